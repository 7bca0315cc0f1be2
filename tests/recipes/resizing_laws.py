"""What holds when experts are added to a model and removed from it; test_broken_resizing.py breaks each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import moa
from moa.monitor.statistics import RoutingStatistics
from tests import laws, models

from .recipe_laws import Subject


def add_and_remove(model: Any, batch: dict[str, Any], base: Any, path: Path) -> None:
    """Adding and removing an expert leaves logits bit for bit; what is between saves, loads, routes and trains."""
    whole, routers = model.expert_names, [branch.router for _, branch in model.branches()]
    number = model.add_expert()
    assert number == len(whole) and model.expert_names == [*whole, str(number)]
    assert [branch.router for _, branch in model.branches()] == routers, "those that others know"
    if all(branch.bank.zero_at_init and branch.bank.n_experts > number for _, branch in model.branches()):
        with model.pin_expert(number):
            fresh = models.outputs_of(model, batch)
        with model.disable_adapter():
            laws.assert_close(fresh, models.outputs_of(model, batch), 1e-5, "a fresh expert")
    statistics = RoutingStatistics()
    models.randomise(model, seed=8)
    model.observers.append(lambda traces: [statistics.add(trace) for trace in traces])
    model.train()(**batch).loss.backward()
    model.observers.clear()
    assert {load.n_experts for load in statistics.summary().values()} <= {number + 1, 1}
    model.eval().save_pretrained(path)
    again = moa.load(path, base=base())
    assert again.expert_names == model.expert_names
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch)), "saved with one more"


def comes_back(subject: Subject, path: Path) -> None:
    """A model with an expert added and removed is what it was, bit for bit."""
    model, batch = subject.trained().eval(), subject.batch()
    want, names = models.outputs_of(model, batch), model.expert_names
    state = {key: value.clone() for key, value in model.adapter_state_dict().items()}
    assert model.add_expert() == len(names)
    model.remove_expert(len(names))
    assert torch.equal(models.outputs_of(model, batch), want), "what comes back is another model"
    assert model.expert_names == names
    assert all(torch.equal(value, state[key]) for key, value in model.adapter_state_dict().items())
    assert model.recipes[0][0] == subject.fresh().recipes[0][0]
    add_and_remove(model, batch, subject.base, path)


def keeps_the_others(subject: Subject, path: Path) -> None:
    """Each expert that stays gives by itself what it gave, under its new number, also after saving."""
    model, batch = subject.trained().double().eval(), subject.batch()
    n = len(model.expert_names)

    def by_itself(number: int) -> torch.Tensor:
        with model.pin_expert(number):
            return models.outputs_of(model, batch)

    before = [by_itself(number) for number in range(n)]
    model.remove_expert(1)
    for place, number in enumerate([0, *range(2, n)]):
        laws.assert_close(by_itself(place), before[number], 1e-9, f"expert {number}, now {place}")
    model.save_pretrained(path)
    again = moa.load(path, base=subject.base().double())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch)), "saved with one less"
