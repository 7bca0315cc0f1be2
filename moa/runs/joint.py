"""Several processes that are one run: the first one decides, and what fails in one ends all, with one error.

They meet by the store that their launcher names in the environment, which is there before any backend is chosen.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..errors import MoaError, SaidElsewhere
from .processes import is_first

T = TypeVar("T")
PAUSE = 0.02  # seconds between two looks at the store; a wait inside it would not hear Ctrl-C
PATIENCE = 1800.0  # seconds, torch's own for a collective
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun, accelerate launch and deepspeed

_runs = itertools.count()
_now: _Run | None = None


class _Run:
    """What the processes of a run tell each other.

    Args:
        number: of the run in each process; each has keys of its own, so that one that failed stops no later one.
    """

    def __init__(self, number: int) -> None:
        import torch

        dist: Any = torch.distributed  # whose stores it exports without saying so
        store, _, self.world = next(iter(dist.rendezvous("env://")))
        self.store, self._ended = dist.PrefixStore(f"moa/{number}", store), dist.DistNetworkError
        self.meetings, self.decisions = itertools.count(), itertools.count()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask the store, which is in the first process where no launcher holds one.

        Raises:
            SaidElsewhere: that process has ended.
        """
        try:
            yield
        except self._ended as error:
            raise SaidElsewhere("the first process of this run has ended.") from error

    def add(self, key: str) -> int:
        """Return how many processes have come to a place with this one.

        Raises:
            SaidElsewhere: see `asking`.
        """
        with self.asking():
            return int(self.store.add(key, 1))

    def leave(self) -> None:
        """End the run; the first process goes last, since the others may still ask the store.

        Raises:
            SaidElsewhere: another process has failed.
        """
        if is_first():
            self.wait(lambda: self.store.add("left", 0) == self.world - 1)
            return
        with suppress(SaidElsewhere):  # it may go as soon as this is counted
            self.add("left")

    def wait(self, done: Callable[[], bool]) -> None:
        """Return when something is done.

        Raises:
            SaidElsewhere: another process has failed, or see `asking`.
            MoaError: it is not done within half an hour.
        """
        end = time.monotonic() + PATIENCE
        with self.asking():
            while not done():
                if self.store.check(["failed"]):
                    raise SaidElsewhere("another process of this run has failed, and says why.")
                if time.monotonic() > end:
                    raise MoaError(f"the other processes of this run did not come within {PATIENCE / 60:.0f} minutes.")
                time.sleep(PAUSE)


@contextmanager
def joint() -> Iterator[None]:
    """Run in all processes what is one run: the first that fails says why, and the others end in silence.

    Raises:
        SaidElsewhere: what failed here has failed in another process before, or because of it.
    """
    global _now
    if _now is not None or not several():
        yield
        return
    run = _now = _Run(next(_runs))
    try:
        yield
        run.leave()
    except SaidElsewhere:
        raise
    except BaseException as error:
        if run.add("failed") > 1:
            raise SaidElsewhere("another process of this run has failed, and says why.") from error
        raise
    finally:
        _now = None


def n_processes() -> int:
    """Return how many processes this one is one of."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in LAUNCHED) else 1


def several() -> bool:
    """Tell whether this is one of several processes."""
    return n_processes() > 1


def meet() -> None:
    """Wait until every process of the run is here.

    Raises:
        SaidElsewhere: one has failed.
    """
    if _now is not None:
        run, key = _now, f"meeting {next(_now.meetings)}"
        run.add(key)
        run.wait(lambda: run.store.add(key, 0) >= run.world)


def decided_by_first(work: Callable[[], T]) -> T:
    """Return what the first process's work returns, in every process; the others do none of it.

    Raises:
        SaidElsewhere: it failed.
    """
    if _now is None:
        return work()
    run, key = _now, f"decision {next(_now.decisions)}"
    if is_first():
        made = work()
        run.store.set(key, pickle.dumps(made))
        return made
    run.wait(lambda: bool(run.store.check([key])))
    found: Any = pickle.loads(run.store.get(key))
    return found
