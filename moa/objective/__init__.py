"""What a training step adds: traces, losses, and how they become one."""

from .objective import Objective
from .trace import Record, Trace

__all__ = ["Objective", "Record", "Trace"]
