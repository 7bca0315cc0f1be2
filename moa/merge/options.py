"""The keywords of merging methods: what one is, and those that several rows of the table share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .consensus import DEFINITIONS, VOTES

REQUIRED = object()


@dataclass(frozen=True)
class Option:
    """A keyword of a method.

    Args:
        default: its value when not given; `REQUIRED` if it must be.
        doc: what it means.
        choices: the accepted names, if it is one of several.
        elsewhere: `definition` -> its value when not given, where that definition has another than `default`.
    """

    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    elsewhere: Mapping[str, Any] = field(default_factory=dict)


SCALE = Option(1.0, "λ, multiplies the merged change")
DENSITY = Option(REQUIRED, "kept fraction in (0, 1], one number or one per adapter", elsewhere={"mergekit": 1.0})
SEED = Option(0, "seed of the random masks; each adapter and tensor draws its own")
RESCALE = Option(True, "divide kept entries by their probability of being kept; mergekit: to the same L1 norm")
SCOPE = Option(None, "rank magnitudes over the whole 'model' or each 'tensor'; by the definition if None")
VOTE: Mapping[str, Option] = {
    "definition": Option("paper", "whose method, TIES by moa.merge.consensus.agreeing_sum", DEFINITIONS),
    "vote": Option("total", "signs are elected by the 'total' or by 'count'", VOTES),
    "normalize": Option(True, "mergekit's definition only: divide by the agreeing weights"),
}
# mergekit divides by the agreeing weights in ties and della, and not in dare_ties and breadcrumbs_ties.
SUMMED_VOTE: Mapping[str, Option] = {**VOTE, "normalize": replace(VOTE["normalize"], default=False)}
RANDOM: Mapping[str, Option] = {
    "density": DENSITY,
    "seed": SEED,
    "rescale": RESCALE,
    "scale": SCALE,
    "definition": Option("paper", "whose method", ("paper", "mergekit")),
}
BY_RANK: Mapping[str, Option] = {
    **RANDOM,
    "epsilon": Option(
        0.1,
        "spread of the keep probabilities over a row: the whole width, or half of it by mergekit's definition",
        elsewhere={"mergekit": 0.15},
    ),
}
MIDDLE: Mapping[str, Option] = {
    "density": DENSITY,
    "gamma": Option(0.01, "fraction of the largest magnitudes dropped"),
    "scale": SCALE,
}
