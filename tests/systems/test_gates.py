"""AdaMoLE, HydraLoRA, LoRAMoE, MOELoRA and MoLA's shapes against their formulas.

Run: pytest tests/systems/test_gates.py
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, ContextError, FoldError
from moa.mixture.mixture import Mixture
from moa.objective.losses import balance_loss, localized_loss
from moa.recipes import Site
from moa.recipes.depth import by_depth
from moa.routers import LocalizedRouter, ThresholdRouter
from tests import models
from tests.laws import assert_close


def make(name: str, task_ids: Tensor | None = None, **options: Any) -> Mixture:
    base = nn.Linear(10, 7).double().requires_grad_(False)
    recipe = moa.make_recipe(name, **options)
    context = moa.Context(task_ids=task_ids)
    mixture = Mixture(base, recipe.build(Site("layer", base, 10, 7)), context, "layer").double()
    for parameter in mixture.branches.parameters():
        nn.init.normal_(parameter)
    return mixture.eval()


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max())
    return e / e.sum()


def parts(mixture: Mixture) -> tuple[Any, Any]:
    return mixture.branches[0].router, mixture.branches[0].bank


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def test_adamole_is_its_equations() -> None:
    mixture = make("adamole", n_experts=5, rank=2)
    router, bank = parts(mixture)
    x = torch.randn(20, 10, dtype=torch.float64)
    rows, counts = [], set()
    for row in numpy(x):
        p = softmax(numpy(router.weight) @ row)
        tau = 1 / (1 + np.exp(-(numpy(router.threshold_weight)[0] @ row + router.threshold_bias.item()))) / 5
        passed = np.where(p >= tau, p - tau, 0)
        weights = passed / passed.sum()
        counts.add(int((weights > 0).sum()))
        experts = [numpy(bank.up[e]).T @ (numpy(bank.down[e]) @ row) * 2.0 for e in range(5)]
        rows.append(sum(w * y for w, y in zip(weights, experts, strict=True)))
    assert_close(mixture(x), mixture.base(x) + torch.tensor(np.stack(rows)))
    assert len(counts) > 2, "rows choose different numbers of experts"


def test_adamole_may_choose_none_and_then_adds_nothing() -> None:
    mixture = make("adamole", n_experts=5, rank=2, max_threshold=1.0)
    router, _ = parts(mixture)
    with torch.no_grad():
        router.threshold_bias.fill_(100.0)
        router.weight.zero_()
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    y = mixture(x)
    assert torch.equal(y, mixture.base(x))
    y.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert not router(x, moa.Context()).selected().any()


def test_balance_has_minimum_one_for_any_number_of_experts() -> None:
    router = ThresholdRouter(4, 6)
    nn.init.zeros_(router.weight)
    even = router(torch.randn(50, 4), moa.Context())
    assert_close(balance_loss(even), torch.tensor(1.0), 1e-6)
    with torch.no_grad():
        router.weight[0, 0] = 5.0
    assert balance_loss(router(torch.rand(50, 4) + 1, moa.Context())) > 1.5


def test_hydralora_is_one_a_and_many_b() -> None:
    mixture = make("hydralora")
    router, bank = parts(mixture)
    assert bank.down.shape == (1, 4, 10) and bank.up.shape == (4, 4, 7) and bank.scaling == 8.0
    x = torch.randn(20, 10, dtype=torch.float64)
    rows = []
    for row in numpy(x):
        gate = softmax(numpy(router.weight) @ row)
        shared = numpy(bank.down[0]) @ row
        rows.append(sum(gate[e] * (numpy(bank.up[e]).T @ shared) for e in range(4)) * 8.0)
    assert_close(mixture(x), mixture.base(x) + torch.tensor(np.stack(rows)))


def released_cv_squared(weights: np.ndarray, kinds: np.ndarray, delta: float) -> float:
    """Return the released code's loss: CV² of Σ_seq w times 1 ± δ, type 1 with the first half of the experts."""
    half = weights.shape[-1] // 2
    first = np.repeat((kinds == 1)[:, None], half, 1)
    second = np.repeat((kinds == 0)[:, None], half, 1)
    factor = np.where(np.concatenate([first, second], 1), 1 + delta, 1 - delta)
    z = (weights.sum(1) * factor).ravel()
    return float(z.var(ddof=1) / (z.mean() ** 2 + 1e-10))


def test_loramoes_loss_is_the_released_one() -> None:
    router = LocalizedRouter(10, 6, task_kinds=(0, 1, 1), delta=0.3, losses={"localized": 1.0}).double().train()
    x = torch.randn(5, 8, 10, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 0, 1])
    routing = router(x, moa.Context(task_ids=ids))
    kinds = np.array([0, 1, 1])[ids.numpy()]
    expected = released_cv_squared(numpy(routing.weights), kinds, 0.3)
    assert_close(localized_loss(routing), torch.tensor(expected, dtype=torch.float64), 1e-7)
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[:, 6:] = False
    kept = released_cv_squared(numpy(routing.weights[:, :6]), kinds, 0.3)
    assert_close(localized_loss(routing, mask), torch.tensor(kept, dtype=torch.float64), 1e-7)


def test_loramoes_loss_gives_each_kind_its_half() -> None:
    router = LocalizedRouter(4, 6, task_kinds=(0, 1), delta=0.5, losses={"localized": 1.0}).train()
    features = torch.eye(4)[:2].repeat(8, 1).unsqueeze(1)
    context = moa.Context(task_ids=torch.tensor([0, 1]).repeat(8))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(200):
        loss = localized_loss(router(features, context))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = router.eval()(features, context).weights[:, 0]
    assert (weights[0, :3].mean() / weights[0, 3:].mean()).item() == pytest.approx(3.0, rel=0.05)  # (1 + δ) / (1 − δ)
    assert (weights[1, 3:].mean() / weights[1, :3].mean()).item() == pytest.approx(3.0, rel=0.05)


def test_loramoe_trains_with_kinds_and_decodes_without() -> None:
    model = moa.build(models.llama(), "loramoe", n_experts=4, rank=2, task_kinds=(0, 1))
    batch = models.lm_batch()
    with pytest.raises(ContextError, match="needs task ids"):
        model.train()(**batch)
    model(**batch, task_ids=torch.tensor([0, 1, 1, 0]))
    assert model.last_losses["localized"] > 0
    model.eval().generate(batch["input_ids"].clamp(min=2), max_new_tokens=2)


def test_moelora_is_its_equations_and_folds_per_task() -> None:
    ids = torch.tensor([2, 0, 2])
    mixture = make("moelora", ids, n_tasks=3, d_embedding=6)
    router, bank = parts(mixture)
    x = torch.randn(3, 4, 10, dtype=torch.float64)
    expected = mixture.base(x).clone()
    for b, task in enumerate(ids.tolist()):
        gate = softmax(numpy(router.weight) @ numpy(router.embedding[task]))
        for t in range(4):
            row = numpy(x[b, t])
            expected[b, t] += torch.tensor(
                sum(gate[e] * (numpy(bank.up[e]).T @ (numpy(bank.down[e]) @ row)) for e in range(8)) * 2.0
            )
    assert_close(mixture(x), expected)
    with pytest.raises(FoldError, match="no task was named"):
        moa.fold(mixture)
    assert_close(moa.fold(mixture, 2)(x[0]), expected[0])


def test_numbers_of_experts_by_depth() -> None:
    recipes = by_depth("topk", 2, (2, 6), rank=2)
    for kind in ("llama", "gpt2", "bert", "t5", "vit"):
        make_model, make_batch = models.MODELS[kind]
        model = moa.build(make_model(), recipes)
        counts: dict[int, set[int]] = {}
        for name, branch in model.branches():
            number = re.search(r"\.(\d+)\.", name)
            counts.setdefault(int(number[1]), set()).add(branch.bank.n_experts)
        assert counts == {0: {2}, 1: {6}}, kind
        models.outputs_of(model, make_batch())
    quarters = by_depth("topk", 10, (2, 4, 6, 8), rank=2)
    owners = [
        [r.n_experts for r in quarters if re.fullmatch(r.targets, f"model.layers.{n}.mlp.up2_proj")] for n in range(10)
    ]
    assert owners == [[2], [2], [4], [4], [4], [6], [6], [8], [8], [8]]


def test_bad_inputs() -> None:
    for name, options, text in (
        ("adamole", {"max_threshold": 0.0}, r"max_threshold must be in \(0, 1\]"),
        ("loramoe", {"delta": 1.0}, r"delta must be in \[0, 1\)"),
        ("loramoe", {"task_kinds": (0, 2)}, "task_kinds must hold 0 or 1"),
        ("moelora", {"n_tasks": 0}, "n_tasks must be at least 1"),
        ("moelora", {"d_embedding": 0}, "d_embedding must be at least 1"),
        ("hydralora", {"expert": "one"}, "unknown expert family 'one'"),
    ):
        with pytest.raises(ConfigError, match=text):
            moa.build(models.llama(), name, **options)
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 3 parts"):
        by_depth("topk", 2, (2, 4, 6))
    with pytest.raises(ConfigError, match="leave targets out"):
        by_depth("topk", 2, (2, 4), targets="ffn")
