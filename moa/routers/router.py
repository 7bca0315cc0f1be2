"""The router contract, and what several routers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ContextError, ShapeError
from ..kernels import Gate
from ..rows import repeat_to
from ..tables import check_experts
from ..types import Context, Pinned, Routing


class Router(nn.Module):
    """Decides which experts act on each row: `(x (*rows, i), context) -> Routing`.

    Args:
        d_in: i, features of a row.
        n_experts: E.
        k: K, experts per row.

    Attributes:
        causal: the routing of a row never depends on later rows of its sequence, nor on other examples.
        per_row: each row (token) has a routing of its own; False where it is constant, or one for each task or example.
        rowwise: the routing of a row is a function of that row alone: no task, no other row, no first pass. An engine
            that lays the rows of many requests side by side can run only such routers.
        needs_preview: it looks at `Context.preview`, a first pass of the frozen base.
        per_expert: name of a parameter or buffer -> its axis of experts, E or a multiple of it, expert after expert.
        made_anew: names of those that only say how many experts there are.
        fixed_size: why no expert can be added or removed; None where one can.
        stochastic: samples in training; the recipe then trains it with several samples per step.
        samples: M, selections of the whole network per training step (1 unless stochastic).
        loss_weights: name in `LOSSES` of `moa.objective.losses` -> coefficient, added to the training loss.
        losses_over: whose rows these losses are of: "global", the batch of all processes, or each "process" by itself.
        known_tasks: the task ids it can route; None where it does not look at them or takes any.
        learning_rate: of this router's parameters, see `MoAModel.optimizer_groups`; None uses the optimizer's.

    Raises:
        ConfigError: k < 1 or k > n_experts.
    """

    causal: bool = True
    per_row: bool = True
    rowwise: bool = True
    stochastic: bool = False
    needs_preview: bool = False
    per_expert: ClassVar[Mapping[str, int]] = {}
    made_anew: ClassVar[tuple[str, ...]] = ()
    fixed_size: ClassVar[str | None] = None

    def __init__(self, d_in: int, n_experts: int, k: int) -> None:
        super().__init__()
        check_experts(n_experts, k)
        self.d_in, self.n_experts, self.k = d_in, n_experts, k
        self.samples = 1
        self.known_tasks: range | None = None
        self.learning_rate: float | None = None
        self.loss_weights: dict[str, float] = {}
        self.losses_over: Literal["global", "process"] = "global"

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i); its rows broadcast against (*rows,)."""
        raise NotImplementedError

    def gate(self) -> Gate | None:
        """Return how a linear gate decides now, where that is all that `forward` does, else None.

        Such a routing can be formed together with its mixture.
        """
        return None

    def pinned(self, x: Tensor, pinned: Pinned) -> Routing:
        """Return the routing that uses only one expert on a row of x (*rows, i): its weight is 1.

        A layer with one expert keeps it, whatever the number. An example that has no expert gets one all the same; the
        mixture puts its base's output in the place.

        Raises:
            ConfigError: an expert is above n_experts - 1, and there are several.
            ShapeError: the rows of x are not a multiple of the number of examples.
        """
        only = self.n_experts == 1
        if pinned.highest is not None and pinned.highest >= self.n_experts and not only:
            raise ConfigError(
                f"expert {pinned.highest} does not exist: this layer has experts 0 to {self.n_experts - 1}."
            )
        indices = pinned.rows(x).clamp(0, 0 if only else None)  # (1,) or (B, 1, …)
        indices = indices.unsqueeze(-1) if indices.numel() > 1 else indices
        return Routing(torch.ones_like(indices, dtype=torch.float32), indices, self.n_experts)

    def observe(self, routing: Routing, mask: Tensor | None) -> None:
        """Take note of one training forward; mask (*rows,). Routers that balance by a bias count here."""

    def constant(self, task: int | None = None) -> Routing | None:
        """Return the routing of rows () that every input gets, or None when it depends on the input.

        Args:
            task: the inputs are all of this task; None for any.
        """
        return None

    def every_expert(self, near: Tensor) -> Routing:
        """Return the routing of rows () where every expert has the weight 1, as exact as a tensor (any shape)."""
        weights = torch.ones(self.n_experts, device=near.device, dtype=torch.promote_types(near.dtype, torch.float32))
        return Routing(weights, None, self.n_experts)

    def experts_changed(self, down: Tensor, up: Tensor) -> None:
        """Take note of low-rank experts read in or trained, down (E, r, i), up (E, r, o), for routing by them."""

    def learned(self) -> Iterator[nn.Parameter]:
        """Yield the parameters by which it decides, of any shape, those of a module that all layers share included."""
        for part in (self, *self.lent()):
            yield from part.parameters()

    def lent(self) -> list[nn.Module]:
        """Return the modules (*rows, d) -> (*rows, E) that it calls and that all layers share: the model owns them."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def take_counts(self) -> Tensor | None:
        """Return what was counted since the last call, (E,), and count anew; None of a router that counts nothing."""
        return None

    def give_counts(self, counts: Tensor) -> None:
        """Take what all processes have counted, (E,), for the next step."""

    def step(self) -> None:
        """Update what is not learned by gradient; called once after each optimizer step."""

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"d_in={self.d_in}, n_experts={self.n_experts}, k={self.k}"


def pool(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return the mean of x (B, S, i) over the positions that a mask allows, (B, 1, i).

    Args:
        x: (B, S, i).
        masks: (B, S) bool candidates; the first of x's length is used, and none at all means every position.

    Raises:
        ShapeError: x has no sequence axis, or no mask is of its length (as in chunked prefill).
    """
    if x.ndim != 3:
        raise ShapeError(
            f"sequence routing needs x of shape (B, S, i), got {tuple(x.shape)}: use granularity='token' here, or "
            "leave this layer out with exclude=[…]."
        )
    if not masks:
        return x.mean(1, keepdim=True)
    fitting = [mask for mask in masks if mask.shape[1] == x.shape[1]]
    if not fitting:
        raise ShapeError(
            f"no routing mask fits x {tuple(x.shape)}, they are {[tuple(m.shape) for m in masks]}: sequence routing "
            "must see the whole prompt at once (no chunked prefill), with an attention mask of the same length."
        )
    weight = repeat_to(fitting[0], x.shape[0], "routing_mask").to(x.dtype).unsqueeze(-1)  # (B, S, 1)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def frozen_while_decoding(router: Router, context: Context, n_rows: int) -> Routing | None:
    """Return the routing that this pooled router kept at prefill, weights (B, 1, K), or None when it has to decide now.

    Raises:
        ContextError: the number of rows changed between prefill and decoding.
    """
    if context.frozen_routings is None:
        return None
    kept = context.frozen_routings.get(id(router))
    if kept is not None and kept.weights.shape[0] != n_rows:
        raise ContextError(
            f"the routing kept at prefill has {kept.weights.shape[0]} rows, this step has {n_rows}: this decoding "
            "strategy changes the batch; use granularity='token'."
        )
    return kept
