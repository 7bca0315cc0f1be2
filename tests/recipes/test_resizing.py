"""Experts added to a model and removed from it, over every recipe and family.

Run: pytest tests/recipes/test_resizing.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import moa
from moa.errors import CheckpointError, ConfigError, ContextError
from moa.experts import FAMILIES
from moa.monitor.statistics import RoutingStatistics
from moa.recipes import RECIPES
from tests import laws, models
from tests.model.test_bases import base
from tests.systems import adapters

from .recipe_laws import Subject
from .resizing_laws import comes_back, keeps_the_others

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
# name or name-variant -> why the number of its experts is fixed
FIXED = {
    "xcross": "a stream of the whole model",
    "flylora": "the ranks of one LoRA",
    "loramoe": "one kind of task",
    "hydra-default": "needs gate='experts'",
    "hydra-biases": "needs gate='experts'",
    "hydra-gated-branches": "needs gate='experts'",
}
EMITTED = {"hypelora"}  # a new expert is what the trained network makes of a new embedding, which is not zero
FAMILY_CASES = [case for case in laws.BANK_CASES if case[0] in FAMILIES]


def refusal(name: str, variant: str) -> str | None:
    return FIXED.get(name, FIXED.get(f"{name}-{variant}"))


def subject_of(name: str, variant: str) -> Subject:
    return Subject(laws.small_recipe(name, variant))


def unchanged(model: Any, call: Any, error: type[Exception], match: str) -> None:
    """A call fails by name and leaves the model as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipes, tensors = list(model.recipes), {key: id(value) for key, value in model.named_parameters()}
    with pytest.raises(error, match=match):
        call()
    assert model.recipes == recipes and tensors == {key: id(value) for key, value in model.named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@laws.parametrize(laws.RECIPE_CASES)
def test_add_then_remove_is_as_before(name: str, variant: str, tmp_path: Path) -> None:
    subject, reason = subject_of(name, variant), refusal(name, variant)
    if reason is not None:
        model = subject.trained().eval()
        unchanged(model, model.add_expert, ConfigError, reason)
        return
    comes_back(subject, tmp_path)


@laws.parametrize(laws.RECIPE_CASES)
def test_what_is_left_is_what_it_was(name: str, variant: str, tmp_path: Path) -> None:
    """Each expert that stays gives alone what it gave, under its new number, also after saving."""
    subject, reason = subject_of(name, variant), refusal(name, variant)
    n = subject.recipe.n_experts
    if reason is None and n > 1:
        keeps_the_others(subject, tmp_path)
    elif n > 1:
        model = subject.trained().double().eval()
        unchanged(model, lambda: model.remove_expert(0), ConfigError, reason or "")


@laws.parametrize(FAMILY_CASES)
def test_experts_of_any_family_come_and_go(name: str, variant: str) -> None:
    own = dict(laws.BANK_OPTIONS.get(name, {}).get(variant, {}))
    own |= {key: 2 for key in ("n_heads", "block_size") if key in own}
    options = {"rank": 2} if "rank" in FAMILIES[name].uses else {}
    recipe = moa.make_recipe("moelora", n_experts=3, n_tasks=laws.N_TASKS, expert=name, **options, **own)
    subject = Subject(recipe)
    model, batch = subject.trained().double().eval(), subject.batch()
    if variant == "magnitude":  # the largest entries of a weight are dealt out to the experts that there are
        unchanged(model, model.add_expert, ConfigError, "comes out otherwise")
        return
    want = models.outputs_of(model, batch)
    with model.pin_expert(2):
        last = models.outputs_of(model, batch)
    model.add_expert()
    with model.pin_expert(3), torch.no_grad():
        fresh = models.outputs_of(model, batch)
    with model.disable_adapter():
        plain = models.outputs_of(model, batch)
    if name in EMITTED:
        assert not torch.allclose(fresh, plain)
    elif all(branch.bank.zero_at_init for _, branch in model.branches()):
        laws.assert_close(fresh, plain, 1e-5, "a fresh expert")
    model.remove_expert(3)
    assert torch.equal(models.outputs_of(model, batch), want)
    seeded = any(
        part in branch.bank._non_persistent_buffers_set and getattr(branch.bank, part) is not None
        for _, branch in model.branches()
        for part in branch.bank.per_expert
    )
    if seeded:
        unchanged(model, lambda: model.remove_expert(0), ConfigError, "the last can be removed")
        return
    model.remove_expert(0)
    with model.pin_expert(1):
        laws.assert_close(models.outputs_of(model, batch), last, 1e-9, "the last of those that stay")


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].wants_experts or name == "topk"])
def test_one_added_is_as_built_with_all(name: str, tmp_path: Path) -> None:
    folders, batch = adapters.write(tmp_path, models.llama, n=4, ranks=(4, 4, 4, 4)), models.lm_batch()
    fewer = moa.build(models.llama(), name, experts=folders[:3]).eval()
    if refusal(name, "default") is not None:
        unchanged(fewer, lambda: fewer.add_expert(folders[3]), ConfigError, refusal(name, "default") or "")
        return
    whole = moa.build(models.llama(), name, experts=folders).eval()
    fewer.add_expert(folders[3])
    assert fewer.recipes == whole.recipes and fewer.expert_names == [folder.name for folder in folders]
    assert adapters.frozen(fewer)
    routers = {
        key: value for key, value in whole.adapter_state_dict().items() if ".router." in key or ".routers." in key
    }
    if any(p.requires_grad for _, branch in whole.branches() for p in branch.router.learned()):
        fewer.load_state_dict(routers, strict=False)
    assert torch.equal(models.outputs_of(fewer, batch), models.outputs_of(whole, batch))
    fewer.remove_expert(folders[1].name)
    without = moa.build(models.llama(), name, experts=[folders[0], *folders[2:]]).eval()
    if not any(p.requires_grad for _, branch in whole.branches() for p in branch.router.learned()):
        assert torch.equal(models.outputs_of(fewer, batch), models.outputs_of(without, batch))
    assert fewer.recipes == without.recipes and fewer.expert_names == without.expert_names
    assert torch.equal(
        fewer(**batch, adapter_ids=[folders[3].name] * 4).logits, without(**batch, adapter_ids=[2] * 4).logits
    )


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "Llama4"])
def test_experts_on_fused_weights_come_and_go(kind: str) -> None:
    model: Any = models.randomise(moa.build(base(kind), "topk", n_experts=3, k=2, rank=2, targets="moe-experts"), 0.2)
    model.eval().set_experts_implementation("eager")
    batch = models.token_batch()
    want = models.outputs_of(model, batch)
    with model.pin_expert(2):
        last = models.outputs_of(model, batch)
    model.add_expert()
    model.remove_expert(3)
    assert torch.equal(models.outputs_of(model, batch), want)
    model.remove_expert(0)
    with model.pin_expert(1):
        laws.assert_close(models.outputs_of(model, batch), last, 1e-5, "the last of those that stay")


def test_wrong_moments_and_experts_are_refused(tmp_path: Path) -> None:
    folders = adapters.write(tmp_path, models.llama, n=3, ranks=(4, 4, 8))
    other = adapters.write(tmp_path / "o", models.llama, n=1, targets=["gate_proj"])[0]
    model = moa.build(models.llama(), "topk", experts=folders[:2], k=2).eval()
    unchanged(model, lambda: model.remove_expert(0), ConfigError, "1 of 2 experts would be left, and k=2 act on a row")
    unchanged(model, lambda: model.remove_expert("adapter9"), ContextError, "unknown expert 'adapter9'")
    unchanged(model, lambda: model.remove_expert(2), ContextError, "expert 2 does not exist")
    unchanged(model, lambda: model.add_expert(folders[2]), ConfigError, "rank=8, and the experts of this model 4")
    unchanged(model, lambda: model.add_expert(other), CheckpointError, "gate_proj, .*carry no experts")
    unchanged(model, lambda: model.add_expert(folders[0]), ConfigError, "3 different names")
    unchanged(model, model.add_expert, ConfigError, "3 different names")
    unchanged(model, lambda: model.add_expert(tmp_path / "none"), CheckpointError, "none")
    inside = model.lm_head.register_forward_pre_hook(lambda *_: model.add_expert(name="x"))  # type: ignore[union-attr]
    unchanged(model, lambda: model(**models.token_batch()), ConfigError, "what a forward runs on")
    inside.remove()
    with model.pin_expert(0):
        unchanged(model, lambda: model.add_expert(name="x"), ConfigError, "what pin_expert runs on")
    one = moa.build(models.llama(), "fixed", n_experts=1, rank=2)
    unchanged(one, lambda: one.remove_expert(0), ConfigError, "the only one that is left")
    with one.folded(), pytest.raises(ConfigError, match="add_expert needs the frozen base"):
        one.add_expert()
    assert model.add_expert(name="law") == 2 and model.expert_names == ["adapter0", "adapter1", "law"]


def test_a_copy_keeps_its_own_number() -> None:
    subject = subject_of("topk", "default")
    model = subject.trained().eval()
    twin, want = copy.deepcopy(model), models.outputs_of(model, subject.batch())
    twin.add_expert()
    assert torch.equal(models.outputs_of(model, subject.batch()), want) and len(model.expert_names) == 4


def test_a_window_that_saw_two_numbers_counts_the_latest() -> None:
    model, statistics = moa.build(models.llama(), "topk", n_experts=3, k=2, rank=2).eval(), RoutingStatistics()
    for _ in range(2):
        with torch.no_grad(), model.tracing() as trace:  # type: ignore[operator]
            model(**models.token_batch())
        statistics.add(trace)
        rows = next(iter(statistics.summary().values())).rows
        model.add_expert()
    summary = statistics.summary()
    assert {load.n_experts for load in summary.values()} == {4} and set(summary) == set(model.mixtures())
    assert all(load.rows == rows for load in summary.values())


def test_the_last_expert_is_taken_out_with_the_mixture() -> None:
    model = models.randomise(moa.build(models.llama(), "dense", n_experts=2))
    model.remove_expert(0)
    unchanged(model, lambda: model.remove_expert(0), ConfigError, r"the only one that is left: unload\(\)")
