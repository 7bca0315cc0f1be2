"""Recipes like another one but for one thing, by which a law is shown to fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest

import moa
from moa.experts import ExpertBank
from moa.mixture import Branch, Mixture, Site
from moa.recipes import Recipe
from moa.recipes.gates import TopK
from moa.routers import LinearRouter
from tests import laws

SIZES = {"n_experts": 4, "k": 2, "rank": 2}


def twin(base: type[Recipe] = TopK, **members: Any) -> Recipe:
    """Return a recipe like another one but for some members."""
    cls = dataclass(frozen=True, kw_only=True)(type("Twin", (base,), {"__annotations__": {}, **members}))
    known = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in {**SIZES, "n_tasks": laws.N_TASKS}.items() if name in known})


def with_router(router: type[LinearRouter]) -> Recipe:
    """Return a recipe whose layers have a gate of this class."""
    return twin(build=lambda self, site: [Branch(router(site.d_in, 4, 2), self.bank(site))])


def with_bank(bank: type[ExpertBank], base: type[Recipe] = TopK) -> Recipe:
    """Return a recipe whose layers have experts of this class."""
    return twin(base, bank=lambda self, site: bank(site.d_in, site.d_out, self.n_experts, rank=2))


def with_mixture(mixture: type[Mixture]) -> Recipe:
    """Return a recipe whose layers are mixtures of this class."""

    def mixtures(self: Recipe, sites: list[Site], context: moa.Context) -> list[Mixture]:
        return [mixture(site.module, self.build(site), context, site.name) for site in sites]

    return twin(mixtures=mixtures)


def fails(what: str, law: Callable[..., None], *args: Any) -> None:
    with pytest.raises(AssertionError, match=what):
        law(*args)
