"""Kernels on a GPU: bf16 numerics against fp64, the same bits every time, CUDA-graph replay.

Run: pytest -m gpu tests/kernels/test_gpu.py
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from experiments.gpu.launching import direct, unasked
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

from .compare import EPS, Case, assert_three_way, make_case, results, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENGINES = ("triton_concat", "triton_grouped")
each_engine = pytest.mark.parametrize("engine", ENGINES)
SHAPES = {
    "one row": {"rows": (1,), "d_in": 1024, "d_out": 1024, "n_experts": 8, "rank": 8},
    "sixteen rows": {"rows": (16,), "d_in": 1024, "d_out": 3072, "n_experts": 8, "rank": 8},
    "odd sizes": {"rows": (333,), "d_in": 523, "d_out": 1111, "n_experts": 5, "rank": 7, "k": 3},
    "tokens": {"rows": (4, 1024), "d_in": 1024, "d_out": 1024, "n_experts": 8, "rank": 8},
    "long": {"rows": (8, 1024), "d_in": 512, "d_out": 768, "n_experts": 16, "rank": 16},
    "sequences": {"rows": (4, 300), "wrows": (4, 1), "d_in": 256, "d_out": 256},
    "dense": {"rows": (700,), "d_in": 256, "d_out": 512, "n_experts": 8, "rank": 8, "k": None},
    "many experts": {"rows": (2048,), "d_in": 512, "d_out": 512, "n_experts": 64, "rank": 16},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def on_gpu(case: Case) -> Case:
    indices = None if case.indices is None else case.indices.cuda()
    return Case(*(v.cuda() for v in (case.x, case.a, case.b, case.weights)), indices, case.grad.cuda())


@each_engine
@each_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_three_way_precision(engine, shape, dtype, poisoned):
    case = on_gpu(make_case(**shape)).to(dtype, torch.float32)
    got = results(partial(low_rank_mixture, engine=engine), case)
    assert_three_way(got, results(low_rank_mixture_reference, case), truth(case), eps=EPS[dtype])


@each_engine
@pytest.mark.parametrize("name", ["sixteen rows", "odd sizes", "long", "many experts"])
def test_the_same_bits_every_time(engine, name):
    case = on_gpu(make_case(**SHAPES[name])).to(torch.bfloat16, torch.float32)
    first = results(partial(low_rank_mixture, engine=engine), case)
    for _ in range(9):
        for one, other in zip(first, results(partial(low_rank_mixture, engine=engine), case), strict=True):
            assert torch.equal(one, other)


@each_engine
@pytest.mark.parametrize("name", ["sixteen rows", "odd sizes", "long", "many experts"])
def test_direct_launches_give_the_same_bits(engine, name, poisoned):
    case = on_gpu(make_case(**SHAPES[name])).to(torch.bfloat16, torch.float32)
    run = partial(low_rank_mixture, engine=engine)
    with direct(False):
        expected = results(run, case)
    with direct(True):
        results(run, case)  # the first of each kind, which Triton compiles
        with unasked():
            got = results(run, case)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


@each_engine
@pytest.mark.parametrize("n_rows", [1, 16, 512])
def test_a_replayed_graph_gives_the_same(engine, n_rows):
    """New inputs in the captured buffers, other experts included: the grids cover every routing."""
    shape = {"d_in": 1024, "d_out": 1024, "n_experts": 8, "rank": 8}
    case = on_gpu(make_case((n_rows,), **shape)).to(torch.bfloat16, torch.float32)
    other = on_gpu(make_case((n_rows,), seed=1, **shape)).to(torch.bfloat16, torch.float32)
    weight = (torch.randn(1024, 1024, device="cuda") / 32).bfloat16()
    x, weights, indices = case.x.clone(), case.weights.clone(), case.indices.clone()

    def run() -> torch.Tensor:
        with torch.no_grad():
            return mixture_linear(x, weight, None, case.a, case.b, weights, indices, engine=engine)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for new in (case, other):
        x.copy_(new.x)
        weights.copy_(new.weights)
        indices.copy_(new.indices)
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, run())


@each_engine
def test_mixture_linear_three_way(engine):
    case = on_gpu(make_case((600,), d_in=512, d_out=768, n_experts=8, rank=8)).to(torch.bfloat16, torch.float32)
    weight = (torch.randn(768, 512, device="cuda") / 22).bfloat16()

    def fused(x, *rest):
        return mixture_linear(x, weight, None, *rest, engine=engine)

    def apart(x, *rest):
        return F.linear(x, weight.to(x.dtype)) + low_rank_mixture_reference(x, *rest)

    exact = results(apart, case.to(torch.float64))
    assert_three_way(results(fused, case), results(apart, case), exact, eps=EPS[torch.bfloat16])


def test_fullgraph_compile_and_backward():
    case = on_gpu(make_case((256,), d_in=256, d_out=256, n_experts=8, rank=8)).to(torch.float32)
    compiled = torch.compile(low_rank_mixture, fullgraph=True, backend="aot_eager")
    assert_three_way(results(compiled, case), results(low_rank_mixture_reference, case), truth(case), eps=1e-6)


@pytest.mark.parametrize("engine", [None, "concat", "triton_grouped"])
@pytest.mark.parametrize(("n_experts", "width"), [(8, 8), (64, 48)])
def test_grouped_linear_and_sum_three_way(engine, n_experts, width, poisoned):
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(700, 256, generator=rng), torch.randn(n_experts, width, 256, generator=rng) / 16
    values = torch.randn(700, 2, width, generator=rng)
    indices = torch.rand(700, n_experts, generator=rng).topk(2, -1).indices.cuda()
    x, weight, values = (value.to("cuda", torch.bfloat16) for value in (x, weight, values))

    def run(op, leaf, weight, grad):
        leaves = [value.clone().requires_grad_() for value in (leaf, weight)]
        y = op(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)), *([y.detach()] * 2)

    for op, plain, leaf, grad in (
        (grouped_linear, lambda x, w: torch.einsum("ti,tkpi->tkp", x, w[indices]), x, values),
        (grouped_sum, lambda v, w: torch.einsum("tkp,tkpi->ti", v, w[indices]), values, x),
    ):
        got = run(lambda *o, op=op: op(*o, indices, engine=engine), leaf, weight, grad)
        exact = run(plain, leaf.double(), weight.double(), grad.double())
        assert_three_way(got, run(plain, leaf, weight, grad), exact, eps=EPS[torch.bfloat16])


@pytest.mark.parametrize("n_experts", [8, 16])
def test_a_router_in_the_shrink_equals_the_one_apart(n_experts, poisoned):
    rng = torch.Generator().manual_seed(0)
    shapes = ((4096, 512), (n_experts, 512), (n_experts, 8, 512), (n_experts, 8, 768), (768, 512), (4096, 768))
    *values, grad = (torch.randn(*s, generator=rng).to("cuda", torch.bfloat16) / s[-1] ** 0.5 for s in shapes)

    def run(engine, dtype):
        x, gate, a, b = (value.to(dtype).requires_grad_() for value in values[:4])
        y, _, indices, *_ = gated_linear(x, values[4].to(dtype), None, Gate(gate, 2), a, b, engine=engine)
        return indices, (y.detach(), *torch.autograd.grad(y, (x, gate, a, b), grad.to(dtype)))

    (chosen, got), (expected, plain), (_, exact) = (
        run(*arguments)
        for arguments in (("triton_concat", torch.bfloat16), ("concat", torch.bfloat16), ("concat", torch.float64))
    )
    assert torch.equal(chosen, expected)
    assert_three_way(got, plain, exact, eps=EPS[torch.bfloat16])


def test_measured_tiles_give_the_same_values(tmp_path, monkeypatch):
    monkeypatch.setenv("MOA_CACHE", str(tmp_path))
    case = on_gpu(make_case(**SHAPES["tokens"])).to(torch.bfloat16, torch.float32)
    run = partial(low_rank_mixture, engine="triton_concat")
    fixed = results(run, case)
    monkeypatch.setattr("moa.kernels.triton.tiles.TUNE", True)
    assert_three_way(results(run, case), fixed, truth(case), eps=EPS[torch.bfloat16])
    assert list(tmp_path.glob("tiles-*.json"))


def test_the_dispatcher_picks_triton():
    assert engines()["triton_concat"] is None
    assert choose_engine(8192, 4096, 4096, 8, 8, 2, torch.bfloat16, "cuda") == "triton_concat"
    assert choose_engine(8192, 4096, 4096, 128, 16, 2, torch.bfloat16, "cuda") == "triton_grouped"
