"""Attention outputs and gradients of tasks: against hooks and autograd written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError
from moa.monitor.attention_spectra import attention_spectra, attentions, task_alignment
from tests import models
from tests.monitor.test_expert_spectra import effective

Batches = dict[str, dict[str, Tensor]]


@pytest.fixture
def model() -> moa.MoAModel:
    return models.randomise(moa.build(models.bert(), "topk", n_experts=2, k=1, rank=2)).train()


@pytest.fixture
def batches() -> Batches:
    found = {}
    for seed, task in enumerate(("first", "second")):
        batch = models.class_batch(seed=seed)
        mask = torch.ones_like(batch["input_ids"])
        mask[0, 5:] = 0
        found[task] = {**batch, "attention_mask": mask}
    return found


@torch.no_grad()
def outputs(model: Any, batches: Batches) -> np.ndarray:
    """Return the first layer's attention outputs (T, d), without padding."""
    kept: list[Tensor] = []
    layer = model.get_submodule("base.bert.encoder.layer.0.attention.self")
    hook = layer.register_forward_hook(lambda _m, _i, out: kept.append(out[0]))
    for batch in batches.values():
        model(**batch)
    hook.remove()
    rows = [out[batch["attention_mask"].bool()] for out, batch in zip(kept, batches.values(), strict=True)]
    return torch.cat(rows).double().numpy()


def test_spectra_are_those_of_what_a_hook_sees_with_experts_and_without(model: moa.MoAModel, batches: Batches) -> None:
    found = attention_spectra(model, batches)
    assert model.training
    assert list(found) == [f"bert.encoder.layer.{n}.attention.self" for n in range(2)]
    first = found["bert.encoder.layer.0.attention.self"]
    model.eval()
    own = outputs(model, batches)
    with model.disable_adapter():
        base = outputs(model, batches)
    assert len(own) == 2 * (4 * 8 - 3)
    assert first.rank == pytest.approx(effective(own), rel=1e-5)
    assert first.base_rank == pytest.approx(effective(base), rel=1e-5)
    assert abs(first.rank - first.base_rank) > 1e-3
    assert first.shape == (32, 16)
    for profile, matrix in ((first.profile, own), (first.base_profile, base)):
        wanted = {2**n: np.log(effective(matrix[:32].reshape(2**n, -1))) for n in range(1, 9)}
        assert profile == pytest.approx(wanted, rel=1e-4)


def test_cosines_are_those_of_gradients_taken_one_by_one(model: moa.MoAModel, batches: Batches) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tasks, cosines = task_alignment(model, batches)
    assert tasks == ["first", "second"] and model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    held = [p for name, p in model.named_parameters() if ".bank." in name]
    rows = []
    for batch in batches.values():
        model(**batch).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in held if p.grad is not None]).double())
        model.zero_grad()
    wanted = torch.cosine_similarity(rows[0], rows[1], 0)
    assert cosines[0, 1].item() == pytest.approx(wanted.item(), abs=1e-5) and abs(wanted) < 0.999
    torch.testing.assert_close(cosines.diagonal(), torch.ones(2, dtype=torch.float64))


def test_attentions_are_the_innermost_of_that_name() -> None:
    assert list(attentions(models.llama())) == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert list(attentions(nn.TransformerEncoderLayer(8, 2))) == ["self_attn"]
    assert not attentions(models.plain())


def test_what_cannot_be_said_is_named(model: moa.MoAModel, batches: Batches) -> None:
    with pytest.raises(ConfigError, match="there is no batch"):
        attention_spectra(model, {})
    unlabelled = {task: {k: v for k, v in batch.items() if k != "labels"} for task, batch in batches.items()}
    with pytest.raises(ConfigError, match="no loss on the rows of first, second"):
        task_alignment(model, unlabelled)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="this model has none"):
        task_alignment(model, batches)
