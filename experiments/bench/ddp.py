"""What DDP costs two processes over ideal scaling: moa's top-k mixture against peft's LoRA of as many parameters.

Both processes take a whole training step at once, by themselves (that is ideal scaling: neither waits for the other,
and both share the machine as they do under DDP) and by DDP, whose step also sends the gradients and, for moa, the sums
of the routers' own losses. Wall time of the slower process, interleaved in one run; a ratio of 1 costs nothing.

Run it on a machine with a core for each process and nothing else to do: `python -m experiments.bench.ddp`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import moa

from .common import write

COMMAND = "python -m experiments.bench.ddp"
WORLD = 2
WARMUP = 2
N_EXPERTS, RANK = 8, 8


def base_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """Return a decoder in fp32, drawn at random."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
        )
    )


def mixture(options: argparse.Namespace, losses_over: str) -> nn.Module:
    """Return moa's top-k mixture; by itself a process exchanges nothing for its losses either."""
    recipe: dict[str, Any] = {"n_experts": N_EXPERTS, "rank": RANK, "k": 2, "targets": "all-linear"}
    return moa.build(base_model(options), "topk", losses_over=losses_over, **recipe)


def lora(options: argparse.Namespace) -> nn.Module:
    """Return peft's LoRA with as many parameters as all experts together."""
    import peft

    config = peft.LoraConfig(r=N_EXPERTS * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base_model(options), config)  # type: ignore[no-any-return]


def step_of(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Return a whole step on ids (B, S): forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def slowest(step: Callable[[], None]) -> float:
    """Return the seconds that the slower process takes for a step which all begin together."""
    distributed.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    distributed.all_reduce(taken, distributed.ReduceOp.MAX)
    return float(taken)


def process(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """Measure as one of the processes; the first one writes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    torch.manual_seed(10 + rank)
    ids = torch.randint(1024, (options.rows, options.length))
    steps = {
        "moa alone": step_of(mixture(options, "process"), ids),
        "moa ddp": step_of(DistributedDataParallel(mixture(options, "global")), ids),
        "peft alone": step_of(lora(options), ids),
        "peft ddp": step_of(DistributedDataParallel(lora(options)), ids),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)  # the same order in both
    for round_ in range(WARMUP + options.rounds):
        draw.shuffle(order)
        for name in order:
            taken = slowest(steps[name])
            if round_ >= WARMUP:
                times[name].append(taken)
    distributed.destroy_process_group()
    if rank == 0:
        report(times, options)


def report(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print both ratios, and write them with what they are made of."""
    found: dict[str, Any] = {name: {"median_s": statistics.median(t), "min_s": min(t)} for name, t in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[f"{name} ddp"], times[f"{name} alone"], strict=True))
        for name in ("moa", "peft")
    }
    for name, ratio in ratios.items():
        print(f"{name}: a step by DDP takes {ratio:.3f} times one by itself")
    setting = {key: value for key, value in vars(options).items() if key != "out"}
    setting |= {"world": WORLD, "n_experts": N_EXPERTS, "rank": RANK, "lora_rank": N_EXPERTS * RANK}
    command = " ".join([COMMAND, *(f"--{key} {value}" for key, value in vars(options).items())])
    result: dict[str, Any] = {"setting": setting, "times": found, "over_ideal": ratios}
    result["moa_over_peft"] = ratios["moa"] / ratios["peft"]
    print(write(options.out, result, command))


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of one process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", default="ddp", help="name of the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (str(Path(folder) / "meet"), options), nprocs=WORLD)


if __name__ == "__main__":
    main()
