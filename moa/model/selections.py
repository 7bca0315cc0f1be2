"""The M forwards of a training step: another selection in each, and every other random number the same."""

from __future__ import annotations

import bisect
import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

from ..compat import next_node, working_node
from ..errors import ContextError


class Selections:
    """Numbers the M forwards of a step, and lets each start from the same random state.

    What the estimator compares are the selections. Dropout that differed between the forwards would be in their losses
    too: noise of its own, without any effect on the mean. So dropout, and whatever else a base or a closure draws, is
    the same in all M, and new in the next step. A sampling router draws the noise of all M selections, which keeps the
    streams in step, and takes its own by `current`.

    Gradient checkpointing runs a block again in backward, when other forwards have run since. Which one the block
    belongs to is read off the autograd node at work: nodes are numbered in the order in which they were made.
    """

    def __init__(self) -> None:
        self._threads: dict[int, _Begun] = {}  # each numbers its nodes by itself
        self._here = _Here()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Selections, ()  # a copy has run nothing

    def of(self, samples: int) -> Iterator[contextlib.AbstractContextManager[None]]:
        """Yield one context for each of M forwards; run them in this order, each in its own.

        Args:
            samples: M; with 1 nothing is compared, and the context does nothing.
        """
        if samples == 1:
            yield contextlib.nullcontext()
            return
        state = RandomState()
        for number in range(samples):
            yield self._one(number, samples, state)

    @contextlib.contextmanager
    def _one(self, number: int, samples: int, state: RandomState) -> Iterator[None]:
        if number > 0:
            state.restore()
        self._begin((number, samples))
        try:
            yield
        finally:
            self._begin(None)

    def _begin(self, which: tuple[int, int] | None) -> None:
        begun = self._here.begun
        self._threads[threading.get_ident()] = begun
        begun.now = which
        begun.starts.append(next_node())
        begun.which.append(which)

    def current(self) -> tuple[int, int] | None:
        """Return (m, M) of the forward that runs, or that a recomputed block belongs to; None outside of such.

        Raises:
            ContextError: a recomputed block may belong to selections of several threads.
        """
        here = self._here.begun
        node = None if torch.compiler.is_compiling() else working_node()  # compiled code is not run again
        if node is None:
            return here.now
        begun = here if here.starts else None
        if begun is None and len(self._threads) == 1:  # a GPU's backward runs in a thread of its own
            begun = next(iter(self._threads.values()))
        if begun is None:
            if not self._threads:
                return None
            raise ContextError(
                "a recomputed block may belong to selections of several threads: train one model from one thread, or "
                "without gradient checkpointing."
            )
        place = bisect.bisect_right(begun.starts, node) - 1
        return begun.which[place] if place >= 0 else None

    def forget(self) -> None:
        """Forget the forwards that ran: once an optimizer has changed the weights, none of them is run again."""
        for begun in self._threads.values():
            begun.starts.clear()
            begun.which.clear()
        self._threads = {thread: begun for thread, begun in self._threads.items() if begun.now is not None}


class _Begun:
    """The forwards that one thread has begun."""

    def __init__(self) -> None:
        self.now: tuple[int, int] | None = None
        self.starts: list[int] = []  # number of the first autograd node
        self.which: list[tuple[int, int] | None] = []  # of which forward


class _Here(threading.local):
    """What this thread has begun."""

    def __init__(self) -> None:
        self.begun = _Begun()


class RandomState:
    """The state of what draws random numbers: PyTorch on the CPU and on all GPUs, Python, NumPy."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
