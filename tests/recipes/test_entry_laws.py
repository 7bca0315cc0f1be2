"""Every entry sees its own batch, over every recipe. Run: pytest tests/recipes/test_entry_laws.py"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import moa
from moa.model.scope import ModelScope
from moa.types import Context
from tests import laws, models

from . import entry_laws
from .recipe_laws import Subject

recipes = laws.parametrize(laws.RECIPE_CASES)
both = pytest.mark.parametrize("kind", ["decoder", "encoder"])


def subject_of(name: str, variant: str, kind: str = "decoder") -> Subject:
    return Subject(laws.small_recipe(name, variant), kind)  # type: ignore[arg-type]


@recipes
@both
def test_the_body_sees_its_own_batch(name: str, variant: str, kind: str) -> None:
    entry_laws.body_sees_its_batch(subject_of(name, variant, kind))


@recipes
def test_recomputes_see_their_own_batch(name: str, variant: str) -> None:
    entry_laws.recomputes_each_batch(subject_of(name, variant))


@recipes
def test_threads_run_apart(name: str, variant: str) -> None:
    entry_laws.threads_run_apart(subject_of(name, variant))


@recipes
def test_a_batch_is_forgotten(name: str, variant: str) -> None:
    subject = subject_of(name, variant)
    model = subject.trained().train()
    model.gradient_checkpointing_enable()
    batch = {key: value.clone() for key, value in subject.batch().items()}
    mask = weakref.ref(batch["attention_mask"])
    model(**batch).loss.backward()
    entry_laws.forgets(model)
    broken = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    broken.remove()
    entry_laws.forgets(model)
    del batch
    gc.collect()
    assert mask() is None, "the mask of a batch outlives its graph"


# ------------------------------------------------------------------ each law fails on a model that breaks it


class Stays(ModelScope):
    """A scope whose contexts stay until the next is entered, as one object for all threads."""

    held: Context | None = None

    def current(self) -> Context:
        return self.held or super().current()

    def enter(self, owner: object, context: Context) -> None:
        if isinstance(owner, moa.MoAModel):
            self.held = context


@pytest.fixture
def staying(monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr("moa.model.moa_model.ModelScope", Stays)
    return subject_of("poly", "default")


@pytest.mark.parametrize(
    "law", [entry_laws.body_sees_its_batch, entry_laws.recomputes_each_batch, entry_laws.threads_run_apart]
)
def test_the_laws_see_a_context_that_stays(staying: Subject, law) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError):
        law(staying)


def test_forgetting_is_seen_to_fail(staying: Subject) -> None:
    model = staying.trained()
    models.outputs_of(model, staying.batch())
    with pytest.raises(AssertionError, match="a batch is kept"):
        entry_laws.forgets(model)


def test_a_graph_of_two_threads_is_told_apart() -> None:
    """Recomputes in the thread of their forward see its tasks, though both number their nodes from the same start."""
    subject = subject_of("moelora", "default")
    model = subject.trained().double().train()
    model.gradient_checkpointing_enable()
    batches, found = [subject.batch(), entry_laws.other_batch(subject)], {}

    def train(number: int) -> None:
        found[number] = torch.autograd.grad(
            model(**batches[number]).loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )

    for number in (0, 1):
        train(number)
    alone = dict(found)
    threads = [threading.Thread(target=train, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        for got, want in zip(found[number], alone[number], strict=True):
            assert (got is None) == (want is None) and (got is None or torch.allclose(got, want, rtol=1e-9))
