"""Every family in a whole model: start, training, saving, folding, what does not fit. Run: pytest tests/experts"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import moa
from experiments.families import root
from moa.errors import ConfigError, FoldError
from moa.experts import FAMILIES
from moa.recipes import RECIPES
from tests import laws, models
from tests.laws import assert_close

# a family's own keywords on the tiny models, whose layers have 8, 16 or 24 features
KEYWORDS: dict[str, dict[str, Any]] = {
    "shira": {"density": 0.1},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4, "n_factors": 2},
    "ia3": {"feedforward": ("down_proj",)},
    "salt": {"n_scaled": 3},
    "qwha": {"density": 0.1},
}
NEW = ["ia3", "vera", "shira", "core", "comp_lora", "salt", "loldu", "paca", "dylora", "lokr", "loha", "randlora"]
NEW += ["soka", "tera", "mps", "qwha", "dora", "oft", "boft"]
WHOLE = ["dora", "oft", "boft"]
# trainable numbers of one expert on a layer i -> o at rank r, by the paper's closed formula
FORMULAS: dict[str, Any] = {
    "ia3": lambda i, o, r, name: i if name.endswith("down_proj") else o,
    "vera": lambda i, o, r, name: r + o,
    "shira": lambda i, o, r, name: int(0.1 * i * o),
    "qwha": lambda i, o, r, name: int(0.1 * i * o),
    "core": lambda i, o, r, name: r * r,
    "comp_lora": lambda i, o, r, name: r * (i + o),
    "salt": lambda i, o, r, name: 2 * 3 + 2 * r * (min(i, o) - 3),
    "loldu": lambda i, o, r, name: r,
    "soka": lambda i, o, r, name: r * (root(o) * root(i) + o * i // (root(o) * root(i))),
    "tera": lambda i, o, r, name: sum(root(d) + d // root(d) for d in (i, o)),
    "mps": lambda i, o, r, name: r * (root(o) + r * o // root(o) + r * root(i) + i // root(i)),
    "dylora": lambda i, o, r, name: r * (i + o),
    "paca": lambda i, o, r, name: r * o,
    "loha": lambda i, o, r, name: 2 * r * (i + o),
    "randlora": lambda i, o, r, name: -(-min(i, o) // r) * (r + min(i, o)),
    "dora": lambda i, o, r, name: r * (i + o) + o,
    "oft": lambda i, o, r, name: i // 4 * (4 * 3 // 2),
    "boft": lambda i, o, r, name: 2 * i // 4 * 16 + o,
}
families = pytest.mark.parametrize("name", NEW)


def keywords(name: str, router: str = "fixed", n_experts: int = 2) -> dict[str, Any]:
    """Return small keywords of a recipe with a family."""
    family = FAMILIES[name]
    options: dict[str, Any] = {"router": router, "expert": name, "n_experts": n_experts, **KEYWORDS.get(name, {})}
    return {**options, "rank": 2} if "rank" in family.uses else options


def built(name: str, router: str = "fixed", n_experts: int = 2, **options: Any) -> Any:
    return moa.build(models.llama(), **{**keywords(name, router, n_experts), **options})


def gentle(model: Any) -> Any:
    """Draw every trainable parameter a little way from its start: norms stay apart from zero."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return model


@families
def test_it_starts_as_its_base_and_can_learn(name: str) -> None:
    model, batch = built(name), models.lm_batch()
    assert_close(models.outputs_of(model, batch), models.outputs_of(models.llama(), batch), 1e-6)
    before = model.train()(**batch).loss.item()
    rate = 0.2 if name == "ia3" else 2e-2  # scales of a model of random weights hardly reach its loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.1)
    for _ in range(8):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**batch).loss.item() < before - 0.02
    after = model.unload().state_dict()
    for key, value in models.llama().state_dict().items():
        assert torch.equal(after[key], value), f"{key} is the base's and moved"


@families
def test_its_parameters_are_the_closed_formula(name: str) -> None:
    model = built(name, n_experts=3)
    for layer, branch in model.branches():
        d_in, d_out = branch.router.d_in, branch.bank.d_out
        d_in = model.mixtures()[layer].base.in_features
        own = sum(p.numel() for p in branch.bank.parameters())
        if name == "lokr":
            (i1, i2), (o1, o2) = branch.bank.inner, branch.bank.outer
            assert (i1 * i2, o1 * o2) == (d_in, d_out) and i1 <= i2 and o1 <= o2
            right = o2 * i2 if max(o2, i2) / 2 <= 2 else 2 * (o2 + i2)
            assert own == 3 * (o1 * i1 + right)
        else:
            assert own == 3 * FORMULAS[name](d_in, d_out, 2, layer), layer


@families
def test_it_is_saved_without_what_a_seed_or_the_base_gives(name: str, tmp_path: Path) -> None:
    model, batch = gentle(built(name)), models.lm_batch()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    routers = {key for key in saved if ".router." in key}
    assert set(saved) - routers == trained - routers, "a checkpoint holds what is trained, and nothing else"
    torch.manual_seed(99)
    again = moa.load(tmp_path, base=models.llama())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    assert again.recipes[0][0] == model.recipes[0][0]


@families
def test_it_folds_where_the_routing_is_constant(name: str) -> None:
    model, batch = gentle(built(name).double()), models.lm_batch()
    expected = models.outputs_of(model, batch)
    base = models.outputs_of(models.llama().double(), batch)
    assert not torch.allclose(expected, base, atol=1e-3)
    with model.folded() as inside:
        assert_close(models.outputs_of(inside, batch), expected)
    assert torch.equal(models.outputs_of(model, batch), expected)
    assert_close(models.outputs_of(model.merge_and_unload(), batch), expected)


@families
@pytest.mark.parametrize("router", list(RECIPES))
def test_it_runs_under_every_recipe_that_fits(name: str, router: str) -> None:
    """Forward, backward and a pinned expert; or a refusal that names the family, the recipe or the reason."""
    if RECIPES[router].wants_experts:
        return
    fields = laws.recipe_options(router, next(iter(laws.RECIPE_OPTIONS.get(router, {"default": {}}))))
    options = {**keywords(name, router, 4), **fields}
    if "rank" not in FAMILIES[name].uses:
        options.pop("rank", None)
    for key in ("alpha", "dropout"):
        options.pop(key, None)
    batch = models.lm_batch()
    if laws.needs_tasks(router):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    options["n_experts"] = fields.get("n_experts", 4)
    make = lambda: moa.build(models.llama(), **options)  # noqa: E731
    recipe = RECIPES[router]
    if recipe.families is not None and name not in recipe.families:
        with pytest.raises(ConfigError, match="has experts of its own kind"):
            make()
        return
    if name in WHOLE and router not in ("fixed", "moelora", "xcross"):
        with pytest.raises(ConfigError, match=r"whole weights of their layer.*row by row"):
            make()
        return
    model = gentle(make())
    model.train()(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ".bank." in key:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
    assert any(bool(p.grad.any()) for k, p in model.named_parameters() if p.grad is not None and ".bank." in k)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_weights_mix_by_example(name: str) -> None:
    """In remix by sequence each example gets the weight W0 + Σ w ΔW of its own."""
    model = gentle(built(name, "remix", n_experts=3, k=2, granularity="sequence").double()).eval()
    layer, mixture = next(iter(model.mixtures().items()))
    x = torch.randn(2, 5, mixture.base.in_features, dtype=torch.float64)
    (branch,) = mixture.branches
    routing = branch.router(x, model.context)
    deltas = torch.stack([branch.bank.delta(e).dense() for e in range(3)])
    weight = mixture.base.weight + torch.einsum("bse,eoi->bsoi", routing.dense().double(), deltas)[:, 0]
    assert_close(mixture(x), torch.einsum("boi,bsi->bso", weight, x), 1e-9, layer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"expert": "oft", "block_size": 5}, r"block_size=5 does not divide 16: the nearest that do are 2, 4, 8"),
        ({"expert": "boft", "block_size": 8, "n_factors": 3}, r"2\^\(n_factors - 1\)=32 does not divide 16"),
        ({"expert": "lokr", "factor": 7}, r"q_proj: factor=7 does not divide 16: the nearest that do are 2, 4, 8"),
        ({"expert": "core", "rank": 9}, r"k_proj: a weight \(8, 16\) has 8 singular values: rank=9 is too many"),
        ({"expert": "comp_lora", "protected": 0}, r"protected must be at least 1, got 0"),
        ({"expert": "comp_lora", "sides": "left"}, r"sides must be one of both, input, output, got 'left'"),
        ({"expert": "loldu", "rank": 9}, r"k_proj: a weight \(8, 16\) has 8 pivots: rank=9 is too many"),
        ({"expert": "loldu", "place": "block"}, r"family 'loldu' sit on input: place='block'"),
        ({"expert": "salt", "n_scaled": 0}, r"n_scaled must be at least 1, got 0"),
        ({"expert": "salt", "alpha": 2.0}, r"family 'salt' have no alpha"),
        ({"expert": "paca", "rank": 20}, r"q_proj: rank=20 columns of a weight \(16, 16\) that has 16"),
        ({"expert": "paca", "place": "output"}, r"family 'paca' sit on input: place='output'"),
        ({"expert": "shira", "rank": 40}, r"at most rank=\d+ fits, or set density"),
        ({"expert": "shira", "mask": "gradint"}, r"mask must be one of random.*'gradint'"),
        ({"expert": "ia3", "rank": 4}, r"family 'ia3' have no rank"),
        ({"expert": "dora", "place": "output"}, r"family 'dora' sit on input: place='output'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), "fixed", n_experts=2, **options)


@pytest.mark.parametrize("name", ["core", "comp_lora", "salt", "loldu", "dora", "oft", "boft"])
def test_a_base_without_values_is_refused(name: str) -> None:
    with torch.device("meta"):
        layer = nn.Linear(8, 8)
    family = laws.make_family(name, {"block_size": 4} if name in ("oft", "boft") else {})
    with pytest.raises(ConfigError, match=rf"q: experts of the family '{name}' start from the base's weight.*meta"):
        family.build(moa.Site("q", layer, 8, 8), 2, None, rank=2)
    with pytest.raises(ConfigError, match="whose weight cannot be read as one matrix"):
        family.build(moa.Site("q", nn.Identity(), 8, 8), 2, None, rank=2)


def test_ia3_on_the_input_of_a_convolution_is_refused() -> None:
    conv = nn.Sequential(nn.Conv1d(4, 6, 3))
    with pytest.raises(ConfigError, match=r"0 is a convolution.*leave it out of feedforward"):
        moa.build(conv, "fixed", n_experts=1, expert="ia3", place="input", targets=("0",))


def test_per_row_folding_says_why_not() -> None:
    with warnings.catch_warnings(), pytest.raises(FoldError, match="depends on the input"):
        built("loha", "topk", n_experts=4).merge_and_unload()
