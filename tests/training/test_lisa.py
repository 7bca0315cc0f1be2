"""LISA: exactly γ train in an interval, all are covered, and what does not train keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import moa
from moa.errors import ConfigError
from moa.training.lisa import Lisa
from moa.training.lisa_callback import LisaCallback
from tests import models


def built(**options: Any) -> moa.MoAModel:
    model = moa.build(models.bert(), "topk", n_experts=3, k=2, rank=2, targets=["query", "value"], **options)
    return models.randomise(model).train()


def banks(model: moa.MoAModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".bank." in n}


def trained(model: moa.MoAModel, optimizer: torch.optim.Optimizer) -> None:
    model(**models.class_batch()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("state", ["keep", "drop"])
def test_one_layer_trains_and_the_others_keep_their_bits(state: Any) -> None:
    model = built()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    trained(model, optimizer)  # all have moments, which would move them further
    lisa = Lisa(model, optimizer, n_active=1, every=2, state=state)
    assert lisa.total == 2
    seen = set()
    for _ in range(4):
        before, active = banks(model), lisa.active[0]
        seen.add(active)
        model(**models.class_batch()).loss.backward()
        for name, parameter in model.named_parameters():
            if ".bank." in name:
                mine = f"layer.{active}." in name
                assert (parameter.grad is not None) == mine, name
                assert (parameter in optimizer.state) == (mine or state == "keep") or mine
        optimizer.step()
        for name, value in banks(model).items():
            assert torch.equal(value, before[name]) != (f"layer.{active}." in name), name
        optimizer.zero_grad()
    assert seen == {0, 1}
    lisa.close()
    assert all(p.requires_grad for n, p in model.named_parameters() if ".bank." in n)
    before = banks(model)
    trained(model, optimizer)
    assert not any(torch.equal(value, before[name]) for name, value in banks(model).items())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_one_expert_trains_and_the_others_rows_keep_their_bits(kind: Any) -> None:
    """As if they were not there: the trained expert moves as with the others' gradients, and moments stay."""
    model = built()
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5, **extra)
    trained(model, optimizer)
    optimizer.zero_grad()
    lisa = Lisa(model, optimizer, n_active=1, every=1, over="experts")
    seen = set()
    moment = "exp_avg" if kind is torch.optim.AdamW else "momentum_buffer"
    parameters = {n: p for n, p in model.named_parameters() if ".bank." in n}
    for _ in range(3):
        before, (active,) = banks(model), lisa.active
        states = {n: optimizer.state[p][moment].clone() for n, p in parameters.items()}
        seen.add(active)
        trained(model, optimizer)
        for name, value in banks(model).items():
            for e in range(3):
                assert torch.equal(value[e], before[name][e]) != (e == active), (name, e)
                kept = torch.equal(optimizer.state[parameters[name]][moment][e], states[name][e])
                assert kept != (e == active and states[name][e].any()), (name, e)
        optimizer.zero_grad()
    assert seen == {0, 1, 2}


def test_moments_that_a_step_makes_start_at_zero_for_what_stands_still() -> None:
    model = built()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    lisa, before = Lisa(model, optimizer, n_active=1, over="experts"), banks(model)
    trained(model, optimizer)
    for name, value in banks(model).items():
        for e in {0, 1, 2} - set(lisa.active):
            assert torch.equal(value[e], before[name][e])
            assert not optimizer.state[model.get_parameter(name)]["exp_avg"][e].any()


@pytest.mark.parametrize(("total", "active"), [(5, 2), (4, 4), (7, 3)])
def test_each_round_covers_all_with_as_many_each_time(total: int, active: int) -> None:
    model = moa.build(models.plain(), "topk", n_experts=total, k=2, rank=2, targets=["up"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lisa = Lisa(model, optimizer, n_active=active, every=1, over="experts")
    chosen = []
    for _ in range(2 * -(-total // active)):
        chosen.append(lisa.active)
        optimizer.step()
    half = len(chosen) // 2
    assert all(len(set(one)) == active for one in chosen)
    assert all({e for one in part for e in one} == set(range(total)) for part in (chosen[:half], chosen[half:]))
    later = Lisa(model, optimizer, n_active=active, every=1, over="experts", start_step=half)
    assert later.active == chosen[half]


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.moved: list[set[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = banks(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        after = banks(model)
        self.moved.append({n.split("layer.")[1][0] for n in after if not torch.equal(after[n], self.before[n])})


def test_with_trainer(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(2, 8), "labels": torch.tensor(1)}] * 8
    args = TrainingArguments(
        str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, weight_decay=0.5,
        learning_rate=0.01, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    watch = Watch()
    Trainer(
        built(), args, train_dataset=rows, callbacks=[LisaCallback(n_active=1, every=2, state="drop"), watch]
    ).train()
    assert watch.moved[0] == watch.moved[1] != watch.moved[2] == watch.moved[3]
    assert all(len(one) == 1 for one in watch.moved)


def test_what_cannot_be_is_refused() -> None:
    model = built()
    optimizer = torch.optim.AdamW(model.parameters())
    for options, message in (
        ({"n_active": 3}, "n_active=3: this model has 2 layers that train"),
        ({"n_active": 0}, "must be at least 1"),
        ({"over": "layer"}, "Did you mean 'layers'"),
        ({"state": "drp"}, "Did you mean 'drop'"),
        ({"over": "experts", "state": "drop"}, "share one count of steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            Lisa(model, optimizer, **options)  # type: ignore[arg-type]
    shared = moa.build(models.bert(), "topk", n_experts=3, k=2, rank=2, expert="shared")
    with pytest.raises(ConfigError, match="which is not one expert's: choose over='layers'"):
        Lisa(shared, optimizer, n_active=1, over="experts")
