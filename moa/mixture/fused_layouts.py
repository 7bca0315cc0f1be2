"""How a class of fused experts computes: which tensors it holds, which rows each expert sees, what lies between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import grouped_linear, grouped_sum
from ..layers import is_dense

CONTRACT = ("has_gate", "has_bias", "is_transposed", "down_proj")


@dataclass(frozen=True)
class Rows:
    """The rows of one call: what one expert of the base makes of one token.

    Args:
        tokens: (T, d) what the module was called on, a row for each token.
        x: (R, d) the rows.
        expert: (R,) int64 the base's expert of each row.
        token: (R,) int64 the token of each row.
        weights: (R,) what the base's router multiplies the row's output by; None for 1.
    """

    tokens: Tensor
    x: Tensor
    expert: Tensor
    token: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Layout:
    """A class of fused experts under the contract of transformers: gate and up in one tensor or only up, then down.

    Args:
        up: name of the tensor of first matrices.
        down: name of the tensor of last matrices.
        transposed: the matrices are stored (i, o), not (o, i).
        biased: each tensor has biases (N, o) beside it, under its name and "_bias".
    """

    up: str
    down: str
    transposed: bool
    biased: bool

    def size(self, module: nn.Module, name: str) -> tuple[int, int, int]:
        """Return (N, i, o) of a tensor of the module, (N, o, i) or (N, i, o)."""
        n, first, second = getattr(module, name).shape
        return (n, first, second) if self.transposed else (n, second, first)

    def stored(self, matrices: Tensor) -> Tensor:
        """Return matrices (N, o, i) as the module stores them."""
        return matrices.mT if self.transposed else matrices

    def rows(self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Rows:
        """Return the rows of a call on tokens (T, d), experts and weights (T, k); an expert beyond N adds nothing."""
        n, k = self.size(module, self.up)[0], top_k_index.shape[-1]
        token = torch.arange(hidden_states.shape[0], device=hidden_states.device).repeat_interleave(k)
        expert = top_k_index.reshape(-1)
        weights = top_k_weights.reshape(-1).masked_fill(expert >= n, 0)
        return Rows(hidden_states, hidden_states[token], expert.clamp(max=n - 1), token, weights)

    def product(self, module: Any, name: str, x: Tensor, expert: Tensor) -> Tensor:
        """Return each row's product with its expert's matrix, and its bias, (R, o), of x (R, i) and expert (R,)."""
        weight, chosen = getattr(module, name), expert[:, None]
        y = grouped_sum(x[:, None], weight, chosen) if self.transposed else grouped_linear(x, weight, chosen)[:, 0]
        return y + getattr(module, f"{name}_bias")[expert] if self.biased else y

    def between(self, module: Any, opened: Tensor) -> Tensor:
        """Return what the last matrices multiply, (R, f), of what the first ones give."""
        out: Tensor = module._apply_gate(opened) if module.has_gate else module.act_fn(opened)
        return out

    def together(self, module: Any, closed: Tensor, rows: Rows) -> Tensor:
        """Return the module's output (T, d) of its experts' outputs (R, d)."""
        if getattr(module, "has_post_expert_norm", False):
            closed = module.post_expert_norm(closed)
        assert rows.weights is not None
        weighted = closed * rows.weights[:, None]
        return weighted.view(rows.tokens.shape[0], -1, closed.shape[-1]).sum(1).to(rows.tokens.dtype)


class EveryRow(Layout):
    """Llama 4: every expert sees every token, times its own score, expert after expert, (N · T, d) -> (N · T, d).

    A token's row for the adapters' router is the sum over the experts of what they see: the token times its scores.
    """

    def rows(self, module: Any, hidden_states: Tensor) -> Rows:  # type: ignore[override]
        """Return the rows of a call on (N · T, d)."""
        n = self.size(module, self.up)[0]
        apart = hidden_states.view(n, -1, hidden_states.shape[-1])  # (N, T, d)
        number = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        n_tokens = apart.shape[1]
        return Rows(apart.sum(0), hidden_states, number // n_tokens, number % n_tokens, None)

    def between(self, module: Any, opened: Tensor) -> Tensor:
        """Return up · act(gate), (R, f)."""
        gate, up = opened.chunk(2, -1)
        out: Tensor = up * module.act_fn(gate)
        return out

    def together(self, module: Any, closed: Tensor, rows: Rows) -> Tensor:
        """Return (N · T, d) as it is: the model sums over experts."""
        return closed


EVERY_ROW: dict[str, Layout] = {
    "Llama4TextExperts": EveryRow("gate_up_proj", "down_proj", transposed=True, biased=False)
}


def layout_of(module: Any) -> Layout | None:
    """Return how a module of fused experts (N, o, i) computes, or None where it is none or its way is not known.

    Known are the classes that transformers runs by its own kernels (`use_experts_implementation`), which say of
    themselves what the kernels have to know, and those of a short table.
    """
    found = EVERY_ROW.get(type(module).__name__)
    if found is None:
        if not all(hasattr(module, name) for name in CONTRACT):
            return None
        up = "gate_up_proj" if module.has_gate else "up_proj"
        found = Layout(up, "down_proj", bool(module.is_transposed), bool(module.has_bias))
    tensors: list[Any] = [getattr(module, name, None) for name in (found.up, found.down)]
    dense = all(is_dense(tensor) and tensor.ndim == 3 for tensor in tensors)
    return found if dense else None
