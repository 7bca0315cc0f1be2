"""What must hold for every recipe on a decoder and on an encoder: plain functions that raise AssertionError."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ContextError, FoldError, MoaWarning
from moa.mixture import Mixture
from moa.mixture.blocks import FollowRouter
from moa.monitor.statistics import RoutingStatistics
from moa.recipes import Recipe
from tests import models
from tests.laws import N_TASKS, assert_close

FIRST_LAYER = {"decoder": "model.layers.0.", "encoder": "bert.encoder.layer.0."}
# why a mixture is not one weight, as folding says it
REASONS = r"depends on the input|experts are whole blocks"


@dataclass(frozen=True)
class Subject:
    """A recipe on a decoder, or on an encoder whose head is frozen, so that only the recipe can learn."""

    recipe: Recipe
    kind: Literal["decoder", "encoder"] = "decoder"

    @property
    def by_task(self) -> bool:
        """Whether the recipe routes by task."""
        return any(field.name == "n_tasks" for field in dataclasses.fields(self.recipe))

    def base(self) -> Any:
        """Return the base anew, always the same."""
        if self.kind == "decoder":
            return models.llama()
        base = models.bert()  # as it is drawn, its head hardly lets a gradient through
        nn.init.normal_(base.classifier.weight, generator=torch.Generator().manual_seed(0))
        return base

    def fresh(self) -> Any:
        """Return the model as it starts."""
        recipe = self.recipe
        if self.kind == "encoder":
            recipe = dataclasses.replace(recipe, targets=r".*encoder\.layer.*")
        return moa.build(self.base(), recipe, modules_to_save=[])

    def trained(self) -> Any:
        """Return the model with every trainable parameter drawn at random."""
        return models.randomise(self.fresh())

    def tasks(self, *ids: int) -> dict[str, Tensor]:
        """Return the task ids as a part of a batch, if the recipe looks at them."""
        return {"task_ids": torch.tensor(ids) % N_TASKS} if self.by_task else {}

    def batch(self) -> dict[str, Tensor]:
        """Return a batch of four examples with labels, padding, and tasks where the recipe routes by them."""
        batch = models.lm_batch() if self.kind == "decoder" else models.class_batch()
        return {**batch, **self.tasks(0, 1, 2, 3)}


def step_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each trainable parameter in one training step, zeros where there is none."""
    torch.manual_seed(5)
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def trains_only_what_it_adds(subject: Subject) -> None:
    """A few steps under weight decay lower the loss, and the base that comes out is the one that went in."""
    model, batch = subject.fresh(), subject.batch()

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return model(**batch).loss.item()

    before = evaluate()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(8):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate() < before - 0.02, "the loss did not fall"
    after, came = model.unload().state_dict(), subject.base().state_dict()
    assert after.keys() == came.keys(), "the base has other tensors"
    for name, value in came.items():
        assert torch.equal(after[name], value), f"{name} is the base's and moved"


def is_monitored(subject: Subject) -> None:
    """Each decision of a training step is counted once, on real tokens only, under the name of its layer."""
    model, batch = subject.trained(), subject.batch()
    statistics = RoutingStatistics(N_TASKS)
    seen: list[tuple[str, int]] = []

    def observe(traces: list[Any]) -> None:
        for trace in traces:
            statistics.add(trace, batch.get("task_ids"))
        seen.extend((record.name, id(record.router)) for record in traces[0])

    model.observers.append(observe)
    model.train()(**batch)
    layers = statistics.summary()
    deciding = [(layer, branch) for layer, branch in model.branches() if not isinstance(branch.router, FollowRouter)]
    assert {layer.split("#")[0] for layer in layers} == {layer for layer, _ in deciding}, "not every layer is counted"
    assert sorted(seen) == sorted((layer, id(branch.router)) for layer, branch in deciding), (
        "not once for each decision"
    )
    real = int(batch["attention_mask"].sum())
    streams = 1 if model.streams is None else model.streams.n
    for layer, load in layers.items():
        assert_close(load.load.sum(), torch.ones_like(load.load.sum()), 1e-5, layer)
        # a routing by example or a constant one has fewer rows than tokens, M selections have M times as many
        assert 0 < load.rows <= real * model.samples * streams, f"{layer}: {load.rows} rows of {real} real tokens"
        assert all(math.isfinite(value) for value in load.measures().values())


def reaches_every_parameter(subject: Subject) -> None:
    """Every trainable parameter gets a gradient, finite and not zero."""
    for name, grad in step_gradients(subject.trained(), subject.batch()).items():
        assert bool(grad.isfinite().all()) and bool(grad.any()), f"{name} gets no gradient"


def recomputes_the_same(subject: Subject, reentrant: bool) -> None:
    """Gradient checkpointing gives the same gradients, also where it is asked for in a mode that cannot.

    In fp64: a reentrant checkpoint's first pass has no gradients, and its sums may run in another order.
    """
    model, batch = subject.trained().double(), subject.batch()
    plain = step_gradients(model, batch)
    own_losses = any(b.router.stochastic or b.router.loss_weights for _, b in model.branches())
    said = pytest.warns(MoaWarning, match="use_reentrant") if reentrant and own_losses else contextlib.nullcontext()
    with said:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    model.base.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = step_gradients(model, batch)
    first_pass = model.preview is not None
    assert len(calls) == 2 * model.samples + first_pass, "nothing was recomputed"
    for name, grad in plain.items():
        assert_close(checkpointed[name], grad, 1e-9, name)


def generates_from_a_cache(subject: Subject) -> None:
    """Decoding with a key-value cache gives the logits of the full forward; a recipe that is not causal refuses."""
    model = subject.trained().eval()
    prompt = models.token_batch(rows=3, length=6)["input_ids"].clamp(min=2)
    extra = subject.tasks(0, 1, 2)
    if not all(branch.router.causal for _, branch in model.branches()):
        with pytest.raises(ContextError, match="not causal"):
            model.generate(prompt, max_new_tokens=2, **extra)
        return
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **extra,
    )
    looked_at = torch.zeros_like(generated.sequences, dtype=torch.bool)
    looked_at[:, :6] = True
    with torch.no_grad():
        full = model(input_ids=generated.sequences, routing_mask=looked_at, **extra).logits
    assert_close(torch.stack(generated.logits, 1), full[:, 5:-1], 1e-5)


def saves_bit_for_bit(subject: Subject, path: Path) -> None:
    """A saved model comes back bit for bit, what no gradient moves included."""
    model, batch = subject.trained().eval(), subject.batch()
    for _, branch in model.branches():
        for part in (branch.router, branch.bank):
            kept = part.state_dict(keep_vars=True)
            for name, buffer in part.named_buffers():
                if name in kept and buffer.is_floating_point():
                    buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(path)
    base = subject.base()
    torch.manual_seed(77)  # what the checkpoint does not hold comes out otherwise
    again = moa.load(path, base=base)
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch)), "other outputs"
    state = again.adapter_state_dict()
    assert state.keys() == model.adapter_state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.adapter_state_dict().items())
    assert [r for r, _ in again.recipes] == [r for r, _ in model.recipes]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def folds_as_declared(subject: Subject) -> None:
    """A model folds exactly when its recipe says so: always, for the one task that is named, or never, by name."""
    folds = subject.recipe.folds
    model = subject.trained().double().eval()
    if folds == "always":
        _folds_exactly(subject, model, None)
        return
    _refuses_to_fold(subject, model, None, "merge_and_unload\\(task_id=" if folds == "by task" else REASONS)
    if folds == "never":
        _refuses_to_fold(subject, model, 0, REASONS)
        return
    if getattr(subject.recipe, "unknown_tasks", "error") == "error":
        _refuses_to_fold(subject, model, N_TASKS + 4, f"task {N_TASKS + 4} is none of them")
    for task in range(N_TASKS):
        _folds_exactly(subject, copy.deepcopy(model), task)


def _folds_exactly(subject: Subject, model: Any, task: int | None) -> None:
    batch = subject.batch()
    if task is not None:
        batch["task_ids"] = torch.full_like(batch["task_ids"], task)
    before, inside = models.outputs_of(model, batch), model.base
    base = models.outputs_of(subject.base().double(), {n: v for n, v in batch.items() if n != "task_ids"})
    assert not torch.allclose(before, base, atol=1e-3), "there is nothing to fold"
    folded = model.merge_and_unload() if task is None else model.merge_and_unload(task_id=task)
    batch.pop("task_ids", None)
    assert folded is inside and not any(isinstance(m, Mixture) for m in folded.modules())
    assert_close(models.outputs_of(folded, batch), before, what=f"folded, task {task}")


def _refuses_to_fold(subject: Subject, model: Any, task: int | None, reason: str) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(FoldError, match=reason) as caught:
        model.merge_and_unload(task_id=task)
    assert FIRST_LAYER[subject.kind] in str(caught.value), f"no layer is named: {caught.value}"
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items()), "half folded"


def copies_apart(subject: Subject) -> None:
    """A deep copy gives the same outputs, and shares nothing with its original."""
    model, batch = subject.trained().eval(), subject.batch()
    before = models.outputs_of(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(models.outputs_of(twin, batch), before), "the copy gives other outputs"
    assert all(m.scope is twin.scope for m in twin.mixtures().values())
    tensors = [{id(t) for t in (*m.parameters(), *m.buffers())} for m in (twin, model)]
    assert not tensors[0] & tensors[1], "the copy shares tensors"
    models.randomise(twin, seed=9)
    assert not torch.equal(models.outputs_of(twin, batch), before)
    assert torch.equal(models.outputs_of(model, batch), before), "the original changed with its copy"


def starts_as_its_base(model: Any, base: Any, batch: dict[str, Tensor], tasks: dict[str, Tensor]) -> None:
    """Zero experts change nothing; experts switched off or taken out leave the base exactly.

    Args:
        model: fresh, on a base of its own.
        base: the base as it came.
        batch: its inputs.
        tasks: what the model gets beyond them.
    """
    base_logits = models.outputs_of(base, batch)
    batch = {**batch, **tasks}
    if all(branch.bank.zero_at_init for _, branch in model.branches()):
        assert_close(models.outputs_of(model, batch), base_logits, 1e-5, "a fresh model")
    models.randomise(model)
    assert not torch.allclose(models.outputs_of(model, batch), base_logits, atol=1e-3), "experts change nothing"
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, batch), base_logits), "experts switched off still act"
    removed = model.unload()
    assert type(removed) is type(base)
    inputs = {name: value for name, value in batch.items() if name != "task_ids"}
    assert torch.equal(models.outputs_of(removed, inputs), base_logits), "the base has changed"
