"""Learned gates: one linear map from the row to a logit per expert, then a pure selection.

Shazeer et al. 2017 (noisy top-k), Fedus et al. 2021 (Switch), Jiang et al. 2024 (Mixtral), DeepSeek-V3 2024 (bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import is_watched
from ..errors import ConfigError
from ..kernels import Gate, exact_linear
from ..kernels.gate import SCORES
from ..types import Context, Routing
from . import select
from .balanced import BalancedRouter


class LinearRouter(BalancedRouter):
    """Scores every expert by a linear map of the row and keeps k of them.

    | parameter | shape | start |
    |---|---|---|
    | weight | (E, i) | uniform ±1/√i: logits of std 0.58 on rows of unit RMS, far from collapse; zero when noisy |
    | noise_weight | (E, i) | zero, only with `noisy` |
    | selection_bias | (E,) buffer, fp32 | zero, only with `bias_rate` > 0 |

    Args:
        d_in: i.
        n_experts: E.
        k: K; with K = E every expert acts, and the routing has no indices.
        score: "softmax" or "sigmoid" over the experts.
        renormalize: weights of a row sum to one after the choice.
        jitter: training only, multiplies x by U(1 − jitter, 1 + jitter) for the logits.
        noisy: learned Gaussian noise on the logits in training, softmax over the kept ones.
        bias_rate: u, step of the selection bias after each optimizer step; 0 for no bias.
        losses: name -> coefficient, see `moa.objective.losses.LOSSES`.

    Attributes:
        fused_gate: `forward` is what the class says, so that `gate` may stand for it; False in a subclass that writes
            its own `forward`, unless it says otherwise.

    Raises:
        ConfigError: bad k, a negative rate, or options that exclude each other.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"weight": 0, "noise_weight": 0, "selection_bias": 0, "counts": 0}
    fused_gate: ClassVar[bool] = True
    weight: nn.Parameter

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first = next(base for base in cls.__mro__ if {"forward", "fused_gate"} & vars(base).keys())
        if "fused_gate" not in vars(first):  # a newer forward, of the class or of a mixin, that nothing vouches for
            cls.fused_gate = False

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
        jitter: float = 0.0,
        noisy: bool = False,
        bias_rate: float = 0.0,
        losses: dict[str, float] | None = None,
    ) -> None:
        super().__init__(d_in, n_experts, k, bias_rate)
        if noisy and (score != "softmax" or bias_rate):
            raise ConfigError("noisy gates use softmax scores and no selection bias.")
        check_jitter(jitter)
        self.score, self.renormalize, self.jitter, self.noisy = score, renormalize, jitter, noisy
        self.loss_weights = {name: c for name, c in (losses or {}).items() if c}
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.noise_weight = nn.Parameter(torch.empty(n_experts, d_in)) if noisy else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight (E, i) anew; a noisy gate starts at zero, as its paper does."""
        if self.noise_weight is None:
            bound = self.d_in**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): weights and indices (*rows, K), indices None when K = E."""
        gate = self._gate()
        if gate.jitter:
            x = x * torch.empty_like(x).uniform_(1 - gate.jitter, 1 + gate.jitter)
        logits = exact_linear(x, self.weight)  # (*rows, E)
        if self.noisy:
            return self._noisy(x, logits)
        weights, indices, _ = gate.decide(logits)
        return Routing(weights, indices, self.n_experts, logits, SCORES[gate.score])

    def constant(self, task: int | None = None) -> Routing | None:
        """Return the routing of rows () where there is one expert whose weight is 1 on every row; else None."""
        if self.n_experts > 1 or not (self.score == "softmax" or self.renormalize):
            return None
        return self.every_expert(self.weight)

    def gate(self) -> Gate | None:
        """Return how this gate decides, or None where its forward must run: noise, a hook, a forward of another's."""
        # A forward that was replaced on this module, or that something watches, must run.
        if not self.fused_gate or self.noisy or is_watched(self) or "forward" in vars(self):
            return None
        return self._gate()

    def _gate(self) -> Gate:
        jitter = self.jitter if self.training else 0.0
        bias = self.selection_bias if self.bias_rate else None  # reading it costs a Python call
        return Gate(self.weight, self.k, self.score, self.renormalize, bias, jitter)

    def _noisy(self, x: Tensor, clean: Tensor) -> Routing:
        """Return the routing of x (*rows, i) from its logits (*rows, E), in training with noise on them."""
        usage = None
        logits = clean
        if self.training:
            assert self.noise_weight is not None
            std = F.softplus(exact_linear(x, self.noise_weight)) + 1e-2  # (*rows, E), never 0
            logits = clean + std * torch.randn_like(clean)
            usage = select.selection_probability(clean, logits, std, self.k)
        weights, indices = select.softmax_top_k(logits, self.k)  # (*rows, K)
        return Routing(weights, indices, self.n_experts, clean, SCORES["softmax"], usage=usage)


def check_jitter(jitter: float) -> None:
    """Check how far a factor on x may lie from 1.

    Raises:
        ConfigError: outside [0, 1).
    """
    if not 0 <= jitter < 1:
        raise ConfigError(f"jitter must be in [0, 1), got {jitter}.")
