"""definition="mergekit", its defaults included, against mergekit's formula written out entry by entry.

mergekit itself is the reference in test_mergekit.py.  pytest tests/merge/test_mergekit_definition.py
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moa.merge import METHODS, merge
from moa.merge.options import REQUIRED
from moa.merge.sparsify import generator_for

from .tools import assert_close

SHAPES = {"matrix": (6, 5), "vector": (40,), "convolution": (4, 5, 3), "few": (3,)}
WEIGHTS = [0.2, 0.5, 0.9]
SPARSIFIED = {
    "ties": "magnitude",
    "dare": "random",
    "dare_ties": "random",
    "della": "rank",
    "della_linear": "rank",
    "breadcrumbs": "outliers",
    "breadcrumbs_ties": "outliers",
}
VOTES = ("ties", "dare_ties", "della", "breadcrumbs_ties")


def adapters() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()} for _ in WEIGHTS]


def keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """A row is what varies along axis 1 (of a vector: its only axis); ranks count from the smallest magnitude."""
    x = delta[None] if delta.ndim < 2 else delta
    out = torch.empty_like(x)
    others = [range(n) for axis, n in enumerate(x.shape) if axis != 1]
    for place in itertools.product(*others):
        row = (place[0], slice(None), *place[1:])
        values = x[row].abs().tolist()
        ranks = [sum(v < w for v in values) for w in values]
        out[row] = torch.tensor([density - epsilon + 2 * epsilon * r / (len(values) - 1) for r in ranks]).to(x)
    return out.reshape(delta.shape)


def sparsify(kind: str, delta: Tensor, index: int, name: str, o: dict[str, Any]) -> Tensor:
    density, n = o.get("density", 1.0), delta.numel()
    if density == 1:
        return delta
    order = delta.reshape(-1).abs().argsort()
    mask = torch.zeros(n, dtype=torch.bool)
    if kind == "magnitude":
        mask[order[n - max(1, int(density * n)) :]] = True
    elif kind == "outliers":
        top = int(o.get("gamma", 0.01) * n)
        bottom = n - int(density * n) - top
        if bottom < 0:
            top, bottom = top + bottom, 0
        mask[order[bottom : n - top]] = True
    else:
        keep = torch.full(delta.shape, density, dtype=torch.float64)
        if kind == "rank":
            keep = keep_probability(delta, density, o.get("epsilon", 0.15))
        mask = (torch.rand(delta.shape, generator=generator_for(0, index, name)) < keep).reshape(-1)
    kept = delta * mask.view(delta.shape)
    if kind in ("magnitude", "outliers") or not o.get("rescale", True):
        return kept
    after = kept.abs().sum()
    return kept * delta.abs().sum() / after if after > 1e-7 else kept


def by_formula(method: str, deltas: list[Tensor], name: str, o: dict[str, Any]) -> Tensor:
    parts = [sparsify(SPARSIFIED[method], d, t, name, o) for t, d in enumerate(deltas)]
    out = torch.zeros_like(deltas[0]).reshape(-1)
    normalize = o.get("normalize", method in ("ties", "della"))
    for p in range(out.numel()):
        terms = [w * float(part.reshape(-1)[p]) for w, part in zip(WEIGHTS, parts, strict=True)]
        weights = WEIGHTS
        if method in VOTES:
            sign = 1 if sum(terms) >= 0 else -1
            agreeing = [t * sign > 0 for t in terms]
            weights = [w for w, a in zip(WEIGHTS, agreeing, strict=True) if a]
            terms = [t for t, a in zip(terms, agreeing, strict=True) if a]
        divide = sum(weights) if normalize and method in VOTES and weights else 1
        out[p] = o.get("scale", 1.0) * sum(terms) / divide
    return out.view(deltas[0].shape)


CASES: list[dict[str, Any]] = [
    {},
    {"density": 0.5},
    {"density": 0.2},
    {"density": 0.5, "scale": 0.7, "normalize": True},
    {"density": 0.5, "normalize": False},
    {"density": 0.6, "rescale": False},
    {"density": 0.4, "epsilon": 0.05},
    {"density": 0.6, "gamma": 0.1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("method", SPARSIFIED)
def test_it_is_mergekits_formula(method: str, options: dict[str, Any]) -> None:
    known = METHODS[method].options
    options = {key: value for key, value in options.items() if key in known}
    if method == "breadcrumbs" and "density" not in options:
        pytest.skip("it has one definition, and so no density of mergekit's")
    chosen = {"definition": "mergekit"} if "definition" in known else {}
    sets = adapters()
    got = merge(sets, WEIGHTS, method, **chosen, **options)
    for name in SHAPES:
        expected = by_formula(method, [s[name] for s in sets], name, options)
        assert_close(got[name].dense(), expected, 1e-12)


def test_mergekits_own_defaults_are_used_and_every_other_definition_keeps_its_own() -> None:
    sets = [{"w": a["matrix"]} for a in adapters()]
    whole = merge(sets, WEIGHTS, "dare_ties", definition="mergekit")["w"].dense()
    assert torch.equal(whole, merge(sets, WEIGHTS, "dare_ties", definition="mergekit", density=1.0)["w"].dense())
    trimmed = merge(sets, method="ties", definition="peft")["w"].dense()
    assert torch.equal(trimmed, merge(sets, method="ties", definition="peft", density=0.2)["w"].dense())
    for method in ("dare", "dare_ties", "della", "della_linear", "breadcrumbs_ties"):
        assert METHODS[method].options["density"].default is REQUIRED
