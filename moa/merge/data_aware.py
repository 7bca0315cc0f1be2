"""Merges that look at data: input statistics (RegMean), gradients (Fisher), a loss on merged models (AdaMerging).

RegMean (arXiv 2212.09849), Fisher merging (arXiv 2111.09832), AdaMerging (arXiv 2310.02575).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import Delta, Dense
from ..errors import ConfigError, NumericsError, ShapeError
from ..formats.named_deltas import DeltaLike, as_delta, check_finite
from .compose import check_weights


def gram(inputs: Tensor) -> Tensor:
    """Return XᵀX of a linear layer's inputs, the statistic RegMean needs; sum it over batches.

    Args:
        inputs: X (*rows, i), padding already removed.

    Returns:
        (i, i) float64 on the inputs' device.
    """
    x = inputs.reshape(inputs.shape[:-1].numel(), inputs.shape[-1]).double()  # (rows, i)
    return x.T @ x


def regmean(
    deltas: Sequence[Delta], weights: Sequence[float], grams: Sequence[Tensor], *, shrink: float = 0.9
) -> Dense:
    """Return (Σ w_t ΔW_t G̃_t)(Σ w_t G̃_t)⁻¹, the change whose outputs are nearest to every task's own.

    G̃ = α G + (1 - α) diag(G), G_t = X_tᵀ X_t; least squares of Σ_t w_t ‖X_t (ΔW - ΔW_t)ᵀ‖² when α = 1. The paper
    states it for weights; the base being common, it is the same for changes.

    Args:
        deltas: each (o, i).
        weights: (T,) one per task.
        grams: T matrices (i, i), see `gram`.
        shrink: α, how much of the off-diagonal is kept, [0, 1].

    Returns:
        Dense (o, i); solved in float64.

    Raises:
        ShapeError: a Gram matrix does not fit.
        ConfigError: α out of range, or not one Gram matrix per task.
        NumericsError: the summed matrix is not positive definite (too few inputs and α = 1, or inputs always 0).

    Source: Jin et al. 2022, arXiv 2212.09849 (closed form, and shrinking the off-diagonal).
    """
    if not 0 <= shrink <= 1:
        raise ConfigError(f"regmean: shrink is {shrink}, expected a number in [0, 1].")
    if len(grams) != len(deltas):
        raise ConfigError(f"regmean: {len(grams)} Gram matrices for {len(deltas)} adapters; give one each.")
    i = deltas[0].shape[1]
    left = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    right = torch.zeros(i, i, dtype=torch.float64, device=left.device)
    for delta, weight, statistic in zip(deltas, weights, grams, strict=True):
        if statistic.shape != (i, i):
            raise ShapeError(f"regmean: a Gram matrix is {tuple(statistic.shape)}, expected ({i}, {i}).")
        full = statistic.to(left)
        g = weight * (shrink * full + (1 - shrink) * full.diag().diag())
        left += delta.to(torch.float64).before(g).dense()
        right += g
    root, failed = torch.linalg.cholesky_ex(right)
    if int(failed):
        raise NumericsError(
            "regmean: the summed Gram matrix is not positive definite (some inputs never vary, or there are fewer "
            f"rows than the {i} inputs): use more data or a smaller shrink than {shrink}."
        )
    return Dense(torch.cholesky_solve(left.T, root).T.to(deltas[0].dtype).contiguous())


def fisher(
    deltas: Sequence[Delta], weights: Sequence[float], fishers: Sequence[Tensor], *, floor: float = 1e-6
) -> Dense:
    """Return Σ w_t F_t ⊙ ΔW_t / Σ w_t F_t, entry by entry: each task counts where its loss is curved.

    Args:
        deltas: each of one shape, e.g. (o, i).
        weights: (T,) one per task.
        fishers: T diagonals of that shape, mean squared gradients, not negative.
        floor: added to every F, so that entries no task cares about become the weighted mean.

    Returns:
        Dense, of that shape.

    Raises:
        ShapeError: a Fisher diagonal does not fit.
        ConfigError: not one per task.
        NumericsError: a Fisher diagonal has a negative or non-finite entry, or some Σ w_t F_t is 0.

    Source: Matena and Raffel 2021, arXiv 2111.09832 (diagonal Fisher, closed form).
    """
    if len(fishers) != len(deltas):
        raise ConfigError(f"fisher: {len(fishers)} Fisher diagonals for {len(deltas)} adapters; give one each.")
    shape, dtype, device = deltas[0].shape, deltas[0].dtype, deltas[0].device
    above, below = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    for delta, weight, diagonal in zip(deltas, weights, fishers, strict=True):
        if diagonal.shape != shape:
            raise ShapeError(f"fisher: a diagonal is {tuple(diagonal.shape)}, expected {tuple(shape)}.")
        if not bool(torch.isfinite(diagonal).all()) or bool((diagonal < 0).any()):
            raise NumericsError("fisher: a diagonal has negative or non-finite entries; it is a mean of squares.")
        weighted = weight * (diagonal.to(above) + floor)
        above += weighted * delta.dense()
        below += weighted
    if bool((below == 0).any()):
        raise NumericsError("fisher: Σ w_t F_t is 0 somewhere, so the mean is not determined; use a floor above 0.")
    return Dense(above / below)


@dataclass(frozen=True, eq=False)
class AdaMerged:
    """What AdaMerging learnt.

    Args:
        coefficients: (T,) one per task, or (L, T) one row per layer.
        layers: name of each row's layer; empty when task-wise.
        losses: the loss before each step, then after the last (steps + 1).
    """

    coefficients: Tensor
    layers: tuple[str, ...]
    losses: tuple[float, ...]


def adamerge(
    adapters: Sequence[Mapping[str, DeltaLike]],
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    layer_of: Callable[[str], str] | None = None,
    weights: Sequence[float] | None = None,
    init: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
) -> AdaMerged:
    """Return the coefficients λ that minimise a loss of the merged change Σ_t λ_t ΔW_t, by Adam.

    Task-wise: one λ_t per task. Layer-wise: one λ_t^l per task and layer, l = layer_of(name).

    Args:
        adapters: T mappings name -> delta (o, i), dense or in factors, with the same names.
        loss: gives a scalar () from the merged change, name -> ΔW (o, i), differentiable; the paper's is the entropy
            of the merged model's predictions on unlabelled inputs of every task.
        layer_of: name -> layer; None is task-wise; `lambda name: name` gives every tensor its own.
        weights: (T,) start values; `init` for all if None.
        init: start value of every λ.
        steps: Adam steps.
        lr: Adam's rate.

    Returns:
        `AdaMerged`: the coefficients, their layers and the losses. Changes of every adapter stay in memory, dense.

    Raises:
        ConfigError: steps or lr out of range, or weights that do not match.
        NumericsError: a delta holds NaN or infinity, or the loss is not a finite scalar or does not depend on the
            coefficients.

    Source: Yang et al. 2023, arXiv 2310.02575; init 0.3 and Adam at 1e-3 as there.
    """
    if steps < 0 or lr <= 0:
        raise ConfigError(f"adamerging: steps is {steps} and lr is {lr}; expected ≥ 0 and > 0.")
    start = check_weights(weights, len(adapters), "adamerging") if weights is not None else (init,) * len(adapters)
    names = list(adapters[0])
    changes = {
        name: torch.stack(
            [check_finite(as_delta(a[name], name), name, f"adapter {t}").dense() for t, a in enumerate(adapters)]
        )
        for name in names
    }
    layers = tuple(dict.fromkeys(layer_of(name) for name in names)) if layer_of else ()
    row = {name: layers.index(layer_of(name)) for name in names} if layer_of else {}
    first = changes[names[0]]
    table = torch.tensor([start] * max(len(layers), 1), dtype=first.dtype, device=first.device)
    with torch.enable_grad():
        table.requires_grad_(True)
        optimizer = torch.optim.Adam([table], lr=lr, betas=(0.9, 0.999))
        losses = []
        for step in range(steps + 1):
            merged = {n: torch.tensordot(table[row.get(n, 0)].to(c), c, dims=1) for n, c in changes.items()}
            value = loss(merged)
            if value.ndim or not bool(torch.isfinite(value)):
                raise NumericsError(
                    f"adamerging: the loss at step {step} is {value.detach()}, expected a finite scalar ()."
                )
            losses.append(float(value.detach()))
            if step == steps:
                break
            if not value.requires_grad:
                raise NumericsError(
                    "adamerging: the loss does not depend on the merged change, so nothing can be learnt: run the "
                    "model with the given tensors (torch.func.functional_call) and without no_grad."
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    result = table.detach()
    return AdaMerged(result if layers else result[0], layers, tuple(losses))
