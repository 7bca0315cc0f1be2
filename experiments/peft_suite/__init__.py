"""PEFT's own common tests, unchanged, with a mixture of moa in the place of a PEFT model."""
