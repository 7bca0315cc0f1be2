"""LoRA experts with a bias after each factor. Kim et al. 2023 (Hydra), arXiv 2309.06922."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers import Site
from .bank import Axes, ExpertBank
from .family import Family, register_expert
from .lora import LoRABank


class AffineLoRABank(LoRABank):
    """E low-rank experts with biases: E_e(x) = s · ((x down_e^T + a_e) up_e + c_e).

    | parameter | shape | start |
    |---|---|---|
    | down, up | as `LoRABank` | as `LoRABank` |
    | down_bias (a) | (E, r) | zero |
    | up_bias (c) | (E, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        options: as in `ExpertBank`.
    """

    per_expert = ("down", "up", "down_bias", "up_bias")
    axes: ClassVar[Axes] = {**LoRABank.axes, "up_bias": "out"}

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.down_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_out))

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew; up (E, r, o) and the biases are zero."""
        super().reset_parameters()
        if hasattr(self, "up_bias"):  # not yet during construction
            nn.init.zeros_(self.down_bias)
            nn.init.zeros_(self.up_bias)

    def constants(self) -> Tensor:
        """Return s · (a_e up_e + c_e), (E, o)."""
        return (torch.einsum("er,ero->eo", self.down_bias, self.up) + self.up_bias) * self.scaling


@register_expert("affine", "Kim et al. 2023, arXiv 2309.06922")
@dataclass(frozen=True, kw_only=True)
class Affine(Family):
    """Low-rank factors with a bias after each."""

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i), up (E, r, o) and their biases."""
        return AffineLoRABank(site.d_in, site.d_out, n_experts, **options)
