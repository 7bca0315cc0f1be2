"""A static mixture as a weight: folded, swapped in for a while, averaged over data."""
