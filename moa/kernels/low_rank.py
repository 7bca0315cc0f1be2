"""The two functions that layers call: a mixture of low-rank experts, alone or on top of its frozen linear.

They check and choose the compute dtype; the op itself is in `ops.py`, its eager node in `node.py`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..compat import is_transformed, own_view
from ..errors import ShapeError
from . import ops
from .dispatch import Chosen, choose
from .dtypes import cast, exact_dtypes
from .engine import Operands
from .node import Mix


def low_rank_mixture(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    *,
    scaling: float = 1.0,
    engine: str | None = None,
) -> Tensor:
    """Return the weighted sum of the chosen low-rank experts.

    y[t] = Σ_j weights[t, j] · (x[t] a[e]ᵀ) b[e] with e = indices[t, j].

    Args:
        x: (*rows, i) inputs, any strides; (0, i) is allowed.
        a: (E, r, i) down factors; may be fp32 masters of a lower-precision x.
        b: (E, r, o) up factors, stored transposed. Smaller ranks are padded with zero rows in a and b.
        weights: (*wrows, K) floating; wrows broadcasts against rows: (B, S), (B, 1) or (). Per-expert scales
            belong in here. A weight of exactly 0 means that the expert is not active on that row.
        indices: (*wrows, K) int64 expert of each slot; None means all of them, K = E. A repeated expert adds.
        scaling: multiplies every weight.
        engine: a name of `engines()`; None lets `choose_engine` decide.

    Returns:
        (*rows, o), new, in x's dtype, or in the autocast dtype where autocast is on. Gradients of x, a, b and
        weights come in each one's own dtype; products nobody asked for are not computed.

    Raises:
        ShapeError: shapes, dtypes or devices that do not belong together; an index that names no expert (on a
            CPU always, on a GPU with MOA_DEBUG=1).
        BackendError: `engine` is not known or cannot run here.

    Source: Hu et al. 2021, arXiv 2106.09685, §4.1, summed over experts as in Shazeer et al. 2017, arXiv
        1701.06538, eq. 1.

    Differs: a hidden value that overflows in an expert of weight 0 never reaches y or a gradient; but where
        an expert's *parameters* are not finite, the engines that run every expert spread them to all rows.
    """
    return _apply(x, a, b, weights, indices, None, None, scaling, engine)


def mixture_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    *,
    scaling: float = 1.0,
    engine: str | None = None,
) -> Tensor:
    """Return a frozen linear plus the weighted sum of the chosen low-rank experts, adapters first.

    y[t] = x[t] Wᵀ + bias + Σ_j weights[t, j] · (x[t] a[e]ᵀ) b[e] with e = indices[t, j].

    The base product accumulates onto the adapters' (one write instead of a read-modify-write, and more
    accurate than the other order); its input gradient accumulates the same way. Where the base weight or bias
    needs a gradient, the sum is formed from two separate ops instead, with the same value.

    Args:
        x: (*rows, i) inputs.
        weight: (o, i) frozen base weight.
        bias: (o,) frozen base bias, or None.
        a: (E, r, i) down factors.
        b: (E, r, o) up factors, stored transposed.
        weights: (*wrows, K) floating; wrows broadcasts against rows.
        indices: (*wrows, K) int64, or None for all experts, K = E.
        scaling: multiplies every weight.
        engine: a name of `engines()`; None lets `choose_engine` decide.

    Returns:
        (*rows, o), new, in x's dtype, or in the autocast dtype where autocast is on.

    Raises:
        ShapeError: shapes, dtypes or devices that do not belong together.
        BackendError: `engine` is not known or cannot run here.

    Source: as `low_rank_mixture`; base as in `torch.nn.functional.linear`.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return F.linear(x, weight, bias) + low_rank_mixture(x, a, b, weights, indices, scaling=scaling, engine=engine)
    if weight.shape != (b.shape[-1], x.shape[-1]) or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [None if t is None else tuple(t.shape) for t in (weight, bias, x, b)]
        raise ShapeError(
            "mixture_linear: weight {}, bias {}, x {} and b {} do not fit: weight is (o, i), bias (o,), "
            "x (*rows, i), b (E, r, o).".format(*shapes)
        )
    return _apply(x, a, b, weights, indices, weight, bias, scaling, engine)


def _apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    engine: str | None,
) -> Tensor:
    """Check, choose the compute dtype, and call the op, its eager node, or the engine itself."""
    dtype, name = x.dtype, engine or ""
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if not is_plain(x, a, b, weights):
        _check(_facts(x, a, b, weights, indices))
        flat = ops.flatten(Operands(cast(x, dtype), a, b, weights, indices, base, bias))
        weighted = flat.weights if scaling == 1 else flat.weights * scaling
        y: Tensor = ops.forward_op(flat.x, a, b, weighted, flat.indices, base, bias, name)[0]
        return y if x.ndim == 2 else own_view(y, (*x.shape[:-1], y.shape[-1]))
    chosen = _plan(_facts(x, a, b, weights, indices), dtype, name)
    if not chosen.few and torch.is_grad_enabled() and _needs_gradient(x, a, b, weights):
        mixed: Tensor = Mix.apply(x, a, b, weights, (indices, base, bias, scaling, dtype, name))
        return mixed
    with exact_dtypes(x):
        return ops.compose(Operands(cast(x, dtype), a, b, weights, indices, base, bias), chosen, scaling)


def _needs_gradient(x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> bool:
    return x.requires_grad or a.requires_grad or b.requires_grad or weights.requires_grad


def is_plain(*operands: Tensor) -> bool:
    """Return whether nothing traces or transforms these tensors, so that an op's bookkeeping may be left out."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    # Loops instead of generators: this is on the way of every decoded token.
    for value in operands:  # noqa: SIM110
        if type(value) is not Tensor and type(value) is not Parameter:
            return False
    return True


Facts = tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


def _facts(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor | None) -> Facts:
    """Return what can be known of the operands without looking at a value."""
    return (
        (x.shape, x.dtype, x.device),
        (a.shape, a.dtype, a.device),
        (b.shape, b.dtype, b.device),
        (weights.shape, weights.dtype, weights.device),
        None if indices is None else (indices.shape, indices.dtype, indices.device),
    )


@functools.lru_cache(maxsize=4096)
def _plan(facts: Facts, dtype: torch.dtype, name: str) -> Chosen:
    """Return the engine of one mixture whose operands belong together: looked into once for operands that are alike."""
    _check(facts)
    (x, _, device), (a, *_), (b, *_), (weights, *_) = facts[:4]  # type: ignore[misc]
    return choose(name, x[:-1].numel(), a, b[-1], weights[-1], dtype, device, "few_rows")


def _check(facts: Facts) -> None:
    """Raise ShapeError where the operands of one mixture do not belong together."""
    (x, dtype, device), (down, _, at_a), (up, _, at_b), (weights, weighing, at_weights), indices = facts  # type: ignore[misc]
    fits = len(down) == len(up) == 3 and down[0] == up[0] and down[1] == up[1]
    if not fits or len(x) < 1 or x[-1] != down[2]:
        raise ShapeError(
            f"low_rank_mixture: x {tuple(x)}, a {tuple(down)}, b {tuple(up)} do not fit: "
            "expected x (*rows, i), a (E, r, i), b (E, r, o) with the same E, r and i."
        )
    if not (dtype.is_floating_point and weighing.is_floating_point):
        raise ShapeError(f"low_rank_mixture: x is {dtype} and weights {weighing}; both must be floating.")
    if indices is None:
        if len(weights) < 1 or weights[-1] != down[0]:
            raise ShapeError(
                f"low_rank_mixture: weights {tuple(weights)} without indices must hold one weight for "
                f"each of the {down[0]} experts; pass indices to choose some of them."
            )
    elif indices[1] != torch.int64 or indices[0] != weights:
        raise ShapeError(
            f"low_rank_mixture: indices {indices[1]} {tuple(indices[0])} must be int64 and have the "
            f"shape of weights {tuple(weights)}."
        )
    places = {"a": at_a, "b": at_b, "weights": at_weights, "indices": device if indices is None else indices[2]}
    for name, place in places.items():
        if place != device:
            raise ShapeError(f"low_rank_mixture: x is on {device} but {name} on {place}; move one of them.")
