"""What must hold at every entry of a model with a recipe: plain functions that raise AssertionError."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

import moa
from moa.errors import ContextError
from tests import models
from tests.laws import assert_close

from .recipe_laws import Subject


def other_batch(subject: Subject) -> dict[str, Tensor]:
    """Return a batch of the same size with other tokens, padding and tasks."""
    make = models.lm_batch if subject.kind == "decoder" else models.class_batch
    batch = {name: value.flip(0) for name, value in make(seed=5).items()}
    return {**batch, **subject.tasks(2, 0, 1, 1)}


def body_sees_its_batch(subject: Subject) -> None:
    """The body by itself gives the hidden states of a forward on the same batch, whatever ran before; or it refuses."""
    model = subject.trained().eval()
    inputs = {name: value for name, value in subject.batch().items() if name != "labels"}
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states[-1]
        model(**other_batch(subject))
        try:
            got = model.base.base_model(**inputs).last_hidden_state
        except ContextError as error:
            assert "first pass" in str(error) and model.preview is not None, error
            return
    assert_close(got, want, 1e-6, "the body's hidden states")
    if subject.by_task and subject.recipe.folds == "by task" and not _takes_any_task(subject):
        inputs.pop("task_ids")
        try:
            model.base.base_model(**inputs)
        except ContextError:
            return
        raise AssertionError("the body ran with the tasks of the batch before")


def _takes_any_task(subject: Subject) -> bool:
    return getattr(subject.recipe, "unknown_tasks", "error") == "uniform" or "task_ids" not in subject.batch()


def recomputes_each_batch(subject: Subject) -> None:
    """Two forwards and one backward with gradient checkpointing give the gradients that they give without."""
    gradients: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model = subject.trained().double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(**subject.batch()).loss + 2 * model(**other_batch(subject)).loss
        with torch.no_grad():
            model(**subject.batch())
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys(), "other parameters have a gradient"
    for name, grad in plain.items():
        assert_close(recomputed[name], grad, 1e-9, name)


def threads_run_apart(subject: Subject) -> None:
    """Two threads with forwards on one model get their own batch's outputs and routings."""
    model = subject.trained().eval()
    batches = [subject.batch(), other_batch(subject)]

    def answer(number: int) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        with torch.no_grad(), model.tracing() as trace:
            logits: Tensor = model(**batches[number]).logits
        return logits, [(record.name, record.routing.weights) for record in trace]

    expected: list[Any] = [answer(number) for number in (0, 1)]
    wrong: list[str] = []

    def serve(number: int) -> None:
        logits, routings = expected[number]
        for _ in range(4):
            got, seen = answer(number)
            if not torch.allclose(got, logits, atol=1e-5):
                wrong.append(f"thread {number}: logits {(got - logits).abs().max():.2g} off")
            if [name for name, _ in seen] != [name for name, _ in routings]:
                wrong.append(f"thread {number}: {len(seen)} routings, alone {len(routings)}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[0]


def forgets(model: moa.MoAModel) -> None:
    """Between forwards the model holds nothing of a batch."""
    context = model.context
    held = (context.task_ids, context.source, context.batch, context.trace, context.frozen_routings)
    several = (context.masks, context.preview, context.decisions)
    assert all(value is None for value in held) and not any(several), "a batch is kept"
