"""A bank whose experts see slots, each a mixture of an example's rows. Puigcerver et al. 2023, arXiv 2308.00951."""

from __future__ import annotations

import torch
from torch import Tensor

from ..delta import Delta
from ..errors import ConfigError, FoldError, ShapeError
from ..types import Routing
from .bank import ExpertBank


class SlotBank(ExpertBank):
    """Any family behind soft dispatch: y_t = Σ_s C_{t,s} E_{e(s)}(Σ_u D_{u,s} x_u), s over the E · p slots.

    D is the softmax over rows, C over slots, of the routing's logits (*rows, E · p). The inner family mixes a
    routing without logits row by row.

    Args:
        inner: the experts.

    Raises:
        ConfigError: they look at more than a row.
    """

    def __init__(self, inner: ExpertBank) -> None:
        super().__init__(inner.d_in, inner.d_out, inner.n_experts)
        if not inner.rowwise:
            raise ConfigError(
                f"{type(inner).__name__} experts look at the rows around each row, and a slot is a mixture of rows "
                "that has none around it: choose another recipe."
            )
        self.inner = inner

    @property
    def per_expert(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the inner bank's tensors (E, …)."""
        return tuple(f"inner.{name}" for name in self.inner.per_expert)

    @property
    def whole(self) -> bool:  # type: ignore[override]
        """Whether the inner bank's experts (o, i) are."""
        return self.inner.whole

    def reset_parameters(self) -> None:
        """Draw the experts anew, e.g. down (E, r, i)."""
        self.inner.reset_parameters()

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's output on x (*rows, i), (*rows, o)."""
        return self.inner.expert_forward(x, expert)

    def delta(self, expert: int) -> Delta:
        """Return the weight change (o, i) that one expert equals."""
        return self.inner.delta(expert)

    def constants(self) -> Tensor | None:
        """Return the inner bank's, (E, o)."""
        return self.inner.constants()

    def mixed_delta(self, weights: Tensor) -> Delta:
        """Raise: rows are mixed with each other, which no weight (o, i) does.

        Raises:
            FoldError: always.
        """
        raise FoldError("soft slots mix the rows of an example, which no weight does: they cannot be folded.")

    def why_not_stacked(self) -> str:
        """Return why: a slot is a sum over rows (B, S, i), and each row has another matrix."""
        return "a soft slot mixes the rows of an example, which go to different experts of the base"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the combined outputs of the slots, (B, S, o), for x (B, S, i); (B, i) is one row per example."""
        if routing.logits is None:
            return self.inner(x, routing)
        logits = routing.logits
        if x.ndim == 2:
            return self.forward(
                x.unsqueeze(1), Routing(routing.weights, None, self.n_experts, logits[:, None])
            ).squeeze(1)
        if logits.shape[:-1] != x.shape[:-1]:
            raise ShapeError(f"slots were routed for rows {tuple(logits.shape[:-1])}, x has {tuple(x.shape[:-1])}.")
        slots = logits.softmax(1).to(x.dtype).mT @ x  # (B, E p, i)
        per_expert = slots.shape[1] // self.n_experts
        owner = torch.arange(self.n_experts, device=x.device).repeat_interleave(per_expert)  # (E p,)
        one = torch.ones(slots.shape[1], 1, dtype=routing.weights.dtype, device=x.device)
        out = self.inner(slots, Routing(one, owner[:, None], self.n_experts))  # (B, E p, o)
        return logits.softmax(-1).to(out.dtype) @ out
