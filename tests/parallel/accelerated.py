"""One of N processes that train recipes as accelerate shards them by FSDP2, from a file of its configuration.

accelerate itself runs FSDP on accelerators only; what it does to a model there is run here, on CPUs: the choice of the
units, and sharding them. See `test_accelerated.py`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env

from .steps import STEPS, by_task, model_of, optimizer_of, same_draws, take_step


def plugin_of(file: str) -> Any:
    """Return what `accelerate launch --config_file FILE` lets an Accelerator make."""
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "train.py"]))
    os.environ.update({k: v for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith("FSDP")})
    return FullyShardedDataParallelPlugin()


def main(rank: int, world: int, folder: str, file: str, cases: str) -> None:
    """Train every case, and save it by one call of all processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    wrong = []
    for case in cases.split(","):
        try:
            model = model_of(case)
            accelerator = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin_of(file)),
                mixed_precision="no",
                is_main_process=rank == 0,
                device=torch.device("cpu"),
            )
            fsdp2_prepare_model(accelerator, model)
            optimizer = optimizer_of(model)
            with same_draws():
                for step in range(STEPS):
                    take_step(model, optimizer, step, world, rank, by_task(case))
            model.save_pretrained(Path(folder) / "out" / case)
        except (RuntimeError, ValueError, KeyError):  # in every process alike; the other recipes are tried all the same
            wrong.append(f"{case}:\n{traceback.format_exc()[-1500:]}")
    dist.destroy_process_group()
    if wrong:
        sys.exit("\n".join(wrong))
