"""Hypercomplex bottlenecks: torch.kron as the formula, one slow weight for all. Run: pytest tests/experts"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import moa
from moa.errors import ConfigError, FoldError
from moa.recipes import RECIPES
from tests import laws, models
from tests.laws import assert_close


def built(router: str = "fixed", n_experts: int = 2, **options: Any) -> Any:
    return moa.build(models.llama(), router, n_experts=n_experts, expert="compacter", **{"rank": 8, **options})


def matrices(bank: Any, expert: int) -> tuple[Tensor, Tensor]:
    """Return down (r, i) and up (r, o) as sums of torch's own Kronecker products."""
    sums = []
    for side in ("down", "up"):
        left, right = getattr(bank, f"{side}_left")[expert], getattr(bank, f"{side}_right")[expert]
        rule = bank.slow.rule
        sums.append(sum(torch.kron(rule[j], torch.outer(left[j], right[j])) for j in range(len(rule))))
    return sums[0], sums[1]


@pytest.mark.parametrize("router", ["fixed", "topk"])
def test_an_expert_is_the_papers_sum_of_kronecker_products(router: str) -> None:
    model = models.randomise(built(router, 3)).double().eval()
    for name, mixture in model.mixtures().items():
        (branch,) = mixture.branches
        bank, x = branch.bank, torch.randn(2, 5, mixture.base.in_features, dtype=torch.float64)
        y0 = mixture.base(x)
        expected = y0.clone()
        weights = branch.router(y0, model.context).dense()
        for expert in range(3):
            down, up = matrices(bank, expert)
            assert torch.linalg.matrix_rank(down) <= 16  # n² at most
            one = F.gelu(y0 @ down.T + bank.down_bias[expert], approximate="tanh") @ up + bank.up_bias[expert]
            expected = expected + weights[..., expert, None] * one
        assert_close(mixture(x), expected, 1e-7, name)


def test_the_slow_weight_is_one_for_all_layers_and_experts_and_is_trained(tmp_path: Path) -> None:
    model, batch = built("topk", 4), models.lm_batch()
    slow = model.shared_by_layers["0"]["experts"]
    assert all(branch.bank.slow is slow for _, branch in model.branches())
    (_, branch), *_ = model.branches()
    own = sum(p.numel() for n, p in branch.bank.named_parameters() if not n.startswith("slow"))
    assert own == 4 * ((8 + 16) + (8 + 16) + 8 + 16) and slow.rule.numel() == 4**3
    assert torch.equal(models.outputs_of(model, batch), models.outputs_of(models.llama(), batch))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    before, first = slow.rule.clone(), model.train()(**batch).loss.item()
    for _ in range(8):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(slow.rule, before) and model(**batch).loss.item() < first - 0.02
    expected = models.outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    assert [k for k in load_file(tmp_path / "model.safetensors") if "rule" in k] == ["shared_by_layers.0.experts.rule"]
    assert torch.equal(models.outputs_of(moa.load(tmp_path, base=models.llama()), batch), expected)
    assert torch.equal(models.outputs_of(model.unload(), batch), models.outputs_of(models.llama(), batch))


def test_the_papers_start_is_not_zero_and_folding_says_why_not() -> None:
    model, batch = built(start="glorot"), models.lm_batch()
    change = models.outputs_of(model, batch) - models.outputs_of(models.llama(), batch)
    assert 0 < change.abs().max() < 1e-2
    assert not any(branch.bank.zero_at_init for _, branch in model.branches())
    with pytest.raises(FoldError, match=r"layers\.0.*CompacterBank experts are not a weight change"):
        model.merge_and_unload()


@pytest.mark.parametrize("router", list(RECIPES))
def test_it_runs_under_every_recipe_that_fits(router: str) -> None:
    recipe = RECIPES[router]
    if recipe.wants_experts:
        return
    fields = laws.recipe_options(router, next(iter(laws.RECIPE_OPTIONS.get(router, {"default": {}}))))
    options = {k: v for k, v in fields.items() if k not in ("alpha", "dropout", "n_experts", "rank")}
    if recipe.families is not None and "compacter" not in recipe.families:
        with pytest.raises(ConfigError, match="has experts of its own kind"):
            built(router, 4, **{**options, "rank": 4})
        return
    model, batch = models.randomise(built(router, fields.get("n_experts", 4), **options)), models.lm_batch()
    if laws.needs_tasks(router):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    model.train()(**batch).loss.backward()
    assert bool(model.shared_by_layers["0"]["experts"].rule.grad.any())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 3}, r"o_proj, rank: n=3 does not divide 8: the nearest that do are 1, 2, 4"),
        ({"n": 8, "place": "block", "rank": 8}, None),
        ({"n": 5, "rank": 10}, r"o_proj, inputs: n=5 does not divide 16: the nearest that do are"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"start": "zeros"}, r"start must be.*'zeros'"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"alpha": 2.0}, "family 'compacter' have no alpha"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], match: str | None) -> None:
    own = {"expert": "compacter", "n_experts": 1, "rank": 8, **options}
    if match is None:
        assert moa.build(models.llama(), "fixed", **own)
        return
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), "fixed", **own)
