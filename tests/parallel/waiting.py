"""One of two processes, of which only the first comes to an exchange; it leaves what it is told.

See `test_waiting.py`.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import moa
from moa.errors import ContextError
from tests import models

from .steps import rows_of

TIMEOUT = timedelta(seconds=2)


def forward(model: Any) -> torch.Tensor:
    """Return the loss of a training forward."""
    batch = rows_of(0, 0)
    batch.pop("task_ids")
    loss: torch.Tensor = model(**batch).loss
    return loss


def step_of_another(model: Any) -> None:
    """Step an optimizer that trains nothing of this model, as a probe beside it may have."""
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()


PLACES = {
    "forward": ("topk", lambda model: None, forward),
    "backward": ("topk", lambda model: setattr(model, "loss", forward(model)), lambda model: model.loss.backward()),
    "step": ("sigmoid", lambda model: forward(model).backward(), step_of_another),
}


def main(rank: int, world: int, folder: str) -> None:
    """Go somewhere together, and on from there in the first process only."""
    told = {}
    for place, (recipe, together, alone) in PLACES.items():
        dist.init_process_group("gloo", f"file://{folder}/{place}", TIMEOUT, world, rank)
        model: Any = moa.build(models.llama(num_hidden_layers=1), recipe, n_experts=4, targets="all-linear").train()
        together(model)
        done = Path(folder) / f"{place}.done"
        if rank == 0:
            try:
                alone(model)
            except ContextError as error:
                told[place] = str(error)
            done.touch()
        while not done.is_file():  # a process that ends would be missed at once
            time.sleep(0.05)
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "told.json").write_text(json.dumps(told))
