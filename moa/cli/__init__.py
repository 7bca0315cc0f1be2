"""The command `moa`."""
