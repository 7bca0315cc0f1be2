"""Sub-commands of `moa` that merge adapters and take mixtures apart; their libraries load when they run."""

from .merge import add_merge
from .ways_out import add_distill, add_export, add_fold

__all__ = ["add_distill", "add_export", "add_fold", "add_merge"]
