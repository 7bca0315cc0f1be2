"""Launches that compete with the package's: each moves there when it is measured to win. See `variants.py`."""
