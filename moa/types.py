"""What routers and banks share: `Routing` and `Context`.

Letters used everywhere: B batch · S sequence · T flattened rows · *rows leading dims · E experts · K active experts
per row · H heads · r rank · i/o in/out features · M routing samples · n streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ContextError
from .rows import ImageRows, check_task_ids, each_tensor, example_rows, in_streams, in_turn, of_one_stream

if TYPE_CHECKING:
    from torch import nn


class Routing:
    """What a router decided, and never changed: the only thing routers and banks share.

    Its rows broadcast against x's rows: token (B, S), sequence or task (B, 1), constant (). Scores and log-probability
    may be functions of the routing, formed when somebody asks, for many layers at once.

    Args:
        weights: (*rows, K) what multiplies the chosen experts' outputs.
        indices: (*rows, K) int64 chosen experts, distinct in each row; None means all of them, K = E.
        n_experts: E.
        logits: (*rows, E) fp32 router outputs before the score function; None where there are none. With slots,
            (*rows, E · p).
        scores: (*rows, E) fp32 after the score function; None where there are none.
        log_prob: (*rows,) log-probability of the sampled choice in nats; None where nothing was sampled.
        usage: (*rows, E) fp32 differentiable share of each expert that a balance loss counts; mostly None.

    Attributes:
        ranks: (*rows, K) or (*rows, 1) int64, how many components of an elastic expert act; None leaves it to it.
    """

    # of its own only what stands here; DeepSpeed looks at the `vars` of whatever a module returns
    __slots__ = ("__dict__", "_log_prob", "_scores", "indices", "logits", "n_experts", "ranks", "usage", "weights")

    def __init__(
        self,
        weights: Tensor,
        indices: Tensor | None,
        n_experts: int,
        logits: Tensor | None = None,
        scores: Tensor | Callable[[Routing], Tensor] | None = None,
        log_prob: Tensor | Callable[[Routing], Tensor] | None = None,
        usage: Tensor | None = None,
    ) -> None:
        self.weights, self.indices, self.n_experts = weights, indices, n_experts
        self.logits, self.usage, self._scores, self._log_prob = logits, usage, scores, log_prob
        self.ranks: Tensor | None = None

    @property
    def scores(self) -> Tensor | None:
        """(*rows, E) fp32 after the score function, or None."""
        return self._scores(self) if callable(self._scores) else self._scores

    @property
    def log_prob(self) -> Tensor | None:
        """(*rows,) log-probability of the sampled choice in nats, or None."""
        return self._log_prob(self) if callable(self._log_prob) else self._log_prob

    @property
    def is_sampled(self) -> bool:
        """Whether the choice (*rows, K) has a log-probability."""
        return self._log_prob is not None

    @property
    def given(self) -> tuple[Any, ...]:
        """The arguments that it was made of, tensors (*rows, …) and others, in order."""
        return self.weights, self.indices, self.n_experts, self.logits, self._scores, self._log_prob, self.usage

    def at(self, ranks: Tensor) -> Routing:
        """Return this routing with ranks (*rows, K) or (*rows, 1) of its elastic experts."""
        found = Routing(*self.given)
        found.ranks = ranks
        return found

    @property
    def k(self) -> int:
        """Active experts per row, K."""
        return self.weights.shape[-1]

    def dense(self) -> Tensor:
        """Return the weights scattered over all experts (*rows, E): 0 where an expert is not chosen."""
        if self.indices is None:
            return self.weights
        full = self.weights.new_zeros(*self.weights.shape[:-1], self.n_experts)
        return full.scatter(-1, self.indices, self.weights)

    def selected(self) -> Tensor:
        """Return which experts are active (*rows, E), bool: the chosen ones, or all with a weight that is not 0."""
        if self.indices is None:
            return self.weights != 0
        full = self.weights.new_zeros(*self.weights.shape[:-1], self.n_experts, dtype=torch.bool)
        return full.scatter(-1, self.indices, True)


class Recorder(Protocol):
    """What a context's trace slot accepts: see `moa.objective.Trace`."""

    def add(self, layer: Any, routing: Routing, mask: Tensor | None, router: nn.Module, n_streams: int) -> None:
        """Keep one routing of a mixture; `mask` (*rows,) is True on rows that count, which are those of n streams."""


class Draws(Protocol):
    """What a context's draws slot accepts: see `moa.model.selections.Selections`."""

    def current(self) -> tuple[int, int] | None:
        """Return (m, M) where the forward that runs is one of M which are compared, else None."""


@dataclass
class Decision:
    """What one router has decided for several layers in the forward that runs, and what they have computed together.

    Args:
        routing: weights and indices (*rows, K).
        source: x (*rows, i), the input of what follows; None where there is nothing left of it.
        hidden: by the number of a layer, its hidden values (*rows, K, r) of source, until it takes them.
        beside: (*rows, o) what experts beside a sub-layer add to its output, until its last layer takes it.
    """

    routing: Routing
    source: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    beside: Tensor | None = None


@dataclass(frozen=True)
class Pinned:
    """Which expert acts with weight 1, in place of the routers: the same for all examples, or one for each.

    Args:
        experts: (1,) or (B,) int64; -1 is the base as it is.
        highest: the largest of them; None where it is not known, as in compiled code.
        has_base: one of them may be -1.
        images: of which example rows of images are; None where rows are the examples in turn.
    """

    experts: Tensor
    highest: int | None
    has_base: bool
    images: ImageRows | None = None

    @staticmethod
    def of(experts: Sequence[int]) -> Pinned:
        """Return the record of experts by number: one of them for all examples, or B of them."""
        return Pinned(torch.tensor(experts), max(experts), min(experts) < 0)

    def rows(self, x: Tensor) -> Tensor:
        """Return the experts shaped to broadcast against the rows of x (*rows, i): (1,) or (B, 1, …), -1 for the base.

        Raises:
            ShapeError: the rows of x are not a multiple of the number of examples.
        """
        return example_rows(self.experts, x, "adapter_ids", self.images)

    def keep_base(self, y: Tensor, y0: Tensor) -> Tensor:
        """Return y (*rows, …) with the rows of y0, which broadcasts against it, in the examples that have no expert."""
        if not self.has_base:
            return y
        rows = self.rows(y0)  # (1,) or (B, 1, …)
        return torch.where(rows.reshape(-1, *([1] * (y.ndim - 1))) < 0, y0, y)


class Scope(Protocol):
    """Where mixtures find the context of the forward that runs: a `Context` is its own."""

    def current(self) -> Context:
        """Return the context of what runs in this thread."""

    def run_in(self, n_streams: int) -> None:
        """Let what follows in this thread see rows (n · B, …) of n streams, or with n = 1 the batch's own (B, …)."""


@dataclass
class Context:
    """What a layer cannot see in x: the batch, and the part of the model that the layer is in.

    A model makes one at every entry and forgets it when that ends, see `moa.model.entries`; each thread has its own.

    Args:
        task_ids: (B,) int64 task or domain of each example.
        masks: (B, S) bool masks of the part of the model that the layer is in, True on real tokens; the first whose
            size fits a layer's rows is used, and none at all counts every row.
        routing_masks: (B, S) bool masks of what a pooled (sequence-level) router may look at: the prompt.
        source: (B, S', d) what comes from another part (an encoder's output), with its own masks (B, S').
        trace: where mixtures record their routings; None records nothing.
        draws: which of a step's M forwards runs, for routers that sample; None where each forward is by itself.
        frozen_routings: routings of pooled routers kept while decoding with a cache, by router; None when not decoding.
        preview: (B, S, d) last hidden state of the frozen base on the same tokens, where a router looks at it, and its
            part that the head sees, where that is told which logits to keep.
        decisions: what a router has decided for layers that follow it, by what they belong to; the latest of them
            takes it out, and a new forward of the model forgets what one that failed has left.
        batch: what the outermost entry of the forward was told, for the parts inside; None outside of a forward.
        handed_on: masks hold for a part inside that gets none of its own.
        rows: (B, S) of the tokens of the part that the layer is in, where they are known: some layers see them
            flattened.
        n_streams: n; with more than one, each tensor above has the rows of n streams, one after the other, (n · B, …).
        enabled: False makes every mixture its base layer.
        pinned: the only experts that mixtures use, in place of their routers; None lets routers decide.
        ranks: (1,) or (B,) of elastic experts; None leaves it to routers and experts.
        images: of which example rows of images are, in a part that sees some; None where rows are the examples in turn.
    """

    task_ids: Tensor | None = None
    masks: Sequence[Tensor] = ()
    routing_masks: Sequence[Tensor] = ()
    source: tuple[Tensor, Sequence[Tensor]] | None = field(default=None, repr=False)
    trace: Recorder | None = None
    draws: Draws | None = field(default=None, repr=False)
    frozen_routings: dict[int, Routing] | None = field(default=None, repr=False)
    preview: Sequence[Tensor] = field(default=(), repr=False)
    decisions: dict[Any, Decision] = field(default_factory=dict, repr=False)
    batch: object | None = field(default=None, repr=False)
    handed_on: bool = True
    rows: tuple[int, int] | None = None
    n_streams: int = 1
    enabled: bool = True
    pinned: Pinned | None = None
    ranks: Tensor | None = None
    images: ImageRows | None = None
    _checked: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _known: range | None = field(default=None, init=False, repr=False, compare=False)

    def current(self) -> Context:
        """Return this context: a mixture by itself has one that stays."""
        return self

    def within(
        self, masks: Sequence[Tensor], routing_masks: Sequence[Tensor], source: tuple[Tensor, Sequence[Tensor]] | None
    ) -> Context:
        """Return the context of a part of the model in the same forward, with masks (B, S) of its own."""
        own: dict[str, Any] = {"masks": masks, "routing_masks": routing_masks, "source": source, "decisions": {}}
        return replace(self, **own)

    def run_in(self, n_streams: int) -> None:
        """Take the rows (n · B, …) of n streams, or with n = 1 the batch's own (B, …), from now on."""
        vars(self).update(vars(self.in_streams(n_streams)))

    def in_streams(self, n: int) -> Context:
        """Return this context with the rows (n · B, …) of n streams, or with n = 1 with the batch's own (B, …)."""
        before = self.n_streams
        if before == n:
            return self

        def change(values: Tensor) -> Tensor:
            return in_streams(of_one_stream(values, before), n)

        context = self.within(*each_tensor((self.masks, self.routing_masks, self.source), change))
        for name in ("task_ids", "preview", "batch", "pinned", "ranks"):
            setattr(context, name, each_tensor(getattr(self, name), change))
        context.rows = None if self.rows is None else (self.rows[0] // before * n, self.rows[1])
        context.decisions, context.n_streams = self.decisions, n
        return context

    def decided(self, block: Any) -> Decision:
        """Return what the router of a layer has decided, weights and indices (*rows, K).

        Raises:
            ContextError: that layer has not run in this forward.
        """
        decision = self.decisions.get(block)
        if decision is None:
            raise ContextError(f"{block} decides for its block and has not run before it, so there is no routing.")
        return decision

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "decisions": {}}  # they belong to a forward, with its graph: a copy has run none

    def in_examples(self, x: Tensor) -> Tensor:
        """Return flattened rows (B · S, i) as (B, S, i), where that is what they are."""
        known = [self.rows, *(tuple(mask.shape) for mask in self.masks)]
        if x.ndim == 2:
            for rows in known:
                if rows is not None and len(rows) == 2 and rows[0] * rows[1] == x.shape[0]:
                    return x.view(*rows, x.shape[1])
        return x

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Return the mask (*rows,) that fits x (*rows, i), or None when no mask has that many rows."""
        rows, masks = x.shape[:-1], self._of_source(x)
        masks = self.masks if masks is None else masks
        if not masks:
            return None
        for mask in masks:
            if mask.shape == rows:
                return mask
        size = rows.numel()
        for mask in masks:
            if mask.numel() == size:
                return mask.reshape(rows)
        return None

    def routing_masks_for(self, x: Tensor) -> Sequence[Tensor]:
        """Return the masks (B, S) of what a pooled router may look at in x (B, S, i)."""
        masks = self._of_source(x)
        masks = self.routing_masks if masks is None else masks
        if self.frozen_routings is None:
            return masks
        # decoding: what comes after the prompt, such as tokens that are only proposed, is not a part of it
        return [F.pad(mask, (0, max(0, x.shape[1] - mask.shape[1]))) for mask in masks] if x.ndim > 2 else masks

    def _of_source(self, x: Tensor) -> Sequence[Tensor] | None:
        """Return the masks of the source where x is it, as it is for the keys and values of cross-attention."""
        if self.source is None:
            return None
        source, masks = self.source
        if x is source:
            return masks
        if torch.compiler.is_compiling() or x.shape != source.shape:
            return None
        return masks if x.data_ptr() == source.data_ptr() else None  # detached, as reentrant checkpointing gives it

    def task_rows(self, x: Tensor, known: range | None = None) -> Tensor:
        """Return the task ids shaped to broadcast against the rows of x (*rows, i): (B, 1, …), or (T,) if flattened.

        Args:
            x: (*rows, i).
            known: the ids that are in range; None accepts any.

        Raises:
            ContextError: no task ids are set, or one is not known.
            ShapeError: the rows of x are not a multiple of the number of task ids.
        """
        if self.task_ids is None:
            raise ContextError(
                "this router needs task ids and none are set: pass task_ids=(B,) to the model's forward or "
                "generate, or keep a task_ids column in the data set."
            )
        if known is not None and not torch.compiler.is_compiling():
            if self._checked is not self.task_ids or self._known != known:  # once per batch, not once per layer
                check_task_ids(self.task_ids, known)
            self._checked, self._known = self.task_ids, known
        rows = x.shape[:-1]
        if not rows:
            return self.task_ids
        spread = in_turn if self.images is None else self.images.spread
        return spread(self.task_ids, tuple(rows), "task_ids")
