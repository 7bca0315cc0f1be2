"""Every keyword is read, warned of or refused. Run: pytest tests/recipes/test_keywords.py"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import moa
from moa.errors import ConfigError, UnusedKeywordWarning
from moa.mixture import Branch, Mixture, find_sites
from moa.recipes import RECIPES, Recipe, TopKRecipe, make_recipe
from moa.recipes.depth import by_depth
from moa.routers import FixedRouter, LinearRouter, Router
from moa.runs.config import parse
from moa.tables import ELSEWHERE
from tests import laws, models
from tests.systems import adapters

# transformers' own, when peft looks at a model
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
recipes = pytest.mark.parametrize(("name", "variant"), laws.RECIPE_CASES)


def keywords(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(RECIPES[name])}


# ------------------------------------------------------------------------------------------------ the random stream


def moves_the_stream(make: Any) -> bool:
    before = torch.get_rng_state()
    make()
    return not torch.equal(torch.get_rng_state(), before)


@recipes
def test_a_recipe_draws_nothing(name: str, variant: str) -> None:
    assert not moves_the_stream(lambda: laws.small_recipe(name, variant))
    options = {**laws.recipe_options(name, variant), "router": name}
    task = {"train": "rows.jsonl", "text": "text", "label": "label"}
    values = {"base": "base", "output": "out", "tasks": {"one": task}, "recipe": options}
    assert not moves_the_stream(lambda: parse(values))


def test_a_recipe_that_draws_is_seen() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Drawing(Recipe):
        def __post_init__(self) -> None:
            super().__post_init__()
            LinearRouter(1, self.n_experts, 1)

    assert moves_the_stream(Drawing)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topk", {"jitter": 1.0}, r"jitter must be in \[0, 1\), got 1.0"),
        ("switch", {"jitter": -0.1}, "jitter must be"),
        ("mixlora", {"jitter": 2.0}, "jitter must be"),
        ("sigmoid", {"bias_rate": -1.0}, "bias_rate must not be negative"),
        ("flylora", {"bias_rate": -1.0}, "bias_rate must not be negative"),
        ("flylora", {"nonzeros": 0}, "nonzeros must be in 1 … d_in, got 0"),
        ("adamole", {"max_threshold": 1.5}, r"max_threshold must be in \(0, 1\], got 1.5"),
        ("expert_choice", {"capacity": 0.0}, "capacity must be positive"),
        ("soft", {"n_slots": 0}, "n_slots must be at least 1"),
        ("loramoe", {"task_kinds": (0, 2)}, "task_kinds must hold 0 or 1"),
        ("loramoe", {"task_kinds": (0, 1), "delta": 1.0}, r"delta must be in \[0, 1\)"),
        ("moelora", {"n_tasks": 0}, "n_tasks must be at least 1"),
        ("moelora", {"d_embedding": 0}, "d_embedding must be at least 1"),
        ("moelora", {"unknown_tasks": "skip"}, "unknown must be 'error' or 'uniform'"),
        ("poly", {"n_tasks": 0}, "n_tasks must be at least 1"),
        ("mhr", {"n_heads": 0}, "n_heads must be at least 1"),
        ("xlora", {"depth": 0}, "depth must be at least 1"),
        ("arrow", {"temperature": 0.0}, "temperature must be positive"),
        ("remix", {"samples": 1}, "samples must be at least 2"),
        ("remix", {"granularity": "word"}, "granularity must be"),
    ],
)
def test_bad_values_are_refused_before_a_layer_is_known(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(name, **options)


# ------------------------------------------------------------------------------------------------ k


@pytest.mark.parametrize("name", list(RECIPES))
def test_k_is_obeyed_or_named(name: str) -> None:
    own = {"gate": "experts"} if name == "hydra" else {}
    if "k" in keywords(name):
        for k in (1, 3):
            recipe = make_recipe(name, n_experts=4, k=k, **own)
            assert recipe.k == k
            assert {branch.router.k for branch in routed(recipe)} == {k}
        with pytest.raises(ConfigError, match="k must be at most n_experts, got k=5"):
            make_recipe(name, n_experts=4, k=5, **own)
    elif "k" in RECIPES[name].refused:
        with pytest.raises(ConfigError, match=rf"k=2 cannot be chosen in the recipe '{name}'"):
            make_recipe(name, n_experts=4, k=2)
    else:
        with pytest.warns(UnusedKeywordWarning, match=rf"k=2 changes nothing in the recipe '{name}'"):
            recipe = make_recipe(name, n_experts=4, k=2)
        assert recipe == make_recipe(name, n_experts=4)
        assert recipe.k == 4 and {branch.router.k for branch in routed(recipe)} == {4}


def routed(recipe: Recipe) -> list[Branch]:
    """Return the branches, with a router of more than one expert, that a recipe puts on a small decoder."""
    made = [branch for mixture in built(recipe) for branch in mixture.branches]
    return [branch for branch in made if isinstance(branch, Branch) and branch.router.n_experts > 1]


def built(recipe: Recipe) -> list[Mixture]:
    base = models.llama()
    recipe = recipe.for_base(base)
    return recipe.mixtures(find_sites(base, recipe.targets), moa.Context())


def test_build_and_by_depth_warn_of_k() -> None:
    with pytest.warns(UnusedKeywordWarning, match="k=2 changes nothing in the recipe 'dense'"):
        model = moa.build(models.llama(), router="dense", n_experts=3, k=2)
    assert {branch.router.k for _, branch in model.branches()} == {3}
    with pytest.warns(UnusedKeywordWarning, match="k=2 changes nothing in the recipe 'soft'"):
        by_depth("soft", 2, (2, 4), k=2)


# ------------------------------------------------------------------------------------------------ every other keyword

# read by who puts the recipe into a model
HOST = {"targets", "exclude", "layers", "layers_pattern", "train_experts", "expert_names"}
OTHER: dict[str, Any] = {"expert": "shared", "place": "output", "engine": "concat", "alpha": 3.0, "dropout": 0.25}


def another(recipe: Recipe, keyword: str) -> Any:
    """Return a value of a keyword that differs from its default."""
    default = next(field.default for field in dataclasses.fields(recipe) if field.name == keyword)
    hint = typing.get_type_hints(type(recipe))[keyword]
    if typing.get_origin(hint) is typing.Literal:
        return next(value for value in typing.get_args(hint) if value != default)
    if keyword in OTHER:
        return OTHER[keyword]
    return not default if isinstance(default, bool) else default + 1


def unread(recipe: Recipe) -> set[str]:
    """Return the keywords that nothing asks for while the recipe is put on the layers of a decoder."""
    base = models.llama()
    recipe = recipe.for_base(base)
    sites = find_sites(base, recipe.targets)
    asked: set[str] = set()

    class Watched(type(recipe)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            asked.add(name)
            return super().__getattribute__(name)

    watched = object.__new__(Watched)
    for field in dataclasses.fields(recipe):
        object.__setattr__(watched, field.name, getattr(recipe, field.name))
    asked.clear()
    watched.shared(sites)
    watched.mixtures(sites, moa.Context())
    watched.streams(base, [site.name for site in sites], moa.Context())
    return {field.name for field in dataclasses.fields(recipe)} - asked - HOST


def every_keyword_counts(recipe: Recipe) -> None:
    """What nothing reads is refused as soon as it is set."""
    for keyword in sorted(unread(recipe)):
        with pytest.raises(ConfigError, match=f"{keyword}="):
            dataclasses.replace(recipe, **{keyword: another(recipe, keyword)})


@recipes
def test_every_keyword_is_read_or_refused(name: str, variant: str) -> None:
    every_keyword_counts(laws.small_recipe(name, variant))


def test_a_dropped_keyword_is_seen() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Dropping(TopKRecipe):
        temperature: float = 1.0

        def build(self, site: Any) -> list[Branch]:
            router: Router = FixedRouter(site.d_in, self.n_experts)
            return [Branch(router, self.bank(site))]

    assert unread(Dropping()) == {"k", "temperature"}
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        every_keyword_counts(Dropping())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hydra", {"balance": 0.1}, "balance=0.1 changes nothing here: it needs gate='experts'"),
        ("hydra", {"balance": 0.1, "gate": "branches"}, "balance=0.1 changes nothing"),
        ("loramoe", {"delta": 0.3}, "delta=0.3 changes nothing here: it needs task_kinds"),
        ("xlora", {"width": 8}, "width=8 changes nothing here: it needs inner layers"),
        ("xlora", {"classifier_dropout": 0.0}, "classifier_dropout=0.0 changes nothing"),
        ("flylora", {"engine": "concat"}, "engine='concat' changes nothing"),
        ("mhr", {"mode": "mu", "table_lr": 0.01}, "table_lr=0.01 changes nothing here: it needs a table"),
        ("poly", {"mode": "mu", "n_tasks": 2}, "n_tasks=2 changes nothing"),
    ],
)
def test_a_keyword_without_effect_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(name, **options)


def test_what_the_adapters_say_is_not_asked_twice(tmp_path: Path) -> None:
    folders = adapters.write(tmp_path, models.llama)
    for options, message in (
        ({"targets": "ffn"}, "targets='ffn' changes nothing: the adapters given say on which layers"),
        ({"exclude_modules": ["o_proj"]}, "exclude=.* changes nothing: the adapters given say on which layers"),
        ({"layers": 1}, "layers=1 changes nothing: the adapters given say on which layers"),
        ({"alpha": 4.0}, "alpha=4.0 changes nothing: the adapters given say their scale"),
        ({"lora_alpha": 4.0}, "alpha=4.0 changes nothing"),
        ({"router": "remix", "scale": "lora"}, "scale='lora' changes nothing: the adapters given say their scale"),
    ):
        with pytest.raises(ConfigError, match=message):
            moa.build(models.llama(), **{"router": "topk", **options}, experts=folders)


@recipes
def test_what_chooses_a_scale_is_known_as_such(name: str, variant: str) -> None:
    """Adapters that are read in bring their scale along, so `build` refuses these keywords beside them."""
    made = laws.small_recipe(name, variant)
    for key, hint in typing.get_type_hints(type(made)).items():
        if typing.get_origin(hint) is typing.Literal:
            for value in typing.get_args(hint):
                try:
                    other = dataclasses.replace(made, **{key: value})
                except ConfigError:
                    continue
                assert other.scaling() == made.scaling() or key in made.scales, key
    assert dataclasses.replace(made, alpha=3.0).scaling() != dataclasses.replace(made, alpha=6.0).scaling()
    assert "alpha" in made.scales


@pytest.mark.parametrize("theirs", list(ELSEWHERE))
def test_pefts_words_are_answered_in_ours(theirs: str) -> None:
    assert not any(theirs in keywords(name) for name in RECIPES)
    with pytest.raises(
        ConfigError, match=re.escape(f"unknown keyword '{theirs}' in the recipe 'topk' with expert='lora'. Instead: ")
    ):
        moa.build(models.llama(), "topk", **{theirs: 1})


@recipes
def test_what_would_turn_training_round_is_refused(name: str, variant: Any) -> None:
    """A negative coefficient trains towards what its loss is against, a negative alpha turns the experts' sign."""
    cls = RECIPES[name]
    for keyword in (*cls.coefficients, "alpha"):
        for value, message in ((-1.0, "at least 0|positive"), (float("nan"), "finite number")):
            with pytest.raises(ConfigError, match=f"{keyword} must be .*({message})"):
                make_recipe(name, **{keyword: value})
    with pytest.raises(ConfigError, match="alpha must be positive, got 0"):
        make_recipe(name, alpha=0)
