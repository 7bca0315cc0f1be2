"""LoRA experts. Hu et al. 2021, arXiv 2106.09685."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..delta import Delta
from ..errors import ConfigError
from ..layers import Site
from .bank import Axes, ExpertBank
from .factored import FactoredBank, read_factors
from .family import Family, register_expert
from .frozen import weight_of
from .starts import STARTS

Start = Literal["zero", "pissa", "olora"]


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

    axes: ClassVar[Axes] = {"down": "in", "up": "out"}

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

    @property
    def starts(self) -> tuple[str, ...]:
        """Where downs (E, r, i) can start."""
        return ("eva",)

    @torch.no_grad()
    def begin_at(self, method: str, start: Tensor) -> None:
        """Let the downs start at directions (E · r, i), dealt in turn: the first to the first expert, and so on."""
        self.down.copy_(start.unflatten(0, (self.rank, self.n_experts)).transpose(0, 1))


class StartedLoRABank(FactoredBank):
    """E LoRA experts whose factors start at components of W0: E_e(x) = s · (B_e A_e - B₀ A₀) x.

    | tensor | shape | start |
    |---|---|---|
    | down (A - A₀) | (E, r, i) | zero |
    | up (B - B₀, transposed) | (E, r, o) | zero |
    | down_start (A₀), up_start (B₀, transposed) | (r, i), (r, o), frozen | W0's, derived again when loading |

    B A - B₀ A₀ = (B - B₀) A + B₀ (A - A₀), of rank 2 r, so that it is exactly zero at the start, and the base stays.

    Args:
        down_start: A₀ (r, i).
        up_start: B₀ transposed (r, o).
        n_experts: E.
        options: scaling, dropout and engine as in `ExpertBank`.

    Source: PiSSA, arXiv 2404.02948, eq. 2 to 4; OLoRA, arXiv 2406.01775, algorithm 1.
    Differs: there B₀ A₀ is cut off the base's weight, which no second expert could stand on; outputs and gradients are
        the same. Weight decay draws the factors to their start, the base, and not to zero.
    """

    equal_at_init = True

    down_start: Tensor
    up_start: Tensor

    def __init__(self, down_start: Tensor, up_start: Tensor, n_experts: int, **options: Any) -> None:
        rank, d_in = down_start.shape
        super().__init__(d_in, up_start.shape[1], n_experts, **{**options, "rank": rank})
        self.register_buffer("down_start", down_start.contiguous(), persistent=False)
        self.register_buffer("up_start", up_start.contiguous(), persistent=False)
        self.down = nn.Parameter(torch.zeros(n_experts, rank, d_in))
        self.up = nn.Parameter(torch.zeros(n_experts, rank, self.d_out))

    def reset_parameters(self) -> None:
        """Set both offsets, (E, r, i) and (E, r, o), to zero."""
        nn.init.zeros_(self.down)
        nn.init.zeros_(self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [A; A - A₀] (E, 2 r, i) and [B - B₀; B₀] (E, 2 r, o)."""
        down = torch.cat([self.down + self.down_start.to(self.down.dtype), self.down], 1)
        return down, torch.cat([self.up, self.up_start.to(self.up.dtype).expand_as(self.up)], 1)


@register_expert("lora", "Hu et al. 2021, arXiv 2106.09685")
@dataclass(frozen=True, kw_only=True)
class LoRA(Family):
    """Low-rank factors: s · up^T down.

    Args:
        start: "zero" (up is zero, down drawn), or the base's own components, "pissa" (singular) or "olora" (QR), of
            which the base keeps its own: experts are what the factors moved away from there.

    Raises:
        ConfigError: an unknown start.
    """

    start: Start = "zero"

    def __post_init__(self) -> None:
        if self.start != "zero" and self.start not in STARTS:
            raise ConfigError(f"start must be one of zero, {', '.join(STARTS)}, got {self.start!r}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i) and up (E, r, o).

        Raises:
            ConfigError: a start without a weight to take it from, or of a rank above the weight's.
        """
        if self.start == "zero":
            return LoRABank(site.d_in, site.d_out, n_experts, **options)
        if site.place != "input":
            raise ConfigError(
                f"{site.name}: start={self.start!r} is for experts on a layer's input, not {site.place!r}."
            )
        weight = weight_of(site, self.name)
        if options["rank"] > min(weight.shape):
            raise ConfigError(
                f"{site.name}: a weight {tuple(weight.shape)} has {min(weight.shape)} components to start from: "
                f"rank={options['rank']} is too many."
            )
        down, up = STARTS[self.start](weight, options["rank"], options["scaling"])
        return StartedLoRABank(down, up, n_experts, **options)
