"""Keywords that no recipe has, with what to write instead, and names of experts that are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import ConfigError, unknown_name

_RECIPES = "give router= a list of recipes, each with its own targets={} as a regex"

# peft's keyword -> what to write instead
ELSEWHERE = {
    "rank_pattern": _RECIPES.format(" and rank"),
    "alpha_pattern": _RECIPES.format(" and alpha"),
    "use_rslora": "give alpha = lora_alpha · √rank; the recipe 'remix' has scale='rslora'",
    "fan_in_fan_out": "how a layer stores its weight is found by itself; leave it out",
    "task_type": "a model says by its class what it is for; leave it out",
    "inference_mode": "use model.eval(), and train_experts=False to freeze the experts",
}


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


def check_names(names: Sequence[str], n_experts: int) -> None:
    """Check that there is one name for each expert; no tensors, so no shapes.

    Raises:
        ConfigError: another number of them, an empty one, or one given twice.
    """
    if names and (len(names) != n_experts or len(set(names)) < n_experts or not all(names)):
        raise ConfigError(f"expert_names must be {n_experts} different names, one an expert, got {tuple(names)}.")
