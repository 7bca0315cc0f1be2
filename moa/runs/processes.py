"""Several processes of one run: the first one writes and speaks."""

from __future__ import annotations

import os

from ..errors import plain_text


def is_first() -> bool:
    """Tell whether this is the first of the run's processes, or the only one."""
    return int(os.environ.get("RANK", "0") or 0) == 0


def say(text: str) -> None:
    """Print lines, in the first process only; escape codes in names are text."""
    if is_first():
        print(plain_text(text, kept="\n"), flush=True)


def meet() -> None:
    """Wait until every process of the run is here."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
