"""`tests.parallel.commands` where DeepSpeed is: `torchrun -m tests.parallel.zero_commands FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from .commands import run
from .zero import compile_nothing

if __name__ == "__main__":
    compile_nothing()
    run(Path(sys.argv[1]))
