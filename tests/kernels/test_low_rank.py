"""`low_rank_mixture` and `mixture_linear`, every engine that runs here.

Run: pytest tests/kernels/test_low_rank.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moa.errors import ShapeError
from moa.kernels import engines, low_rank_mixture, mixture_linear
from moa.kernels.reference import low_rank_mixture_reference

from .compare import EPS, assert_same, assert_three_way, make_case, results, truth

HERE = [name for name, reason in engines().items() if reason is None]
EXACT = [name for name in HERE if name in ("concat", "sorted")]  # the engines that compute in fp64
each_engine = pytest.mark.parametrize("engine", EXACT)
SHAPES = {
    "rows": {"rows": (6,)},
    "tokens": {"rows": (2, 3)},
    "sequences": {"rows": (2, 3), "wrows": (2, 1)},
    "constant": {"rows": (2, 3), "wrows": ()},
    "constant of one": {"rows": (2, 3), "wrows": (1, 1)},
    "three axes": {"rows": (2, 3, 4), "wrows": (2, 1, 4)},
    "single row": {"rows": (1,)},
    "no axes": {"rows": (), "wrows": ()},
    "one expert": {"rows": (5,), "n_experts": 1, "k": 1},
    "all experts": {"rows": (5,), "k": 4},
    "dense": {"rows": (5,), "k": None},
    "dense constant": {"rows": (2, 3), "wrows": (), "k": None},
    "rank one": {"rows": (9,), "rank": 1, "k": 3},
    "many experts": {"rows": (11,), "n_experts": 33, "k": 5},
    "wide": {"rows": (300,), "d_in": 13, "d_out": 700},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@each_engine
@each_shape
def test_equals_the_truth_in_value_and_every_gradient(engine, shape, poisoned):
    case = make_case(**shape)
    assert_same(results(partial(low_rank_mixture, engine=engine), case), truth(case))


@each_engine
@each_shape
@pytest.mark.parametrize("with_bias", [True, False])
def test_mixture_linear_adds_its_base(engine, shape, with_bias, poisoned):
    case = make_case(**shape)
    weight = torch.randn(case.b.shape[-1], case.a.shape[-1], dtype=torch.float64)
    bias = torch.randn(case.b.shape[-1], dtype=torch.float64) if with_bias else None

    def fused(x, *rest):
        return mixture_linear(x, weight, bias, *rest, engine=engine)

    def apart(x, *rest):
        return F.linear(x, weight, bias) + low_rank_mixture_reference(x, *rest)

    assert_same(results(fused, case), results(apart, case))


@each_engine
def test_zero_rows(engine):
    case = make_case((0,))
    for value in results(partial(low_rank_mixture, engine=engine), case):
        assert value.numel() == 0 or (value == 0).all()


@each_engine
@pytest.mark.parametrize("k", [2, None])
def test_gradcheck(engine, k):
    case = make_case((2, 3), (2, 1), k=k)
    leaves = [v.clone().requires_grad_() for v in (case.x, case.a, case.b, case.weights)]
    assert torch.autograd.gradcheck(lambda *t: low_rank_mixture(*t, case.indices, engine=engine), leaves)


@each_engine
def test_gradcheck_of_mixture_linear(engine):
    case = make_case((4,))
    weight, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    leaves = [v.clone().requires_grad_() for v in (case.x, case.a, case.b, case.weights)]

    def function(x, *rest):
        return mixture_linear(x, weight, bias, *rest, case.indices, engine=engine)

    assert torch.autograd.gradcheck(function, leaves)


@each_engine
def test_a_trained_base_gets_its_gradient(engine):
    case = make_case((4,))
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    mixed = mixture_linear(case.x, weight, bias, case.a, case.b, case.weights, case.indices, engine=engine)
    got = torch.autograd.grad(mixed, (weight, bias), case.grad)
    expected = torch.autograd.grad(F.linear(case.x, weight, bias), (weight, bias), case.grad)
    torch.testing.assert_close(mixed, F.linear(case.x, weight, bias) + truth(case)[0], rtol=0, atol=1e-12)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@each_engine
def test_experts_relabelled_together_change_nothing(engine):
    case = make_case((6,))
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(case, a=case.a[order], b=case.b[order], indices=torch.argsort(order)[case.indices])
    one = low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices, engine=engine)
    other = low_rank_mixture(moved.x, moved.a, moved.b, moved.weights, moved.indices, engine=engine)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@each_engine
def test_repeated_experts_add(engine):
    case = make_case((6,))
    case = replace(case, indices=torch.tensor([[1, 1], [0, 2], [3, 3], [2, 2], [1, 0], [3, 3]]))
    assert_same(results(partial(low_rank_mixture, engine=engine), case), truth(case))


@each_engine
def test_strided_operands(engine):
    case = make_case((6,))
    strided = replace(
        case,
        x=torch.stack([case.x, case.x], dim=-1)[..., 0],
        weights=case.weights.T.contiguous().T,
        indices=case.indices.T.contiguous().T,
        grad=case.grad.T.contiguous().T,
    )
    assert not strided.x.is_contiguous()
    assert_same(results(partial(low_rank_mixture, engine=engine), strided), truth(case))


@each_engine
def test_a_broadcast_gradient_arrives(engine):
    case = make_case((6,))
    x = case.x.clone().requires_grad_()
    low_rank_mixture(x, case.a, case.b, case.weights, case.indices, engine=engine).sum().backward()
    expected = truth(replace(case, grad=torch.ones_like(case.grad)))[1]
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)


@each_engine
@pytest.mark.parametrize("dense", [True, False])
def test_an_overflow_in_an_inactive_expert_reaches_nothing(engine, dense):
    """Finite factors whose hidden value overflows: 0 · inf must not become NaN."""
    case = make_case((6,), n_experts=3).to(torch.float32)
    case.a[2] = 3e38
    if dense:
        weights = torch.zeros(6, 3)
        weights[:, :2] = case.weights
        case = replace(case, weights=weights, indices=None)
    else:
        case = replace(case, indices=torch.tensor([[0, 1]]).expand(6, 2).contiguous())
    got = results(partial(low_rank_mixture, engine=engine), case)
    small = replace(case, a=case.a[:2], b=case.b[:2])
    if dense:
        small = replace(small, weights=case.weights[:, :2])
    expected = truth(small)
    assert_same((got[0], got[1], got[2][:2], got[3][:2], got[4][:, :2]), expected, tolerance=1e-5)
    assert (got[2][2] == 0).all() and (got[3][2] == 0).all()


def test_sorted_never_reads_an_expert_nobody_chose():
    case = make_case((6,), n_experts=3)
    case.a[2], case.b[2] = float("nan"), float("nan")
    case = replace(case, indices=torch.tensor([[0, 1]]).expand(6, 2).contiguous())
    got = results(partial(low_rank_mixture, engine="sorted"), case)
    assert all(value.isfinite().all() for value in got)


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, None])
def test_three_way_precision(engine, dtype, k):
    case = make_case((64,), d_in=96, d_out=80, n_experts=8, rank=4, k=k).to(dtype, torch.float32)
    plain = results(low_rank_mixture_reference, case)
    got = results(partial(low_rank_mixture, engine=engine), case)
    assert [value.dtype for value in got] == [dtype] * 4 + [torch.float32]
    assert_three_way(got, plain, truth(case), eps=EPS[dtype])


def test_adapters_first_is_no_less_accurate_than_base_first():
    case = make_case((64,), d_in=256, d_out=256, n_experts=8, rank=4).to(torch.bfloat16, torch.float32)
    weight = (torch.randn(256, 256) / 16).bfloat16()
    operands = (case.a, case.b, case.weights, case.indices)
    exact = F.linear(case.x.double(), weight.double()) + truth(case)[0]
    fused = mixture_linear(case.x, weight, None, *operands)
    apart = F.linear(case.x, weight) + low_rank_mixture(case.x, *operands)
    assert (fused - exact).norm() <= (apart - exact).norm()


@each_engine
def test_fp32_masters_of_bf16_rows_keep_their_own_gradient_dtype(engine):
    case = make_case((8,)).to(torch.float32)
    leaves = [case.x.bfloat16().requires_grad_(), *(v.requires_grad_() for v in (case.a, case.b, case.weights))]
    y = low_rank_mixture(*leaves, case.indices, engine=engine)
    grads = torch.autograd.grad(y, leaves, case.grad.bfloat16())
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_autocast_runs_in_its_dtype():
    case = make_case((8,)).to(torch.float32)
    weight = torch.randn(7, 5)
    leaves = [v.requires_grad_() for v in (case.x, case.a, case.b, case.weights)]
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_mixture(*leaves, case.indices)
        full = mixture_linear(case.x, weight, None, *leaves[1:], case.indices)
        wide = low_rank_mixture(case.x.double(), *leaves[1:], case.indices)
    assert (y.dtype, full.dtype, wide.dtype) == (torch.bfloat16, torch.bfloat16, torch.float64)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y, leaves, case.grad.bfloat16()))


@pytest.mark.parametrize("needs", range(1, 16))
@each_engine
def test_only_the_gradients_asked_for(engine, needs):
    case = make_case((6,))
    expected = truth(case)[1:]
    leaves = [v.clone() for v in (case.x, case.a, case.b, case.weights)]
    wanted = [i for i in range(4) if needs >> i & 1]
    for i in wanted:
        leaves[i].requires_grad_()
    y = low_rank_mixture(*leaves, case.indices, engine=engine)
    got = torch.autograd.grad(y, [leaves[i] for i in wanted], case.grad)
    for i, value in zip(wanted, got, strict=True):
        torch.testing.assert_close(value, expected[i], rtol=0, atol=1e-12)


def test_checkpointing_gives_the_same_gradients():
    case = make_case((6,))
    plain = results(low_rank_mixture, case)
    again = results(lambda *t: checkpoint(low_rank_mixture, *t, use_reentrant=False), case)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [2, None])
def test_fullgraph_compile_gives_the_same(k):
    case = make_case((2, 3), (2, 1), k=k).to(torch.float32)
    weight, bias = torch.randn(7, 5), torch.randn(7)

    def function(x, *rest):
        return mixture_linear(x, weight, bias, *rest) + low_rank_mixture(x, *rest)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(results(compiled, case), results(function, case), tolerance=1e-6)


def test_fullgraph_compile_under_autocast():
    case = make_case((6,)).to(torch.float32)
    compiled = torch.compile(low_rank_mixture, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(case.x, case.a, case.b, case.weights, case.indices)
        expected = low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


BAD = {
    "x of another width": ({"x": (6, 4)}, "expected x"),
    "a of another rank": ({"a": (4, 2, 5)}, "expected x"),
    "b of another E": ({"b": (3, 3, 7)}, "expected x"),
    "weights of another K": ({"weights": (6, 3)}, "shape of weights"),
    "rows that do not broadcast": ({"weights": (5, 2), "indices": (5, 2)}, "broadcast"),
    "too few dense weights": ({"indices": None}, "each of the 4 experts"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_shapes_are_refused(change, message):
    case = make_case((6,))
    operands = {"x": case.x, "a": case.a, "b": case.b, "weights": case.weights, "indices": case.indices}
    for name, shape in change.items():
        dtype = torch.int64 if name == "indices" else torch.float64
        operands[name] = None if shape is None else torch.zeros(shape, dtype=dtype)
    with pytest.raises(ShapeError, match=message):
        low_rank_mixture(**operands)


@pytest.mark.parametrize("wrong", [-1, 4])
@each_engine
def test_an_index_of_no_expert_is_refused(engine, wrong):
    case = make_case((6,))
    case.indices[2, 1] = wrong
    with pytest.raises(ShapeError, match=r"experts 0 … 3"):
        low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices, engine=engine)


def test_wrong_dtypes_and_devices_are_refused():
    case = make_case((6,))
    with pytest.raises(ShapeError, match="int64"):
        low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices.int())
    with pytest.raises(ShapeError, match="floating"):
        low_rank_mixture(case.x, case.a, case.b, case.weights.long(), case.indices)
    with pytest.raises(ShapeError, match="a on meta"):
        low_rank_mixture(case.x, case.a.to("meta"), case.b, case.weights, case.indices)
    with pytest.raises(ShapeError, match="weight is"):
        mixture_linear(case.x, torch.zeros(7, 6), None, case.a, case.b, case.weights, case.indices)
