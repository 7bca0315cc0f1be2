"""One of N processes that train every recipe, by DDP and then by FSDP2, and leave what they learned in a folder.

See `test_processes.py`.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests import laws

from .steps import STEPS, by_task, model_of, optimizer_of, rows_of, same_draws, take_step


def replicated(case: str, rank: int, world: int, folder: Path) -> None:
    """Train a recipe by DDP; the first process saves after the first step, with the optimizer, and after the last."""
    model = model_of(case)
    run, optimizer = DistributedDataParallel(model), optimizer_of(model)
    for step in range(STEPS):
        if rank == step % world:  # a forward that the others do not make: no exchange may wait for them
            with torch.no_grad():
                model(**{k: v for k, v in rows_of(rank, 0).items() if k != "task_ids" or by_task(case)})
                model.eval()(**{k: v for k, v in rows_of(0, 0).items() if k != "task_ids" or by_task(case)})
            model.train()
        take_step(run, optimizer, step, world, rank, by_task(case))
        if rank == 0 and step == 0:
            model.save_pretrained(folder / "half" / case)
            torch.save(optimizer.state_dict(), folder / "half" / f"{case}.optimizer.pt")
    if rank == 0:
        model.save_pretrained(folder / "ddp" / case)
    if case.startswith("switch") and rank == 1:
        with torch.no_grad(), model.tracing() as trace:
            model(**{k: v for k, v in rows_of(1, 0).items() if k != "task_ids"})
        starved = min(int(r.routing.selected().flatten(0, -2).any(0).sum()) for r in trace)
        assert starved < laws.N_EXPERTS, "every expert has rows here"


def sharded(case: str, rank: int, mesh: DeviceMesh, folder: Path) -> None:
    """Train a recipe by FSDP2, layer by layer, and save it by one call of all processes."""
    model = model_of(case)
    for part in (*model.base.model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        take_step(model, optimizer, step, mesh.size(), rank, by_task(case))
    model.save_pretrained(folder / "fsdp" / case)


def main(rank: int, world: int, folder: str, cases: str) -> None:
    """Train every recipe both ways, as process `rank` of `world`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    wrong = []
    with same_draws():
        for case in cases.split(","):
            replicated(case, rank, world, Path(folder))
            try:
                sharded(case, rank, mesh, Path(folder))
            except RuntimeError:  # in every process alike; the other recipes are tried all the same
                wrong.append(f"{case}:\n{traceback.format_exc()[-1500:]}")
    dist.destroy_process_group()
    if wrong:
        sys.exit("\n".join(wrong))
