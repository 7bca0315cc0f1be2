"""Low-rank experts beside the weight's main directions, which they cannot touch. Complementary subspace LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import Site
from ..bank import ExpertBank
from ..factored import FactoredBank
from ..family import Family, register_expert
from ..frozen import singular, weight_of

SIDES = ("both", "input", "output")
Sides = Literal["both", "input", "output"]


class CompLoRABank(FactoredBank):
    """E low-rank experts in the complement of W0's first c singular directions.

    ΔW_e = s · (I - U_c U_c^T) B_e A_e (I - V_c V_c^T), so that U_c^T ΔW_e = 0 and ΔW_e V_c = 0.

    | tensor | shape | start |
    |---|---|---|
    | down (A) | (E, r, i) | uniform ±1/√i |
    | up (B, transposed) | (E, r, o) | zero |
    | right (V_c^T) | (c, i), frozen, or None | W0's, derived again when loading |
    | left (U_c^T) | (c, o), frozen, or None | W0's, derived again when loading |

    The factors are projected, not x: that costs E r c (i + o) a step, whatever the number of rows.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        right: what A is projected away from.
        left: what B is projected away from.
        options: rank, scaling, dropout, engine as in `ExpertBank`.
    """

    right: Tensor | None
    left: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, n_experts: int, right: Tensor | None, left: Tensor | None, **options: Any
    ) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.register_buffer("right", right, persistent=False)
        self.register_buffer("left", left, persistent=False)
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, d_in))
        self.up = nn.Parameter(torch.zeros(n_experts, self.rank, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew and set up (E, r, o) to zero; the directions stay."""
        nn.init.uniform_(self.down, -(self.d_in**-0.5), self.d_in**-0.5)
        nn.init.zeros_(self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (I - V_c V_c^T), (E, r, i), and B^T (I - U_c U_c^T), (E, r, o)."""
        return beside(self.down, self.right), beside(self.up, self.left)


def beside(factor: Tensor, directions: Tensor | None) -> Tensor:
    """Return the rows of a factor (…, r, d) without what lies in some orthonormal directions (c, d), if any."""
    if directions is None:
        return factor
    kept = directions.to(factor.dtype)
    return factor - (factor @ kept.T) @ kept


@register_expert("comp_lora", "Complementary Subspace Low-Rank Adaptation")
@dataclass(frozen=True, kw_only=True)
class CompLoRA(Family):
    """A LoRA that leaves W0's largest singular directions, which hold most of what it knows, as they are.

    Args:
        protected: c, how many of them; on a layer with fewer singular values than twice that, half of its own.
        sides: "both", or only what the layer reads ("input", ΔW V_c = 0) or writes ("output", U_c^T ΔW = 0).

    Raises:
        ConfigError: nothing protected, or an unknown side.

    Differs: whether the paper projects one side or both could not be seen from its abstract. On both sides the c
        triplets of W0 stay singular triplets of W0 + ΔW exactly.
    """

    places = ("input",)

    protected: int = 16
    sides: Sides = "both"

    def __post_init__(self) -> None:
        if self.protected < 1:
            raise ConfigError(f"protected must be at least 1, got {self.protected}: without any it is expert='lora'.")
        if self.sides not in SIDES:
            raise ConfigError(f"sides must be one of {', '.join(SIDES)}, got {self.sides!r}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i) and up (E, r, o).

        Raises:
            ConfigError: no weight to derive the directions from, or one of a single singular value.
        """
        weight = weight_of(site, self.name)
        if min(weight.shape) < 2:
            raise ConfigError(
                f"{site.name}: a weight {tuple(weight.shape)} has one singular direction and nothing beside it: leave "
                "the layer out of targets."
            )
        left, _, right = singular(weight, min(self.protected, min(weight.shape) // 2))
        v = right if self.sides != "output" else None
        u = left.T.contiguous() if self.sides != "input" else None
        return CompLoRABank(site.d_in, site.d_out, n_experts, v, u, **options)
