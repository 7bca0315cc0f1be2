"""An expert for each example of a batch, over every recipe and family. Run: pytest tests/recipes/test_chosen_laws.py"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import moa
from moa.errors import ConfigError, ContextError
from moa.experts import FAMILIES
from moa.model.hot_switch import hot_switch
from moa.recipes.depth import by_depth
from moa.types import Pinned
from tests import laws, models
from tests.model.test_bases import base
from tests.systems import adapters

from . import chosen_laws
from .recipe_laws import Subject


def subject_of(name: str, variant: str, kind: str = "decoder") -> Subject:
    return Subject(laws.small_recipe(name, variant), kind)  # type: ignore[arg-type]


FAMILY_CASES = [case for case in laws.BANK_CASES if case[0] in FAMILIES]
ONE_EACH = list(dict(reversed(laws.RECIPE_CASES)).items())  # the first variant of every recipe


@laws.parametrize(laws.RECIPE_CASES)
def test_each_example_has_its_expert(name: str, variant: str) -> None:
    chosen_laws.each_example_has_its_expert(subject_of(name, variant))


@laws.parametrize(ONE_EACH)
def test_each_example_of_an_encoder_has_its_expert(name: str, variant: str) -> None:
    chosen_laws.each_example_has_its_expert(subject_of(name, variant, "encoder"))


@laws.parametrize(FAMILY_CASES)
def test_each_example_has_its_expert_of_any_family(name: str, variant: str) -> None:
    own = dict(laws.BANK_OPTIONS.get(name, {}).get(variant, {}))
    own |= {key: 2 for key in ("n_heads", "block_size") if key in own}  # which divides the decoder's features
    options = {"rank": 2} if "rank" in FAMILIES[name].uses else {}
    # by task, which every family allows: some are whole weights, which no router can mix row by row
    recipe = moa.make_recipe("moelora", n_experts=4, n_tasks=laws.N_TASKS, expert=name, **options, **own)
    chosen_laws.each_example_has_its_expert(Subject(recipe))


@laws.parametrize(ONE_EACH)
def test_prompts_are_generated_as_one_by_one(name: str, variant: str) -> None:
    chosen_laws.generates_one_by_one(subject_of(name, variant))


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "Llama4"])  # one base of each layout of fused experts
def test_each_example_has_its_expert_inside_the_bases_experts(kind: str) -> None:
    built = moa.build(base(kind), "topk", n_experts=3, k=2, rank=2, targets="moe-experts")
    model: Any = models.randomise(built, 0.2).eval()
    model.set_experts_implementation("eager")
    model.double()
    batch, choice = models.token_batch(), chosen_laws.choice_of(model)
    together = model(**batch, adapter_ids=choice).logits
    apart = chosen_laws.one_by_one(model, batch, choice)
    laws.assert_close(together, apart, 1e-9, "a batch of several experts")
    assert not torch.allclose(together, model(**batch).logits, atol=1e-4)
    weight = torch.randn(together.shape, dtype=together.dtype)
    banks = [p for n, p in model.named_parameters() if ".bank." in n]
    gradients = [torch.autograd.grad((out * weight).sum(), banks) for out in (together, apart)]
    laws.assert_close(*(torch.cat([g.flatten() for g in found]) for found in gradients), 1e-9, "gradients")


def mixlora(path: Path) -> tuple[Any, str]:
    options = {"targets": "all-linear", "dropout": 0.0, "rank": 3}
    return models.randomise(moa.build(models.llama(), "mixlora", n_experts=3, k=2, **options), 0.3), "self_attn"


def two_recipes(path: Path) -> tuple[Any, str]:
    recipes = [
        moa.make_recipe("topk", n_experts=3, k=2, targets="ffn"),
        moa.make_recipe("fixed", n_experts=1, targets="attention"),
    ]
    return models.randomise(moa.build(models.llama(), recipes), 0.3), "self_attn"


UNEVEN = {"mixlora": mixlora, "two recipes": two_recipes}


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("kind", list(UNEVEN))
def test_layers_with_one_expert_keep_it(kind: str, tmp_path: Path) -> None:
    """Whatever takes an expert by its number takes the same one; peft's loader of what is exported is the judge."""
    model, single = UNEVEN[kind](tmp_path)
    model.double().eval()
    banks = {name: branch.bank for name, branch in model.branches()}
    assert {bank.n_experts for name, bank in banks.items() if single in name} == {1} != {len(model.expert_names)}
    assert model.expert_names == ["0", "1", "2"]
    batch, base_state = models.token_batch(), models.llama().double()
    with torch.no_grad():
        pinned = []
        for expert in range(3):
            with model.pin_expert(expert):
                pinned.append(model(**batch).logits)
            plain = copy.deepcopy(base_state)
            folder = moa.export_expert(model, expert, tmp_path / str(expert))
            peers = peft.PeftModel.from_pretrained(plain, folder).double().eval()
            laws.assert_close(pinned[-1], peers(**batch).logits, 1e-5, f"expert {expert} in peft")
            if kind == "mixlora":  # whose gated blocks have no one weight
                continue
            with hot_switch(model) as switch:
                switch.to(expert)
                laws.assert_close(model(**batch).logits, pinned[-1], 1e-9, f"expert {expert} in the weights")
        assert not torch.allclose(pinned[0], pinned[1], atol=1e-3)
    for bad in (3, -1):
        with pytest.raises(ConfigError, match="this model has experts 0 to 2"):
            model.pin_expert(bad)
        with pytest.raises(ConfigError, match="this model has experts 0 to 2"):
            moa.export_expert(model, bad, tmp_path / "none")
        if kind != "mixlora":
            with pytest.raises(ConfigError, match="this model has experts 0 to 2"), hot_switch(model) as switch:
                switch.to(bad)
    assert model.add_expert() == 3 and model.expert_names == ["0", "1", "2", "3"]
    model.remove_expert(0)
    assert {branch.bank.n_experts for name, branch in model.branches() if single in name} == {1}
    for expert in (0, 1):
        with model.pin_expert(expert):
            laws.assert_close(models.outputs_of(model, batch), pinned[expert + 1], 1e-9, "moved up by one")
    model.save_pretrained(tmp_path / "saved")
    again = moa.load(tmp_path / "saved", base=models.llama().double())
    with again.pin_expert("1"):
        laws.assert_close(models.outputs_of(again, batch), pinned[2], 1e-9, "after saving")


@pytest.mark.parametrize("broken", ["all as the first", "no base", "in another order"])
def test_the_law_sees_a_wrong_choice(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    rows = Pinned.rows
    if broken == "all as the first":
        monkeypatch.setattr(Pinned, "rows", lambda self, x: rows(self, x)[:1].expand(rows(self, x).shape))
    elif broken == "no base":
        monkeypatch.setattr(Pinned, "keep_base", lambda self, y, y0: y)
    else:
        monkeypatch.setattr(Pinned, "rows", lambda self, x: rows(self, x).roll(1, 0))
    with pytest.raises(AssertionError, match="a batch of several experts"):
        chosen_laws.each_example_has_its_expert(subject_of("topk", "default"))


# ------------------------------------------------------------------ names, entries, wrong inputs


@pytest.fixture
def named() -> moa.MoAModel:
    return models.randomise(
        moa.build(models.llama(), "topk", n_experts=3, k=2, rank=2, expert_names=["math", "code", "law"])
    ).eval()


def test_every_entry_and_spelling_is_the_same(named: moa.MoAModel) -> None:
    batch = models.token_batch()
    with torch.no_grad():
        want = named(**batch, adapter_ids=["code", None, "math", "law"]).logits
        peft = named(**batch, adapter_names=["code", "__base__", "math", "law"]).logits
        body = named.model(**batch, adapter_ids=["code", None, "math", "law"]).last_hidden_state
        base = named.base(**batch, adapter_ids=[1, None, 0, 2]).logits
        with named.pin_expert("law"):
            inside = named(**batch, adapter_ids=[1, None, 0, 2]).logits
    for got in (peft, named.lm_head(body), base, inside):
        assert torch.equal(got, want)
    assert named.context.pinned is None and named.expert_names == ["math", "code", "law"]


def test_names_are_saved(named: moa.MoAModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    named.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama())
    assert again.expert_names == ["math", "code", "law"]
    batch = models.token_batch()
    ids = ["law", "law", "code", None]
    assert torch.equal(again(**batch, adapter_ids=ids).logits, named(**batch, adapter_ids=ids).logits)


def test_checkpointing_recomputes_each_examples_expert(named: moa.MoAModel) -> None:
    batch, found = models.lm_batch(), []
    named.double().train()
    for checkpointed in (False, True):
        if checkpointed:
            named.gradient_checkpointing_enable()
        named.zero_grad()
        loss = named(**batch, adapter_ids=["law", None, "code", "law"]).loss
        named(**batch).loss.detach()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in named.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        laws.assert_close(found[1][name], grad, 1e-9, name)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["math"], "has 1 entries and the batch 4 examples"),
        ([], "has 0 entries"),
        (["math", "maths", "law", None], "unknown expert 'maths'. Did you mean 'math'"),
        ([0, 1, 2, 3], "expert 3 does not exist: this model has experts 0 to 2"),
        ([0, 1, 2, -2], "expert -2 does not exist"),
        ("math", "one name for each example"),
        (torch.tensor([0.0, 1.0, 2.0, 1.0]), "whole numbers"),
        (torch.tensor([[0, 1], [1, 2]]), "whole numbers"),
        ([True, 0, 1, 2], "unknown expert True"),
    ],
)
def test_wrong_ids_are_refused(named: moa.MoAModel, ids, said: str) -> None:  # type: ignore[no-untyped-def]
    batch = models.token_batch()
    for run in (named, named.model, lambda **kwargs: named.generate(**kwargs, max_new_tokens=1)):
        with pytest.raises(ContextError, match=said):
            run(**batch, adapter_ids=ids)
    assert torch.equal(named(**batch).logits, named(**batch).logits)


def test_other_misuse_is_refused(named: moa.MoAModel) -> None:
    batch = models.token_batch()
    with pytest.raises(ContextError, match="give one of them"):
        named(**batch, adapter_ids=[0, 0, 0, 0], adapter_names=["math"] * 4)
    with pytest.raises(ContextError, match="unknown expert 'maths'"), named.pin_expert("maths"):
        pass
    with (
        pytest.raises(ConfigError, match="expert -1 does not exist: this model has experts 0 to 2"),
        named.pin_expert(-1),
    ):
        pass
    for names in (["a", "b"], ["a", "b", "a"], ["a", "b", ""]):
        with pytest.raises(ConfigError, match="must be 3 different names"):
            moa.make_recipe("topk", n_experts=3, expert_names=names)
    one = moa.build(models.llama(), "fixed", n_experts=1, rank=2)
    with one.folded(), pytest.raises(ConfigError, match="adapter_ids needs the frozen base"):
        one(**batch, adapter_ids=[0, 0, 0, 0])


def test_the_names_of_several_recipes_are_those_they_share() -> None:
    model = models.randomise(moa.build(models.llama(), by_depth("topk", 2, (2, 3), rank=2))).eval()
    assert model.expert_names == ["0", "1"]
    batch = models.token_batch()
    with torch.no_grad():
        got = model(**batch, adapter_ids=["1", 0, None, 1]).logits
        want = chosen_laws.one_by_one(model, batch, [1, 0, None, 1])
    laws.assert_close(got, want, 1e-5)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_adapters_read_in_are_known_by_their_folders(tmp_path: Path) -> None:
    first, second, third = adapters.write(tmp_path, models.llama, n=3, targets=["q_proj"])
    names = [folder.name for folder in (first, second, third)]
    model = moa.build(models.llama(), "topk", experts=[first, f"{second}/", third])
    assert model.expert_names == names
    model.save_pretrained(tmp_path / "saved")
    assert moa.load(tmp_path / "saved", base=models.llama()).expert_names == names
    own = moa.build(models.llama(), "topk", experts=[first, second], expert_names=["math", "law"])
    assert own.expert_names == ["math", "law"]
    (tmp_path / "other").mkdir()
    same = first.rename(tmp_path / "other" / names[1])
    number = third.rename(tmp_path / "1")
    for folders in ([same, second], [second, number]):
        assert moa.build(models.llama(), "topk", experts=folders).expert_names == ["0", "1"]
