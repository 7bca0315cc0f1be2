"""The routers one by one; what they share is in test_laws.py. Run: pytest tests/routers/test_routers.py"""

from __future__ import annotations

import pytest
import torch

from moa.errors import ConfigError, ContextError, ShapeError
from moa.kernels import exact_linear
from moa.routers import FixedRouter, LinearRouter, SampledRouter
from moa.routers.router import frozen_while_decoding, pool
from moa.rows import repeat_to
from moa.types import Context, Routing
from tests.laws import assert_close


def test_routing_dense_and_selected():
    routing = Routing(torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]]), 4)
    assert torch.equal(routing.dense(), torch.tensor([[0.3, 0.0, 0.7, 0.0]]))
    assert routing.selected().tolist() == [[True, False, True, False]]
    assert routing.k == 2
    everyone = Routing(torch.ones(3, 4), None, 4)
    assert everyone.dense() is everyone.weights and bool(everyone.selected().all())


@pytest.mark.parametrize(
    ("n_experts", "k", "words"),
    [
        (4, 0, "k must be at least 1"),
        (4, 5, "k=5 with n_experts=4"),
        (0, 1, "n_experts must be at least 1"),
        (4, -1, "got -1"),
    ],
)
@pytest.mark.parametrize("router", [LinearRouter, SampledRouter])
def test_k_out_of_range(router, n_experts, k, words):
    with pytest.raises(ConfigError, match=words):
        router(8, n_experts, k)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noisy": True, "score": "sigmoid"}, "noisy"),
        ({"noisy": True, "bias_rate": 0.1}, "noisy"),
        ({"jitter": 1.0}, "jitter"),
        ({"jitter": -0.1}, "jitter"),
        ({"bias_rate": -1.0}, "bias_rate"),
    ],
)
def test_linear_router_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        LinearRouter(8, 4, 2, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"samples": 1}, "at least 2"), ({"samples": 0}, "at least 2"), ({"granularity": "batch"}, "granularity")],
)
def test_sampled_router_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        SampledRouter(8, 4, 2, **options)


def test_fixed_weights_of_another_length():
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        FixedRouter(8, 3, torch.ones(4))


def test_noise_and_jitter_in_training_only():
    x = torch.randn(6, 8)
    for options in ({"jitter": 0.3}, {"noisy": True}):
        router = LinearRouter(8, 4, 2, **options).train()
        torch.nn.init.normal_(router.weight)
        one, two = router(x, Context()), router(x, Context())
        assert not torch.equal(one.dense(), two.dense())
        router.eval()
        assert torch.equal(router(x, Context()).dense(), router(x, Context()).dense())


def test_noisy_logits_in_the_record_are_clean():
    router = LinearRouter(8, 4, 2, noisy=True).train()
    routing = router(torch.randn(6, 8), Context())
    assert not bool(routing.logits.any())  # the gate starts at zero, and the noise is not in what is reported
    assert routing.usage is not None and routing.usage.requires_grad


def test_selection_bias_moves_against_the_load_once_per_step():
    router = LinearRouter(2, 3, 1, score="sigmoid", bias_rate=0.01).train()
    assert router.selection_bias is not None and router.counts is not None
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
    x = torch.tensor([[2.0, 0], [2, 0], [2, 0], [0, 2]])
    for _ in range(2):  # two micro-batches
        router.observe(router(x, Context()), torch.tensor([True, True, True, True]))
    assert router.counts.tolist() == [6, 2, 0]
    assert not bool(router.selection_bias.any())
    router.step()
    assert_close(router.selection_bias, torch.tensor([-0.01, 0.01, 0.01]), 1e-6)
    assert router.counts.tolist() == [0, 0, 0]
    router.observe(router(x, Context()), torch.tensor([False, False, False, True]))  # padding does not count
    assert router.counts.tolist() == [0, 1, 0]
    assert set(router.state_dict()) == {"weight", "selection_bias"}


def test_balance_by_bias_evens_out_the_load():
    """A gate that sends everything to one expert is spread by the bias alone."""
    router = LinearRouter(4, 4, 1, score="sigmoid", bias_rate=0.01)
    x = torch.randn(512, 4)
    with torch.no_grad():
        router.weight.mul_(0.1)
        router.weight[0] += 0.5
    load = torch.zeros(4)
    for step in range(300):
        routing = router(x, Context())
        router.observe(routing, None)
        router.step()
        if step >= 280:
            load += routing.selected().float().mean(0) / 20
    assert load.max() < 0.32 and load.min() > 0.18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_exact_whatever_the_dtype_of_x(dtype):
    x, weight = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
        logits = exact_linear(x, weight)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    right = x.detach().double() @ weight.detach().double().T
    assert_close(logits, right, 1e-6)
    upstream = torch.randn(5, 4, dtype=logits.dtype)
    logits.backward(upstream)
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    assert_close(weight.grad, upstream.double().T @ x.detach().double(), 1e-6)
    bound = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-6)  # half a unit in the last place of x's dtype
    assert_close(x.grad, upstream.double() @ weight.detach().double(), bound)


def test_exact_linear_differentiates():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exact_linear, (x, weight))
    assert torch.autograd.gradcheck(exact_linear, (x[0, 0], weight))


def test_pool_is_the_mean_over_the_mask():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    expected = torch.stack([x[0, :2].mean(0), x[1, 1:].mean(0)]).unsqueeze(1)
    assert_close(pool(x, (mask,)), expected)
    assert_close(pool(x, ()), x.mean(1, keepdim=True))
    assert_close(pool(x, (torch.ones(2, 9, dtype=torch.bool), mask)), expected)  # the first whose length fits
    assert_close(pool(x.repeat_interleave(2, 0), (mask,)), expected.repeat_interleave(2, 0))  # beams
    assert not bool(pool(x, (torch.zeros_like(mask),)).any())  # nothing to look at: zero, not NaN


def test_pool_without_a_sequence_or_a_mask_that_fits():
    with pytest.raises(ShapeError, match="granularity='token'"):
        pool(torch.randn(2, 4), ())
    with pytest.raises(ShapeError, match="chunked prefill"):
        pool(torch.randn(2, 1, 4), (torch.ones(2, 3, dtype=torch.bool),))


def test_a_kept_routing_of_another_batch_is_refused():
    router = SampledRouter(4, 3, 1, granularity="sequence").eval()
    context = Context(frozen_routings={})
    kept = router(torch.randn(2, 5, 4), context)
    assert router(torch.randn(2, 1, 4), context) is kept
    with pytest.raises(ContextError, match="2 rows, this step has 3"):
        frozen_while_decoding(router, context, 3)
    assert frozen_while_decoding(router, Context(), 3) is None


def test_task_rows():
    context = Context(task_ids=torch.tensor([2, 0]))
    assert context.task_rows(torch.zeros(2, 5, 4), range(3)).tolist() == [[2], [0]]
    assert context.task_rows(torch.zeros(4, 4), range(3)).tolist() == [2, 2, 0, 0]  # beams, or flattened sequences
    with pytest.raises(ShapeError, match="task_ids has 2 entries, but the layer sees 3 rows"):
        context.task_rows(torch.zeros(3, 5, 4), range(3))
    with pytest.raises(ContextError, match="pass task_ids"):
        Context().task_rows(torch.zeros(2, 5, 4), range(3))


@pytest.mark.parametrize(("bad", "words"), [([0, 3], "task id 3: this model routes tasks 0 to 2"), ([-1, 0], "id -1"),
                                            ([0.0, 1.0], "whole numbers")])  # fmt: skip
def test_task_id_out_of_range(bad, words):
    with pytest.raises(ContextError, match=words):
        Context(task_ids=torch.tensor(bad)).task_rows(torch.zeros(2, 5, 4), range(3))


def test_repeat_to():
    assert repeat_to(torch.tensor([1, 2]), 4, "x").tolist() == [1, 1, 2, 2]
    with pytest.raises(ShapeError, match="x has 2 entries"):
        repeat_to(torch.tensor([1, 2]), 5, "x")


def test_mask_for_prefers_the_shape_and_accepts_flattened_rows():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    context = Context(masks=(mask,))
    assert context.mask_for(torch.zeros(2, 3, 4)) is mask
    assert torch.equal(context.mask_for(torch.zeros(6, 4)), mask.reshape(6))
    assert context.mask_for(torch.zeros(5, 4)) is None
