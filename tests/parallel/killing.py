"""Processes that run moa's commands as under a launcher, one group after the other, of which one may be killed.

`python -m tests.parallel.killing FOLDER ...`, each with a commands.json of its own, see `test_killed.py`.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from . import commands, fork


def main(rank: int, world: int, folder: str, port: str) -> None:
    """Run the commands of a folder as process `rank` of `world`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    try:
        commands.run(Path(folder))
    except SystemExit as end:
        if end.code:
            raise


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def run_all(folders: list[Path]) -> None:
    """Run each folder's commands in two processes, and keep in it how many failed, and the run `killed` beside it."""
    for folder in folders:
        failed = fork.main("tests.parallel.killing", 2, [str(folder), free_port()])
        (folder / "failed").write_text(str(failed))
        shutil.copytree(folder.parent / "killed", folder / "killed")


if __name__ == "__main__":
    run_all([Path(one) for one in sys.argv[1:]])
