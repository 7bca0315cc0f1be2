"""PEFT LoRA folders for tests, written by peft itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

TARGETS = ["q_proj", "v_proj", "down_proj"]


def write(
    folder: Path,
    make: Callable[[], Any],
    n: int = 3,
    ranks: Sequence[int] = (4, 4, 4),
    targets: Sequence[str] = TARGETS,
    scale: float = 0.3,
) -> list[Path]:
    """Return n folders of LoRA adapters with random factors for the model that make returns."""
    paths = []
    for number in range(n):
        config = peft.LoraConfig(
            r=ranks[number], lora_alpha=2 * ranks[number], target_modules=list(targets), init_lora_weights=False
        )
        model = peft.get_peft_model(make(), config)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        path = folder / f"adapter{number}"
        model.save_pretrained(path)
        paths.append(path)
    return paths


def frozen(model: nn.Module) -> bool:
    """Tell whether no expert of a MoAModel is trained."""
    return not any(p.requires_grad for _, branch in model.branches() for p in branch.bank.parameters())
