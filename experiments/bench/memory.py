"""Bytes that one adapted linear keeps for backward beyond its input x and beyond weights, in multiples of x.

Counted with saved-tensor hooks, each storage once; parameters and x itself do not count.
"""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moa

from .common import write

COMMAND = "python -m experiments.bench.memory"


class Net(nn.Module):
    """One linear layer, as a model."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (*rows, d)."""
        return self.linear(x)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes of distinct storages saved for backward, weights and x (*rows, d) left out."""
    known = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters(), *layer.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    assert out.requires_grad
    return sum(found.values())


def adapted(model: nn.Module) -> nn.Module:
    """Return the adapted layer itself: a whole training forward of ReMix needs a loss."""
    return next(module for name, module in model.named_modules() if name.endswith("linear"))


def measure(d: int, dtype: torch.dtype, rows: int = 2048) -> dict[str, float]:
    """Return name -> saved bytes over x's bytes, for a linear of d features."""
    x = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    models = {
        "moa topk 8x8 k=2": moa.build(Net(d).to(dtype), "topk", 8, 2, targets=["linear"]),
        "moa remix 8x8 k=2": moa.build(Net(d).to(dtype), "remix", 8, 2, targets=["linear"]),
        "moa dense 8x8": moa.build(Net(d).to(dtype), "dense", 8, targets=["linear"]),
        "peft LoRA r64": get_peft_model(Net(d).to(dtype), LoraConfig(r=64, target_modules=["linear"])),
    }
    layers = {name: adapted(model.train()) for name, model in models.items()}
    return {name: saved_bytes(layer, x) / (x.numel() * x.element_size()) for name, layer in layers.items()}


def main() -> None:
    """Count at d = 1024 and 4096 and write experiments/results/memory.json."""
    warnings.filterwarnings("ignore")
    rows = {}
    for d in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            rows[f"d={d} {str(dtype).removeprefix('torch.')}"] = measured = measure(d, dtype)
            for name, ratio in measured.items():
                print(f"d={d} {dtype} {name:20s} {ratio:.4f} x")
    print(write("memory", {"rows": rows}, COMMAND))


if __name__ == "__main__":
    main()
