"""Routing to adapters that exist, without training. Ostapenko et al. 2024 (Arrow), arXiv 2405.11157."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import exact_linear
from ..types import Context, Routing
from . import select
from .router import Router


class PrototypeRouter(Router):
    """Scores an expert by how much of the row lies along the direction that its weight change amplifies most.

    logit_e = |v_e · x| / T, v_e the first right singular vector of ΔW_e; softmax over the k largest

    Layers that read the same row may have one prototype together (`share`), of their weight changes on top of each
    other.

    | buffer | shape | start |
    |---|---|---|
    | prototypes (v) | (E, i), unit rows | zero; set by `experts_changed` |

    It has no trainable parameter, and keeps no row for the backward pass.

    Args:
        d_in: i.
        n_experts: E.
        k: K.
        temperature: T > 0.

    Raises:
        ConfigError: temperature is not positive.
    Source: arXiv 2405.11157, §4, eq. 4-5.
    Differs: peft finds v by 15 power iterations from a random start; here it is exact, from an r × r eigenproblem.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"prototypes": 0}
    prototypes: Tensor

    def __init__(self, d_in: int, n_experts: int, k: int, *, temperature: float = 1.0) -> None:
        super().__init__(d_in, n_experts, k)
        check_temperature(temperature)
        self.temperature = temperature
        self.register_buffer("prototypes", torch.zeros(n_experts, d_in))

    def experts_changed(self, down: Tensor, up: Tensor) -> None:
        """Find the prototypes of experts down (E, r, i), up (E, r, o)."""
        self.share((down, up))

    def share(self, *layers: tuple[Tensor, Tensor]) -> None:
        """Find the prototypes that this layer has together with others, each down (E, r, i), up (E, r, o).

        Source: microsoft/mttl, ArrowTransform with tie_params and tie_op="concat".
        Differs: there the layers must have one A; here each has its own, and with one A both give the same.
        """
        self.prototypes.copy_(top_right_singular(*layers))

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): weights and indices (*rows, K)."""
        logits = exact_linear(x, self.prototypes).abs() / self.temperature  # (*rows, E)
        weights, indices = select.softmax_top_k(logits, self.k)  # (*rows, K)
        return Routing(weights, indices, self.n_experts, logits, logits.softmax(-1))

    def constant(self, task: int | None = None) -> Routing | None:
        """Return the routing of rows () where there is one expert, whose softmax is 1; else None."""
        return self.every_expert(self.prototypes) if self.n_experts == 1 else None


def check_temperature(temperature: float) -> None:
    """Check the temperature of a softmax.

    Raises:
        ConfigError: it is not positive.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature must be positive, got {temperature}.")


@torch.no_grad()
def top_right_singular(*layers: tuple[Tensor, Tensor]) -> Tensor:
    """Return each expert's first right singular vector of up_e^T down_e, (E, i), unit length, sign undefined.

    With down^T = Q R and G = up up^T, ΔW^T ΔW = Q (R G R^T) Q^T: an r × r eigenproblem in fp64. Of several layers,
    ΔW is theirs on top of each other, and ΔW^T ΔW the sum of theirs. An expert whose up is zero gets the direction
    that its down amplifies most; one that is zero altogether gets zero.

    Args:
        layers: down (E, r, i) and up (E, r, o) of each; r and o may differ.
    """
    downs = [down.double() for down, _ in layers]
    grams = [up.double() @ up.double().mT for _, up in layers]  # (E, r, r) each
    q, r = torch.linalg.qr(torch.cat(downs, 1).mT)  # (E, i, R), (E, R, Σr), R = min(i, Σr)
    energy = torch.stack([gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in grams]).sum(0)  # (E,)
    untrained = (energy == 0)[:, None, None]  # (E, 1, 1)
    small = torch.zeros_like(r[..., :1])  # (E, R, R), by broadcasting
    for part, gram in zip(r.split([gram.shape[-1] for gram in grams], -1), grams, strict=True):
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        small = small + part @ torch.where(untrained, identity, gram) @ part.mT
    vectors = torch.linalg.eigh(small).eigenvectors[..., -1:]  # (E, R, 1): eigenvalues ascend
    found = (q @ vectors).squeeze(-1)  # (E, i)
    alive = small.diagonal(dim1=-2, dim2=-1).sum(-1) > 0  # (E,)
    return torch.where(alive[:, None], found, 0).to(layers[0][0].dtype)
