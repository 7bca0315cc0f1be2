"""Everything that is measured on one GPU, in one call with a budget: see README.md beside this file."""
