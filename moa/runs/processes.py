"""Several processes of one run: the first one writes and speaks; `say` is how every command prints."""

from __future__ import annotations

import os
import sys

from ..errors import plain_text


def is_first() -> bool:
    """Tell whether this is the first of the run's processes, or the only one."""
    return int(os.environ.get("RANK", "0") or 0) == 0


def say(*lines: str, kept: str = "", error: bool = False) -> None:
    """Print lines, in the first process only; escape codes and line ends inside of one, as names have, are text.

    Args:
        lines: to print, each as one; a table in text is given as its `splitlines`.
        kept: characters that stay as they are, e.g. the line ends of what a model wrote.
        error: to the stream of errors, from whatever process.
    """
    if error or is_first():
        for line in lines:
            print(plain_text(line, kept), file=sys.stderr if error else sys.stdout, flush=True)
