"""What must hold for every registered router, bank and recipe: plain functions that raise AssertionError.

`test_laws.py` runs them over the registries, so that a new row is covered by being registered. A row that needs more
than the common keywords has an entry in `ROUTER_OPTIONS`, `BANK_OPTIONS` or `RECIPE_OPTIONS`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from moa.experts import FAMILIES, ExpertBank, make_family
from moa.layers import Site
from moa.recipes import RECIPES, Recipe, make_recipe
from moa.routers import ROUTERS, Router
from moa.types import Context, Routing

M = TypeVar("M", bound=nn.Module)
N_TASKS = 3
N_EXPERTS = 4
TOLERANCE = 1e-9  # relative, fp64

# name -> variants of the constructor's own keywords; a router that is not named runs with its defaults
ROUTER_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {
        "softmax": {},
        "not-renormalised": {"renormalize": False},
        "sigmoid-bias": {"score": "sigmoid", "bias_rate": 0.01},
        "noisy": {"noisy": True, "losses": {"load": 0.01, "importance": 0.01}},
        "jitter": {"jitter": 0.1},
    },
    "sampled": {"token": {}, "sequence": {"granularity": "sequence"}},
    "table": {"one-head": {}, "heads": {"n_heads": 3}, "uniform": {"unknown": "uniform"}, "plain": {"relaxed": False}},
    "threshold": {"default": {}, "loss": {"losses": {"balance": 0.1}}},
    "localized": {"default": {}, "tasks": {"task_kinds": (0, 1, 1), "losses": {"localized": 0.1}}},
    "task_embedding": {"default": {"d_embedding": 5}},
}
BANK_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {}
RECIPE_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "poly": {"default": {"alpha": 8.0}, "mu": {"mode": "mu", "alpha": 8.0, "n_tasks": 1}},
    "mhr": {"default": {"n_heads": 4, "alpha": 8.0}},
    "hydra": {
        "default": {"n_experts": 1, "k": 1, "alpha": 8.0, "targets": "all-linear"},
        "biases": {"n_experts": 1, "k": 1, "biases": True, "sequential_rank": 3},
        "gated-branches": {"n_experts": 1, "k": 1, "gate": "branches", "alpha": 8.0, "targets": "all-linear"},
        "gated-experts": {"gate": "experts", "alpha": 8.0, "targets": "all-linear"},
    },
    "xlora": {"default": {"k": 0}, "topk": {}, "layerwise": {"layerwise": True, "depth": 2, "width": 8}},
    "mixlora": {"default": {"dropout": 0.0}},
    "xcross": {"default": {"n_experts": 2}},
    "moelora": {"default": {"d_embedding": 5}},
    "flylora": {"default": {"rank": N_EXPERTS}},
    "remix": {"token": {}, "sequence": {"granularity": "sequence"}},
}
# (recipe, kind of model) -> what its refusal says
REFUSED: dict[tuple[str, str], str] = {
    ("mhr", "plain"): "n_heads=4 must divide",
    ("xlora", "plain"): "needs a transformers model",
    ("xlora", "t5"): "needs a model of one stack",
    ("xcross", "plain"): "needs a transformers model",
    ("xcross", "t5"): "needs a model of one stack",
    ("xcross", "bert"): "lie outside",
}
UNNORMALISED = {
    "expert_choice",
    "sampled",
    "projection",
    "linear-not-renormalised",
}  # rows need not sum to one: (router, or router-variant)


def accepted(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a class's constructor names."""
    return {name: value for name, value in options.items() if name in inspect.signature(cls).parameters}


def variants(names: Sequence[str], table: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Return (name, variant) for every registered name; a name without an entry has the variant "default" alone."""
    return [(name, variant) for name in names for variant in table.get(name, {"default": {}})]


def parametrize(cases: list[tuple[str, str]]) -> Any:
    """Return the pytest mark that runs a test for every (name, variant)."""
    ids = [name if variant == "default" else f"{name}-{variant}" for name, variant in cases]
    return pytest.mark.parametrize(("name", "variant"), cases, ids=ids)


ROUTER_CASES = variants(list(ROUTERS), ROUTER_OPTIONS)
BANK_CASES = variants(list(FAMILIES), BANK_OPTIONS)
RECIPE_CASES = variants(list(RECIPES), RECIPE_OPTIONS)


def make_router(name: str, variant: str, d_in: int, n_experts: int, k: int) -> Router:
    """Return a registered router in fp64 with every parameter drawn at random."""
    cls = ROUTERS[name]
    common = {"d_in": d_in, "n_experts": n_experts, "k": k, "n_tasks": N_TASKS}
    own = ROUTER_OPTIONS.get(name, {}).get(variant, {})
    return randomised(cls(**accepted(cls, common), **own).double())


def make_bank(name: str, variant: str, d_in: int, d_out: int, n_experts: int, rank: int, **options: Any) -> ExpertBank:
    """Return a registered bank in fp64 with every parameter drawn at random."""
    family = make_family(name, BANK_OPTIONS.get(name, {}).get(variant, {}))
    site = Site("layer", nn.Linear(d_in, d_out).double(), d_in, d_out)
    shared = family.shared([site])
    bank = family.build(site, n_experts, shared, **{"rank": rank, "scaling": 0.7, **options})
    return randomised(bank.double())


def recipe_options(name: str, variant: str) -> dict[str, Any]:
    """Return small keywords for a recipe: few experts of rank 2, and task ids where it wants them."""
    fields = {field.name for field in dataclasses.fields(RECIPES[name])}
    common = {"n_experts": N_EXPERTS, "k": 2, "rank": 2, "n_tasks": N_TASKS}
    if name == "switch":
        common["k"] = 1
    common = {key: value for key, value in common.items() if key in fields}
    return {**common, **RECIPE_OPTIONS.get(name, {}).get(variant, {})}


def small_recipe(name: str, variant: str, **options: Any) -> Recipe:
    """Return a registered recipe with small sizes."""
    return make_recipe(name, **{**recipe_options(name, variant), **options})


def needs_tasks(name: str) -> bool:
    """Tell whether a recipe routes by task."""
    return "n_tasks" in {field.name for field in dataclasses.fields(RECIPES[name])}


@torch.no_grad()
def randomised(module: M) -> M:
    """Draw every parameter from N(0, 0.5²), and return the module."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def make_context(rows: tuple[int, ...], mask: Tensor | None = None) -> Context:
    """Return a context with task ids for the first of the rows."""
    n = rows[0] if rows else 1
    masks = () if mask is None else (mask,)
    return Context(task_ids=torch.arange(n) % N_TASKS, masks=masks, routing_masks=masks)


# ------------------------------------------------------------------------------------------------ comparing


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE, what: str = "values") -> None:
    """Fail unless both have one shape and differ by at most tolerance times the largest expected magnitude."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert bool(got.isfinite().all()), f"{what}: not finite"
    error = (got.double() - expected.double()).abs().max().item()
    size = max(expected.double().abs().max().item(), 1e-12)
    assert error <= tolerance * size, f"{what}: off by {error:.3e}, which is {error / size:.1e} of {size:.3e}"


def assert_same_routing(got: Routing, expected: Routing) -> None:
    """Fail unless two routings give the same weights over all experts, and the same scores."""
    assert_close(got.dense(), expected.dense(), what="weights")
    assert bool((got.selected() == expected.selected()).all()), "another selection"
    if expected.scores is not None:
        assert got.scores is not None
        assert_close(got.scores, expected.scores, what="scores")


def gradients(module: nn.Module, *extra: Tensor) -> list[Tensor]:
    """Return the gradients of a module's trainable parameters (zeros where there is none), then those of extra."""
    leaves = [p for p in module.parameters() if p.requires_grad] + list(extra)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in leaves]


# ------------------------------------------------------------------------------------------------ banks


def random_routing(rows: tuple[int, ...], n_experts: int, k: int, dense: bool = False) -> Routing:
    """Return a random fp64 routing of the given rows; dense gives weights of any sign to all experts."""
    if dense:
        return Routing(torch.randn(*rows, n_experts, dtype=torch.float64), None, n_experts)
    indices = torch.rand(*rows, n_experts).argsort(-1)[..., :k]
    return Routing(torch.randn(*rows, k, dtype=torch.float64), indices, n_experts)


def one_hot(rows: tuple[int, ...], expert: int, n_experts: int) -> Routing:
    """Return the routing that gives one expert the weight 1 on every row."""
    return Routing(torch.ones(*rows, 1, dtype=torch.float64), torch.full((*rows, 1), expert), n_experts)


def bank_selects(bank: ExpertBank, x: Tensor) -> None:
    """One-hot routing is that expert alone, with indices and without."""
    rows = x.shape[:-1]
    for expert in range(bank.n_experts):
        expected = bank.expert_forward(x, expert)
        routing = one_hot(rows, expert, bank.n_experts)
        assert_close(bank(x, routing), expected, what=f"expert {expert}")
        assert_close(bank(x, Routing(routing.dense(), None, bank.n_experts)), expected, what=f"expert {expert}, dense")


def bank_is_linear(bank: ExpertBank, x: Tensor) -> None:
    """Outputs are linear in the weights where the bank mixes outputs."""
    if bank.mixes != "outputs":
        return
    one, two = (random_routing(x.shape[:-1], bank.n_experts, 1, dense=True) for _ in range(2))
    both = Routing(2 * one.weights - 3 * two.weights, None, bank.n_experts)
    assert_close(bank(x, both), 2 * bank(x, one) - 3 * bank(x, two))


def bank_broadcasts(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A routing of rows (B, 1) or () is the same as the one expanded to x's rows (B, S)."""
    assert x.ndim == 3
    for rows in ((x.shape[0], 1), ()):
        short = random_routing(rows, bank.n_experts, k)
        assert short.indices is not None
        wide = Routing(
            short.weights.expand(*x.shape[:2], k).contiguous(),
            short.indices.expand(*x.shape[:2], k).contiguous(),
            bank.n_experts,
        )
        assert_close(bank(x, short), bank(x, wide), what=f"rows {rows}")


def bank_relabels(bank: ExpertBank, x: Tensor, k: int) -> None:
    """Numbering the experts otherwise, in the bank and in the routing, changes nothing."""
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    assert routing.indices is not None
    before = bank(x, routing)
    order = torch.randperm(bank.n_experts)  # new expert j is old expert order[j]
    with torch.no_grad():
        for parameter in bank.parameters():
            if parameter.shape[0] == bank.n_experts:
                parameter.copy_(parameter[order].clone())
    renamed = Routing(routing.weights, order.argsort()[routing.indices], bank.n_experts)
    assert_close(bank(x, renamed), before)


def bank_ignores_slot_order(bank: ExpertBank, x: Tensor, k: int) -> None:
    """The order of the chosen experts within a row changes nothing."""
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    assert routing.indices is not None
    turned = Routing(routing.weights.flip(-1), routing.indices.flip(-1), bank.n_experts)
    assert_close(bank(x, turned), bank(x, routing))


def bank_is_local(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A row's output depends on that row alone, even when another row holds NaN."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] < 2:
        return
    routing = random_routing(flat.shape[:1], bank.n_experts, k)
    before = bank(flat, routing)
    changed = flat.clone()
    changed[-1] = float("nan")
    assert_close(bank(changed, routing)[:-1], before[:-1])


def bank_delta_is_expert(bank: ExpertBank, x: Tensor) -> None:
    """`delta` is the expert as one weight change, where the family has one."""
    if type(bank).delta is ExpertBank.delta:
        return
    for expert in range(bank.n_experts):
        assert_close(x @ bank.delta(expert).dense().T, bank.expert_forward(x, expert))


def bank_adds_no_constant(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A bank that is a weight change maps zero to zero, in training with dropout, too: the mixture adds constants."""
    if type(bank).delta is ExpertBank.delta or bank.carries_input:
        return
    zero, dropout = torch.zeros_like(x), bank.dropout
    weight = torch.zeros(bank.d_out, bank.d_in, dtype=x.dtype)
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    for bank.dropout in (0.0, 0.5):
        assert not bool(bank.train()(zero, routing).any()), "forward adds a constant"
        assert not bool(bank.fused.add_linear(zero, routing, weight, None).any()), "add_linear adds a constant"
    bank.dropout = dropout
    assert not any(bool(bank.expert_forward(zero, e).any()) for e in range(bank.n_experts)), "an expert adds one"


def bank_fast_is_generic(bank: ExpertBank, x: Tensor, k: int, dense: bool) -> None:
    """The family's own forward, and the one that adds the base, equal the definition with every gradient."""
    if bank.mixes != "outputs":
        return
    weight = torch.randn(bank.d_out, bank.d_in, dtype=x.dtype)
    bias = torch.randn(bank.d_out, dtype=x.dtype)
    routing = random_routing(x.shape[:-1], bank.n_experts, k, dense)
    upstream = torch.randn(*x.shape[:-1], bank.d_out, dtype=x.dtype)
    base = torch.nn.functional.linear(x, weight, bias)

    def results(run: Any) -> list[Tensor]:
        bank.zero_grad()
        leaf, w = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
        y = run(leaf, Routing(w, routing.indices, bank.n_experts))
        (y * upstream).sum().backward()
        return [y.detach(), *gradients(bank, leaf, w)]

    generic = results(lambda a, r: ExpertBank.forward(bank, a, r))
    fast = results(lambda a, r: bank(a, r))
    fused = results(lambda a, r: bank.fused.add_linear(a, r, weight, bias))
    fused[0] = fused[0] - base
    n_parameters = len(list(bank.parameters()))
    fused[1 + n_parameters] = fused[1 + n_parameters] - upstream @ weight  # x's gradient through the base
    for number, (definition, one, other) in enumerate(zip(generic, fast, fused, strict=True)):
        assert_close(one, definition, what=f"fast result {number}")
        assert_close(other, definition, 1e-8, what=f"fused result {number}")  # a difference of larger numbers


def bank_gated_is_apart(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A gate and its mixture in one call, with gradients and without, equal the routing and then `add_linear`."""
    weight, gate = (torch.randn(size, bank.d_in, dtype=x.dtype) for size in (bank.d_out, bank.n_experts))
    bias = torch.randn(bank.d_out, dtype=x.dtype)
    kept, indices = (x @ gate.T).topk(k, -1)
    expected = bank.fused.add_linear(x, Routing(kept.softmax(-1), indices, bank.n_experts), weight, bias)
    for graded in (True, False):
        with torch.set_grad_enabled(graded):
            found = bank.fused.add_gated(x, gate, k, weight, bias)
        if found is not None:
            assert_close(found[0], expected, what=f"with gradients {graded}")


def bank_starts_as_declared(bank: ExpertBank, x: Tensor) -> None:
    """A fresh bank is exactly zero where it says so, its experts differ, and drawing anew draws anew."""
    bank.reset_parameters()
    out = bank(x, one_hot(x.shape[:-1], 0, bank.n_experts))
    if bank.zero_at_init:
        assert not bool(out.any()), "a fresh bank is not zero"
    before = [p.detach().clone() for p in bank.parameters()]
    stacked = [p for p in before if bank.n_experts > 1 and p.shape[0] == bank.n_experts]
    if stacked:
        different = [bool((p[0] != p[1]).any()) for p in stacked]
        assert any(different) != bank.equal_at_init, (
            "all experts start equal: identical experts get identical gradients"
        )
    bank.reset_parameters()
    assert any(bool((a != b).any()) for a, b in zip(before, bank.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ routers


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


def router_is_batch_invariant(router: Router, x: Tensor, mask: Tensor) -> None:
    """An example's routing is the same alone, with others, and in another order."""
    router.eval()
    together = router(x, make_context(x.shape[:-1], mask))
    if together.weights.ndim < 2:  # constant rows
        return
    tasks = torch.arange(x.shape[0]) % N_TASKS
    order = torch.randperm(x.shape[0])
    for rows in (order, torch.tensor([x.shape[0] - 1])):
        context = Context(task_ids=tasks[rows], masks=(mask[rows],), routing_masks=(mask[rows],))
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
    context = make_context(x.shape[:-1], torch.ones_like(mask))
    context.routing_masks = (mask,)
    before = router(x, context)
    later = x.clone()
    later[:, prompt:] = torch.randn_like(later[:, prompt:]) * 10
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
