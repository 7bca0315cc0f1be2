"""Triton engines in Triton's interpreter, on a CPU. Not collected by itself: `test_triton.py` runs it with
TRITON_INTERPRET=1, which must be set before the kernels are imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moa.errors import BackendError
from moa.kernels import (
    Gate,
    choose_engine,
    engines,
    gated_linear,
    grouped_linear,
    grouped_sum,
    low_rank_mixture,
    mixture_linear,
)
from moa.kernels.reference import low_rank_mixture_reference
from moa.kernels.triton import decode

from .compare import EPS, Case, assert_three_way, make_case, results, truth

# The interpreter of triton before 3.9 takes scalars from arrays in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
ENGINES = ("triton_concat", "triton_grouped")
each_engine = pytest.mark.parametrize("engine", ENGINES)
# numpy, on which the interpreter runs, warns of the overflows that a test is about.
overflows = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
SHAPES = {
    "one row": {"rows": (1,), "d_in": 40, "d_out": 72},
    "few rows, odd sizes": {"rows": (5,), "wrows": ()},
    "few rows, split features": {"rows": (3,), "d_in": 600, "d_out": 40, "n_experts": 8, "rank": 8},
    "sequences": {"rows": (2, 40), "wrows": (2, 1), "d_in": 33, "d_out": 130},
    "constant": {"rows": (70,), "wrows": (), "d_in": 20, "d_out": 24},
    "tokens": {"rows": (2, 37), "d_in": 40, "d_out": 72, "n_experts": 5},
    "dense": {"rows": (66,), "d_in": 40, "d_out": 36, "k": None},
    "few dense rows": {"rows": (4,), "k": None},
    "all experts": {"rows": (65,), "k": 4},
    "one expert": {"rows": (67,), "n_experts": 1, "k": 1},
    "several column blocks": {"rows": (65,), "d_in": 24, "d_out": 24, "n_experts": 10, "rank": 15, "k": 3},
    "a rank of several blocks": {"rows": (66,), "d_in": 24, "d_out": 24, "n_experts": 2, "rank": 70, "k": 1},
    "rank one": {"rows": (65,), "n_experts": 16, "rank": 1, "k": 5},
}


def test_the_interpreter_is_on():
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    assert engines()["triton_concat"] is None


def check(engine: str, case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    case = case.to(dtype, torch.float32)
    got = results(partial(low_rank_mixture, engine=engine), case)
    assert [value.dtype for value in got] == [dtype] * 4 + [torch.float32]
    assert_three_way(got, results(low_rank_mixture_reference, case), truth(case), eps=EPS[dtype])
    return got


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_triton_concat_equals_the_truth_in_value_and_every_gradient(shape, poisoned):
    check("triton_concat", make_case(**shape))


@pytest.mark.parametrize("name", ["one row", "tokens", "a rank of several blocks"])
def test_triton_grouped_equals_the_truth_in_value_and_every_gradient(name, poisoned):
    check("triton_grouped", make_case(**SHAPES[name]))


@pytest.mark.parametrize(("engine", "n_rows"), [(ENGINES[0], 3), (ENGINES[0], 70), (ENGINES[1], 3)])
def test_fp16(engine, n_rows):
    check(engine, make_case((n_rows,), d_in=64, d_out=48, n_experts=8, rank=4), torch.float16)


@each_engine
def test_zero_rows(engine):
    case = make_case((0,)).to(torch.float32)
    for value in results(partial(low_rank_mixture, engine=engine), case):
        assert value.numel() == 0 or (value == 0).all()


@each_engine
def test_experts_without_rows_get_zero_gradients(engine, poisoned):
    case = make_case((70,), n_experts=6)
    case = replace(case, indices=torch.tensor([4, 1]).expand(70, 2).contiguous())
    got = check(engine, case)
    assert (got[2][[0, 2, 3, 5]] == 0).all() and (got[3][[0, 2, 3, 5]] == 0).all()


@each_engine
def test_every_row_to_one_expert(engine, poisoned, monkeypatch):
    monkeypatch.setattr("moa.kernels.triton.triton_grouped._CHUNK", 64)  # fewer than the rows
    case = make_case((150,), d_in=8, d_out=8, k=1, n_experts=3)
    check(engine, replace(case, indices=torch.full((150, 1), 2)))


@pytest.mark.parametrize(("engine", "n_rows"), [(ENGINES[0], 4), (ENGINES[0], 70), (ENGINES[1], 4)])
def test_repeated_experts_add(engine, n_rows):
    case = make_case((n_rows,), k=3)
    check(engine, replace(case, indices=case.indices[:, [0, 1, 0]].contiguous()))


@pytest.mark.parametrize(("engine", "n_rows"), [(ENGINES[0], 4), (ENGINES[0], 70), (ENGINES[1], 4)])
def test_strided_operands(engine, n_rows):
    case = make_case((n_rows,), d_in=12, d_out=20)
    views = {
        "rows of a wider matrix": lambda v: torch.cat([v, v], -1)[:, : v.shape[1]],
        "columns": lambda v: v.T.contiguous().T,
    }
    for view in views.values():
        strided = replace(case, **{n: view(getattr(case, n)) for n in ("x", "weights", "indices", "grad")})
        operands = strided.to(torch.float32)
        assert not operands.indices.is_contiguous()
        check(engine, strided)


@each_engine
def test_ragged_ranks_are_zero_rows(engine):
    case = make_case((70,), rank=4)
    case.a[1, 2:], case.b[1, 2:] = 0, 0
    got = check(engine, case)
    assert (got[2][1, 2:] == 0).all() and (got[3][1, 2:] == 0).all()


@overflows
@pytest.mark.parametrize(
    ("engine", "n_rows", "dense"),
    [*((ENGINES[0], n_rows, dense) for n_rows in (4, 70) for dense in (True, False)), (ENGINES[1], 4, False)],
)
def test_an_overflow_in_an_inactive_expert_reaches_nothing(engine, n_rows, dense):
    case = make_case((n_rows,), n_experts=3).to(torch.float32)
    case.a[2] = 3e38
    if dense:
        case = replace(case, weights=F.pad(case.weights, (0, 1)), indices=None)
    else:
        case = replace(case, indices=torch.tensor([[0, 1]]).expand(n_rows, 2).contiguous())
    got = results(partial(low_rank_mixture, engine=engine), case)
    small = replace(case, a=case.a[:2], b=case.b[:2], weights=case.weights[:, :2])
    mine = got[0], got[1], got[2][:2], got[3][:2], got[4][:, :2]
    assert_three_way(mine, results(low_rank_mixture_reference, small), truth(small), eps=1e-6)
    assert (got[2][2] == 0).all() and (got[3][2] == 0).all()


def test_grouped_never_reads_an_expert_nobody_chose():
    case = make_case((9,), n_experts=3).to(torch.float32)
    case.a[2], case.b[2] = float("nan"), float("nan")
    case = replace(case, indices=torch.tensor([[0, 1]]).expand(9, 2).contiguous())
    assert all(v.isfinite().all() for v in results(partial(low_rank_mixture, engine="triton_grouped"), case))


@pytest.mark.parametrize(("engine", "n_rows"), [(ENGINES[0], 4), (ENGINES[0], 70), (ENGINES[1], 4)])
def test_mixture_linear(engine, n_rows, poisoned):
    case = make_case((n_rows,), d_in=24, d_out=40).to(torch.float32)
    weight, bias = torch.randn(40, 24), torch.randn(40)

    def fused(x, *rest):
        return mixture_linear(x, weight, bias, *rest, engine=engine)

    def apart(x, *rest):
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)) + low_rank_mixture_reference(x, *rest)

    assert_three_way(results(fused, case), results(apart, case), results(apart, case.to(torch.float64)), eps=1e-6)


@each_engine
@pytest.mark.parametrize("needs", [1, 2, 4, 8, 5, 10])
def test_only_the_gradients_asked_for(engine, needs):
    case = make_case((17,)).to(torch.float32)
    expected = truth(case)[1:]
    leaves = [v.clone() for v in (case.x, case.a, case.b, case.weights)]
    wanted = [i for i in range(4) if needs >> i & 1]
    for i in wanted:
        leaves[i].requires_grad_()
    y = low_rank_mixture(*leaves, case.indices, engine=engine)
    for i, value in zip(wanted, torch.autograd.grad(y, [leaves[i] for i in wanted], case.grad), strict=True):
        torch.testing.assert_close(value, expected[i].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 17])
def test_few_rows_and_many_rows_agree(n_rows, monkeypatch):
    """The two-launch path against the three-launch one, whose hidden values it must keep as well."""
    case = make_case((n_rows,), d_in=300, d_out=40, n_experts=6, rank=5)
    few = check("triton_concat", case)
    monkeypatch.setattr(decode, "MAX_ROWS", 0)
    many = check("triton_concat", case)
    for one, other in zip(few, many, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dtypes_without_kernels_are_refused():
    case = make_case((5,))
    for engine in ENGINES:
        with pytest.raises(BackendError, match=r"not torch.float64: use 'concat'"):
            low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices, engine=engine)


def test_choice_on_a_gpu_changes_over_with_columns_per_slot():
    assert engines()["triton_concat"] is None

    def choose(n_rows: int, n_experts: int, rank: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return choose_engine(n_rows, 4096, 4096, n_experts, rank, k, dtype, "cuda")

    assert choose(8192, 8, 8, 2) == "triton_concat"
    assert choose(8192, 600, 1, 2) == "triton_concat"
    assert choose(8192, 601, 1, 2) == "triton_grouped"
    assert choose(8192, 64, 16, 64) == "triton_concat"  # dense
    assert choose(1, 64, 16, 2) == "triton_grouped"  # one row would read 62 experts for nothing
    assert choose(8192, 8, 8, 2, torch.float64) == "concat"


@pytest.mark.parametrize(("n_rows", "k"), [(0, 2), (1, 1), (70, 2)])
def test_grouped_linear_equals_plain_products(n_rows, k, poisoned):
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n_rows, 40, generator=rng), torch.randn(5, 24, 40, generator=rng)
    indices = torch.randint(0, 4, (n_rows, k), generator=rng)  # the last expert gets no row
    grad = torch.randn(n_rows, k, 24, generator=rng)
    found = []
    for engine in ("triton_grouped", "sorted"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped_linear(*leaves, indices, engine=engine)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
        leaves = grad.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped_sum(*leaves, indices, engine=engine)
        found[-1] += (y.detach(), *torch.autograd.grad(y, leaves, x))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("n_rows", "n_experts", "k", "dtype"), [
    (70, 4, 2, torch.float32),
    (65, 12, 3, torch.float32),  # several blocks of columns
    (130, 8, 1, torch.float32),
    (70, 8, 2, torch.float16),
])  # fmt: skip
def test_a_router_in_the_shrink_equals_the_one_apart(n_rows, n_experts, k, dtype, poisoned):
    rng = torch.Generator().manual_seed(n_rows)
    shapes = ((n_rows, 72), (n_experts, 72), (n_experts, 8, 72), (n_experts, 8, 40), (40, 72), (40,), (n_rows, 40))
    *values, grad = (torch.randn(*shape, dtype=torch.float64, generator=rng).to(dtype) for shape in shapes)

    def run(engine, dtype):
        x, gate, a, b = (value.to(dtype).requires_grad_() for value in values[:4])
        weight, bias = (value.to(dtype) for value in values[4:])
        y, weights, indices, logits = gated_linear(x, weight, bias, Gate(gate, k), a, b, 1.5, engine=engine)
        grads = torch.autograd.grad(y, (x, gate, a, b), grad.to(dtype))
        return indices, (y.detach(), logits.detach(), weights.detach(), *grads)

    (chosen, got), (expected, plain), (_, exact) = (
        run(*arguments) for arguments in (("triton_concat", dtype), ("concat", dtype), ("concat", torch.float64))
    )
    assert torch.equal(chosen, expected)
    assert_three_way(got[:5], plain[:5], exact[:5], eps=EPS[dtype])
    assert_three_way((*got[5:], *got[:3]), (*plain[5:], *plain[:3]), (*exact[5:], *exact[:3]), eps=EPS[dtype])
