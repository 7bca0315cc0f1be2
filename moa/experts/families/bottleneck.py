"""Bottleneck experts: down, a non-linearity, up, in any of the places that adapters have had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, unknown_name
from ...kernels import grouped_linear, grouped_sum, has_slots
from ...layers import Site
from ...types import Routing
from ..bank import Axes, ExpertBank
from ..family import LAYERS, Family, register_expert

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"]


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · sigmoid(1.702 x), of any shape."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckBank(ExpertBank):
    """E small networks: E_e(x) = s · (f(x down_e^T + a_e) up_e + c_e).

    | parameter | shape | start |
    |---|---|---|
    | down | (E, r, i) | Xavier uniform |
    | up (transposed) | (E, r, o) | zero, or N(0, 10⁻⁸) |
    | down_bias (a), up_bias (c) | (E, r), (E, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        activation: f.
        start: of up, "zero" or "small".
        options: rank, scaling, dropout and engine as in `ExpertBank`.

    Source: Houlsby et al. 2019, arXiv 1902.00751, §2.1.
    """

    per_expert: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")
    axes: ClassVar[Axes] = {"down": "in", "up": "out", "up_bias": "out"}

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_experts: int,
        activation: Activation = "gelu",
        start: Literal["zero", "small"] = "zero",
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.activation, self.start = activation, start
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, d_in))
        self.down_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, d_out))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_out))
        self.reset_parameters()

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether a fresh bank returns exactly zero, (*rows, o): not from a small start."""
        return self.start == "zero"

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew, set up (E, r, o) to its start and the biases to zero."""
        for expert in self.down:
            nn.init.xavier_uniform_(expert)
        if self.start == "zero":
            nn.init.zeros_(self.up)
        else:
            nn.init.normal_(self.up, std=1e-4)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o)."""
        return self.down, self.up

    def act(self, x: Tensor) -> Tensor:
        """Return f(x), of any shape."""
        return ACTIVATIONS[self.activation](x)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · f(x down_e^T + a_e) up_e, (*rows, o), of x (*rows, i)."""
        hidden = self.act(F.linear(x, self.down[expert].to(x.dtype), self.down_bias[expert].to(x.dtype)))
        return hidden @ self.up[expert].to(hidden.dtype) * self.scaling

    def constants(self) -> Tensor:
        """Return s · c_e, (E, o)."""
        return self.up_bias * self.scaling

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i), without the constants, by the grouped kernels."""
        x = F.dropout(x, self.dropout, self.training)
        if routing.indices is None or not has_slots(self.engine):
            return self._by_all(x, routing.dense())
        indices, (down, up) = routing.indices.expand(*x.shape[:-1], routing.k), self.matrices()
        hidden = grouped_linear(x, down, indices, engine=self.engine)  # (*rows, K, r)
        hidden = self.act(hidden + self.down_bias[indices].to(hidden.dtype))
        weighted = hidden * (routing.weights * self.scaling).to(hidden.dtype).unsqueeze(-1)
        return grouped_sum(weighted, up, indices, engine=self.engine)

    def _by_all(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the mixture (*rows, o) of x (*rows, i) by all experts' products at once, of weights (*rows, E)."""
        downs, ups = self.matrices()
        down, bias = downs.flatten(0, 1), self.down_bias.flatten()  # (E r, i), (E r,)
        hidden = self.act(F.linear(x, down.to(x.dtype), bias.to(x.dtype))).unflatten(-1, (self.n_experts, self.rank))
        scaled = (weights * self.scaling).to(hidden.dtype).unsqueeze(-1)  # (*rows, E, 1)
        weighted = torch.where(scaled != 0, hidden * scaled, 0).flatten(-2)  # (*rows, E r)
        return weighted @ ups.flatten(0, 1).to(weighted.dtype)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, activation={self.activation}"


def check_activation(name: str) -> None:
    """Check the name of an activation; no tensors, so no shapes.

    Raises:
        ConfigError: no such one; the nearest known is named.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(unknown_name("activation", name, get_args(Activation), "a bottleneck"))


@register_expert("bottleneck", "Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2021, arXiv 2005.00247")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Family):
    """Down to r features, a non-linearity, and up again: an adapter that no weight equals, and that is never folded.

    | system | keywords |
    |---|---|
    | AdapterTune | place="block"; every second one of 12: layers=range(1, 12, 2) |
    | Houlsby, arXiv 1902.00751 | place="sequential", the usual place, targets="all-linear" |
    | Pfeiffer, arXiv 2005.00247 | place="sequential", targets="ffn" |
    | parallel adapters, arXiv 2110.04366 | place="parallel", targets="ffn", activation="relu", scale=4 |
    | AdaptFormer, arXiv 2205.13535 | place="parallel", targets="ffn", activation="relu", scale=0.1 |

    Args:
        activation: the non-linearity.
        scale: s on the output; there is no alpha / rank.
        start: "zero" gives exactly the base, "small" draws up from N(0, 10⁻⁸), AdapterTune's other start.

    Raises:
        ConfigError: an unknown activation, or a scale that is not positive.
    Source: arXiv 1902.00751, §2.1; arXiv 2312.03694, §2.2, for the places in a spectrogram transformer.
    Differs: the released code of 2312.03694 starts down and up both at zero, from where no weight gets a gradient;
        Houlsby et al. draw both from N(0, 10⁻⁴). Layer norms of the base stay frozen: name them in modules_to_save.
    """

    places = ("sequential", "parallel", *LAYERS)
    uses = ("rank", "dropout", "engine")

    activation: Activation = "gelu"
    scale: float = 1.0
    start: Literal["zero", "small"] = "zero"

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if not self.scale > 0:
            raise ConfigError(f"scale must be positive, got {self.scale}: the experts would do nothing, or harm.")
        if self.start not in ("zero", "small"):
            raise ConfigError(f"start must be 'zero' or 'small', got {self.start!r}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i), up (E, r, o) and their biases."""
        scaled = {**options, "scaling": self.scale}
        return BottleneckBank(site.d_in, site.d_out, n_experts, self.activation, self.start, **scaled)
