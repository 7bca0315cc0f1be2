"""A broken recipe for each law of recipes: a law that cannot fail proves nothing.

Run: pytest tests/recipes/test_broken_recipes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.experts import ExpertBank, LoRABank
from moa.mixture import Branch, Mixture
from moa.recipes import RECIPES, Recipe
from moa.recipes.gates import Fixed, MOELoRA, TopK
from moa.routers import FixedRouter, LinearRouter, TaskEmbeddingRouter
from tests import laws, models

from . import recipe_laws
from .compile_law import blocks_in_one_graph, compiles
from .recipe_laws import Subject
from .twins import SIZES, fails, twin, with_bank, with_mixture, with_router

both = pytest.mark.parametrize("kind", ["decoder", "encoder"])


def test_the_unbroken_recipe_passes(tmp_path: Path) -> None:
    """So that what fails below fails for what was broken."""
    subject = Subject(twin())
    for law in (
        recipe_laws.trains_only_what_it_adds,
        recipe_laws.is_monitored,
        recipe_laws.reaches_every_parameter,
        recipe_laws.generates_from_a_cache,
        recipe_laws.folds_as_declared,
        recipe_laws.copies_apart,
    ):
        law(subject)
    recipe_laws.recomputes_the_same(subject, False)
    recipe_laws.saves_bit_for_bit(Subject(RECIPES["topk"](**SIZES)), tmp_path)


# ------------------------------------------------------------------------------------------------ training


class TrainsTheBase(Mixture):
    """Lets its layer's weight learn."""

    def __init__(self, base: nn.Module, *args: Any) -> None:
        super().__init__(base, *args)
        base.weight.requires_grad_(True)


class MovesTheBase(Mixture):
    """Writes into its frozen layer, as a balancing that picked the wrong tensor would."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training:
            self.base.weight.data.mul_(1.001)
        return super().forward(x, *args, **kwargs)


class Still(LoRABank):
    """Does not learn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requires_grad_(False)


@both
def test_training(kind: Any) -> None:
    for mixture in (TrainsTheBase, MovesTheBase):
        fails("is the base's and moved", recipe_laws.trains_only_what_it_adds, Subject(with_mixture(mixture), kind))
    fails("did not fall", recipe_laws.trains_only_what_it_adds, Subject(with_bank(Still), kind))


class RecordsTwice(Mixture):
    """Counts each decision twice."""

    def _record(self, *args: Any) -> None:
        super()._record(*args)
        super()._record(*args)


class RecordsPadding(Mixture):
    """Counts rows that are padding."""

    def _record(self, routing: moa.Routing, x: Tensor, router: Any, context: Any) -> None:
        context.trace.add(self, routing, None, router)


class RecordsNothing(Mixture):
    """Forgets to record."""

    def _record(self, *args: Any) -> None:
        pass


@both
def test_monitoring(kind: Any) -> None:
    fails("not once for each", recipe_laws.is_monitored, Subject(with_mixture(RecordsTwice), kind))
    fails("rows of", recipe_laws.is_monitored, Subject(with_mixture(RecordsPadding), kind))
    fails("not every layer", recipe_laws.is_monitored, Subject(with_mixture(RecordsNothing), kind))


class HasADeadParameter(LoRABank):
    """Holds a parameter that nothing reads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.unused = nn.Parameter(torch.zeros(self.n_experts))


@both
def test_gradients(kind: Any) -> None:
    fails("unused gets no gradient", recipe_laws.reaches_every_parameter, Subject(with_bank(HasADeadParameter), kind))


class CountsItsCalls(LinearRouter):
    """Routes otherwise the second time, as a router with a counter does when a block is run again."""

    calls = 0

    def forward(self, x: Tensor, context: moa.Context) -> moa.Routing:
        self.calls += 1
        return super().forward(x * self.calls, context)


def test_recomputing() -> None:
    fails("off by", recipe_laws.recomputes_the_same, Subject(with_router(CountsItsCalls)), False)


# ------------------------------------------------------------------------------------------------ decoding, compiling


class SumsEarlierRows(LinearRouter):
    """Looks at all earlier rows, which is causal, and with a cache sees only the new ones."""

    def forward(self, x: Tensor, context: moa.Context) -> moa.Routing:
        return super().forward(x.cumsum(1), context)


def test_decoding() -> None:
    fails("off by", recipe_laws.generates_from_a_cache, Subject(with_router(SumsEarlierRows)))


class DiffersWhenCompiled(LinearRouter):
    """Computes something else under compilation."""

    def forward(self, x: Tensor, context: moa.Context) -> moa.Routing:
        return super().forward(x * 1.01 if torch.compiler.is_compiling() else x, context)


class AsksTheHost(LinearRouter):
    """Reads a value on the way, which breaks the graph."""

    def forward(self, x: Tensor, context: moa.Context) -> moa.Routing:
        return super().forward(x * (2.0 if x.sum().item() > 0 else 1.0), context)


class RaisesWhenCompiled(Mixture):
    """A layer that its recipe puts there and that cannot be compiled, as a block's layers once were."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("not compiled")
        return super().forward(x, *args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiling() -> None:
    fails("off by", compiles, Subject(with_router(DiffersWhenCompiled)), blocks_in_one_graph)
    for recipe in (with_router(AsksTheHost), with_mixture(RaisesWhenCompiled)):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            compiles(Subject(recipe), blocks_in_one_graph)


# ------------------------------------------------------------------------------------------------ saving, copying


class ForgetsItsBuffer(ExpertBank):
    """Reads a random projection that a checkpoint does not hold."""

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.up = nn.Parameter(torch.zeros(n_experts, d_out))
        self.register_buffer("down", torch.randn(n_experts, d_in), persistent=False)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.down[expert, :, None] * self.up[expert]


@both
def test_saving(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_bank(ForgetsItsBuffer)
    monkeypatch.setitem(RECIPES, "forgetful", type(recipe))
    monkeypatch.setattr(type(recipe), "name", "forgetful")
    fails("other outputs", recipe_laws.saves_bit_for_bit, Subject(recipe, kind), tmp_path)


class StaysOne(LoRABank):
    """Is the same object in every copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StaysOne:
        return self


def test_copying() -> None:
    fails("the copy shares tensors", recipe_laws.copies_apart, Subject(with_bank(StaysOne)))


# ------------------------------------------------------------------------------------------------ folding


def declared(base: type[Recipe], folds: str, **members: Any) -> Recipe:
    return twin(base, folds=property(lambda self: folds), **members)


class DropsConstants(ExpertBank):
    """Adds a constant that its weight change does not hold."""

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.inner = LoRABank(d_in, d_out, n_experts, **options)
        self.constant = nn.Parameter(torch.zeros(n_experts, d_out))

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        return self.inner.expert_forward(x, expert) + self.constant[expert].to(x.dtype)

    def delta(self, expert: int) -> Any:
        return self.inner.delta(expert)


class ForgetsTheTask(TaskEmbeddingRouter):
    """Folds the first task whichever is named."""

    def constant(self, task: int | None = None) -> moa.Routing | None:
        return super().constant(None if task is None or task not in self.tasks else 0)


class TakesAnyTask(TaskEmbeddingRouter):
    """Folds some task when none is named."""

    def constant(self, task: int | None = None) -> moa.Routing | None:
        return super().constant(task or 0)


class FoldsSomeLayers(FixedRouter):
    """Is constant on layers of some widths only."""

    def forward(self, x: Tensor, context: moa.Context) -> moa.Routing:
        return super().constant()

    def constant(self, task: int | None = None) -> Any:
        return None if self.d_in == 24 else super().constant(task)


@both
def test_folding(kind: Any) -> None:
    def law(what: str, recipe: Recipe) -> None:
        with pytest.raises((AssertionError, moa.MoaError, pytest.fail.Exception), match=what):
            recipe_laws.folds_as_declared(Subject(recipe, kind))

    def by_task(router: type[TaskEmbeddingRouter]) -> Recipe:
        return twin(MOELoRA, build=lambda self, site: [Branch(router(site.d_in, 4, laws.N_TASKS), self.bank(site))])

    law("off by", with_bank(DropsConstants, Fixed))
    law("depends on the input", declared(TopK, "always"))
    law("task_id", declared(TopK, "by task"))
    law("DID NOT RAISE", declared(Fixed, "never"))
    law("DID NOT RAISE", declared(Fixed, "by task"))
    law("off by", by_task(ForgetsTheTask))
    law("DID NOT RAISE", by_task(TakesAnyTask))
    narrow = twin(Fixed, build=lambda self, site: [Branch(FoldsSomeLayers(site.d_in, 4), self.bank(site))])
    law("depends on the input", narrow)


# ------------------------------------------------------------------------------------------------ starting


class StartsBeside(LoRABank):
    """Says that it starts at zero and does not."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.up)


class NeverOff(Mixture):
    """Acts while experts are switched off."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.add(x, self.base(x, *args, **kwargs))


class Idle(Mixture):
    """Is its layer and nothing else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.base(x, *args, **kwargs)
        return out


class LeavesItsMark(Mixture):
    """Changes its layer once its experts are no longer zero."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.context.enabled and self.branches[0].bank.up.any():
            self.base.weight.data.add_(1e-4)
        return super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_starting(kind: str) -> None:
    make, make_batch = models.MODELS[kind]

    def law(what: str, recipe: Recipe) -> None:
        with pytest.raises(AssertionError, match=what):
            recipe_laws.starts_as_its_base(moa.build(make(), recipe), make(), make_batch(), {})

    law("a fresh model", with_bank(StartsBeside))
    law("switched off still act", with_mixture(NeverOff))
    law("experts change nothing", with_mixture(Idle))
    law("switched off still act", with_mixture(LeavesItsMark))
