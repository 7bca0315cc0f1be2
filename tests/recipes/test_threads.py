"""Forwards in two threads never mix tasks, traces, switches or weights. Run: pytest tests/recipes/test_threads.py"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ContextError
from tests import laws, models

from . import entry_laws
from .recipe_laws import Subject

ROUNDS = 25
BATCHES = [models.token_batch(seed=1), models.token_batch(seed=2)]


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def apart(*answers: Callable[[], Tensor], rounds: int = ROUNDS) -> None:
    """Run each again and again in a thread of its own: each time it gives what it gives by itself."""
    alone = [answer() for answer in answers]

    def serve(number: int) -> None:
        for _ in range(rounds):
            got = answers[number]()
            assert torch.allclose(got, alone[number], atol=1e-5), (
                f"{number}: {(got - alone[number]).abs().max():.2g} off"
            )

    together(*(partial(serve, number) for number in range(len(answers))))


def together(*calls: Callable[[], Any]) -> None:
    """Run each in a thread of its own, the threads taking turns as often as they can."""
    with switching_often(), ThreadPoolExecutor(len(calls)) as pool:
        for running in [pool.submit(call) for call in calls]:
            running.result()


def logits(model: Any, number: int, block: Any = None, **extra: Any) -> Tensor:
    with torch.no_grad(), block() if block else contextlib.nullcontext():
        out: Tensor = model(**BATCHES[number], **extra).logits
    return out


@pytest.mark.parametrize("switch", ["disable_adapter", "pin_expert", "folded", "reference"])
def test_switches_hold_in_their_own_thread(switch: str) -> None:
    model = moa.build(models.llama(), "fixed", n_experts=3, modules_to_save=["lm_head"])
    models.randomise(model).train(switch == "reference")
    reference = model.reference()
    blocks = {
        "disable_adapter": model.disable_adapter,
        "pin_expert": lambda: model.pin_expert(2),
        "folded": model.folded,
    }
    second = (lambda: reference(**BATCHES[1]).logits) if switch == "reference" else None
    apart(lambda: logits(model, 0), second or (lambda: logits(model, 1, blocks[switch])))


def test_tasks_and_traces_stay_apart() -> None:
    model = models.randomise(moa.build(models.llama(), "poly", n_tasks=3, n_experts=4)).eval()

    def traced(number: int) -> Tensor:
        with torch.no_grad(), model.tracing() as trace:  # type: ignore[operator]
            model(**BATCHES[number], task_ids=torch.full((4,), number))
        return torch.stack([record.routing.dense().flatten()[:4] for record in trace])

    apart(lambda: traced(0), lambda: traced(1))


@pytest.mark.parametrize("router", ["topk", "remix"])
def test_a_closure_is_its_own_threads(router: str) -> None:
    """A loss that the model computes beside somebody's closure holds the routers' own, as by itself."""
    model = models.randomise(moa.build(models.llama(), router, n_experts=4, k=2)).train()
    batch = models.lm_batch()

    def inside() -> Tensor:
        loss: Tensor = model.routed_loss(lambda: model(**batch).loss)  # type: ignore[operator]
        return loss.detach()

    def own() -> Tensor:
        torch.manual_seed(1)
        loss: Tensor = model(**batch).loss
        return loss.detach()

    if router == "topk":
        apart(inside, own)
        return
    came: list[bool] = []
    draw = model.selections.current  # type: ignore[union-attr]

    def watched() -> Any:
        came.append(model.scope.turns.mine())  # type: ignore[union-attr]
        return draw()

    model.selections.current = watched  # type: ignore[method-assign, union-attr]
    together(inside, own)
    assert came and all(came), "two threads draw selections from one random state"


@laws.parametrize(laws.RECIPE_CASES)
def test_training_forwards_are_their_own_threads(name: str, variant: str) -> None:
    """What a recipe's training forward records, adds up and draws is its own batch's, in every thread."""
    subject = Subject(laws.small_recipe(name, variant))
    model: Any = subject.trained().train()
    batches = [subject.batch(), entry_laws.other_batch(subject)]
    models_modes: list[bool] = []
    first = next(iter(model.mixtures().values()))
    first.base.register_forward_pre_hook(
        lambda module, _: models_modes.append(module.training) if model.context.enabled else None
    )

    def train(number: int) -> tuple[list[str], Tensor]:
        with torch.no_grad():
            before = model.tracing()
            with before as trace:
                loss = model(**batches[number]).loss
        return [record.name for record in trace], loss

    draws = any(branch.router.stochastic for _, branch in model.branches())
    alone = [[train(number) for _ in range(3)] for number in (0, 1)]
    draws = draws or any(not torch.allclose(runs[0][1], loss) for runs in alone for _, loss in runs)

    def serve(number: int) -> None:
        for _ in range(4):
            names, loss = train(number)
            assert names == alone[number][0][0]
            assert draws or torch.allclose(loss, alone[number][0][1], atol=1e-5)

    together(partial(serve, 0), partial(serve, 1))
    assert models_modes and all(models_modes), "a first pass has switched the modes under another thread's forward"


def test_two_threads_that_wait_inside_of_forwards_are_refused() -> None:
    """Each would wait for the other's forward to end: the second gets an error, and the first goes on."""
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=3)).eval()
    both = threading.Barrier(2)
    refused: list[str] = []

    def inside(module: Any, args: Any) -> None:
        if getattr(done, "tried", False) or not model.context.enabled:
            return
        done.tried = True
        both.wait(30)
        try:
            with model.folded():  # type: ignore[operator]
                pass
        except ContextError as error:
            refused.append(str(error))

    done = threading.local()
    handle = model.lm_head.register_forward_pre_hook(inside)  # type: ignore[union-attr]
    together(lambda: logits(model, 0), lambda: logits(model, 1))
    handle.remove()
    assert len(refused) == 1 and "before the forward" in refused[0]
    apart(lambda: logits(model, 0), lambda: logits(model, 1, model.folded), rounds=3)
