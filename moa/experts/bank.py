"""The bank contract: a bank is, by definition, the mixture of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, FoldError
from ..types import Routing


class ExpertBank(nn.Module):
    """E experts of one family on one layer: `(x (*rows, i), routing) -> (*rows, o)`.

    A family writes its parameters, `reset_parameters`, `expert_forward`; a faster `forward` and `delta` are optional.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        rank: r of each expert; families without a rank do not look at it.
        scaling: s on every expert's output.
        dropout: probability on x in training.
        engine: kernel engine by name; None lets the dispatcher choose.

    Attributes:
        mixes: "outputs" (Σ w_e E_e(x)) or "parameters" (the expert made of Σ w_e θ_e).
        zero_at_init: a fresh bank returns exactly zero.
        equal_at_init: fresh experts are equal, so that only weights which differ between them tell them apart.

    Raises:
        ConfigError: rank < 1 or dropout outside [0, 1).
    """

    mixes: ClassVar[Literal["outputs", "parameters"]] = "outputs"
    zero_at_init: ClassVar[bool] = True
    equal_at_init: ClassVar[bool] = False

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_experts: int,
        *,
        rank: int = 8,
        scaling: float = 1.0,
        dropout: float = 0.0,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank must be at least 1, got {rank}.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {dropout}.")
        self.d_in, self.d_out, self.n_experts = d_in, d_out, n_experts
        self.rank, self.scaling, self.dropout, self.engine = rank, scaling, dropout, engine

    def reset_parameters(self) -> None:
        """Draw the parameters anew; each family's table gives the shapes, e.g. (E, r, i)."""
        raise NotImplementedError

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert alone on x (*rows, i), (*rows, o)."""
        raise NotImplementedError

    def delta(self, expert: int) -> Tensor:
        """Return the weight change (o, i) that one expert equals.

        Raises:
            FoldError: the family is not linear in x.
        """
        raise FoldError(f"{type(self).__name__} experts are not a weight change: they cannot be folded or exported.")

    def shift(self, expert: int) -> Tensor | None:
        """Return the constant (o,) that one expert adds whatever x is, or None where it adds none."""
        return None

    def mixture_delta(self, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Return the weight change (o, i) and the constant (o,) or None that a routing of rows () equals.

        Raises:
            FoldError: the family is not a weight change.
        """
        weights = routing.dense()
        delta = torch.stack([self.delta(e) * weights[e] for e in range(self.n_experts)]).sum(0)
        shifts = [(weights[e], self.shift(e)) for e in range(self.n_experts)]
        parts = [weight * shift for weight, shift in shifts if shift is not None]
        return delta, torch.stack(parts).sum(0) if parts else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o): the definition, one expert at a time.

        An expert that a row did not choose cannot reach it, not even with NaN.
        """
        weights, chosen = routing.dense(), routing.selected()
        total = x.new_zeros(*x.shape[:-1], self.d_out)
        for expert in range(self.n_experts):
            out = self.expert_forward(x, expert)
            weighted = out * weights[..., expert, None].to(out.dtype)
            total = total + torch.where(chosen[..., expert, None], weighted, 0)
        return total

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return base and mixture together, x W^T + b + Σ_e w_e E_e(x), (*rows, o).

        Args:
            x: (*rows, i).
            routing: whose rows broadcast against x's.
            weight: (o, i) frozen.
            bias: (o,) or None.
        """
        y = F.linear(x, weight, bias)
        return y + self(x, routing).to(y.dtype)

    def shared_hidden(self, banks: Sequence[ExpertBank], x: Tensor, indices: Tensor) -> list[Tensor]:
        """Return what `open_slots` of each bank would form first, (*rows, K, r), in one product for all of them.

        Empty where the families have no such product, or not the same.

        Args:
            banks: that see the same x and routing.
            x: (*rows, i).
            indices: (*rows, K) the experts.
        """
        return []

    def open_slots(self, x: Tensor, indices: Tensor, onto: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return onto + E_{e_k}(x) for each slot k, (*rows, K, o): one chosen expert in each, with weight 1.

        Args:
            x: (*rows, i).
            indices: (*rows, K) the experts.
            onto: (*rows, o) what every slot adds to.
            hidden: (*rows, K, r) of `shared_hidden`, where it is known already.
        """
        one = x.new_ones(*x.shape[:-1], 1)
        # slot by slot, so that all of them share x, which is kept for the backward pass
        slots = [self(x, Routing(one, chosen.unsqueeze(-1), self.n_experts)) for chosen in indices.unbind(-1)]
        return onto.unsqueeze(-2) + torch.stack(slots, -2).to(onto.dtype)

    def close_slots(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return Σ_k w_k E_{e_k}(x_k), (*rows, o): each slot has an input of its own.

        Args:
            x: (*rows, K, i).
            weights: (*rows, K).
            indices: (*rows, K) the experts.
        """
        return self(x, Routing(weights.unsqueeze(-1), indices.unsqueeze(-1), self.n_experts)).sum(-2)

    def add_gated(
        self, x: Tensor, gate: Tensor, k: int, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return `add_linear` together with its routing, of a softmax over the k largest of x gate^T, or None.

        (*rows, o), and of the routing logits (*rows, E), weights and indices (*rows, K).

        None where the family, or this call, has no way to form both at once.

        Args:
            x: (*rows, i).
            gate: (E, i), see `Router.gate`.
            k: experts per row.
            weight: (o, i) frozen.
            bias: (o,) or None.
        """
        return None

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"d_in={self.d_in}, d_out={self.d_out}, n_experts={self.n_experts}"
