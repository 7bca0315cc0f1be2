"""GaLore's groups in galore-torch's own Adam: the rank of a step, a trained base, the state's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moa
from moa.errors import ConfigError
from moa.training.galore import galore_groups, galore_state_bytes
from tests import models


def built() -> moa.MoAModel:
    model = moa.build(models.bert(), "topk", n_experts=6, k=2, rank=2, targets=["query"], modules_to_save=["pooler"])
    return models.randomise(model).train()


def test_steps_have_the_rank_and_the_state_its_bytes(galore_torch: Any) -> None:
    model = built()
    groups = galore_groups(model, rank=3)
    optimizer = galore_torch.GaLoreAdamW(groups, lr=0.1, no_deprecation_warning=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(**models.class_batch()).loss.backward()
    optimizer.step()
    projected = {id(p) for p in groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in projected}
    assert any("router" in n for n in names) and any("pooler" in n for n in names)
    assert not any(".bank." in n for n in names)
    for name in names:
        step = (model.get_parameter(name) - before[name]).detach().double()
        values = torch.linalg.svdvals(step)
        assert values[3:].max() < 1e-5 * values[0], name
    bytes_kept = 0
    for state in optimizer.state.values():
        kept = [state["exp_avg"], state["exp_avg_sq"]]
        if "projector" in state:
            kept.append(state["projector"].ortho_matrix)
            gram = kept[-1] @ kept[-1].T if kept[-1].shape[0] == 3 else kept[-1].T @ kept[-1]
            torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-5)
        bytes_kept += sum(t.numel() * t.element_size() for t in kept)
    assert bytes_kept == galore_state_bytes(groups)
    assert sum(len(g["params"]) for g in groups) == len(before)


def test_what_cannot_be_projected_is_refused() -> None:
    model = built()
    for options, message in (
        ({"rank": 64}, "no trained matrix is larger .*largest is 16"),
        ({"rank": 0}, "must be at least 1"),
        ({"rank": 2, "projection": "st"}, "unknown projection 'st'"),
    ):
        with pytest.raises(ConfigError, match=message):
            galore_groups(model, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="known of projection 'std'"):
        galore_state_bytes(galore_groups(model, rank=2, projection="left"))
