"""Tables of rows by name, which other packages can add to: recipes, adapter families; and their keywords."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import ConfigError, shown, unknown_name

PLAIN = (type(None), bool, int, float, str, list, tuple, dict)  # what a file can hold
LARGEST = 2**63 - 1  # of a whole number that torch takes
Row = TypeVar("Row", bound=type)
COMMON = ("rank", "alpha", "dropout", "engine")  # a recipe's keywords that an adapter family may use
# peft's spelling of a keyword, and that of other mixtures -> ours
PEFT_WORDS = {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_experts": "n_experts",
    "top_k": "k",
    "num_experts_per_tok": "k",
    "num_tasks": "n_tasks",
}
_RECIPES = "give router= a list of recipes, each with its own targets={} as a regex"

# one of peft's that we do not have -> what to write instead
ELSEWHERE = {
    "rank_pattern": _RECIPES.format(" and rank"),
    "alpha_pattern": _RECIPES.format(" and alpha"),
    "use_rslora": "give alpha = lora_alpha · √rank; the recipe 'remix' has scale='rslora'",
    "use_dora": "give expert='dora'",
    "init_lora_weights": "give start=, 'pissa' or 'olora'; moa.initialize has those that look at data",
    "bias": "the base's biases stay frozen; expert='affine' trains biases in the experts",
    "lora_bias": "give expert='affine', whose factors have biases",
    "trainable_token_indices": "name the embedding in modules_to_save=, which trains it whole",
    "target_parameters": "give targets='moe-experts', which finds a base's fused experts",
    "router_aux_loss_coef": "give balance=",
    "router_jitter_noise": "give jitter=",
    "fan_in_fan_out": "how a layer stores its weight is found by itself; leave it out",
    "task_type": "a model says by its class what it is for; leave it out",
    "inference_mode": "use model.eval(), and train_experts=False to freeze the experts",
}


def put(table: dict[str, Row], name: str, row: Row, kind: str) -> None:
    """Put a row into a table under a name; no tensors, so no shapes.

    Raises:
        ConfigError: the name is taken by another class.
    """
    taken = table.get(name)
    if taken is not None and taken.__qualname__ != row.__qualname__:
        raise ConfigError(f"{kind} {name!r} is already {taken.__module__}.{taken.__qualname__}: choose another name.")
    table[name] = row


def find(
    table: dict[str, Row], name: str, kind: str, group: str, register: Callable[[str], Callable[[Row], Row]]
) -> Row:
    """Return the row of a name, from the table or from a plug-in; no tensors, so no shapes.

    Args:
        table: name -> row.
        name: what is looked for.
        kind: what the name should be, in the error.
        group: of the entry points that name plug-ins; one is loaded when it is first asked for.
        register: the decorator that puts a row into the table.

    Raises:
        ConfigError: neither has it; the nearest known name is given.
    """
    plugins = {entry.name: entry for entry in entry_points(group=group)} if name not in table else {}
    if name in plugins:
        register(name)(plugins[name].load())
    if name not in table:
        raise ConfigError(unknown_name(kind, name, [*table, *plugins]))
    return table[name]


def own_words(options: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    """Return keywords with peft's spellings replaced by ours; no tensors, so no shapes.

    Args:
        options: keyword -> value.
        where: what begins the error, e.g. "recipe: ".

    Raises:
        ConfigError: one is given under both spellings.
    """
    out: dict[str, Any] = {}
    for key, value in options.items():
        ours = PEFT_WORDS.get(key, str(key))
        if ours in out or (ours != key and ours in options):
            raise ConfigError(f"{where}{ours} is given twice, once under peft's spelling: give it once.")
        out[ours] = value
    return out


def unknown_keyword(key: str, known: Iterable[str], where: str) -> str:
    """Return the message for a keyword that is not known.

    Args:
        key: what came.
        known: the keywords that exist there.
        where: the place, e.g. "the recipe 'topk'".
    """
    if key in ELSEWHERE:
        return f"unknown keyword {key!r} in {where}. Instead: {ELSEWHERE[key]}."
    return unknown_name("keyword", key, known, where)


def check_keyword(row: Any, key: str, value: Any, known: Sequence[str], where: str) -> None:
    """Check a keyword that a recipe does not have: whether it is one that only changes nothing there, `row.unused`.

    Args:
        row: of the table of recipes; no tensors, so no shapes.
        key: the keyword.
        value: what it was given.
        known: the keywords that exist there.
        where: the place, e.g. "the recipe 'topk'".

    Raises:
        ConfigError: it contradicts the recipe, or is unknown.
    """
    if key in row.refused:
        raise ConfigError(f"{key}={value!r} cannot be chosen in the recipe {row.name!r}: {row.refused[key]}.")
    if key not in row.unused:
        raise ConfigError(unknown_keyword(key, known, where))


def check_used(family: str, uses: Iterable[str], options: Mapping[str, Any]) -> None:
    """Check that a recipe's keywords which only a family could use are used by it; no tensors, so no shapes.

    Args:
        family: its name.
        uses: keywords of COMMON that it looks at.
        options: keyword -> value, as given.

    Raises:
        ConfigError: one of COMMON was given that it does not look at.
    """
    for key in COMMON:
        if key in options and key not in uses:
            raise ConfigError(
                f"experts of the family {family!r} have no {key}: {key}={options[key]!r} would do nothing; leave it "
                "out."
            )


def check_places(recipe: Any, place: str | None, family: Any, several: bool = False) -> None:
    """Check that a family, and the place that was chosen for it, fit a recipe; no tensors, so no shapes.

    Args:
        recipe: with `name`, `families` and `places`.
        place: of the experts; None is the usual one.
        family: with `name` and `places`.
        several: it stands for experts of several families or ranks.

    Raises:
        ConfigError: they do not.
    """
    if recipe.families is not None and (several or family.name not in recipe.families):
        what = "expert and rank cannot be lists" if several else f"expert={family.name!r} cannot be chosen"
        raise ConfigError(
            f"the recipe {recipe.name!r} has experts of its own kind ({', '.join(recipe.families)}): {what}."
        )
    fits = place is None or place in family.places
    if not fits or not set(family.places) & set(recipe.places):
        why = f"the recipe {recipe.name!r} has no such place" if fits else f"place={place!r} does not fit"
        raise ConfigError(f"experts of the family {family.name!r} sit on {' or '.join(family.places)}: {why}.")
    if place is not None and place not in recipe.places:
        raise ConfigError(
            f"the recipe {recipe.name!r} puts experts on {' or '.join(recipe.places)}: place={place!r} does not fit."
        )


def check_experts(n_experts: int, k: int) -> None:
    """Check 1 ≤ k ≤ n_experts; no tensors, so no shapes.

    Raises:
        ConfigError: it does not hold.
    """
    if n_experts < 1:
        raise ConfigError(f"n_experts must be at least 1, got {n_experts}.")
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}.")
    if k > n_experts:
        raise ConfigError(f"k must be at most n_experts, got k={k} with n_experts={n_experts}.")


def check_common(values: Mapping[str, Any], not_negative: Iterable[str] = ()) -> None:
    """Check the keywords that every recipe has, as far as their values tell by themselves; no tensors, so no shapes.

    Args:
        values: keyword -> value; one that is left out is not looked at.
        not_negative: keywords that must be at least 0.

    Raises:
        ConfigError: a value out of range.
    """
    n_experts = values.get("n_experts")
    check_experts(max(values.get("k", 1), 1) if n_experts is None else n_experts, values.get("k", 1))
    names = values.get("expert_names")
    if names and n_experts is not None and (len({*names}) < n_experts or len(names) != n_experts or not all(names)):
        raise ConfigError(f"expert_names must be {n_experts} different names, one an expert, got {tuple(names)}.")
    rank = values.get("rank", 1)
    ranks = tuple(rank) if isinstance(rank, Sequence) and not isinstance(rank, str) else (rank,)
    if any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in ranks):
        raise ConfigError(f"rank must be at least 1, got {rank}.")
    _check_finite(values, not_negative)
    alpha, dropout = values.get("alpha"), values.get("dropout", 0.0)
    if alpha is not None and alpha <= 0:
        raise ConfigError(f"alpha must be positive, got {alpha}: the experts would do nothing, or harm.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout}.")


def check_numbers(row: Any, not_negative: Iterable[str] = ()) -> None:
    """Check the numbers among a row's keywords; no tensors, so no shapes.

    Args:
        row: a dataclass.
        not_negative: keywords that must be at least 0.

    Raises:
        ConfigError: one is NaN or infinite, too large for any number type, or is negative and must not be.
    """
    _check_finite({field.name: getattr(row, field.name) for field in dataclasses.fields(row)}, not_negative)


def _check_finite(values: Mapping[str, Any], not_negative: Iterable[str] = ()) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, got {value}.")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{name} must be below 2**63, got {shown(value, 40)}.")
        if name in not_negative and value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}.")


def check_types(cls: type, options: Mapping[str, Any]) -> None:
    """Check that keywords of a row have the types that its fields are declared with; no tensors, so no shapes.

    Args:
        cls: a dataclass.
        options: keyword -> value, of its fields.

    Raises:
        ConfigError: a value of another type; its keyword is named.
    """
    hints = typing.get_type_hints(cls)
    for key, value in options.items():
        if isinstance(value, PLAIN) and not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key])) if isinstance(hints[key], type) else hints[key]
            raise ConfigError(f"{key} must be {wanted}, got {shown(repr(value))} ({type(value).__name__}).")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return isinstance(value, str | int)  # which of them, the row says in its own words
    if origin in (tuple, list, Sequence):
        if isinstance(value, str):  # one name for several: the row says what it makes of that
            return True
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value)
    if origin is not None or not isinstance(hint, type):
        return True
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, hint)
