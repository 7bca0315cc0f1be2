"""`build` puts a mixture into a model; `load` brings back a saved one."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, foreign
from .errors import ConfigError
from .mixture import Mixture
from .model import MoAModel
from .peft_format import load_experts, read_adapters
from .recipes import Recipe, make_recipe, recipe_class
from .sites import backbone_prefix, take_out

HEADS = ("Classification", "QuestionAnswering", "MultipleChoice")
ALIASES = {
    "target_modules": "targets",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_experts": "n_experts",
    "top_k": "k",
}


def build(
    model: nn.Module,
    router: str | Recipe | Sequence[Recipe] = "topk",
    n_experts: int | None = None,
    k: int | None = None,
    *,
    expert: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    experts: Sequence[str | Path] | None = None,
    modules_to_save: Sequence[str] | None = None,
    **options: Any,
) -> MoAModel:
    """Return model with a mixture of adapters in its layers, everything else frozen.

    Args:
        model: any module, transformers or not, changed in place; or a `MoAModel`, which gets a further recipe.
        router: name of a recipe (`moa.RECIPES`), a recipe, or a list of recipes for different layers.
        n_experts: E, experts per layer; the recipe's default is 8.
        k: K, active experts per row; the recipe's default is 2 in most.
        expert: adapter family, "lora".
        rank: r of each expert, default 8.
        alpha: experts' outputs are scaled by alpha / rank; default 2 · rank, ReMix: its paper's.
        targets: "all-linear", "ffn", "attention", a list of name endings, or a regex; default the recipe's.
        experts: folders of PEFT LoRA adapters that become the experts, on the layers that they adapt; frozen unless
            train_experts=True.
        modules_to_save: names of modules that are trained and saved whole; default the new heads of
            classification models.
        options: the recipe's own keywords; peft's spellings (target_modules, r, lora_alpha, …) are understood.

    Returns:
        The `MoAModel`; `model` is inside it as `.base`.

    Raises:
        ConfigError: unknown names (the nearest known one is given), values out of range, no matching layer, or layers
            that already carry experts.
        CheckpointError: an adapter folder that cannot be read or does not fit this base.
    """
    for theirs, ours in ALIASES.items():
        if theirs in options:
            options[ours] = options.pop(theirs)
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
    if isinstance(options.get("targets"), list):
        options["targets"] = tuple(options["targets"])
    if experts is not None and not isinstance(router, str):
        raise ConfigError("experts=[…] needs router as a name: their number and rank come from the adapters.")
    adapters = read_adapters(experts) if experts is not None else None
    if adapters is not None:
        for name, value in (("n_experts", len(adapters)), ("rank", max(a.max_rank for a in adapters))):
            if options.setdefault(name, value) != value:
                raise ConfigError(f"{name}={options[name]} was asked for, but the adapters given have {value}.")
        options.setdefault("train_experts", False)
    if isinstance(router, str):
        if adapters is None and recipe_class(router).wants_experts:
            raise ConfigError(f"router={router!r} is for adapters that exist already: name them with experts=[…].")
        recipes = [make_recipe(router, **options)]
    else:
        several: list[Any] = list(router) if isinstance(router, Sequence) else []
        recipes = [router] if isinstance(router, Recipe) else several
        if options:
            raise ConfigError(f"keywords {', '.join(options)} belong inside the recipes when router is not a name.")
        if not recipes or not all(isinstance(r, Recipe) for r in recipes):
            raise ConfigError(f"router must be a name, a Recipe or a list of Recipes, got {router!r}.")
    with _all_or_nothing(model):
        out = model if isinstance(model, MoAModel) else _wrap(model)
        if modules_to_save is None and out is not model:
            modules_to_save = _new_heads(model)
        _train_whole(out, modules_to_save or ())
        for recipe in recipes:
            sites = None if adapters is None else sorted({name for a in adapters for name in a.layers})
            names = out.add_recipe(recipe, sites)
            if adapters is not None:
                load_experts(out.mixtures(), names, adapters)
                out.experts_changed()
    return out


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was if building on it fails: its own layers, and what of them is trained."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    before = {id(m) for m in model.modules() if isinstance(m, Mixture)}
    lists = (list(model.recipes), list(model.modules_to_save)) if isinstance(model, MoAModel) else None
    try:
        yield
    except BaseException:
        take_out(model, {id(m) for m in model.modules() if isinstance(m, Mixture)} - before)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        if isinstance(model, MoAModel) and lists is not None:
            model.recipes, model.modules_to_save = lists
            model.routers_changed()
        raise


def _wrap(model: nn.Module) -> MoAModel:
    if any(isinstance(m, Mixture) for m in model.modules()):
        raise ConfigError(
            "this model already carries experts: build on the MoAModel that holds it, or reload the base."
        )
    return model_class(type(model))(model)  # type: ignore[arg-type]


def _train_whole(out: MoAModel, names: Sequence[str]) -> None:
    for name in names:
        try:
            out.base.get_submodule(name).requires_grad_(True)
        except AttributeError as error:
            raise ConfigError(
                f"modules_to_save names {name!r}, which {type(out.base).__name__} does not have."
            ) from error
    out.modules_to_save += [name for name in names if name not in out.modules_to_save]


def _new_heads(model: nn.Module) -> list[str]:
    """Return the head modules of a classification model: they were not pretrained, so they are trained whole."""
    prefix = backbone_prefix(model)
    if not prefix or not any(kind in type(model).__name__ for kind in HEADS):
        return []
    return [n for n, m in model.named_children() if f"{n}." != prefix and any(True for _ in m.parameters())]


def load(path: str | Path, base: nn.Module | None = None, *, check_base: bool = True, **kwargs: Any) -> MoAModel:
    """Return the model saved under a path or hub id.

    Folders of MixLoRA (TUDB-Labs' package, MoE-PEFT) and of peft's X-LoRA are read, too, into the recipes `mixlora` and
    `xlora`; saved again, they are checkpoints of moa.

    Args:
        path: folder with model.safetensors, or with adapter_config.json; or a hub id.
        base: the model to put the mixtures into; None loads the one that the checkpoint names.
        check_base: refuse a base whose weights are not those the mixture was trained on.
        kwargs: for the base's `from_pretrained` (dtype, device_map, …).

    Raises:
        CheckpointError: not such a folder, truncated, another base, or tensors that are missing, unexpected or of
            another shape, grouped by kind; an option of another library that has no counterpart, named.
    """
    folder = checkpoint.locate(path)
    if foreign.is_foreign(folder):
        found = foreign.read_foreign(folder)
        out = _wrap(foreign.foreign_base(found, kwargs) if base is None else base)
        with _all_or_nothing(out.base):
            foreign.adopt(out, found)
        out.eval()
        return out
    description, tensors = checkpoint.read(folder)
    if base is None:
        from .tasks import load_base

        base = load_base(description["base"], folder, kwargs)
    if check_base:
        checkpoint.check_fingerprint(description["base"], base, folder)
    out = _wrap(base)
    _train_whole(out, description["modules_to_save"])
    for row in description["recipes"]:
        options = {key: value for key, value in row.items() if key not in ("router", "layers")}
        out.add_recipe(make_recipe(row["router"], **options), row["layers"])
    checkpoint.fill(out.adapter_state_dict(), tensors, folder)
    out.eval()
    return out


@functools.cache
def model_class(base_class: type[nn.Module]) -> type[MoAModel]:
    """Return the `MoAModel` class whose forward names the inputs of a base's forward, and task_ids.

    Trainer drops the columns that the signature does not name, and looks for labels in it.
    """
    own = inspect.signature(MoAModel.forward).parameters
    extra = [own[name] for name in ("task_ids", "routing_mask", "num_items_in_batch")]
    kept = [
        p for name, p in inspect.signature(base_class.forward).parameters.items() if name not in own or name == "self"
    ]
    if "labels" in inspect.signature(base_class.forward).parameters:
        extra.insert(0, own["labels"])
    kinds = inspect.Parameter
    named = [p for p in kept if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.VAR_POSITIONAL)]
    rest = [p for p in kept if p.kind is kinds.KEYWORD_ONLY]
    forward = types.FunctionType(
        MoAModel.forward.__code__, MoAModel.forward.__globals__, "forward", None, MoAModel.forward.__closure__
    )
    forward.__kwdefaults__ = MoAModel.forward.__kwdefaults__
    forward.__doc__ = MoAModel.forward.__doc__
    forward.__signature__ = inspect.Signature([*named, *rest, *extra, own["kwargs"]])  # type: ignore[attr-defined]
    members = {"forward": forward, "__doc__": MoAModel.__doc__, "__module__": MoAModel.__module__}
    return type(f"MoA{base_class.__name__}", (MoAModel,), members)
