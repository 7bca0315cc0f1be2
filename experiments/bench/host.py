"""Host time: what a layer costs when its tensors are so small that only calls cost, and how many calls those are.

On a GPU the device runs behind the host as long as the host is fast enough, so this is what bounds small models and
small batches there. Time added per adapted layer, over what peft's LoRA of rank 64 adds in the same run: medians of
interleaved rounds, one thread. Calls: Python functions of the package (moa, or peft) that one training forward through
one layer enters, the files they are in, and how often control goes from one file to another.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moa

from .common import write

COMMAND = "python -m experiments.bench.host"
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPES: dict[str, dict[str, Any]] = {
    "fixed": {"n_experts": 1},
    "topk": {},
    "dense": {},
    "switch": {},
    "sigmoid": {},
    "remix": {},
    "flylora": {},
    "hydra": {},
}
# Recipe -> most times what peft's LoRA adds: a training forward, an evaluation.
TARGETS = {
    "fixed": (1.5, 1.2),
    "topk": (2.5, 1.7),
    "dense": (2.5, 1.7),
    "switch": (3.0, 1.8),
    "sigmoid": (3.0, 1.8),
    "hydra": (3.5, None),
    "remix": (2 * 2.5, None),
}
LORA = "peft LoRA r64"


def base() -> nn.Module:
    """Return a small frozen Llama, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def models(names: list[str]) -> dict[str, nn.Module]:
    """Return the base, peft's LoRA on all of its linears, and moa's recipes on the same."""
    lora: Any = get_peft_model(base(), LoraConfig(r=64, target_modules=LINEARS))  # type: ignore[arg-type]
    found: dict[str, nn.Module] = {"base": base(), LORA: lora}
    for name in names:
        found[name] = moa.build(base(), router=name, targets="all-linear", **RECIPES[name])
    return found


def one_step(model: nn.Module, ids: torch.Tensor, train: bool) -> dict[str, float]:
    """Return the seconds of one forward (and backward) on ids (B, S)."""
    start = time.perf_counter()
    if not train:
        with torch.no_grad():
            model(input_ids=ids)
        return {"evaluation": time.perf_counter() - start}
    loss = model(input_ids=ids, labels=ids).loss
    middle = time.perf_counter()
    if loss.requires_grad:
        loss.backward()
        model.zero_grad()
    return {"forward": middle - start, "backward": time.perf_counter() - middle}


def added(names: list[str], rounds: int, warmup: int = 5) -> dict[str, dict[str, float]]:
    """Return name -> microseconds that each adapted layer adds to a forward, a backward and an evaluation."""
    found, draw = models(names), random.Random(0)
    found["base"].requires_grad_(False)
    ids = torch.randint(3, 60, (2, 8))
    times: dict[tuple[str, str], list[float]] = {}
    order = list(found)
    for train in (True, False):
        for model in found.values():
            model.train(train)
        for round_ in range(warmup + rounds):
            draw.shuffle(order)
            for name in order:
                for kind, seconds in one_step(found[name], ids, train).items():
                    if round_ >= warmup:
                        times.setdefault((name, kind), []).append(seconds)
    n_layers = len(LINEARS) * CONFIG["num_hidden_layers"]
    return {
        name: {
            kind: (statistics.median(times[name, kind]) - statistics.median(times["base", kind])) / n_layers * 1e6
            for kind in ("forward", "backward", "evaluation")
        }
        for name in found
        if name != "base"
    }


class OneLinear(nn.Module):
    """A model of one layer that returns its loss, () ."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss of x (B, S, 8)."""
        return {"loss": self.layer(x).square().mean()}


def calls_of(step: Callable[[], Any], package: Path) -> list[tuple[str, str]]:
    """Return (file, function) of every call of a package's own functions in one step, in order."""
    found: list[tuple[str, str]] = []
    root = str(package)

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            found.append((str(Path(code.co_filename).relative_to(package)), code.co_qualname))

    step()  # what is done once is not counted
    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def count(found: list[tuple[str, str]]) -> dict[str, int]:
    """Return the number of calls, of files, and of changes from one file to another."""
    files = [file for file, _ in found]
    changes = sum(one != other for one, other in itertools.pairwise(files))
    return {"calls": len(found), "files": len(set(files)), "changes": changes}


def walks(names: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Return name -> the calls of one training forward through one layer."""
    x = torch.randn(2, 4, 8)
    lora: Any = get_peft_model(OneLinear(), LoraConfig(r=64, target_modules=["layer"]))  # type: ignore[arg-type]
    found = {LORA: calls_of(lambda: lora(x), Path(peft.__file__).parent)}
    for name in names:
        model = moa.build(OneLinear(), router=name, targets=["layer"], **RECIPES[name]).train()
        found[name] = calls_of(lambda model=model: model(x), Path(moa.__file__).parent)  # type: ignore[misc]
    return found


def run(rounds: int, names: list[str]) -> dict[str, Any]:
    """Return every table."""
    micros = added(names, rounds)
    ratios = {
        name: {kind: value / micros[LORA][kind] for kind, value in row.items()}
        for name, row in micros.items()
        if name != LORA
    }
    targets = {
        name: {"forward_at_most": TARGETS[name][0], "evaluation_at_most": TARGETS[name][1]}
        for name in names
        if name in TARGETS
    }
    return {
        "shape": "Llama of 8 blocks and width 64, all 56 linears, 2 x 8 tokens",
        "microseconds_added_per_layer": micros,
        "over_peft_lora": ratios,
        "targets": targets,
        "calls_of_a_training_forward_through_one_layer": {
            name: count(walk) for name, walk in walks([n for n in names if n != "remix"]).items()
        },
    }


def main() -> None:
    """Write experiments/results/host.json, or print the walk of one recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--walk", help="print the calls of one recipe's training forward, and time nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.walk:
        walk = walks([options.walk])[options.walk]
        print(*(f"{file:32s} {name}" for file, name in walk), count(walk), sep="\n")
        return
    result = run(options.rounds, options.recipes)
    for name, row in result["over_peft_lora"].items():
        print(f"{name:10s}", *(f"{kind} {value:5.2f}" for kind, value in row.items()))
    print(result["calls_of_a_training_forward_through_one_layer"])
    print(write("host", result, f"{COMMAND} --rounds {options.rounds}"))


if __name__ == "__main__":
    main()
