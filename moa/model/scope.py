"""Which context a mixture sees: that of the forward that runs in its thread, or that a recomputed block belongs to."""

from __future__ import annotations

import bisect
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..compat import next_node, working_node
from ..errors import ContextError
from ..types import Context, Draws
from .outputs import tensors_of
from .turns import Turns


class ModelScope:
    """The contexts of one model: each thread has those of its own forward, one inside the other, and forgets them.

    Gradient checkpointing runs a block again in backward, when its forward has ended and others may have run since.
    Which one it belongs to is read off the autograd node at work, as nodes are numbered in the order in which they
    were made. A forward's contexts live as long as the graph of its outputs, and no longer.

    Args:
        draws: which of a step's M forwards runs; every context holds it.

    Attributes:
        names: of the model's experts, by which a batch chooses them.
        before: called with the context in which a forward is about to begin.
        after: called when one has ended.
    """

    before: Callable[[Context], None] | None = None
    after: Callable[[], None] | None = None

    def __init__(self, draws: Draws | None = None, names: tuple[str, ...] = ()) -> None:
        self.draws, self.names = draws, names
        self.turns = Turns()
        self._threads = _Threads(draws)
        self._graphs: dict[int, list[weakref.ref[_Graph]]] = {}  # of each thread

    def current(self) -> Context:
        """Return the context of what runs in this thread; outside of any forward, what its forwards start from."""
        here: _Thread = self._threads.this
        if here.inside:
            context: Context = here.inside[-1][1]
            return context
        again = None if torch.compiler.is_compiling() else self._recomputed()
        return here.outside if again is None else again

    @property
    def in_closure(self) -> bool:
        """Whether the loss () of what runs in this thread is a closure's."""
        inside: bool = self._threads.this.in_closure
        return inside

    @contextlib.contextmanager
    def closure(self) -> Iterator[None]:
        """Run a closure that computes a loss () of this thread's forwards inside the block."""
        here: _Thread = self._threads.this
        before, here.in_closure = here.in_closure, True
        try:
            yield
        finally:
            here.in_closure = before

    def enter(self, owner: object, context: Context) -> None:
        """Make a context the current one, until the same owner leaves."""
        here: _Thread = self._threads.this
        if not here.inside:
            here.counted = not torch.compiler.is_compiling()
            if here.counted and self.before is not None:
                self.before(context)
            if here.counted:
                self.turns.begin()
            here.graph = None if torch.compiler.is_compiling() or not torch.is_grad_enabled() else _Graph()
        here.inside = (*here.inside, (owner, context))
        if here.graph is not None:
            here.graph.note(context)

    def run_in(self, n_streams: int) -> None:
        """Let what follows in this thread see rows (n · B, …) of n streams, or with n = 1 the batch's own (B, …).

        What is entered inside is in streams, too; they end for all of it, as they do inside the part that has the last
        block. A block that runs again in backward is inside of nothing, and changes nothing.
        """
        here: _Thread = self._threads.this
        if not here.inside:
            return
        first = len(here.inside) - 1 if n_streams > 1 else 0
        changed = ((owner, context.in_streams(n_streams)) for owner, context in here.inside[first:])
        here.inside = (*here.inside[:first], *changed)
        if here.graph is not None:
            here.graph.note(here.inside[-1][1])

    def leave(self, owner: object, outputs: Any = None) -> None:
        """Go back to the context before, if this owner has entered one; the outermost one leaves with its outputs."""
        here: _Thread = self._threads.this
        if not here.inside or here.inside[-1][0] is not owner:
            return
        here.inside = here.inside[:-1]
        if not here.inside and here.counted:
            here.counted = False
            self.turns.end()
            if self.after is not None:
                self.after()
        graph = here.graph
        if graph is None:
            return
        if here.inside:
            graph.note(here.inside[-1][1])
            return
        here.graph = None
        graph.end = next_node()
        if graph.keep(outputs):
            known = self._graphs.setdefault(threading.get_ident(), [])
            known[:] = [ref for ref in known if ref() is not None]
            known.append(weakref.ref(graph))

    def _recomputed(self) -> Context | None:
        """Return the context under which the autograd node at work was made, or None outside of a backward.

        Raises:
            ContextError: forwards of several threads may be meant.
        """
        node = working_node()
        if node is None:
            return None
        mine = threading.get_ident()
        found = [graph for graph in self._known(mine) if graph.holds(node)]
        if not found:  # a GPU's backward runs in a thread of its own
            others = [thread for thread in list(self._graphs) if thread != mine]
            found = [graph for thread in others for graph in self._known(thread) if graph.holds(node)]
            if len(found) > 1:
                raise ContextError(
                    "a recomputed block may belong to forwards of several threads: train one model from one thread, or "
                    "without gradient checkpointing."
                )
        return found[-1].context(node) if found else None

    def _known(self, thread: int) -> Iterator[_Graph]:
        for ref in list(self._graphs.get(thread, ())):
            graph = ref()
            if graph is not None:
                yield graph

    def __getstate__(self) -> dict[str, Any]:
        return {"draws": self.draws, "names": self.names}  # a copy has run nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Threads(threading.local):
    """What this thread has, as an object of its own: compiled code loses what it sets on a `local` at a graph break."""

    def __init__(self, draws: Draws | None) -> None:
        self.this = _Thread(draws)


class _Thread:
    """What one thread has: the context outside of forwards, those it is inside of, the graph that it makes."""

    def __init__(self, draws: Draws | None) -> None:
        self.outside = Context(draws=draws)
        self.inside: tuple[tuple[object, Context], ...] = ()
        self.graph: _Graph | None = None
        self.counted = False  # among those that run
        self.in_closure = False  # the loss of a forward is a closure's


class _Graph:
    """Which context held when each autograd node of one forward was made; held by the nodes of its outputs."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # number of the first node
        self.contexts: list[Context] = []
        self.end = 0

    def note(self, context: Context) -> None:
        """Take note that a context holds from now on; a block that runs again is not recorded again."""
        self.starts.append(next_node())
        kept = context.within(context.masks, context.routing_masks, context.source)
        kept.trace = None
        self.contexts.append(kept)

    def holds(self, node: int) -> bool:
        """Tell whether a node was made in this forward."""
        return self.starts[0] <= node < self.end

    def context(self, node: int) -> Context:
        """Return the context under which a node was made."""
        return self.contexts[bisect.bisect_right(self.starts, node) - 1]

    def keep(self, outputs: Any) -> bool:
        """Let the graph of outputs (tensors of any shape, nested) hold this; return False where there is none."""
        nodes = [tensor.grad_fn for tensor in tensors_of(outputs) if tensor.grad_fn is not None]
        for node in nodes:
            node.metadata.setdefault(_Graph, []).append(self)  # type: ignore[attr-defined]
        return bool(nodes)
