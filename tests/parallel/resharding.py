"""One of N processes that save with torch's distributed checkpoint under FSDP2, or load what others have saved.

See `test_resharding.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .steps import by_task, model_of, optimizer_of, same_draws, take_step


def main(rank: int, world: int, folder: str, what: str, cases: str) -> None:
    """Train and save every case in all processes, or load it, and leave the whole of it in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{what}-{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for case in cases.split(","):
        model = model_of(case)
        for part in (*model.base.model.layers, model):
            fully_shard(part, mesh=mesh)
        state = state_after(model, case, Path(folder), rank, world, what)
        if rank == 0:
            torch.save(state, Path(folder) / f"{case}-{what}-{world}.pt")
    dist.destroy_process_group()


def state_after(model: Any, case: str, folder: Path, rank: int, world: int, what: str) -> dict[str, Any]:
    """Return the whole state of a model and its optimizer after a step that is saved, or as loaded."""
    optimizer = optimizer_of(model)
    if what == "save":
        with same_draws():
            take_step(model, optimizer, 0, world, rank, by_task(case))
        dcp.save(
            dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)),
            checkpoint_id=folder / case,
        )
    else:
        load(model, optimizer, folder / case)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def load(model: Any, optimizer: Any, folder: Path) -> None:
    """Load a distributed checkpoint into a model and its optimizer, sharded as they are."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    found = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
