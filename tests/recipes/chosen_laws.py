"""What must hold where each example of a batch has an expert of its own: plain functions that raise AssertionError."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tests import models
from tests.laws import assert_close

from .recipe_laws import Subject

TASK = 1e-9  # relative, fp64


def choice_of(model: Any) -> list[int | None]:
    """Return an expert for each of four examples, the base for one of them."""
    n = len(model.expert_names)
    return [n - 1, None, 0, max(0, n - 2)]


def alone(model: Any, expert: int | None) -> contextlib.AbstractContextManager[None]:
    """Return the block in which a model uses one expert, or none."""
    return model.disable_adapter() if expert is None else model.pin_expert(expert)


def one_by_one(model: Any, batch: dict[str, Tensor], choice: list[int | None]) -> Tensor:
    """Return the outputs of the examples, each run by itself under its expert, (B, …)."""
    rows = []
    for row, expert in enumerate(choice):
        with alone(model, expert):
            rows.append(model(**{name: value[row : row + 1] for name, value in batch.items()}).logits)
    return torch.cat(rows)


def inputs_of(subject: Subject) -> dict[str, Tensor]:
    """Return a batch without labels and tasks: who chooses an expert needs no task."""
    return {name: value for name, value in subject.batch().items() if name not in ("labels", "task_ids")}


def each_example_has_its_expert(subject: Subject) -> None:
    """A batch with an expert for each example gives what the examples give one by one, and trains only those."""
    model = subject.trained().double().eval()
    choice, batch = choice_of(model), inputs_of(subject)
    with torch.no_grad():
        want = one_by_one(model, batch, choice)
        assert_close(model(**batch, adapter_ids=choice).logits, want, TASK, "a batch of several experts")
        numbers = torch.tensor([-1 if expert is None else expert for expert in choice])
        assert_close(model(**batch, adapter_ids=numbers).logits, want, TASK, "chosen by a tensor")
        free = model(**batch, **subject.tasks(0, 1, 2, 3)).logits
        assert not torch.allclose(free, want, atol=1e-3), "the routers choose the same"
    model.train()
    weight = torch.randn(want.shape, dtype=want.dtype)
    gradients = []
    for run in (lambda: model(**batch, adapter_ids=choice).logits, lambda: one_by_one(model, batch, choice)):
        model.zero_grad(set_to_none=True)
        (run() * weight).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    together, apart = gradients
    chosen = {expert for expert in choice if expert is not None}
    for name, branch in model.branches():
        for part in branch.bank.per_expert:
            tensor = dict(branch.bank.named_parameters()).get(part)
            if tensor is None or not tensor.requires_grad:
                continue
            for expert, grad in enumerate(tensor.grad if tensor.grad is not None else []):
                assert bool(grad.any()) == (expert in chosen), f"{name}.{part}: expert {expert} of {choice}"
    banks = sorted(key for key in together.keys() | apart.keys() if ".bank." in key or "shared" in key)
    # together: some gradients are zero but for rounding, as that of a bias before a softmax over positions
    assert_close(*(torch.cat([g[key].flatten() for key in banks]) for g in gradients), TASK, "gradients")
    for key in (together.keys() | apart.keys()) - set(banks):
        found = [g[key] for g in gradients if key in g]
        assert not any(bool(g.any()) for g in found), f"{key} learns though no router decided"


def generates_one_by_one(subject: Subject) -> None:
    """A batch of prompts with an expert each gives the tokens and logits of the prompts one by one, under beams too."""
    model = subject.trained().double().eval()
    choice = choice_of(model)
    prompt = models.token_batch(rows=4, length=5)["input_ids"].clamp(min=2)
    common: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    for options in (common, {**common, "num_beams": 2}):
        got = model.generate(prompt, attention_mask=torch.ones_like(prompt), adapter_ids=choice, **options)
        for row, expert in enumerate(choice):
            one = prompt[row : row + 1]
            with alone(model, expert):
                extra = subject.tasks(0) if expert is None else {}
                causal = all(branch.router.causal for _, branch in model.branches())
                run = model.base if expert is None and not causal else model
                want = run.generate(
                    one, attention_mask=torch.ones_like(one), **options, **(extra if run is model else {})
                )
            assert torch.equal(got[row : row + 1], want), f"prompt {row} under expert {expert}"
