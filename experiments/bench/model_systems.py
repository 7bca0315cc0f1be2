"""A decoder with every linear of its blocks adapted, by moa, by peft, and as others mix experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import moa

from .kernel_baselines import mola_loop

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_EXPERTS, RANK, K = 8, 8, 2
OURS = "moa topk 8x8 k=2"
Make = Callable[[], Any]


class LoopLinear(nn.Module):
    """A frozen linear and experts behind a softmax top-k gate, mixed as `mix` mixes: MoLA's loop, by default.

    Args:
        base: the frozen linear (i -> o).
        mix: of x (T, i), down (E, r, i), up (E, r, o), weights and indices (T, K).
    """

    def __init__(self, base: nn.Linear, mix: Callable[..., Tensor] = mola_loop) -> None:
        super().__init__()
        self.base, self.mix = base, mix
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.gate = nn.Linear(base.in_features, N_EXPERTS, bias=False, **like)
        self.down = nn.Parameter(torch.randn(N_EXPERTS, RANK, base.in_features, **like) / base.in_features**0.5)
        self.up = nn.Parameter(torch.randn(N_EXPERTS, RANK, base.out_features, **like) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*rows, o) of x (*rows, i)."""
        kept, indices = self.gate(x).topk(K, -1)
        flat = (value.reshape(-1, value.shape[-1]) for value in (kept.softmax(-1), indices))
        mixed = self.mix(x.reshape(-1, x.shape[-1]), self.down, self.up, *flat)
        return self.base(x) + mixed.view(*x.shape[:-1], -1)


def loop(make: Make, mix: Callable[..., Tensor] = mola_loop) -> nn.Module:
    """Return the decoder with a `LoopLinear` for every linear of its blocks."""
    model = make().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS:
                setattr(module, name, LoopLinear(child, mix))
    return model


def adapters(make: Make, into: str) -> list[str]:
    """Return folders of 8 LoRAs of rank 8 in peft's format."""
    model = peft.get_peft_model(make(), peft.LoraConfig(r=RANK, target_modules=LINEARS, init_lora_weights=False))
    paths = [str(Path(into) / str(e)) for e in range(N_EXPERTS)]
    for path in paths:
        model.save_pretrained(path)
    return paths


def systems(make: Make, experts: Callable[[], list[str]]) -> dict[str, Callable[[], nn.Module]]:
    """Return name -> what makes the model."""

    def xlora() -> nn.Module:
        model = make()
        model.config.use_cache = False  # its training forward refuses a cache
        named = {str(e): path for e, path in enumerate(experts())}
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=named, use_trainable_adapters=True
        )
        return peft.get_peft_model(model, config)

    def of(config: peft.PeftConfig) -> nn.Module:
        return peft.get_peft_model(make(), config)

    return {
        "frozen base": lambda: make().requires_grad_(False),
        OURS: lambda: moa.build(make(), "topk", N_EXPERTS, K, rank=RANK, targets=LINEARS),
        "peft LoRA r64": lambda: of(peft.LoraConfig(r=64, target_modules=LINEARS, task_type="CAUSAL_LM")),
        "peft Poly 8x8": lambda: of(
            peft.PolyConfig(r=RANK, n_skills=N_EXPERTS, n_tasks=4, target_modules=LINEARS, task_type="CAUSAL_LM")
        ),
        "peft X-LoRA 8x8": xlora,
        "peft Arrow 8x8 k=2": lambda: peft.create_arrow_model(make(), experts(), peft.ArrowConfig(top_k=K)),
        "MoLA-style loop 8x8 k=2": lambda: loop(make),
    }


def trained(name: str) -> bool:
    """Return whether the system has a training step: Arrow has none, nor has the base alone."""
    return name not in ("frozen base", "peft Arrow 8x8 k=2")


def inputs(name: str, batch: int, length: int) -> dict[str, Tensor]:
    """Return the arguments of a forward; Poly takes tasks."""
    ids = torch.randint(5, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**found, "task_ids": torch.arange(batch) % 4} if "Poly" in name else found
