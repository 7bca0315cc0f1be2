"""Mixtures of weight changes: rows, memory, precision. Run: pytest tests/kernels/test_changes.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moa.kernels import Changes, change_mixture
from tests.laws import assert_close

I, O, T = 12, 10, 40  # noqa: E741


class Counted:
    """E dense changes that count how often they are formed, and on how many rows they are applied."""

    def __init__(self, n_experts: int, direct: bool, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.weights = torch.randn(n_experts, O, I, dtype=dtype, requires_grad=True)
        self.scale = torch.tensor(1.3, dtype=dtype, requires_grad=True)
        self.formed, self.rows, self.direct = 0, 0, direct

    def form(self, tensors: Any) -> Tensor:
        self.formed += 1
        return tensors["w"] * tensors["scale"]

    def on_rows(self, x: Tensor, tensors: Any) -> Tensor:
        self.rows += x.shape[:-1].numel()
        return F.linear(x, (tensors["w"] * tensors["scale"]).to(x.dtype))

    def changes(self) -> Changes:
        own, shared = {"w": self.weights}, {"scale": self.scale}
        return Changes(len(self.weights), O, self.form, self.on_rows if self.direct else None, own, shared)


def routing(rows: tuple[int, ...], n_experts: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    indices = torch.rand(*rows, n_experts).argsort(-1)[..., :k]
    return torch.randn(*rows, k, dtype=dtype, requires_grad=True), indices


def truth(x: Tensor, weights: Tensor, indices: Tensor | None, experts: Counted, base: Tensor | None) -> Tensor:
    """Return the definition: every expert on every row."""
    dense = weights if indices is None else torch.zeros(*weights.shape[:-1], len(experts.weights), dtype=weights.dtype)
    dense = dense if indices is None else dense.scatter(-1, indices, weights)
    out = torch.einsum("...i,eoi->...eo", x, experts.weights * experts.scale)
    y = (out * dense.unsqueeze(-1)).sum(-2)
    return y if base is None else y + F.linear(x, base)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("rows", [(4, 10), (4, 1), (1, 10), ()], ids=str)
@pytest.mark.parametrize("k", [2, None])
def test_values_and_gradients(direct: bool, with_base: bool, rows: tuple[int, ...], k: int | None) -> None:
    experts = Counted(5, direct)
    x = torch.randn(4, 10, I, dtype=torch.float64, requires_grad=True)
    weights, indices = routing(rows, 5, k or 5)
    found = indices if k else None
    base = torch.randn(O, I, dtype=torch.float64) if with_base else None
    upstream = torch.randn(4, 10, O, dtype=torch.float64)
    leaves = (x, weights, experts.weights, experts.scale)
    results = []
    for run in (
        lambda: change_mixture(x, weights, found, experts.changes(), base),
        lambda: truth(x, weights, found, experts, base),
    ):
        y = run()
        results.append([y, *torch.autograd.grad((y * upstream).sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("n_experts", [4, 16, 64])
def test_the_cost_grows_with_k_and_not_with_the_experts(n_experts: int) -> None:
    """K · T rows go through experts, forward and again in backward, however many experts there are."""
    experts = Counted(n_experts, direct=True)
    x = torch.randn(T, I, dtype=torch.float64, requires_grad=True)
    weights, indices = routing((T,), n_experts, 2)
    change_mixture(x, weights, indices, experts.changes()).sum().backward()
    assert experts.rows == 2 * (2 * T)
    experts = Counted(n_experts, direct=False)
    weights, indices = routing((3, 1), n_experts, 2)
    change_mixture(x[:36].view(3, 12, I), weights, indices, experts.changes()).sum().backward()
    assert experts.formed == 2 * len(indices.unique()), "a change that nobody chose was formed"


@pytest.mark.parametrize("direct", [False, True])
def test_nothing_of_an_experts_size_is_kept(direct: bool) -> None:
    """Saved for the backward pass: x, the routing, and what exists anyway; the same for 4 experts and for 64."""
    kept = []
    for n_experts in (4, 64):
        experts = Counted(n_experts, direct)
        x = torch.randn(T, I, dtype=torch.float64, requires_grad=True)
        weights, indices = routing((T,), n_experts, 2)
        there = {t.untyped_storage().data_ptr() for t in (x, weights, indices, experts.weights, experts.scale)}
        saved: list[int] = []

        def pack(t: Tensor, there: set[int] = there, saved: list[int] = saved) -> Tensor:
            if t.untyped_storage().data_ptr() not in there:
                saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            change_mixture(x, weights, indices, experts.changes())
        kept.append(sum(saved))
    assert kept == [0, 0]


@pytest.mark.parametrize("rows", [(T,), ()], ids=["by row", "constant"])
def test_half_precision_is_as_exact_as_pytorch(rows: tuple[int, ...]) -> None:
    """A small change on a bfloat16 base: the error is at most twice that of plain PyTorch, which adds two products."""
    experts = Counted(3, False, torch.float32)
    with torch.no_grad():
        experts.weights.mul_(1e-3)
    x, base = torch.randn(T, I).bfloat16(), torch.randn(O, I).bfloat16()
    weights, indices = routing(rows, 3, 2, torch.float32)
    exact = truth(x.double(), weights.double(), indices, _double(experts), base.double())
    plain = truth(x.float(), weights, indices, experts, None).bfloat16() + F.linear(x, base)
    got = change_mixture(x, weights, indices, experts.changes(), base)
    assert got.dtype == torch.bfloat16
    errors = [(y.double() - exact).abs().mean().item() for y in (got, plain)]
    assert errors[0] <= 2 * errors[1], errors


def _double(experts: Counted) -> Counted:
    out = Counted(len(experts.weights), experts.direct)
    out.weights, out.scale = experts.weights.detach().double(), experts.scale.detach().double()
    return out


def test_an_expert_that_no_row_chose_cannot_reach_it() -> None:
    experts = Counted(4, False)
    with torch.no_grad():
        experts.weights[3] = float("nan")
    x = torch.randn(6, I, dtype=torch.float64)
    indices = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0]])
    weights = torch.ones(6, 2, dtype=torch.float64)
    assert bool(change_mixture(x, weights, indices, experts.changes()).isfinite().all())
    dense = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    assert bool(change_mixture(x, dense, None, experts.changes()).isfinite().all())
