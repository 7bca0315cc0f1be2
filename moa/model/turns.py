"""Who may run: forwards of many threads beside each other, or one thread alone while it changes what they all read."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from ..errors import ContextError

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """Forwards of one model run side by side; what changes its weights or modes waits for them, and they for it.

    A thread may enter again what it has entered.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # forwards that each thread is inside of
        self._waiting: set[int] = set()  # threads that wait to run alone, inside of a forward
        self._alone: int | None = None
        self._depth = 0

    def begin(self) -> None:
        """Begin a forward, once no other thread runs alone."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, me))
            self._inside[me] = self._inside.get(me, 0) + 1

    def end(self) -> None:
        """End a forward of this thread."""
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
            self._changed.notify_all()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Run the block as a forward runs: beside others, and while no other thread runs alone."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block while no forward of another thread runs.

        Raises:
            ContextError: inside of a forward, while another thread waits inside of one: each would wait for the other.
        """
        me = threading.get_ident()
        with self._changed:
            inside = me in self._inside
            if inside and self._waiting:
                raise ContextError(
                    "two threads want to change the weights, the modes or the random state of one model, each from "
                    "inside of a forward that the other has to wait for: enter disable_adapter, folded, reference and "
                    "their like before the forward, not inside of it."
                )
            if inside:
                self._waiting.add(me)
            try:
                self._changed.wait_for(lambda: self._alone in (None, me) and not self._inside.keys() - {me})
            finally:
                self._waiting.discard(me)
            self._alone, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._alone = None
                self._changed.notify_all()

    def mine(self) -> bool:
        """Tell whether this thread runs alone."""
        return self._alone == threading.get_ident()


def alone(method: Method) -> Method:
    """Return a model's method so that it waits for the forwards of other threads: it changes values, flags or modes.

    Args:
        method: of a class with a `scope`.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.scope.turns.alone():
            return method(self, *args, **kwargs)

    return cast(Method, run)


def outside(method: Method) -> Method:
    """Return a model's method so that it runs alone, and in no block of its own thread: it changes modules.

    Args:
        method: of a class with a `scope` and a `check_outside`, which raises inside of such a block.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.scope.turns.alone():
            self.check_outside(method.__name__)
            return method(self, *args, **kwargs)

    return cast(Method, run)
