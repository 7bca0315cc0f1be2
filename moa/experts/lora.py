"""LoRA experts. Hu et al. 2021, arXiv 2106.09685."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..delta import Delta
from ..layers import Site
from .bank import ExpertBank
from .factored import FactoredBank, read_factors
from .family import Family, register_expert


class LoRABank(FactoredBank):
    """E low-rank experts: E_e(x) = s · (x down_e^T) up_e.

    | parameter | shape | start |
    |---|---|---|
    | down (A) | (E, r, i) | uniform ±1/√i, as nn.Linear and peft |
    | up (B, transposed) | (E, r, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        options: rank, scaling (one for all experts: adapters of other scales are rescaled when read in), dropout,
            engine, as in `ExpertBank`.
    """

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, d_in))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew and set up (E, r, o) to zero."""
        bound = 1 / math.sqrt(self.d_in)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o), the parameters."""
        return self.down, self.up

    def read(self, expert: int, change: Delta) -> None:
        """Make one expert a low-rank change (o, i).

        Raises:
            ConfigError: it is not low-rank, its rank is above r, or it is for another layer.
        """
        read_factors(change, self.down[expert], self.up[expert], self.scaling)


@register_expert("lora", "Hu et al. 2021, arXiv 2106.09685")
@dataclass(frozen=True, kw_only=True)
class LoRA(Family):
    """Low-rank factors: s · up^T down."""

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i) and up (E, r, o)."""
        return LoRABank(site.d_in, site.d_out, n_experts, **options)
