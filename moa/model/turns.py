"""Who may run: forwards of many threads beside each other, or one thread alone while it changes what they all read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Forwards of one model run side by side; what changes its weights or modes waits for them, and they for it.

    A thread may enter again what it has entered.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # forwards that each thread is inside of
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
    def alone(self) -> Iterator[None]:
        """Run the block while no forward of another thread runs."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, me) and not self._inside.keys() - {me})
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
