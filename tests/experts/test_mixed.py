"""Experts of several families and ranks in one bank. Run: pytest tests/experts/test_mixed.py"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from torch import nn

import moa
from moa.cli.main import main
from moa.errors import ConfigError, FoldError
from moa.experts import FAMILIES, LoRABank, Mixed, MixedBank, MixedFactorsBank, make_family
from moa.merge import merge, read_peft
from moa.mixture import ExpertsMixture
from moa.runs.config import read_config
from tests import laws, models, tiny_run
from tests.laws import assert_close
from tests.model.test_bases import base
from tests.recipes import recipe_laws

from .bank_laws import random_routing

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's old name
WIDTH = 12  # what every structure divides
NAMES = sorted(FAMILIES)
PAIRS = [*itertools.pairwise(NAMES), (NAMES[-1], NAMES[0])]
UNMIXABLE = {"headed"}


def family(name: str) -> moa.Family:
    first = next(iter(laws.BANK_OPTIONS.get(name, {"default": {}}).values()))
    return make_family(name, first)


def pair(one: str, two: str) -> tuple[Mixed, MixedBank]:
    """Return a bank of three experts of the first family and two of the second, in turn, on a layer of 12 features."""
    mixed = Mixed(families=(family(one), family(two), family(one), family(two), family(one)))
    torch.manual_seed(3)
    layer = nn.Linear(WIDTH, WIDTH).double()
    site = moa.Site("layer", layer, WIDTH, WIDTH, place=mixed.places[0])
    each = [
        {"rank": r, "scaling": s, "dropout": 0.0, "engine": None} for r, s in ((4, 0.7), (4, 0.3)) * 2 + ((4, 0.7),)
    ]
    bank: Any = mixed.build(site, 5, mixed.shared([site], each=each), each=each)
    return mixed, laws.randomised(bank.double())


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=["-".join(names) for names in PAIRS])
def test_a_bank_of_two_families_is_the_sum_of_its_experts(one: str, two: str) -> None:
    """In fp64, by token, by example, constant and dense; where the routing of whole weights is constant."""
    if {one, two} & UNMIXABLE:
        with pytest.raises(ConfigError, match="are mixed by their parameters"):
            pair(one, two)
        return
    if not set(FAMILIES[one].places) & set(FAMILIES[two].places):
        with pytest.raises(ConfigError, match=rf"none in common: .*'{one}' on .*'{two}' on"):
            pair(one, two)
        return
    _, bank = pair(one, two)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    for rows, dense in itertools.product(((3, 4), (3, 1), ()), (False, True)):
        routing = random_routing(rows, 5, 2, dense)
        leaf = routing.weights.clone().requires_grad_()
        found = bank(x, moa.Routing(leaf, routing.indices, 5))
        weights = moa.Routing(leaf, routing.indices, 5).dense()  # (*rows, E)
        expected = sum(bank.members[e % 2].expert_forward(x, e // 2) * weights[..., e, None] for e in range(5))
        assert_close(found, expected, what=f"rows {rows}")
        upstream = torch.randn_like(found)
        leaves = [leaf, *bank.parameters()]
        got, want = (torch.autograd.grad(y, leaves, upstream, materialize_grads=True) for y in (found, expected))
        for number, (mine, other) in enumerate(zip(got, want, strict=True)):
            assert_close(mine, other, what=f"gradient {number}")


def test_the_cost_grows_with_what_is_chosen() -> None:
    """Members see one row for each slot that chose them, whatever E is."""
    for n_experts in (4, 16, 64):
        recipe = moa.make_recipe("topk", n_experts=n_experts, expert=["lora", "loha"], rank=2)
        bank = recipe.bank(moa.Site("layer", nn.Linear(6, 6), 6, 6))
        assert isinstance(bank, MixedBank)
        seen: list[int] = []
        for member in bank.members:
            member.register_forward_hook(lambda _m, args, _y, seen=seen: seen.append(args[0].shape[:-1].numel()))
        bank(torch.randn(5, 7, 6), random_routing((5, 7), n_experts, 2))
        assert sum(seen) == 5 * 7 * 2


def test_an_expert_that_no_row_chose_cannot_reach_one() -> None:
    _, bank = pair("loha", "lokr")  # kernels of LoRA run all experts and mask
    kept = moa.Routing(torch.ones(3, 4, 1), torch.randint(3, (3, 4, 1)), 5)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    before = bank(x, kept)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter[1 if parameter.shape[0] == 2 else 2] = float("nan")  # experts 3 and 4
    assert_close(bank(x, kept), before)


# ------------------------------------------------------------------------------------------------ models

MIXES: dict[str, dict[str, Any]] = {
    "families": {"expert": ["lora", {"family": "shira", "density": 0.1}], "rank": 2},
    "counts": {"expert": {"affine": 3, "lokr": 1}, "rank": 2},
    "ranks": {"rank": [1, 2, 3, 4]},
    "shared": {"expert": ["vera", "lora"], "rank": [2, 3]},
}
mixes = pytest.mark.parametrize("mix", list(MIXES))


def subject(mix: str, router: str = "topk", **options: Any) -> recipe_laws.Subject:
    return recipe_laws.Subject(moa.make_recipe(router, n_experts=4, **{**MIXES[mix], **options}))


@mixes
def test_the_laws_of_recipes_hold(mix: str, tmp_path: Path) -> None:
    one = subject(mix, targets="attention")
    recipe_laws.trains_only_what_it_adds(one)
    recipe_laws.saves_bit_for_bit(one, tmp_path)
    recipe_laws.is_monitored(one)
    recipe_laws.copies_apart(one)
    recipe_laws.reaches_every_parameter(subject(mix, "dense", targets="attention"))


@mixes
def test_it_folds_where_the_routing_is_constant(mix: str) -> None:
    recipe_laws.folds_as_declared(subject(mix, "fixed", targets="attention"))
    with pytest.raises(FoldError, match="depends on the input"):
        subject(mix).trained().merge_and_unload()


def test_each_expert_goes_to_peft_as_its_own_kind(tmp_path: Path) -> None:
    """peft gives the logits of the pinned expert: LoRAs of each rank and scale, and another family beside them."""
    options = {"expert": ["lora", "loha"], "rank": [2, 2, 4, 4], "alpha": 6.0, "targets": "attention"}
    model = models.randomise(moa.build(models.llama(), "topk", n_experts=4, **options)).eval()
    batch = {"input_ids": models.lm_batch()["input_ids"]}
    for expert, (kind, rank) in enumerate((("LORA", 2), ("LOHA", 2), ("LORA", 4), ("LOHA", 4))):
        folder = moa.export_expert(model, expert, tmp_path / str(expert))
        theirs = peft.PeftModel.from_pretrained(models.llama(), folder).eval()
        config = theirs.peft_config["default"]
        assert config.peft_type == kind and config.r == rank
        with model.pin_expert(expert), torch.no_grad():
            assert_close(theirs(**batch).logits, model(**batch).logits, 1e-5)


def test_experts_of_two_kinds_are_merged_from_their_folders(tmp_path: Path) -> None:
    options = {"expert": ["lora", "core"], "rank": 2, "targets": "attention"}
    model = models.randomise(moa.build(models.llama(), "topk", n_experts=2, **options))
    folders = [moa.export_expert(model, e, tmp_path / str(e), as_lora=True) for e in range(2)]
    merged = merge([read_peft(folder) for folder in folders], [0.5, 0.5], "average")
    name, mixture = next(iter(model.mixtures().items()))
    bank: Any = mixture.branches[0].bank
    expected = (bank.delta(0).dense() + bank.delta(1).dense()) / 2
    assert_close(next(d for n, d in merged.items() if n.startswith(name)).dense(), expected, 1e-5)


def test_names_and_statistics() -> None:
    names = ("low", "sparse", "high", "wide")
    model = models.randomise(subject("families", expert_names=names).fresh())
    batch = {"input_ids": models.lm_batch()["input_ids"]}
    with torch.no_grad():
        together = model.eval()(**batch, adapter_ids=list(names)).logits
        for row, name in enumerate(names):
            with model.pin_expert(name):
                assert_close(model(input_ids=batch["input_ids"][row : row + 1]).logits[0], together[row], 1e-5)


def test_ranks_scale_each_expert_by_its_own() -> None:
    recipe = moa.make_recipe("topk", n_experts=4, rank=[2, 8], alpha=8)
    bank = recipe.bank(moa.Site("layer", nn.Linear(16, 16), 16, 16))
    assert isinstance(bank, MixedFactorsBank)
    assert [(m.rank, m.scaling) for m in bank.banks] == [(2, 4.0), (8, 1.0)]
    assert [bank.delta(e).rank for e in range(4)] == [2, 8, 2, 8]  # type: ignore[attr-defined]
    assert sum(p.numel() for p in bank.parameters()) == 2 * (2 + 8) * 32
    assert isinstance(moa.make_recipe("topk", rank=[4, 4]).bank(moa.Site("l", nn.Linear(8, 8), 8, 8)), LoRABank)


def test_in_a_base_with_experts_of_its_own() -> None:
    """Every matrix of fused experts gets its own, of both kinds."""
    options = {"expert": ["lora", "affine"], "rank": [1, 2], "targets": "moe-experts"}
    model = models.randomise(moa.build(base("Mixtral"), "topk", n_experts=2, **options))
    assert any(isinstance(m, ExpertsMixture) for m in model.mixtures().values())
    model.train()(**models.lm_batch()).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_in_a_configuration_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_run.config_values(tmp_path, tiny_run.encoder_folder(tmp_path / "base"))
    recipe = {"router": "topk", "n_experts": 4, "expert": ["lora", "shira"], "density": 0.1, "rank": [2, 4]}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**values, "recipe": recipe}))
    made = moa.make_recipe(**read_config(config).recipe)
    assert [made.family.of(e).name for e in range(4)] == ["lora", "shira"] * 2 and made.rank == (2, 4, 2, 4)
    assert moa.make_recipe(**made.to_dict()) == made
    changed = read_config(config, ["recipe.expert={lora: 3, shira: 1}", "recipe.rank=2"])
    assert [f.name for f in moa.make_recipe(**changed.recipe).family.families] == ["lora"] * 3 + ["shira"]
    assert main(["train", str(config), "--dry-run"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"expert": ["lora", "shirra"]}, r"unknown expert family 'shirra'.*Did you mean 'shira'"),
        ({"expert": ["lora", "shira"], "densty": 0.1}, r"unknown keyword 'densty'.*Did you mean 'density'"),
        ({"expert": ["lora", {"family": "shira", "densty": 1}]}, r"'densty'.*the family 'shira'.*'density'"),
        ({"expert": ["lora", "shira", "core"]}, r"expert is a list of 3 values, which 8 experts.* n_experts=6 or 9"),
        ({"rank": [1, 2, 3]}, r"rank is a list of 3 values, which 8 experts take in turn"),
        ({"rank": [4, 0]}, r"rank must be at least 1, got \[4, 0\]"),
        ({"rank": []}, r"rank is a list of 0 values"),
        ({"expert": []}, r"a list of names, or counts, got \[\]"),
        ({"expert": {"lora": 0}}, r"how many experts a family has"),
        ({"expert": {"lora": 2, "core": 2}, "n_experts": 5}, r"expert counts 4 experts, and n_experts is 5"),
        ({"expert": ["core", "convpass"]}, r"none in common: 'core' on input; 'convpass' on sequential"),
        ({"expert": ["core", "lora"], "place": "output"}, r"'core \+ lora' sit on input: place='output'"),
        ({"expert": "ia3", "rank": [1, 2]}, r"have no rank: rank=\[1, 2\] would do nothing"),
        ({"expert": ["ia3", "ia3"], "rank": 4}, r"have no rank"),
        ({"router": "poly", "rank": [1, 2]}, r"'poly' has experts of its own kind \(lora\): expert and rank cannot be"),
        ({"router": "flylora", "rank": [1, 2]}, r"rank must be"),
    ],
)
def test_bad_input(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.make_recipe(**{"router": "topk", **options})


def test_what_needs_different_places_is_named_with_its_layer() -> None:
    options = {"feedforward": ["down_proj"], "place": "output"}
    with pytest.raises(ConfigError, match=r"mlp\.down_proj: .*'ia3' on its input, 'lora' on its output"):
        moa.build(models.llama(), "topk", expert=["ia3", "lora"], **options)


def test_a_mixed_model_keeps_its_number_of_experts() -> None:
    for name in ("ranks", "families"):
        model = subject(name).fresh()
        for change in (model.add_expert, lambda model=model: model.remove_expert(0)):
            with pytest.raises(ConfigError, match=r"several kinds or ranks.* build a model of another n_experts"):
                change()
    with pytest.raises(ConfigError, match="adapters that exist already are of one kind"):
        moa.build(models.llama(), "topk", expert=["lora", "shira"], experts=["a", "b"])
    with pytest.raises(ConfigError, match=r"whole weights .* decides row by row"):
        moa.build(models.llama(), "topk", expert=["lora", "dora"])
