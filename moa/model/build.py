"""`build` puts a mixture into a model; `load` brings back a saved one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, UnadaptedWarning
from ..experts.mixed import Kinds
from ..formats.peft_experts import names_of
from ..formats.peft_native import read_given
from ..mixture import GROUPS, fused_experts, without_sizes
from ..recipes import Recipe, make_recipe, recipe_class
from ..tables import own_words
from .moa_model import MoAModel
from .new_heads import new_heads
from .rollback import all_or_nothing


def build(
    model: nn.Module,
    router: str | Recipe | Sequence[Recipe] = "topk",
    n_experts: int | None = None,
    k: int | None = None,
    *,
    expert: Kinds | None = None,
    rank: int | Sequence[int] | None = None,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    experts: str | Path | Sequence[str | Path] | None = None,
    modules_to_save: Sequence[str] | None = None,
    **options: Any,
) -> MoAModel:
    """Return model with a mixture of adapters in its layers, everything else frozen.

    Args:
        model: any module, transformers or not, changed in place; or a `MoAModel`, which gets a further recipe.
        router: name of a recipe (`moa.RECIPES`), a recipe, or a list of recipes for different layers.
        n_experts: E, experts per layer; the recipe's default is 8.
        k: K, active experts per row; the recipe's default is 2 in most.
        expert: adapter family, "lora"; several in one bank: ["lora", "shira"], in turn, or {"lora": 6, "shira": 2}.
        rank: r of each expert, default 8; a list is gone through in turn, [4, 8, 16, 32].
        alpha: experts' outputs are scaled by alpha / rank; default 2 · rank, ReMix: its paper's.
        targets: "all-linear", "ffn", "attention", a list of name endings, or a regex; default the recipe's.
        experts: one or several folders of PEFT adapters of one kind (LoRA, or that of a family) that become the
            experts, on the layers that they adapt; frozen unless train_experts=True, and known by their folders' names
            unless expert_names are given.
        modules_to_save: names of modules, or ends of names, that are trained and saved whole; default the new heads of
            classification models, and the modules that a class of your own puts beside a body of transformers.
        options: the recipe's own keywords, among them exclude and layers, which narrow the targets (see
            `moa recipes NAME`); peft's spellings (target_modules, r, lora_alpha, …) are understood.

    Returns:
        The `MoAModel`; `model` is inside it as `.base`.

    Raises:
        ConfigError: unknown names (the nearest known one is given), values out of range, no matching layer, or layers
            that already carry experts.
        CheckpointError: an adapter folder that cannot be read or does not fit this base.
    """
    options = own_words(options)
    if isinstance(experts, str | Path):
        experts = [experts]
    given = {
        "n_experts": n_experts,
        "k": k,
        "expert": expert,
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & options.keys():
        raise ConfigError(f"{name} is given twice, once under peft's spelling: give it once.")
    options = {**given, **options}
    if experts is not None and not isinstance(router, str):
        raise ConfigError("experts=[…] needs router as a name: their number and rank come from the adapters.")
    base, given_experts = model.base if isinstance(model, MoAModel) else model, None
    if experts is not None:
        if not isinstance(expert, str | None):
            raise ConfigError(f"adapters that exist already are of one kind: expert={expert!r} must be its name.")
        given_experts = read_given(experts, base, expert)
    if given_experts is not None:
        for name, value in given_experts.keywords.items():
            if options.setdefault(name, value) != value:
                raise ConfigError(f"{name}={options[name]} was asked for, but the adapters given have {value}.")
        scales = recipe_class(router).scales if isinstance(router, str) else ()
        where = dict.fromkeys(("targets", "exclude", "layers", "layers_pattern"), "on which layers they sit")
        for name, why in (where | dict.fromkeys(scales, "their scale")).items():
            if name in options:
                raise ConfigError(f"{name}={options[name]!r} changes nothing: the adapters given say {why}.")
        options.setdefault("train_experts", False)
        options.setdefault("expert_names", names_of(experts or ()))
    if isinstance(router, str):
        if given_experts is None and recipe_class(router).wants_experts:
            raise ConfigError(f"router={router!r} is for adapters that exist already: name them with experts=[…].")
        recipes = [make_recipe(router, **options)]
    else:
        several: list[Any] = list(router) if isinstance(router, Sequence) else []
        recipes = [router] if isinstance(router, Recipe) else several
        if options:
            raise ConfigError(f"keywords {', '.join(options)} belong inside the recipes when router is not a name.")
        if not recipes or not all(isinstance(r, Recipe) for r in recipes):
            raise ConfigError(f"router must be a name, a Recipe or a list of Recipes, got {router!r}.")
    with all_or_nothing(model):
        out = model if isinstance(model, MoAModel) else MoAModel.around(model)
        if modules_to_save is None and out is not model:
            modules_to_save = new_heads(model)
        out.train_whole(modules_to_save or ())
        for recipe in recipes:
            names = out.add_recipe(recipe, None if given_experts is None else given_experts.layers)
            if given_experts is not None:
                given_experts.fill(out.mixtures(), names)
                out.experts_changed()
    left = bool(fused_experts(model)) or bool(without_sizes(model))
    if left and any(recipe.targets in GROUPS for recipe in recipes) and given_experts is None:
        warnings.warn(f"{type(base).__name__}: {out.adapted_summary()}", UnadaptedWarning, stacklevel=2)
    return out


def load(
    path: str | Path,
    base: nn.Module | None = None,
    *,
    check_base: bool = True,
    is_trainable: bool = True,
    **kwargs: Any,
) -> MoAModel:
    """Return the model saved under a path or hub id; the same as `MoAModel.from_pretrained`.

    Args:
        path, base, check_base, is_trainable, kwargs: see there.
    """
    return MoAModel.from_pretrained(path, base, check_base=check_base, is_trainable=is_trainable, **kwargs)
