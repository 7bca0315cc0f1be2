"""A selection bias that evens out the load without a loss. Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Routing
from .router import Router


class BalancedRouter(Router):
    """A router that may hold a bias for the choice of experts, moved once per optimizer step towards an even load.

    | buffer | shape | start |
    |---|---|---|
    | selection_bias | (E,) fp32 | zero; absent with bias_rate = 0 |
    | counts | (E,) fp32, not saved | zero |

    Args:
        d_in: i.
        n_experts: E.
        k: K.
        bias_rate: u, the size of a move; 0 for no bias.

    Raises:
        ConfigError: a negative rate, bad k.
    """

    selection_bias: Tensor | None
    counts: Tensor | None
    _everywhere: Tensor | None = None  # counts of all processes, until the step

    def __init__(self, d_in: int, n_experts: int, k: int, bias_rate: float = 0.0) -> None:
        super().__init__(d_in, n_experts, k)
        check_bias_rate(bias_rate)
        self.bias_rate = bias_rate
        self.register_buffer("selection_bias", torch.zeros(n_experts) if bias_rate else None)
        self.register_buffer("counts", torch.zeros(n_experts) if bias_rate else None, persistent=False)

    def observe(self, routing: Routing, mask: Tensor | None) -> None:
        """Add the chosen experts of the counted rows, mask (*rows,), to the counts of this optimizer step."""
        if not self.bias_rate:
            return
        counts, indices = self.counts, routing.indices
        assert counts is not None
        if indices is None:
            chosen = routing.selected()  # (*rows, E)
            if mask is not None and mask.shape == chosen.shape[:-1]:
                chosen = chosen & mask.unsqueeze(-1)  # padding counts for no expert
            counts += chosen.flatten(0, -2).sum(0).to(counts.dtype)
            return
        if mask is None or mask.shape != indices.shape[:-1]:
            one = torch.ones_like(indices, dtype=counts.dtype)
        else:
            one = mask.unsqueeze(-1).to(counts.dtype).expand(indices.shape)
        counts.scatter_add_(0, indices.reshape(-1), one.reshape(-1))

    @torch.no_grad()
    def take_counts(self) -> Tensor | None:
        """Return the rows that each expert got since the last call, (E,), and count anew; None without a bias."""
        if self.counts is None:
            return None
        new = self.counts.clone()
        self.counts.zero_()
        return new

    def give_counts(self, counts: Tensor) -> None:
        """Take the rows that each expert got in all processes, (E,), which then make the same move."""
        self._everywhere = counts if self._everywhere is None else self._everywhere + counts

    @torch.no_grad()
    def step(self) -> None:
        """Move the selection bias (E,) by ±u towards an even load: b_e += u · sign(mean(c) − c_e).

        Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1.
        """
        counts, self._everywhere = self._everywhere, None
        if counts is None:  # by itself, outside of a model
            counts = self.take_counts()
        if self.selection_bias is not None and counts is not None:
            self.selection_bias += self.bias_rate * torch.sign(counts.mean() - counts)


def check_bias_rate(bias_rate: float) -> None:
    """Check the rate at which a selection bias (E,) moves.

    Raises:
        ConfigError: it is negative.
    """
    if bias_rate < 0:
        raise ConfigError(f"bias_rate must not be negative, got {bias_rate}.")
