"""Bottleneck experts that look at neighbouring rows: Convpass and the Conformer's convolution, on (B, S, d)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, ShapeError
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from .bottleneck import ACTIVATIONS, Activation, check_activation


class ConvolvedBank(ExpertBank):
    """E small networks with a convolution over the rows of an example, each row's output still weighted by itself.

    Rows of padding come as zeros and leave what is before the convolution as zeros: that part has no bias.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        kernel: rows under the convolution, odd.
        options: rank, scaling and dropout as in `ExpertBank`.
    """

    rowwise = False

    def __init__(self, d_in: int, d_out: int, n_experts: int, kernel: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.kernel = kernel
        self.up = nn.Parameter(torch.zeros(n_experts, self.rank, d_out))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_out))

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's hidden values (B, S, r) of x (B, S, i)."""
        raise NotImplementedError

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's output on x (B, S, i), (B, S, o), without its constant.

        Raises:
            ShapeError: x has other axes.
        """
        if x.ndim != 3:
            raise ShapeError(
                f"{type(self).__name__} experts look at neighbouring rows of a sequence and need x (B, S, i), got "
                f"{tuple(x.shape)}: leave this layer out of targets."
            )
        hidden = self.hidden(x, expert)
        return hidden @ self.up[expert].to(hidden.dtype) * self.scaling

    def constants(self) -> Tensor:
        """Return s · c_e, (E, o)."""
        return self.up_bias * self.scaling

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (B, S, o), of x (B, S, i): every expert sees all rows."""
        return super().forward(F.dropout(x, self.dropout, self.training), routing)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, kernel={self.kernel}"


class ConvpassBank(ConvolvedBank):
    """E_e(x) = s · (f(conv_e(f(x down_e^T))) up_e + c_e).

    | parameter | shape | start |
    |---|---|---|
    | down | (E, r, i) | Xavier uniform |
    | conv, conv_bias | (E, r, r, kernel), (E, r) | Xavier uniform, zero |
    | up (transposed), up_bias (c) | (E, r, o), (E, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        kernel: rows under the convolution.
        activation: f, which is 0 at 0.
        options: as in `ConvolvedBank`.
    """

    per_expert: ClassVar[tuple[str, ...]] = ("down", "conv", "conv_bias", "up", "up_bias")

    def __init__(
        self, d_in: int, d_out: int, n_experts: int, kernel: int, activation: Activation, **options: Any
    ) -> None:
        super().__init__(d_in, d_out, n_experts, kernel, **options)
        self.activation = activation
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, d_in))
        self.conv = nn.Parameter(torch.empty(n_experts, self.rank, self.rank, kernel))
        self.conv_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) and conv (E, r, r, kernel) anew; up (E, r, o) and the biases are zero."""
        for expert in (*self.down, *self.conv):
            nn.init.xavier_uniform_(expert)
        for zero in (self.conv_bias, self.up, self.up_bias):
            nn.init.zeros_(zero)

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        """Return f(conv_e(f(x down_e^T))), (B, S, r), of x (B, S, i)."""
        act = ACTIVATIONS[self.activation]
        low = act(F.linear(x, self.down[expert].to(x.dtype))).mT  # (B, r, S)
        weight, bias = self.conv[expert].to(low.dtype), self.conv_bias[expert].to(low.dtype)
        return act(F.conv1d(low, weight, bias, padding=self.kernel // 2)).mT


class ConformerBank(ConvolvedBank):
    """E_e(x) = s · (silu(norm_e(depthwise_e(glu(gain_e ⊙ norm(x) in_e^T)))) up_e + c_e).

    | parameter | shape | start |
    |---|---|---|
    | gain | (E, i) | one |
    | down (in) | (E, 2 r, i) | uniform ±1/√i |
    | conv, conv_bias | (E, r, kernel), (E, r) | uniform ±1/√kernel, zero |
    | norm, norm_bias | (E, r) | one, zero |
    | up (transposed), up_bias (c) | (E, r, o), (E, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        kernel: rows under the depthwise convolution.
        options: as in `ConvolvedBank`.
    """

    per_expert: ClassVar[tuple[str, ...]] = (
        "gain",
        "down",
        "conv",
        "conv_bias",
        "norm",
        "norm_bias",
        "up",
        "up_bias",
    )

    def __init__(self, d_in: int, d_out: int, n_experts: int, kernel: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, kernel, **options)
        self.gain = nn.Parameter(torch.ones(n_experts, d_in))
        self.down = nn.Parameter(torch.empty(n_experts, 2 * self.rank, d_in))
        self.conv = nn.Parameter(torch.empty(n_experts, self.rank, kernel))
        self.conv_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.norm = nn.Parameter(torch.ones(n_experts, self.rank))
        self.norm_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (E, 2 r, i) and conv (E, r, kernel) anew; gains are one, up (E, r, o) and the biases zero."""
        for drawn, size in ((self.down, self.d_in), (self.conv, self.kernel)):
            nn.init.uniform_(drawn, -1 / math.sqrt(size), 1 / math.sqrt(size))
        for one in (self.gain, self.norm):
            nn.init.ones_(one)
        for zero in (self.conv_bias, self.norm_bias, self.up, self.up_bias):
            nn.init.zeros_(zero)

    def hidden(self, x: Tensor, expert: int) -> Tensor:
        """Return silu(norm_e(depthwise_e(glu(in_e(x))))), (B, S, r), of x (B, S, i)."""
        normed = F.layer_norm(x, (self.d_in,), self.gain[expert].to(x.dtype))
        low = F.glu(F.linear(normed, self.down[expert].to(normed.dtype))).mT  # (B, r, S)
        weight, bias = self.conv[expert].unsqueeze(1).to(low.dtype), self.conv_bias[expert].to(low.dtype)
        mixed = F.conv1d(low, weight, bias, padding=self.kernel // 2, groups=self.rank).mT  # (B, S, r)
        norm, norm_bias = self.norm[expert].to(mixed.dtype), self.norm_bias[expert].to(mixed.dtype)
        return F.silu(F.layer_norm(mixed, (self.rank,), norm, norm_bias))


def _check(kernel: int, scale: float) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"kernel must be odd and at least 1, got {kernel}: a row lies in the middle of its window.")
    if not scale > 0:
        raise ConfigError(f"scale must be positive, got {scale}: the experts would do nothing, or harm.")


@register_expert("convpass", "Jie and Deng 2022, arXiv 2207.07039; on spectrograms arXiv 2312.03694")
@dataclass(frozen=True, kw_only=True)
class Convpass(Family):
    """A bottleneck with a convolution over the rows between its two products, for encoders of patches or frames.

    Args:
        kernel: rows under the convolution, odd.
        activation: before and after the convolution.
        scale: s on the output; there is no alpha / rank.

    Raises:
        ConfigError: an even kernel, an unknown activation, or a scale that is not positive.
    Source: arXiv 2312.03694, §2.2.
    Differs: the code released for spectrograms computes the convolution and goes on without it; down has no bias here,
        so that padding adds nothing. Jie and Deng convolve over the two axes of an image.
    """

    places = ("sequential", "parallel", "block")
    uses = ("rank", "dropout")

    kernel: int = 3
    activation: Activation = "quick_gelu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_activation(self.activation)
        _check(self.kernel, self.scale)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i), conv (E, r, r, kernel), up (E, r, o) and biases."""
        scaled = {**options, "scaling": self.scale}
        return ConvpassBank(site.d_in, site.d_out, n_experts, self.kernel, self.activation, **scaled)


@register_expert("conformer", "Gulati et al. 2020, arXiv 2005.08100; as an adapter arXiv 2312.03694")
@dataclass(frozen=True, kw_only=True)
class Conformer(Family):
    """The convolution module of a Conformer as an adapter, for encoders of frames.

    Args:
        kernel: rows under the depthwise convolution, odd.
        scale: s on the output; there is no alpha / rank.

    Raises:
        ConfigError: an even kernel, or a scale that is not positive.
    Source: arXiv 2005.08100, §2.2, fig. 2.
    Differs: a norm over the channels stands in the place of the batch norm, so that a row's output does not depend on
        the rest of its batch; the first norm has no bias, so that padding adds nothing; up starts at zero. The released
        code computes the first norm and goes on without it.
    """

    places = ("sequential", "parallel", "block")
    uses = ("rank", "dropout")

    kernel: int = 31
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self.kernel, self.scale)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, 2 r, i), conv (E, r, kernel), up (E, r, o), norms and biases.

        Raises:
            ConfigError: rank 1.
        """
        if options.get("rank", 2) < 2:
            raise ConfigError(f"{site.name}: a norm over one channel is constant: a conformer needs rank=2 or more.")
        return ConformerBank(site.d_in, site.d_out, n_experts, self.kernel, **{**options, "scaling": self.scale})
