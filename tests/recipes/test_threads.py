"""Forwards in two threads never mix tasks, traces, switches or weights. Run: pytest tests/recipes/test_threads.py"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import moa
from tests import models

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
