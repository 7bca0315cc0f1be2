"""N processes of one job, from one that has imported what they need: `python -m tests.parallel.fork JOB N ARGS`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback


def child(job: str, rank: int, n: int, arguments: list[str]) -> None:
    """Run a job's `main` as one of n processes, and end the process."""
    code = 1
    try:
        importlib.import_module(job).main(rank, n, *arguments)
        code = 0
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 (the process ends here: its error is said, and its exit code tells)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(job: str, n: int, arguments: list[str]) -> int:
    """Run a job in n processes and return how many failed; where one fails, the others are ended."""
    importlib.import_module(job)
    ranks: dict[int, int] = {}
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            child(job, rank, n, arguments)
        ranks[pid] = rank
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.pop(pid)
        if status and not failed:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        failed += bool(status)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
