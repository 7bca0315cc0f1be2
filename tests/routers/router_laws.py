"""What must hold for every router: plain functions that raise AssertionError."""

from __future__ import annotations

import torch
from torch import Tensor

from moa.routers import Router
from moa.types import Context
from tests.laws import N_TASKS, assert_close, assert_same_routing, make_context


def router_routing_is_valid(router: Router, x: Tensor, context: Context, normalised: bool) -> None:
    """Indices are distinct and in range; rows broadcast against x's; weights are finite, and sum to one per row."""
    routing = router(x, context)
    assert routing.n_experts == router.n_experts
    rows = routing.weights.shape[:-1]
    torch.broadcast_shapes(rows[:-1] if len(rows) == x.ndim else rows, x.shape[:-1])  # one axis more is the heads
    assert bool(routing.weights.isfinite().all())
    if routing.indices is not None:
        assert routing.indices.dtype == torch.int64 and routing.indices.shape == routing.weights.shape
        assert bool(((routing.indices >= 0) & (routing.indices < router.n_experts)).all())
        assert bool((routing.selected().sum(-1) == routing.k).all()), "an expert is chosen twice in a row"
    else:
        assert routing.k == router.n_experts
    for name in ("logits", "scores", "usage"):
        value = getattr(routing, name)
        if value is not None:
            assert value.shape == (*routing.weights.shape[:-1], router.n_experts), name
            assert value.dtype in (torch.float32, torch.float64), f"{name} must not be in a 16-bit dtype"
    if routing.log_prob is not None:
        assert routing.log_prob.shape == routing.weights.shape[:-1]
        assert bool((routing.log_prob <= 1e-12).all())
    if normalised:
        one = torch.ones_like(routing.weights[..., 0])
        assert_close(routing.weights.sum(-1), one, 1e-6, "row sums")  # constant weights are kept in fp32


def router_is_deterministic_in_eval(router: Router, x: Tensor, context: Context) -> None:
    """Two calls in eval agree, and leave every buffer and the random state as they were."""
    router.eval()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    random_state = torch.get_rng_state()
    one, two = router(x, context), router(x, context)
    assert_same_routing(one, two)
    assert bool((torch.get_rng_state() == random_state).all()), "eval drew random numbers"
    assert all(bool((router.state_dict()[name] == value).all()) for name, value in before.items())


def router_parameters_are_reached(router: Router, x: Tensor, context: Context) -> None:
    """In training every trainable parameter gets a gradient through weights, log_prob or one of its losses."""
    from moa.objective.losses import LOSSES

    router.train()
    routing = router(x, context)
    value = (routing.weights * torch.randn_like(routing.weights)).sum()
    if routing.log_prob is not None:
        value = value + (routing.log_prob * torch.randn_like(routing.log_prob)).sum()
    for name in router.loss_weights:
        value = value + LOSSES[name](routing, None)
    parameters = [p for p in router.parameters() if p.requires_grad]
    if not parameters:
        return
    for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
        assert grad is not None and bool(grad.isfinite().all()), tuple(parameter.shape)
        assert bool(grad.any()), f"no gradient reaches a parameter of shape {tuple(parameter.shape)}"


def router_is_batch_invariant(router: Router, x: Tensor, mask: Tensor, streams: int = 1) -> None:
    """An example's routing is the same alone, with others, and in another order.

    Args:
        router: any.
        x: (B, S, i), or (n · B, S, i) of n streams.
        mask: (B, S), or (n · B, S).
        streams: n.
    """
    router.eval()
    together = router(x, make_context(x.shape[:-1], mask, x))
    if together.weights.ndim < 2:  # constant rows
        return
    tasks = torch.arange(x.shape[0]) % N_TASKS
    places = torch.arange(x.shape[0]).view(streams, -1)  # (n, B)
    for examples in (torch.randperm(places.shape[1]), torch.tensor([-1])):
        rows = places[:, examples].flatten()
        context = Context(task_ids=tasks[rows], masks=(mask[rows],), routing_masks=(mask[rows],), preview=(x[rows],))
        part = router(x[rows], context)
        assert_close(part.dense(), together.dense()[rows], what="weights")
        assert bool((part.selected() == together.selected()[rows]).all())


def router_is_causal(router: Router, x: Tensor, prompt: int) -> None:
    """A row's routing does not change with later rows; a pooled one looks at the prompt alone."""
    if not router.causal:
        return
    router.eval()
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, :prompt] = True
    context = make_context(x.shape[:-1], torch.ones_like(mask), x)
    context.routing_masks = (mask,)
    before = router(x, context)
    later = x.clone()
    later[:, prompt:] = torch.randn_like(later[:, prompt:]) * 10
    context.preview = (later,)
    after = router(later, context)
    if before.weights.ndim < 2:
        assert_same_routing(after, before)
        return
    seen = slice(0, prompt)
    assert_close(after.dense()[:, seen], before.dense()[:, seen])
    assert bool((after.selected()[:, seen] == before.selected()[:, seen]).all())


def router_state_round_trip(router: Router, other: Router, x: Tensor, context: Context) -> None:
    """Another router of the same sizes with this one's state routes the same, also after it has balanced."""
    router.train()
    for _ in range(3):
        router.observe(router(x, context), None)
        router.step()
    router.eval()
    other.eval()
    other.load_state_dict(router.state_dict())
    assert_same_routing(other(x, context), router(x, context))
