"""A gate, its mixture and the frozen linear in one node. Run: pytest tests/kernels/test_gated.py"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moa
from moa.experts import LoRABank
from moa.kernels import Gate, gated_linear, mixture_linear
from moa.routers import LinearRouter
from moa.routers.select import softmax_top_k

NAMES = ("x", "gate", "a", "b")


def operands(rows=(9,), dtype=torch.float64, d_in=6, d_out=5, n_experts=4, rank=3):
    rng = torch.Generator().manual_seed(0)
    shapes = (
        (*rows, d_in),
        (n_experts, d_in),
        (n_experts, rank, d_in),
        (n_experts, rank, d_out),
        (d_out, d_in),
        (d_out,),
    )
    return [torch.randn(*shape, dtype=torch.float64, generator=rng).to(dtype) for shape in shapes]


def together(x, weight, bias, gate, a, b, k, scaling=1.0, engine=None):
    """One node; y, logits, weights and indices of a softmax over the k largest logits."""
    y, weights, indices, logits = gated_linear(x, weight, bias, Gate(gate, k), a, b, scaling, engine=engine)
    return y, logits, weights, indices


def apart(x, weight, bias, gate, a, b, k, scaling, engine=None):
    """The definition by functions that have tests of their own."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ gate.to(wide).T
    weights, indices = softmax_top_k(logits, k)
    y = mixture_linear(x, weight, bias, a, b, weights * scaling, indices, engine=engine)
    return y, logits, weights, indices


def results(function, values, needs=(True,) * 4, parts=("y", "logits", "weights"), engine=None):
    """Return the outputs and the gradients of a loss over the named outputs."""
    *leaves, weight, bias = values
    leaves = [v.detach().clone().requires_grad_(need) for v, need in zip(leaves, needs, strict=True)]
    x, gate, a, b = leaves
    out = function(x, weight, bias, gate, a, b, 2, 1.5, engine=engine)
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, dtype=torch.float64, generator=rng).to(o.dtype) for o in out[:3]]
    chosen = [i for i, name in enumerate(("y", "logits", "weights")) if name in parts]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad([out[i] for i in chosen], wanted, [grads[i] for i in chosen], allow_unused=True)
    return [o.detach() for o in out], found


def assert_same_results(got, expected, tolerance=1e-11):
    for one, other in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("engine", [None, "concat", "sorted"])
@pytest.mark.parametrize("rows", [(70,), (9,), (2, 3), (0,), (1,)])
def test_it_equals_the_three_apart_in_value_and_every_gradient(rows, engine):
    values = operands(rows)
    assert_same_results(results(together, values, engine=engine), results(apart, values, engine=engine))


def test_the_comparison_fails_on_a_wrong_gradient(monkeypatch):
    values = operands((70,))  # few rows need no node
    expected = results(apart, values)
    monkeypatch.setattr("moa.kernels.gated._plus_product", lambda total, left, right, noise: total)
    with pytest.raises(AssertionError):
        assert_same_results(results(together, values), expected)


@pytest.mark.parametrize("parts", [("y",), ("logits",), ("weights",), ("y", "logits")])
def test_each_output_carries_its_own_gradient(parts):
    values = operands()
    assert_same_results(results(together, values, parts=parts), results(apart, values, parts=parts))


@pytest.mark.parametrize("frozen", NAMES)
def test_a_frozen_operand_gets_no_gradient_and_changes_no_other(frozen):
    needs = tuple(name != frozen for name in NAMES)
    assert_same_results(results(together, operands(), needs), results(apart, operands(), needs))


def test_gradcheck():
    x, gate, a, b, weight, bias = (value.requires_grad_(i < 4) for i, value in enumerate(operands((3,))))

    def function(x, gate, a, b):
        return together(x, weight, bias, gate, a, b, 2)[:3]

    assert torch.autograd.gradcheck(function, (x, gate, a, b))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_three_way_precision(dtype, eps):
    """Errors against fp64 are at most twice those of the three apart in the same dtype; gradients have their dtypes."""
    values = operands((40,), dtype)
    got, plain = results(together, values), results(apart, values)
    exact = results(apart, [value.double() for value in values])
    assert torch.equal(got[0][3], plain[0][3]), "the same experts"
    assert torch.equal(plain[0][3], exact[0][3])
    assert [g.dtype for g in got[1]] == [dtype] * 4
    for one, other, right in zip(
        (*got[0][:3], *got[1]), (*plain[0][:3], *plain[1]), (*exact[0][:3], *exact[1]), strict=True
    ):
        scale = right.abs().max()
        assert (one - right).abs().max() <= 2 * (other - right).abs().max() + eps * scale


def test_masters_of_higher_precision_keep_their_dtype():
    x, gate, a, b, weight, bias = operands(dtype=torch.float32)
    a.requires_grad_()
    y, logits, *_ = together(x.bfloat16(), weight, bias, gate, a, b, 2)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32 and a.grad.dtype == torch.float32


def layer(**options) -> tuple[moa.MoAModel, torch.Tensor]:
    torch.manual_seed(0)
    options = {"balance": 0.0, "z_loss": 0.0, **options}  # its tests compute their own loss
    model = moa.build(nn.Sequential(nn.Linear(6, 5)), "topk", 4, 2, rank=3, targets=["0"], **options)
    for _, branch in model.branches():
        nn.init.normal_(branch.bank.up)
    return model.train(), torch.randn(7, 6)


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_layer_takes_it_in_training_and_learns_the_same(monkeypatch):
    model, x = layer()
    calls = []
    monkeypatch.setattr("moa.experts.factored.gated_linear", lambda *a, **k: calls.append(1) or gated_linear(*a, **k))
    together = gradients(model, x)
    assert calls == [1]
    monkeypatch.setattr(LinearRouter, "gate", lambda self: None)
    apart = gradients(model, x)
    assert calls == [1] and together.keys() == apart.keys() and len(apart) == 3
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value)


def test_a_trace_holds_the_same_routing(monkeypatch):
    model, x = layer()
    found = []
    for _ in range(2):
        with model.tracing() as trace:
            model.base(x)
        found.append(trace.records[0].routing)
        monkeypatch.setattr(LinearRouter, "gate", lambda self: None)
    for field in ("weights", "indices", "logits", "scores"):
        torch.testing.assert_close(getattr(found[0], field), getattr(found[1], field))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_gives_the_same_gradients(reentrant):
    model, x = layer()
    x.requires_grad_()
    expected = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_who_decides_otherwise_is_asked():
    """Hooks, noise and subclasses change the routing, so it is not formed without them."""
    assert layer()[0].mixtures()["0"].branches[0].router.gate() is not None

    class Other(LinearRouter):
        def forward(self, x, context):
            return super().forward(-x, context)

    class Before:
        def forward(self, x, context):
            return LinearRouter.forward(self, 2 * x, context)

    class Mixed(Before, LinearRouter):
        pass

    class Plain(LinearRouter):
        pass

    class Vouched(Other):
        fused_gate = True

    class Again(Vouched):
        def forward(self, x, context):
            return super().forward(3 * x, context)

    given = {cls: cls(6, 4, 2).gate() is not None for cls in (Other, Mixed, Plain, Vouched, Again)}
    assert given == {Other: False, Mixed: False, Plain: True, Vouched: True, Again: False}
    replaced = LinearRouter(6, 4, 2)
    replaced.forward = Other(6, 4, 2).forward
    assert replaced.gate() is None
    hooked = LinearRouter(6, 4, 2)
    hooked.register_forward_hook(lambda *a: None)
    assert hooked.gate() is None
    assert LinearRouter(6, 4, 2, noisy=True).gate() is None
    jittered = LinearRouter(6, 4, 2, jitter=0.1)
    assert jittered.gate().jitter == 0.1 and jittered.eval().gate().jitter == 0


GATES = {
    "softmax top-k": {},
    "softmax, scores as weights": {"renormalize": False},
    "softmax of one": {"k": 1, "renormalize": False},
    "biased": {"bias_rate": 0.1},
    "biased, all experts": {"bias_rate": 0.1, "k": 4},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, scores as weights": {"score": "sigmoid", "renormalize": False},
    "biased sigmoid": {"score": "sigmoid", "bias_rate": 0.1},
    "dense": {"k": 4},
    "dense sigmoid": {"k": 4, "score": "sigmoid"},
    "dense sigmoid, scores as weights": {"k": 4, "score": "sigmoid", "renormalize": False},
    "jittered": {"jitter": 0.3},
    "jittered dense": {"k": 4, "jitter": 0.3},
}
each_gate = pytest.mark.parametrize("options", GATES.values(), ids=GATES.keys())


def of_a_router(options, rows, fused, dtype=torch.float64, wrong=1.0):
    """Return y, routing and gradients of a layer whose gate is formed in the node, or by the router's forward."""
    x, gate, a, b, weight, bias = operands(rows, dtype)
    torch.manual_seed(3)
    router, bank = LinearRouter(6, 4, **{"k": 2, **options}).to(dtype), LoRABank(6, 5, 4, rank=3, scaling=1.5).to(dtype)
    leaves = [x.requires_grad_(), router.weight, bank.down, bank.up]
    with torch.no_grad():
        for parameter, value in zip(leaves[1:], (gate, a, b), strict=True):
            parameter.copy_(value)
        if router.selection_bias is not None:
            router.selection_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    torch.manual_seed(5)  # of the jitter
    if fused:
        y, routing = bank.fused.add_gated(x, router.gate(), weight, bias)
    else:
        routing = router(x, moa.Context())
        y = bank.fused.add_linear(x, routing, weight, bias)
    rng = torch.Generator().manual_seed(1)
    outputs = y, routing.logits, routing.scores, routing.weights
    grads = [torch.randn(o.shape, dtype=torch.float64, generator=rng).to(o.dtype) * wrong for o in outputs]
    assert (routing.indices is None) == (router.k == 4 and router.selection_bias is None)
    chosen = torch.zeros(0) if routing.indices is None else routing.indices
    return (*(o.detach() for o in outputs), chosen), torch.autograd.grad(outputs, leaves, grads)


@each_gate
@pytest.mark.parametrize("rows", [(9,), (2, 40), (0,), (1,)])
def test_every_linear_gate_equals_its_router_in_value_and_every_gradient(options, rows):
    assert_same_results(of_a_router(options, rows, True), of_a_router(options, rows, False))


@each_gate
def test_the_comparison_of_gates_fails_on_a_wrong_gradient(options):
    with pytest.raises(AssertionError):
        assert_same_results(of_a_router(options, (9,), True, wrong=1.001), of_a_router(options, (9,), False))


@each_gate
def test_gates_in_16_bits_are_as_exact_as_their_router(options):
    if options.get("jitter"):
        pytest.skip("the noise of another dtype is another noise")
    got, plain = (of_a_router(options, (70,), fused, torch.bfloat16) for fused in (True, False))
    exact = of_a_router(options, (70,), False)
    assert got[0][1].dtype == torch.float32 and [g.dtype for g in got[1]] == [torch.bfloat16] * 4
    assert torch.equal(got[0][4], plain[0][4]) and torch.equal(plain[0][4], exact[0][4]), "the same experts"
    for one, other, right in zip(
        (*got[0][:4], *got[1]), (*plain[0][:4], *plain[1]), (*exact[0][:4], *exact[1]), strict=True
    ):
        assert (one - right).abs().max() <= 2 * (other - right).abs().max() + 4e-3 * right.abs().max()


@pytest.mark.parametrize("rows", [(9,), (2, 3), (0,), (1,), (70,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_gradients_it_gives_the_same(rows, dtype):
    x, gate, a, b, weight, bias = operands(rows, dtype)
    expected = together(x.clone().requires_grad_(), weight, bias, gate, a, b, 2, 1.5)
    with torch.no_grad():
        got = together(x, weight, bias, gate, a, b, 2, 1.5)
    assert torch.equal(got[3], expected[3])
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and not one.requires_grad
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("graded", [True, False])
def test_autocast_is_not_looked_at(graded):
    x, gate, a, b, weight, bias = operands(dtype=torch.float32)
    with torch.set_grad_enabled(graded):
        expected = together(x, weight, bias, gate, a, b, 2)
        with torch.autocast("cpu", torch.bfloat16):
            got = together(x, weight, bias, gate, a, b, 2)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
