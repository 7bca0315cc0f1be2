"""One of N processes that train recipes by DDP, with draws of their own, and leave the weights.

See `test_repeating.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import moa
from tests import laws

from .steps import CASES, base_of, by_task, learned, take_step


def main(rank: int, world: int, folder: str, name: str, steps: str, cases: str) -> None:
    """Train every case for some steps, and leave what this process ends with."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{name}", rank=rank, world_size=world)
    found = []
    for case in cases.split(","):
        torch.manual_seed(3)
        model = moa.build(base_of(case), laws.small_recipe(*CASES[case])).double().train()
        run = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(30 + rank)  # of dropout, jitter and what is sampled
        for step in range(int(steps)):
            take_step(run, optimizer, step, world, rank, by_task(case))
        found.append((case, learned(model)))
    torch.save(found, Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()
