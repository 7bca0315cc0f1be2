"""Decided once, used by several layers, gone with its forward. Run: pytest tests/mixture/test_decisions.py"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ContextError
from moa.mixture.blocks import BlockEntry, BlockExit
from tests import models


class Failure(Exception):
    pass


class Fails(nn.Module):
    """An activation that raises when it is told to."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise Failure
        return nn.functional.silu(x)


def mixlora() -> moa.MoAModel:
    base = models.llama()
    for layer in base.model.layers:
        layer.mlp.act_fn = Fails()
    return models.randomise(moa.build(base, "mixlora", n_experts=4, k=2, rank=2, dropout=0.0))


def left_on_modules(model: moa.MoAModel) -> list[str]:
    """Return where a module holds a tensor that is neither a parameter nor a buffer, in itself or a record of its."""
    found = []
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "context"}
        for key, value in own.items():
            inner = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else []
            if any(isinstance(one, (Tensor, moa.Routing)) for one in (value, *inner)):
                found.append(f"{name}.{key}")
    return found


def fail_between(model: moa.MoAModel) -> None:
    """Let a forward die after a block was opened and before it is closed."""
    model.base.model.layers[1].mlp.act_fn.broken = True
    with pytest.raises(Failure):
        model(**models.lm_batch())
    model.base.model.layers[1].mlp.act_fn.broken = False


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_dies_leaves_nothing_on_the_modules(training: bool) -> None:
    model, batch = mixlora().train(training), models.lm_batch()
    expected = models.outputs_of(model, batch)
    fail_between(model)
    assert not left_on_modules(model)
    assert torch.equal(models.outputs_of(model, batch), expected)
    assert not model.context.decisions


def test_what_is_left_on_a_module_is_seen() -> None:
    model = mixlora()
    next(m for m in model.modules() if isinstance(m, BlockExit)).routing = moa.Routing(torch.ones(2), None, 2)
    assert left_on_modules(model) == ["base.model.layers.0.mlp.down_proj.routing"]


def test_the_next_forward_does_not_see_a_decision_of_one_that_died() -> None:
    """A layer that follows, called before its leader, is an error and not the routing of another batch."""
    model, batch = mixlora().eval(), models.lm_batch()
    fail_between(model)
    mlp = model.base.model.layers[1].mlp
    assert isinstance(mlp.up_proj, BlockEntry) and isinstance(mlp.down_proj, BlockExit)
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)))
    with pytest.raises(ContextError, match=r"model\.layers\.1\.mlp\.gate_proj decides for its block"):
        model(**batch)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_decision_is_no_part_of_a_copy(way) -> None:
    model = mixlora().train()
    fail_between(model)
    twin = way(model)
    assert not twin.context.decisions
    assert torch.equal(models.outputs_of(twin, models.lm_batch()), models.outputs_of(model, models.lm_batch()))


def test_xlora_has_one_classifier_and_saves_it_once(tmp_path) -> None:
    model = moa.build(models.llama(), moa.make_recipe("xlora", n_experts=3, rank=2))
    routers = [branch.router for _, branch in model.branches()]
    assert len(routers) > 1 and len({id(router.classifier) for router in routers}) == 1
    assert not any(list(router.parameters()) for router in routers), "the model owns it"
    names = [name for name in model.adapter_state_dict() if ".routers." in name]
    assert [name.rsplit(".", 1)[-1] for name in names] == ["weight", "bias"]
    layerwise = moa.build(models.llama(), moa.make_recipe("xlora", n_experts=3, rank=2, layerwise=True))
    assert len({id(branch.router.classifier) for _, branch in layerwise.branches()}) == len(routers)
