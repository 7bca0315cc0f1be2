"""What LoRA-Pro costs over AdamW: `python -m experiments.bench.lora_pro`. CPU time of whole steps, in turn, in one run.

A step is forward, backward and the optimizer's, of a top-k mixture on every linear layer of an encoder's shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertModel

import moa
from moa.training.lora_pro import LoRAPro

from .common import interleaved, write

COMMAND = "python -m experiments.bench.lora_pro"
N_EXPERTS, RANK = 8, 8
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4),
    "lora-pro sgd": lambda model: LoRAPro(model, 1e-4, mode="sgd"),
    "lora-pro adam": lambda model: LoRAPro(model, 1e-4, mode="adam"),
}


def step_of(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """Return a whole step on ids (B, S) by one of the optimizers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.width, "num_hidden_layers": options.layers, "num_attention_heads": 8}
    config = BertConfig(vocab_size=1024, intermediate_size=4 * options.width, **sizes)
    recipe: dict[str, Any] = {"n_experts": N_EXPERTS, "rank": RANK, "k": 2, "targets": "all-linear"}
    model = moa.build(BertModel(config), "topk", **recipe).train()
    for _, branch in model.branches():
        branch.bank.up.data.normal_(0, 0.02)  # B = 0 is LoRA-Pro's easy case
    ids = torch.randint(1024, (options.rows, options.length))
    optimizer = OPTIMIZERS[name](model)

    def step() -> None:
        model.routed_loss(lambda: model(input_ids=ids).last_hidden_state.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, print the ratios, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="lora_pro", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = interleaved({name: step_of(name, options) for name in OPTIMIZERS}, options.rounds)
    over = {name: row["median_s"] / times["adamw"]["median_s"] for name, row in times.items()}
    for name, ratio in over.items():
        print(f"{name}: {ratio:.3f} x a step of AdamW")
    setting = {key: value for key, value in vars(options).items() if key != "out"}
    setting |= {"n_experts": N_EXPERTS, "rank": RANK}
    command = " ".join([COMMAND, *(f"--{key} {value}" for key, value in vars(options).items())])
    print(write(options.out, {"setting": setting, "times": times, "over_adamw": over}, command))


if __name__ == "__main__":
    main()
