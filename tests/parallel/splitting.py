"""One of N processes that train sparse copies (MoSA) by DDP, and leave what they learned; see `test_splitting.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moa.training.mosa import MoSA, starts_of

from .steps import STEPS, learned, model_of, optimizer_of, same_draws, take_step

CASE = "topk-default"


def owners(mosa: MoSA) -> dict[str, Tensor]:
    """Return whose each entry is, layer and factor -> (E, r, d)."""
    pairs = {f"{name} {n}": split for name, pair in mosa.splits.items() for n, split in enumerate(pair)}
    return {name: split.owner for name, split in pairs.items() if split is not None}


def trained(world: int, rank: int | None, half: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Return what is learned, whose the entries are, and the state after one step; from such a state on, if given.

    A run that goes on builds the model as at first, reads the state, and splits where the first one started.
    """
    model = model_of(CASE)
    starts = starts_of(model)
    optimizer = optimizer_of(model)
    if half is not None:
        model.load_state_dict(half["model"])
        optimizer.load_state_dict(half["optimizer"])
        model.steps_done = 1
    mosa = MoSA(model, n=2, starts=starts)
    run: nn.Module = model if rank is None else DistributedDataParallel(model)
    state: dict[str, Any] = {}
    with same_draws():
        for step in range(0 if half is None else 1, STEPS):
            take_step(run, optimizer, step, world, rank, False)
            if not state:
                state = {"model": {n: v.clone() for n, v in model.state_dict().items()}}
                state["optimizer"] = {**optimizer.state_dict()}
                state["optimizer"]["state"] = {
                    n: {name: v.clone() for name, v in one.items()} for n, one in state["optimizer"]["state"].items()
                }
    mosa.close()
    return learned(model), owners(mosa), state


def main(rank: int, world: int, folder: str) -> None:
    """Train as process `rank` of `world`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(trained(world, rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
