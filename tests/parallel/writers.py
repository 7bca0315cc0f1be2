"""One of N processes that write a model together, and leave how often each of them did.

See `test_writers.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moa
from moa.errors import CheckpointError
from moa.folding.save import save_folded
from moa.formats import atomic, checkpoint
from moa.formats.peft_export import export_expert
from tests import models


def main(rank: int, world: int, out: str) -> None:
    """Write one model in every way, whole in each process and then sharded."""
    folder = Path(out)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    written: list[str] = []
    whole, put = checkpoint.write, atomic.put

    def counted(target, *args):  # type: ignore[no-untyped-def]
        written.append(target.name)
        whole(target, *args)

    def counted_put(new, target):  # type: ignore[no-untyped-def]
        written.append(target.name)
        put(new, target)

    with mock.patch.object(checkpoint, "write", counted), mock.patch.object(atomic, "put", counted_put):
        model = models.randomise(moa.build(models.llama(num_hidden_layers=1), "dense", n_experts=2))
        model.save_pretrained(folder / "all")
        model.save_pretrained(folder / "last", is_main_process=rank == world - 1)
        export_expert(model, 1, folder / "exported")
        mean = models.randomise(moa.build(models.llama(num_hidden_layers=1), "fixed", n_experts=2))
        save_folded(mean, folder / "folded")
        dist.barrier()
        fully_shard(mean, mesh=init_device_mesh("cpu", (world,)))
        refused = ""
        try:
            export_expert(mean, 0, folder / "sharded")
        except CheckpointError as error:
            refused = str(error)
    (folder / f"{rank}.json").write_text(json.dumps({"written": written, "refused": refused}))
    dist.destroy_process_group()
