"""Comparison helpers and inputs for kernel tests. Each helper is seen to fail in `test_compare.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa.kernels.reference import low_rank_mixture_reference

# Added to twice the error of plain PyTorch: half a unit in the last place of 16-bit dtypes, some ten in fp32.
EPS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
NAMES = ("y", "grad_x", "grad_a", "grad_b", "grad_weights")


@dataclass(frozen=True)
class Case:
    """Operands of one mixture and the gradient that arrives at y."""

    x: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor
    indices: Tensor | None
    grad: Tensor

    def to(self, dtype: torch.dtype, weights_dtype: torch.dtype | None = None) -> Case:
        """Return the same numbers in another dtype; weights may keep one of their own."""
        routed = self.weights.to(weights_dtype or dtype)
        x, a, b, grad = (value.to(dtype) for value in (self.x, self.a, self.b, self.grad))
        return Case(x, a, b, routed, self.indices, grad)


def make_case(
    rows: Sequence[int] = (6,),
    wrows: Sequence[int] | None = None,
    *,
    d_in: int = 5,
    d_out: int = 7,
    n_experts: int = 4,
    rank: int = 3,
    k: int | None = 2,
    seed: int = 0,
) -> Case:
    """Return random fp64 operands; k=None is a dense routing without indices."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    wrows = rows if wrows is None else wrows
    indices = None
    if k is not None:
        indices = torch.rand(*wrows, n_experts, generator=rng).topk(k, dim=-1).indices
    return Case(
        draw(*rows, d_in),
        draw(n_experts, rank, d_in) / d_in**0.5,
        draw(n_experts, rank, d_out) / rank**0.5,
        draw(*wrows, n_experts if k is None else k),
        indices,
        draw(*rows, d_out),
    )


def results(function: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, a, b and weights."""
    leaves = [v.detach().clone().requires_grad_() for v in (case.x, case.a, case.b, case.weights)]
    y = function(*leaves, case.indices)
    return y.detach(), *torch.autograd.grad(y, leaves, case.grad.to(y.dtype))


def truth(case: Case) -> tuple[Tensor, ...]:
    """Return y and every gradient of the definition, in fp64 from the numbers of the case."""
    return results(low_rank_mixture_reference, case.to(torch.float64))


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Fail unless each pair has one shape and differs by at most `tolerance` times the expected maximum."""
    for name, one, other in zip(NAMES, got, expected, strict=True):
        assert one.shape == other.shape, f"{name}: shape {tuple(one.shape)}, expected {tuple(other.shape)}"
        error = _error(one, other)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def assert_three_way(got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], eps: float) -> None:
    """Fail unless each error of `got` is at most twice that of plain PyTorch in the same dtype, plus eps."""
    for name, one, other, right in zip(NAMES, got, plain, exact, strict=True):
        assert one.shape == right.shape, f"{name}: shape {tuple(one.shape)}, expected {tuple(right.shape)}"
        allowed = 2 * _error(other, right) + eps
        error = _error(one, right)
        assert error <= allowed, f"{name}: relative error {error:.2e} > {allowed:.2e}"


def _error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected magnitude; infinite where got is not finite."""
    if expected.numel() == 0:
        return 0.0
    if not got.isfinite().all():
        return float("inf")
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()
