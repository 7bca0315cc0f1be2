"""The M forwards of a training step: another selection in each, and every other random number the same."""

from __future__ import annotations

import bisect
import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from ..compat import next_node, working_node


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
        self._now: tuple[int, int] | None = None
        self._starts: list[int] = []  # number of the first autograd node
        self._which: list[tuple[int, int] | None] = []  # of which forward

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
        self._now = which
        self._starts.append(next_node())
        self._which.append(which)

    def current(self) -> tuple[int, int] | None:
        """Return (m, M) of the forward that runs, or that a recomputed block belongs to; None outside of such."""
        if torch.compiler.is_compiling():  # compiled code is not run again
            return self._now
        node = working_node()
        if node is None:
            return self._now
        place = bisect.bisect_right(self._starts, node) - 1
        return self._which[place] if place >= 0 else None

    def forget(self) -> None:
        """Forget the forwards that ran: once an optimizer has changed the weights, none of them is run again."""
        self._starts.clear()
        self._which.clear()


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
