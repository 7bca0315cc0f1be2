"""The tables of docs/families.md, made of small models: `python -m experiments.families`.

Each cell is tried, none is written by hand: a family is built under each recipe, its parameters are counted against the
formula, it starts, and it is folded behind a constant routing.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import moa
from moa.delta import LowRank
from moa.errors import FoldError, MoaError
from moa.experts import FAMILIES, ExpertBank, Family, make_family
from moa.formats.peft_kinds import KINDS
from moa.layers import Site
from moa.recipes import RECIPES
from moa.types import Routing

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
COMMAND = "python -m experiments.families"
BEGIN, END = f"<!-- made by {COMMAND} -->", f"<!-- end of {COMMAND} -->"
# keywords that fit the small sizes here
KEYWORDS: dict[str, dict[str, Any]] = {
    "compacter": {"n": 2},
    "oft": {"block_size": 3},
    "boft": {"block_size": 3},
    "salt": {"n_scaled": 8},
}
# trained numbers of a layer, in Python; beside E, r, i and o the the keywords of `WORDS`
WORDS = {
    "block_size": "b",
    "kernel": "c",
    "n": "n",
    "n_factors": "m",
    "n_scaled": "p",
    "d_embedding": "d",
    "width": "w",
}
FORMULAS = {
    "lora": "E * r * (i + o)",
    "dylora": "E * r * (i + o)",
    "headed": "E * r * (i + o)",
    "shira": "E * r * (i + o)",
    "qwha": "E * r * (i + o)",
    "affine": "E * (r * (i + o) + r + o)",
    "bottleneck": "E * (r * (i + o) + r + o)",
    "convpass": "E * (r * (i + o) + c * r**2 + r + o)",
    "conformer": "E * (r * (2 * i + o + c + 3) + i + o)",
    "compacter": "E * (3 * r + i + 2 * o)",
    "shared": "r * i + E * r * o",
    "core": "E * r**2",
    "comp_lora": "E * r * (i + o)",
    "salt": "2 * E * (p + r * (min(i, o) - p))",
    "loldu": "E * r",
    "soka": "E * r * (root(i) * root(o) + i * o / (root(i) * root(o)))",
    "tera": "E * (root(i) + i / root(i) + root(o) + o / root(o))",
    "mps": "E * (min(r, root(o)) * (root(o) + r * o / root(o)) + min(r, i / root(i)) * (r * root(i) + i / root(i)))",
    "dora": "E * (r * (i + o) + o)",
    "ia3": "E * o",
    "loha": "2 * E * r * (i + o)",
    "lokr": "E * (root(i) * root(o) + i * o / (root(i) * root(o)))",
    "paca": "E * r * o",
    "hypelora": "E * d",
    "randlora": "E * ceil(min(i, o) / r) * (r + min(i, o))",
    "vera": "E * (r + o)",
    "oft": "E * i * (b - 1) / 2",
    "boft": "E * (m * i * b + o)",
}
SHARED = {
    "compacter": "n**3",
    "hypelora": "w * (d + 1) + (w + 1) * r * (i + o)",
}  # what all layers of one size have together
LEGEND = (
    "Parameters are those trained on a layer (i → o) by E experts of rank r; of the keywords, "
    + ", ".join(f"{letter} is {word}" for word, letter in WORDS.items() if letter != word)
    + ", and the others are as by default. root(s) is the largest divisor of s up to √s. What is shared is shared by "
    "all layers of one size."
)
SIZES = ({"E": 3, "r": 4, "i": 24, "o": 36}, {"E": 2, "r": 6, "i": 36, "o": 24})
# a recipe's keywords here, where they are not those that most take
OPTIONS: dict[str, dict[str, Any]] = {"switch": {"k": 1}, "hydra": {"n_experts": 1, "k": 1}, "flylora": {"k": 2}}
REASONS = {
    "a": (r"has experts of its own kind", "the recipe has experts of its own kind"),
    "b": (
        r"whole weights of their layer",
        "experts are whole weights and the router decides row by row; `remix` fits with `granularity='sequence'`",
    ),
    "c": (r"has no such place", "the recipe has no place that the family sits at"),
    "d": (r"a slot is a mixture of rows", "a slot has no rows around it, which the experts look at"),
}


def main() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END, 1)[1]
    PAGE.write_text(f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}", encoding="utf-8")


def tables() -> str:
    """Return both tables in markdown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = [f"| `{name}` | " + " | ".join(row(name)) + " |" for name in sorted(FAMILIES)]
        fits = [f"| `{name}` | " + " | ".join(under_recipes(name)) + " |" for name in sorted(FAMILIES)]
    names = " | ".join(f"`{name}`" for name in sorted(RECIPES))
    return "\n".join(
        [
            *textwrap.wrap(LEGEND, 118),
            "",
            "| family | parameters | shared by all layers | starts as zero | folds | PEFT |",
            "|---|---|---|---|---|---|",
            *own,
            "",
            "Under a recipe as it is by default: ✓ works, a letter is refused.",
            "",
            f"| family | {names} |",
            "|---|" + "---|" * len(RECIPES),
            *fits,
            "",
            *(f"- {letter}: {said}." for letter, (_, said) in REASONS.items()),
        ]
    )


def row(name: str) -> list[str]:
    """Return what a family is by itself."""
    family = make_family(name, KEYWORDS.get(name))
    starts = "yes" if starts_as_zero(family) else "no"
    return [*parameters(name, family), starts, folds(name), in_peft(name, built(family, SIZES[0])[0])]


def built(family: Family, size: dict[str, int]) -> tuple[ExpertBank, Site, nn.Module | None]:
    """Return a fresh bank, (*rows, i) -> (*rows, o), at the usual place of a layer, and what all layers share."""
    d_in, d_out, place = size["i"], size["o"], family.places[0]
    layer = nn.Linear(d_in, d_out)
    site = Site("layer", layer, d_in if place == "input" else d_out, d_out, place=place)
    options = {"rank": size["r"], "scaling": 1.0, "dropout": 0.0, "engine": None}
    shared = family.shared([site], **options)
    return family.build(site, size["E"], shared, **options), site, shared


def parameters(name: str, family: Family) -> list[str]:
    """Return the formulas of a family's parameters, on a layer and of all layers, checked against the count.

    Raises:
        AssertionError: a formula is wrong.
    """
    if name not in FORMULAS:
        bank, *_ = built(family, SIZES[0])
        size = ", ".join(f"{letter} = {value}" for letter, value in SIZES[0].items())
        return [f"{sum(p.numel() for p in bank.parameters())} at {size}", ""]
    known = {WORDS[key]: value for key, value in family.keywords().items() if key in WORDS}
    for size in SIZES:
        bank, site, shared = built(family, size)
        of_all = set() if shared is None else {id(p) for p in shared.parameters()}
        counts = [0, 0]
        for parameter in bank.parameters():
            counts[id(parameter) in of_all] += parameter.numel()
        names = {**size, **known, "root": root, "ceil": math.ceil, "min": min, "i": site.d_in}
        for count, formula in zip(counts, (FORMULAS[name], SHARED.get(name, "0")), strict=True):
            found = eval(formula, {"__builtins__": {}}, names)
            assert found == count, f"{name}: {formula} is {found} at {size}, and {count} are trained"
    return [f"`{formula.replace(' * ', ' ')}`" if formula else "" for formula in (FORMULAS[name], SHARED.get(name, ""))]


def root(size: int) -> int:
    """Return the largest divisor up to the root."""
    return max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)


def starts_as_zero(family: Family) -> bool:
    """Return whether a fresh expert adds nothing, which the bank must say."""
    bank, site, _ = built(family, SIZES[0])
    x, weights = torch.randn(2, 3, site.d_in), torch.ones(bank.n_experts)
    zero = not bool(bank(x, Routing(weights, None, bank.n_experts)).any())
    assert zero == bank.zero_at_init, f"{family.name} says zero_at_init={bank.zero_at_init}"
    return zero


def folds(name: str) -> str:
    """Return whether a mixture whose routing is constant becomes one weight."""
    model = host()
    model.add_recipe(recipe("fixed", name))
    try:
        model.merge_and_unload()
    except FoldError:
        return "no: not a weight change"
    return "yes"


def in_peft(name: str, bank: ExpertBank) -> str:
    """Return which of PEFT's kinds an expert is read from and written as."""
    if name == "lora":
        return "LORA, both ways"
    if name in KINDS:
        kind = KINDS[name].peft_type + (" with use_dora" if name == "dora" else "")
        return f"{kind}, both ways"
    try:
        low = isinstance(bank.delta(0), LowRank) and bank.constants() is None
    except FoldError:
        return "–"
    return "as LORA, export" if low else "–"


def host() -> moa.MoAModel:
    """Return a decoder of one small block around which models are made."""
    sizes = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return moa.MoAModel.around(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)))


def recipe(router: str, name: str) -> Any:
    """Return a small recipe with experts of a family."""
    fields = {field.name for field in dataclasses.fields(RECIPES[router])}
    usual = {"n_experts": 2, "k": 2, "n_tasks": 3}
    options = {key: value for key, value in usual.items() if key in fields} | OPTIONS.get(router, {})
    if "rank" in FAMILIES[name].uses and router != "flylora":
        options["rank"] = 4
    return moa.make_recipe(router, expert=name, **options, **KEYWORDS.get(name, {}))


def under_recipes(name: str) -> list[str]:
    """Return a sign for each recipe: the family works there, or the letter of why not.

    Raises:
        AssertionError: a refusal whose reason is none of `REASONS`.
    """
    out, model = [], host()
    for router in sorted(RECIPES):
        try:
            model.add_recipe(recipe(router, name))
            out.append("✓")
        except MoaError as error:
            why = [letter for letter, (said, _) in REASONS.items() if re.search(said, str(error))]
            assert why, f"{name} under {router}: {error}"
            out.append(why[0])
            model = host()
        else:
            model.unload()
    return out


if __name__ == "__main__":
    main()
