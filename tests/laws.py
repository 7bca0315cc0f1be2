"""What the laws run over: every router and bank of the package, found by walking it, and every registered recipe.

The laws are in `experts/bank_laws.py`, `routers/router_laws.py` and `recipes/recipe_laws.py`. A class or row that needs
more than the common keywords has an entry in `ROUTER_OPTIONS`, `BANK_OPTIONS`, `OTHER_BANKS` or `RECIPE_OPTIONS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.experts import (
    FAMILIES,
    AffineLoRABank,
    ExpertBank,
    LoRABank,
    MixedBank,
    MixedFactorsBank,
    SlotBank,
    VectorBank,
    make_family,
)
from moa.experts.families import OutputScaleBank
from moa.layers import Site
from moa.recipes import RECIPES, Recipe, make_recipe
from moa.routers import Classifier, Router
from moa.types import Context, Routing

M = TypeVar("M", bound=nn.Module)
N_TASKS = 3
N_EXPERTS = 4
TOLERANCE = 1e-9  # relative, fp64

# name -> variants of the constructor's own keywords; a router that is not named runs with its defaults
ROUTER_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "LinearRouter": {
        "softmax": {},
        "not-renormalised": {"renormalize": False},
        "sigmoid-bias": {"score": "sigmoid", "bias_rate": 0.01},
        "noisy": {"noisy": True, "losses": {"load": 0.01, "importance": 0.01}},
        "jitter": {"jitter": 0.1},
    },
    "SampledRouter": {"token": {}, "sequence": {"granularity": "sequence"}},
    "TableRouter": {
        "one-head": {},
        "heads": {"n_heads": 3},
        "uniform": {"unknown": "uniform"},
        "plain": {"relaxed": False},
    },
    "ThresholdRouter": {"default": {}, "loss": {"losses": {"balance": 0.1}}},
    "LocalizedRouter": {"default": {}, "tasks": {"task_kinds": (0, 1, 1), "losses": {"localized": 0.1}}},
    "PreviewRouter": {
        "default": {},
        "renormalised": {"renormalize": True},
        "raw": {"score": "raw"},
        "deep": {"depth": 2, "width": 16},
    },
    "TaskEmbeddingRouter": {"default": {"d_embedding": 5}},
    "RankedRouter": {"default": {"ranks": (1, 3)}},
}
# classes that no router law is run on, and why; a recipe's laws must reach them
FOLLOWING = {"FollowRouter": "it decides nothing: it gives the routing of its block's first layer"}
# routers whose rows are E streams of the batch, one after the other
STREAMED = {"IdRouter"}
# name of a family -> variants of its own keywords
BANK_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"default": {}, "pissa": {"start": "pissa"}, "olora": {"start": "olora"}},
    "headed": {"default": {}, "heads": {"n_heads": 3}},
    "shira": {
        "default": {"density": 0.3},
        "magnitude": {"density": 0.2, "mask": "magnitude"},
        "few": {"density": 0.1},
    },
    "qwha": {
        "default": {"density": 0.3},
        "scaled": {"density": 0.2, "scale": 3.0},
        "few": {"density": 0.1, "scale": 2.0},
    },
    "randlora": {"default": {}, "sparse": {"sparse": True}},
    "oft": {"default": {"block_size": 3}, "exact": {"block_size": 2, "terms": 0, "share": True}},
    "boft": {"default": {"block_size": 3}, "butterfly": {"block_size": 2, "n_factors": 2}},
    "bottleneck": {"default": {}, "small": {"activation": "silu", "scale": 0.1, "start": "small"}},
    "conformer": {"default": {"kernel": 5}},
    "comp_lora": {"default": {"protected": 2}, "input": {"protected": 1, "sides": "input"}},
    "soka": {"default": {}, "elbow": {"elbow": True}},
    "mps": {"default": {}, "three": {"modes": 3}},
    "salt": {"default": {}, "one": {"n_scaled": 1}},
    "compacter": {"default": {"n": 2}, "glorot": {"n": 2, "start": "glorot"}},
    "hypelora": {"default": {"width": 8, "d_embedding": 5}, "frozen": {"width": 8, "depth": 4, "down": "frozen"}},
    "dylora": {"default": {"seed": 1}, "last": {"seed": 2, "update": "last"}},
}
# what a family's sizes must be multiples of
CUTS: dict[tuple[str, str], int] = {
    ("headed", "heads"): 3,
    ("oft", "default"): 3,
    ("oft", "exact"): 2,
    ("boft", "default"): 3,
    ("boft", "butterfly"): 4,
    ("qwha", "default"): 4,
    ("qwha", "scaled"): 4,
    ("qwha", "few"): 4,
    ("compacter", "default"): 2,
    ("compacter", "glorot"): 2,
}
RECIPE_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "topk": {"default": {}, "ranks": {"expert": "dylora", "ranks": (1, 2)}},
    "poly": {"default": {"alpha": 8.0}, "mu": {"mode": "mu", "alpha": 8.0, "n_tasks": 1}},
    "mhr": {"default": {"n_heads": 4, "alpha": 8.0}},
    "hydra": {
        "default": {"n_experts": 1, "k": 1, "alpha": 8.0, "targets": "all-linear"},
        "biases": {"n_experts": 1, "k": 1, "biases": True, "sequential_rank": 3},
        "gated-branches": {"n_experts": 1, "k": 1, "gate": "branches", "alpha": 8.0, "targets": "all-linear"},
        "gated-experts": {"gate": "experts", "alpha": 8.0, "targets": "all-linear"},
    },
    "xlora": {"default": {"k": 0}, "topk": {}, "layerwise": {"layerwise": True, "depth": 2, "width": 8}},
    "mixlora": {"default": {"dropout": 0.0}},
    "xcross": {"default": {"n_experts": 2}},
    "moelora": {"default": {"d_embedding": 5}},
    "flylora": {"default": {"rank": N_EXPERTS}},
    "remix": {"token": {}, "sequence": {"granularity": "sequence"}},
}
# (recipe, kind of model) -> what its refusal says
REFUSED: dict[tuple[str, str], str] = {
    ("mhr", "plain"): "n_heads=4 must divide",
    ("xlora", "plain"): "needs a transformers model",
    ("xlora", "t5"): "needs a model of one stack",
    ("xcross", "plain"): "needs a transformers model",
    ("xcross", "t5"): "needs a model of one stack",
    ("xcross", "bert"): "lie outside",
}
UNNORMALISED = {
    "ExpertChoiceRouter",
    "SampledRouter",
    "ProjectionRouter",
    "LinearRouter-not-renormalised",
    "PreviewRouter-default",
    "PreviewRouter-raw",
    "PreviewRouter-deep",
}  # rows need not sum to one: (router, or router-variant)


def accepted(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a class's constructor names."""
    return {name: value for name, value in options.items() if name in inspect.signature(cls).parameters}


def _slots(d_in: int, d_out: int, n_experts: int, **options: Any) -> ExpertBank:
    return SlotBank(LoRABank(d_in, d_out, n_experts, **options))


def _vectors(d_in: int, d_out: int, n_experts: int, **options: Any) -> ExpertBank:
    return VectorBank(d_in, d_out, n_experts, directions=torch.randn(n_experts, d_in), **options)


def _output_scales(d_in: int, d_out: int, n_experts: int, **options: Any) -> ExpertBank:
    return OutputScaleBank(d_out, d_out, n_experts, **options)  # of the family "ia3", on an output


def _mixed(d_in: int, d_out: int, n_experts: int, *, rank: int, **options: Any) -> ExpertBank:
    """Return experts of two kinds in turn, the first of which are numbered last in their member bank's order."""
    own = {name: options[name] for name in ("dropout", "engine") if name in options}
    first = LoRABank(d_in, d_out, (n_experts + 1) // 2, rank=rank, scaling=options["scaling"])
    if n_experts == 1:
        return MixedBank([first], [0], **own)
    site = Site("layer", nn.Linear(d_in, d_out), d_in, d_out)
    second = make_family("loha").build(site, n_experts // 2, None, rank=rank, scaling=0.3)
    numbers = [e // 2 + (0 if e % 2 == 0 else first.n_experts) for e in range(n_experts)]
    return MixedBank([first, second], numbers, **own)


def _mixed_ranks(d_in: int, d_out: int, n_experts: int, *, rank: int, **options: Any) -> ExpertBank:
    own = {name: options[name] for name in ("dropout", "engine") if name in options}
    first = LoRABank(d_in, d_out, (n_experts + 1) // 2, rank=rank, scaling=options["scaling"])
    second = AffineLoRABank(d_in, d_out, n_experts // 2, rank=2 * rank, scaling=0.3)
    numbers = [e // 2 + (0 if e % 2 == 0 else first.n_experts) for e in range(n_experts)]
    return MixedFactorsBank([first, second] if n_experts > 1 else [first], numbers, **own)


# banks that no family makes on the input of a layer
OTHER_BANKS: dict[str, Callable[..., ExpertBank]] = {
    "slots": _slots,
    "vector": _vectors,
    "output-scales": _output_scales,
    "mixed": _mixed,
    "mixed-ranks": _mixed_ranks,
}


def classes_below(root: type[M]) -> list[type[M]]:
    """Return every class below root that can be made, in whatever file of the package moa it stands."""
    for info in pkgutil.walk_packages(moa.__path__, "moa."):
        if info.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            assert error.name in {"flwr", "megablocks", "triton", "vllm"}, error
    found, left = [], [root]
    while left:
        cls = left.pop(0)
        left += cls.__subclasses__()
        if cls.__module__.startswith("moa.") and cls not in found and not is_abstract(cls):
            found.append(cls)
    return found


def is_abstract(cls: type) -> bool:
    """Tell whether a method of the class is still to be written: it raises NotImplementedError."""
    methods = (getattr(getattr(cls, name), "__code__", None) for name in dir(cls))
    own = [code for code in methods if code is not None and "moa" in code.co_filename]
    return any("NotImplementedError" in code.co_names for code in own)


def variants(names: Sequence[str], table: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Return (name, variant) for every registered name; a name without an entry has the variant "default" alone."""
    return [(name, variant) for name in names for variant in table.get(name, {"default": {}})]


def parametrize(cases: list[tuple[str, str]]) -> Any:
    """Return the pytest mark that runs a test for every (name, variant)."""
    ids = [name if variant == "default" else f"{name}-{variant}" for name, variant in cases]
    return pytest.mark.parametrize(("name", "variant"), cases, ids=ids)


ROUTER_CLASSES = {cls.__name__: cls for cls in classes_below(Router) if cls.__name__ not in FOLLOWING}
ROUTER_CASES = variants(list(ROUTER_CLASSES), ROUTER_OPTIONS)
BANK_CASES = variants([*FAMILIES, *OTHER_BANKS], BANK_OPTIONS)
RECIPE_CASES = variants(list(RECIPES), RECIPE_OPTIONS)


def make_router(name: str, variant: str, d_in: int, n_experts: int, k: int) -> Router:
    """Return a router of a class in fp64 with every parameter, and the experts it looks at, drawn at random."""
    cls = ROUTER_CLASSES[name]
    common: dict[str, Any] = {"d_in": d_in, "n_experts": n_experts, "k": k, "n_tasks": N_TASKS}
    own = ROUTER_OPTIONS.get(name, {}).get(variant, {})
    if name == "PreviewRouter":
        sizes = {key: own[key] for key in ("depth", "width") if key in own}
        own = {key: value for key, value in own.items() if key not in sizes}
        common["classifier"] = Classifier(d_in, n_experts, **sizes)
    router = randomised(cls(**accepted(cls, common), **own).double())
    router.experts_changed(*(torch.randn(n_experts, 2, d, dtype=torch.float64) for d in (d_in, 3)))
    return router


def make_bank(name: str, variant: str, d_in: int, d_out: int, n_experts: int, rank: int, **options: Any) -> ExpertBank:
    """Return a bank in fp64 with every parameter drawn at random: a registered family's, or one of `OTHER_BANKS`."""
    options = {"rank": rank, "scaling": 0.7, **options}
    if name in OTHER_BANKS:
        return randomised(OTHER_BANKS[name](d_in, d_out, n_experts, **options).double())
    own = BANK_OPTIONS.get(name, {}).get(variant, {})
    cut = CUTS.get((name, variant), 1)
    d_in, d_out = d_in * cut, d_out * cut
    if name in ("core", "paca", "loldu") or own.get("start") in (
        "pissa",
        "olora",
    ):  # as many singular values, or columns, as its rank
        d_in, d_out = max(d_in, rank), max(d_out, rank)
    if name == "soka":  # as many blocks, and numbers in each, as products
        d_in, d_out = 4 * d_in, 4 * d_out
    if name in ("comp_lora", "salt"):  # something beside the directions that it protects, or scales
        d_in, d_out = max(d_in, 2), max(d_out, 2)
    if name == "compacter":
        options["rank"] = 2 * rank
    if name == "conformer":  # norms over its features and its channels
        d_in, options["rank"] = max(d_in, 4), max(rank, 2)
    family = make_family(name, own)
    layer = nn.Linear(d_in, d_out).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))  # always the same: a base's
    site = Site("layer", layer, d_in, d_out)
    shared = family.shared([site], **options)
    return randomised(family.build(site, n_experts, shared, **options).double())


def uses(name: str, option: str) -> bool:
    """Tell whether a bank looks at an option of every bank, "dropout" or "engine"."""
    return option in (FAMILIES[name].uses if name in FAMILIES else ("dropout",))


def recipe_options(name: str, variant: str) -> dict[str, Any]:
    """Return small keywords for a recipe: few experts of rank 2, and task ids where it wants them."""
    fields = {field.name for field in dataclasses.fields(RECIPES[name])}
    common = {"n_experts": N_EXPERTS, "k": 2, "rank": 2, "n_tasks": N_TASKS}
    if name == "switch":
        common["k"] = 1
    common = {key: value for key, value in common.items() if key in fields}
    return {**common, **RECIPE_OPTIONS.get(name, {}).get(variant, {})}


def small_recipe(name: str, variant: str, **options: Any) -> Recipe:
    """Return a registered recipe with small sizes."""
    return make_recipe(name, **{**recipe_options(name, variant), **options})


def needs_tasks(name: str) -> bool:
    """Tell whether a recipe routes by task."""
    return "n_tasks" in {field.name for field in dataclasses.fields(RECIPES[name])}


@torch.no_grad()
def randomised(module: M) -> M:
    """Draw every parameter from N(0, 0.5²), and return the module."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def make_context(rows: tuple[int, ...], mask: Tensor | None = None, preview: Tensor | None = None) -> Context:
    """Return a context with task ids for the first of the rows, and a first pass (*rows, d) where one is given."""
    n = rows[0] if rows else 1
    masks = () if mask is None else (mask,)
    return Context(
        task_ids=torch.arange(n) % N_TASKS,
        masks=masks,
        routing_masks=masks,
        preview=() if preview is None else (preview,),
    )


# ------------------------------------------------------------------------------------------------ comparing


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE, what: str = "values") -> None:
    """Fail unless both have one shape and differ by at most tolerance times the largest expected magnitude."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert bool(got.isfinite().all()), f"{what}: not finite"
    error = (got.double() - expected.double()).abs().max().item()
    size = max(expected.double().abs().max().item(), 1e-12)
    assert error <= tolerance * size, f"{what}: off by {error:.3e}, which is {error / size:.1e} of {size:.3e}"


def assert_same_routing(got: Routing, expected: Routing) -> None:
    """Fail unless two routings give the same weights over all experts, and the same scores."""
    assert_close(got.dense(), expected.dense(), what="weights")
    assert bool((got.selected() == expected.selected()).all()), "another selection"
    if expected.scores is not None:
        assert got.scores is not None
        assert_close(got.scores, expected.scores, what="scores")


def gradients(module: nn.Module, *extra: Tensor) -> list[Tensor]:
    """Return the gradients of a module's trainable parameters (zeros where there is none), then those of extra."""
    leaves = [p for p in module.parameters() if p.requires_grad] + list(extra)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in leaves]
