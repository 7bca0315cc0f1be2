"""Units of FSDP2 that cannot train are refused at the first forward, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moa
from moa.errors import ConfigError
from tests import models

from .steps import rows_of


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return `fully_shard` of modules one after the other, in a group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def sharded(*modules: nn.Module) -> None:
        for module in modules:
            fully_shard(module, mesh=mesh)

    yield sharded
    dist.destroy_process_group()


def trained(model: Any) -> None:
    """Make a training forward."""
    batch = rows_of(0, 0)
    batch.pop("task_ids")
    model(**batch).loss.backward()


@pytest.mark.parametrize("part", ["router", "bank"])
def test_a_unit_inside_a_mixture_is_refused(part: str, shard: Callable[..., None]) -> None:
    model = moa.build(models.llama(num_hidden_layers=1), "topk", n_experts=4, targets="all-linear").train()
    (branch,) = model.base.model.layers[0].mlp.up_proj.branches
    shard(getattr(branch, part), model)
    with pytest.raises(ConfigError, match=rf"fully_shard was called on .*up_proj.branches.0.{part}, a part of the mix"):
        trained(model)


def test_several_dtypes_in_one_unit_are_refused(shard: Callable[..., None]) -> None:
    model = moa.build(models.llama(num_hidden_layers=1), "topk", n_experts=4, targets="all-linear").train()
    (branch,) = model.base.model.layers[0].mlp.up_proj.branches
    branch.bank.bfloat16()
    shard(*model.base.model.layers, model)
    with pytest.raises(ConfigError, match=r"unit base.model.layers.0 trains parameters of several dtypes, e.g. .*bf"):
        trained(model)


def test_a_mixture_and_a_block_are_units(shard: Callable[..., None]) -> None:
    model = moa.build(models.llama(num_hidden_layers=1), "topk", n_experts=4, targets="all-linear").train()
    shard(*model.base.model.layers, model)
    trained(model)
    assert any(p.grad is not None for p in model.parameters())
