"""Bottlenecks of hypercomplex products: a slow weight for all, rank-one fast ones for each. Mahabadi et al. 2021."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import Site
from ..bank import ExpertBank
from ..family import LAYERS, Family, register_expert
from ..frozen import divides
from .bottleneck import Activation, BottleneckBank, check_activation

FACTORS = ("down_left", "down_right", "up_left", "up_right")


class SlowWeights(nn.Module):
    """The matrices that all products of a recipe share, down and up, in every layer and expert.

    | parameter | shape | start |
    |---|---|---|
    | rule (C) | (n, n, n) | N(0, 10⁻⁴) |

    Args:
        n: of them, and of their sides.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n).normal_(std=0.01))


class CompacterBank(BottleneckBank):
    """E bottlenecks E_e(x) = s · (f(x down_e^T + a_e) up_e + c_e), down and up each Σ_j C_j ⊗ (s_j t_j).

    | parameter | shape | start |
    |---|---|---|
    | down_left (s), down_right (t) | (E, n, r / n), (E, n, i / n) | Glorot uniform, gain √2 |
    | up_left (s), up_right (t) | (E, n, r / n), (E, n, o / n) | Glorot, and zero or Glorot |
    | down_bias (a), up_bias (c) | (E, r), (E, o) | zero |
    | slow.rule (C) | (n, n, n), one for all layers and experts | N(0, 10⁻⁴) |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        slow: C.
        activation: f.
        start: of up_right, "zero" or "glorot".
        options: as in `ExpertBank`.

    Source: arXiv 2106.04647, eq. 4-6.
    """

    down_left: nn.Parameter
    down_right: nn.Parameter
    up_left: nn.Parameter
    up_right: nn.Parameter
    per_expert: ClassVar[tuple[str, ...]] = (*FACTORS, "down_bias", "up_bias")
    axes = ExpertBank.axes

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_experts: int,
        slow: SlowWeights,
        activation: Activation,
        start: Literal["zero", "glorot"],
        **options: Any,
    ) -> None:
        ExpertBank.__init__(self, d_in, d_out, n_experts, **options)
        self.activation, self.slow = activation, slow
        self.from_zero, n = start == "zero", len(slow.rule)
        for name, size in zip(FACTORS, (self.rank, d_in, self.rank, d_out), strict=True):
            setattr(self, name, nn.Parameter(torch.empty(n_experts, n, size // n)))
        self.down_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_out))
        self.reset_parameters()

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether a fresh bank returns exactly zero, (*rows, o): not from the paper's start."""
        return self.from_zero

    def reset_parameters(self) -> None:
        """Draw the fast factors (E, n, …) anew, up_right and the biases zero; the slow weights stay."""
        for name in FACTORS:
            factor: Tensor = getattr(self, name)
            bound = (2 * 6 / (factor.shape[-1] + 1)) ** 0.5  # of a column (p, 1), or a row (1, p)
            nn.init.uniform_(factor, -bound, bound)
        if self.from_zero:
            nn.init.zeros_(self.up_right)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o), the sums of Kronecker products."""
        return self._sums(self.down_left, self.down_right), self._sums(self.up_left, self.up_right)

    def _sums(self, left: Tensor, right: Tensor) -> Tensor:
        rule = self.slow.rule.to(left.dtype)
        return torch.einsum("jab,ejp,ejq->eapbq", rule, left, right).flatten(3, 4).flatten(1, 2)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · f(x down_e^T + a_e) up_e, (*rows, o), of x (*rows, i), block by block: no product is formed."""
        left, right, up_left, up_right = (getattr(self, name)[expert].to(x.dtype) for name in FACTORS)
        rule, n = self.slow.rule.to(x.dtype), len(self.slow.rule)
        blocks = x.unflatten(-1, (n, -1))  # (*rows, n, i / n)
        low = torch.einsum("...bq,jq,jab,jp->...ap", blocks, right, rule, left).flatten(-2)  # (*rows, r)
        hidden = self.act(low + self.down_bias[expert].to(low.dtype)).unflatten(-1, (n, -1))  # (*rows, n, r / n)
        out = torch.einsum("...ap,jp,jab,jq->...bq", hidden, up_left, rule.to(hidden.dtype), up_right)
        return out.flatten(-2) * self.scaling


@register_expert("compacter", "Karimi Mahabadi et al. 2021, arXiv 2106.04647")
@dataclass(frozen=True, kw_only=True)
class Compacter(Family):
    """A bottleneck whose products are sums of n Kronecker products, one factor of which all layers and experts share.

    Compacter sits at both sub-layers of a block, the usual place; Compacter++ has targets="ffn".

    Args:
        n: of the products, dividing the rank and the features of every layer.
        activation: the non-linearity.
        scale: s on the output; there is no alpha / rank.
        start: "zero" gives exactly the base, "glorot" is the paper's.

    Raises:
        ConfigError: n below 1, an unknown activation or start, or a scale that is not positive.
    Source: arXiv 2106.04647, §4.
    Differs: the paper draws all factors, so that a fresh adapter is not zero, and trains the base's layer norms: name
        those in modules_to_save.
    """

    places = ("sequential", "parallel", *LAYERS)
    uses = ("rank", "dropout", "engine")

    n: int = 4
    activation: Activation = "gelu_tanh"
    scale: float = 1.0
    start: Literal["zero", "glorot"] = "zero"

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if self.n < 1:
            raise ConfigError(f"n must be at least 1, got {self.n}.")
        if not self.scale > 0:
            raise ConfigError(f"scale must be positive, got {self.scale}: the experts would do nothing, or harm.")
        if self.start not in ("zero", "glorot"):
            raise ConfigError(f"start must be 'zero' or 'glorot', got {self.start!r}.")

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module:
        """Return the slow weights (n, n, n)."""
        return SlowWeights(self.n)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with its fast factors (E, n, …).

        Raises:
            ConfigError: n does not divide the rank or a side of the layer, the nearest that do are named; or without
                the shared weights.
        """
        if not isinstance(shared, SlowWeights):
            raise ConfigError(f"{site.name}: Compacter experts need the slow weights that their layers share.")
        for what, size in (("rank", options["rank"]), ("inputs", site.d_in), ("outputs", site.d_out)):
            divides("n", self.n, size, f"{site.name}, {what}")
        scaled = {**options, "scaling": self.scale}
        return CompacterBank(site.d_in, site.d_out, n_experts, shared, self.activation, self.start, **scaled)
