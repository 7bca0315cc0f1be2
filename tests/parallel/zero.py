"""One of N processes that train recipes by DeepSpeed's ZeRO, and leave what they learned; runs in its environment.

See `test_zero.py`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist

from moa.formats import checkpoint

from .steps import MICRO, STEPS, by_task, learned, model_of, n_labels, optimizer_of, rows_of, same_draws


def main(rank: int, world: int, folder: str, plans: str, cases: str) -> None:
    """Train every case by every plan, a file of DeepSpeed's configuration."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    compile_nothing()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo")
    wrong = []
    for plan in plans.split(","):
        for case in cases.split(","):
            try:
                to = Path(folder) / f"{case}-{Path(plan).stem}"
                state = trained(case, json.loads(Path(plan).read_text()), rank, world, to)
            except (RuntimeError, AssertionError, TypeError, AttributeError, KeyError, ValueError, LookupError):
                wrong.append(f"{case} by {plan}:\n{traceback.format_exc()[-1500:]}")  # in every process alike
                continue
            if rank == 0:
                torch.save(state, to.with_suffix(".pt"))
    if wrong:
        sys.exit("\n".join(wrong))


def compile_nothing() -> None:
    """Let DeepSpeed sum by torch: it would compile an operation of its own for sums on CPUs."""
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False


def trained(case: str, plan: dict[str, Any], rank: int, world: int, to: Path) -> dict[str, torch.Tensor]:
    """Return what a case learns in fp32 by a plan, whole; all processes save it as one checkpoint before."""
    model = model_of(case).float()
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO}
    fp32 = {"bf16": {"enabled": False}, "gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config={**plan, **sizes, **fp32})
    with same_draws():
        for number in range(STEPS * MICRO):
            batch = rows_of(rank, number)
            if not by_task(case):
                batch.pop("task_ids")
            loss = engine(**batch, num_items_in_batch=n_labels(number // MICRO, world)).loss
            engine.backward(loss * world * MICRO)  # it takes the mean over the processes and the micro-batches
            engine.step()
    written: list[Path] = []
    with mock.patch.object(checkpoint, "write", lambda *w, write=checkpoint.write: written.append(w[0]) or write(*w)):
        model.save_pretrained(to)
    assert written == [to] * (rank == 0), "the first process writes, once"
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return learned(model)
