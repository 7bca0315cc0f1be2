"""SLERP, model stock and averages of factors: closed forms.  pytest tests/merge/test_average.py"""

from __future__ import annotations

import math

import pytest
import torch

from moa.errors import ConfigError, ShapeError
from moa.merge import Dense, LowRank, average_factors, model_stock, slerp

from .tools import assert_close, factors, matrices


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("low", [True, False])
def test_slerp_walks_the_arc(t: float, low: bool) -> None:
    a, b = factors(2, seed=1), factors(3, seed=2)
    b = b.scaled(math.sqrt(float(a.dense().square().sum() / b.dense().square().sum())))  # equal norms
    ends = [a, b] if low else [Dense(a.dense()), Dense(b.dense())]
    got = slerp(ends, [1 - t, t])
    assert isinstance(got, LowRank) == low
    norm = a.dense().norm()
    assert float(got.dense().norm()) == pytest.approx(float(norm), rel=1e-12), "the norm is kept"
    whole = torch.acos((a.dense() * b.dense()).sum() / norm**2)
    part = torch.acos(((a.dense() * got.dense()).sum() / norm**2).clamp(-1, 1))
    assert float(part) == pytest.approx(t * float(whole), abs=1e-7)


def test_slerp_is_linear_between_parallel_or_zero_ends() -> None:
    a = factors()
    assert_close(slerp([a, a.scaled(3.0)], [0.5, 0.5]).dense(), 2 * a.dense(), 1e-12)
    assert_close(slerp([a, a.zeros()], [0.75, 0.25]).dense(), 0.75 * a.dense(), 1e-12)


def test_slerp_between_weights_is_not_slerp_between_changes() -> None:
    base, a, b = matrices(3)
    w0, w1 = base + a, base + b
    angle = torch.acos((w0 * w1).sum() / (w0.norm() * w1.norm()))
    expected = (torch.sin(0.7 * angle) * w0 + torch.sin(0.3 * angle) * w1) / torch.sin(angle) - base
    got = slerp([Dense(a), Dense(b)], [0.7, 0.3], base=base)
    assert_close(got.dense(), expected, 1e-12)
    with pytest.raises(AssertionError):
        assert_close(slerp([Dense(a), Dense(b)], [0.7, 0.3]).dense(), expected, 1e-3)


def test_slerp_refuses() -> None:
    a = factors()
    with pytest.raises(ConfigError, match="joins two"):
        slerp([a] * 3, [1.0] * 3)
    for weights in ([-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match="expected"):
            slerp([a, a], weights)
    with pytest.raises(ShapeError, match=r"base is \(5, 7\), the changes are \(7, 5\)"):
        slerp([a, a], [0.5, 0.5], base=torch.ones(5, 7))


def test_slerp_is_linear_where_no_arc_is_determined() -> None:
    a, noise = matrices(2)
    one, other = torch.tensor(0.01).double(), torch.tensor(-0.02).double()
    assert float(slerp([Dense(one), Dense(other)], [0.7, 0.3]).dense()) == pytest.approx(0.7 * 0.01 - 0.3 * 0.02)
    opposite = -2 * a
    assert_close(slerp([Dense(a), Dense(opposite)], [0.7, 0.3]).dense(), 0.7 * a + 0.3 * opposite, 1e-12)
    # Rounding must not choose the arc: opposite within 1e-3 is opposite.
    nearly = opposite + 1e-3 * noise
    assert_close(slerp([Dense(a), Dense(nearly)], [0.7, 0.3]).dense(), 0.7 * a + 0.3 * nearly, 1e-12)
    base = torch.tensor([5.0]).double()
    got = slerp([Dense(torch.tensor([-4.0]).double()), Dense(torch.tensor([-8.0]).double())], [0.25, 0.75], base=base)
    assert float(got.dense()) == pytest.approx(-7.0), "5 - 4 and 5 - 8 have opposite signs"


@pytest.mark.parametrize("degrees", [1.0, 45.0, 90.0, 170.0, 178.0])
def test_slerp_leaves_the_arc_only_beyond_the_cosine_that_mergekit_names(degrees: float) -> None:
    """At an angle θ in a plane of two axes the point at share t stands at angle t θ."""
    angle, t = math.radians(degrees), 0.3
    ends = [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]
    got = slerp([Dense(torch.tensor(e, dtype=torch.float64)) for e in ends], [1 - t, t]).dense()
    assert_close(got, torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("n", [2, 4])
def test_model_stock_from_the_cosines(n: int) -> None:
    deltas = [factors(2, seed=s).scaled(1 + s) for s in range(n)]
    full = [d.dense() for d in deltas]
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for p, a in enumerate(full) for b in full[p + 1 :]]
    c = float(torch.stack(cosines).mean())
    expected = n * c / (1 + (n - 1) * c) * torch.stack(full).mean(0)
    got = model_stock(deltas)
    assert isinstance(got, LowRank)
    assert_close(got.dense(), expected, 1e-12)
    assert_close(model_stock([Dense(f) for f in full]).dense(), expected, 1e-12)


def test_model_stock_of_equal_changes_is_that_change() -> None:
    a = factors()
    assert_close(model_stock([a, a]).dense(), a.dense(), 1e-12)
    assert float(model_stock([a, a.zeros()]).dense().abs().max()) == 0
    with pytest.raises(ConfigError, match="at least two"):
        model_stock([a])


def test_model_stock_is_the_mean_where_the_ratio_is_unbounded() -> None:
    a = factors()
    assert_close(model_stock([a, a.scaled(-3.0)]).dense(), -a.dense(), 1e-12)
    for values in ([0.01, -0.02], [0.01, 0.02, -0.06], [3.0, 3.0]):  # one entry has no angle
        deltas = [Dense(torch.tensor([v]).double()) for v in values]
        assert float(model_stock(deltas).dense()) == pytest.approx(sum(values) / len(values))


def test_averaging_factors_is_not_averaging_changes() -> None:
    deltas = [factors(4, 40, 30, seed=s) for s in range(3)]
    got = average_factors(deltas, [1 / 3] * 3)
    expected = sum(d.up for d in deltas) / 3 @ (sum(d.down for d in deltas) / 3)  # type: ignore[operator]
    assert_close(got.dense(), expected, 1e-13)
    mean = torch.stack([d.dense() for d in deltas]).mean(0)
    assert 0.5 < float((got.dense() - mean).norm() / mean.norm()) < 1.5
    same = [deltas[0]] * 3
    assert_close(average_factors(same, [1 / 3] * 3).dense(), deltas[0].dense(), 1e-13)


def test_heads_are_weighted_apart() -> None:
    deltas = [factors(2, 6, 8, seed=s) for s in range(3)]
    table = torch.rand(2, 3, dtype=torch.float64)
    down = torch.cat([sum(table[h, t] * deltas[t].down[:, 4 * h : 4 * h + 4] for t in range(3)) for h in range(2)], 1)  # type: ignore[misc]
    up = torch.cat([sum(table[h, t] * deltas[t].up[3 * h : 3 * h + 3] for t in range(3)) for h in range(2)], 0)  # type: ignore[misc]
    assert_close(average_factors(deltas, table).dense(), up @ down, 1e-13)
    uniform = average_factors(deltas, torch.full((2, 3), 1 / 3)).dense()
    assert_close(uniform, average_factors(deltas, [1 / 3] * 3).dense(), 1e-7)


def test_averaging_factors_equals_pefts_poly() -> None:
    """The reference is PEFT's own Poly layer, in evaluation, with random skills and a random routing table."""
    import peft
    from torch import nn

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x)

    config = peft.PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=2, target_modules=["lin"])
    model = peft.get_peft_model(Toy(), config).double()
    layer = model.base_model.model.lin
    a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]  # (H, E, i/H, r), (H, E, r, o/H)
    router = layer.poly_router["default"].module_logits
    for p in (a, b, router):
        nn.init.normal_(p)
    model.eval()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    for task in range(3):
        skills = [
            LowRank(
                torch.cat([a[h, e].T for h in range(2)], 1).detach(),
                torch.cat([b[h, e].T for h in range(2)], 0).detach() / 2,  # Poly's scale is 1 / r
            )
            for e in range(4)
        ]
        gates = torch.sigmoid(router[task].detach()).view(2, 4)
        merged = average_factors(skills, gates / gates.sum(-1, keepdim=True)).dense()
        with torch.no_grad():
            expected = model.base_model(x, task_ids=torch.full((5,), task))
        assert_close(x @ (layer.base_layer.weight.detach() + merged).T, expected, 1e-10)


def test_averaging_factors_refuses() -> None:
    with pytest.raises(ConfigError, match=r"ranks \[2, 3\]"):
        average_factors([factors(2), factors(3)], [0.5, 0.5])
    with pytest.raises(ConfigError, match="dense changes"):
        average_factors([factors(2), Dense(factors().dense())], [0.5, 0.5])
    with pytest.raises(ConfigError, match=r"\(1, 3\) for 2"):
        average_factors([factors(2)] * 2, [0.5] * 3)
    with pytest.raises(ShapeError, match="2 heads do not divide"):
        average_factors([factors(2)] * 2, torch.ones(2, 2))
