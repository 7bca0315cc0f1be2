"""What the tests of merging share: random adapters, model folders on disk, and one comparison."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moa.formats.atomic import MANIFEST
from moa.merge import LowRank


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Fail unless shapes agree and the largest error is within `tolerance` of the largest expected magnitude."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach(), expected.detach()
    error = (actual.double() - expected.double()).abs()
    scale = float(expected.abs().max())
    worst = float(error.max())
    assert worst <= tolerance * scale, f"error {worst:.3g} of scale {scale:.3g}, allowed {tolerance:.0e} relative"


def factors(rank: int = 3, o: int = 7, i: int = 5, seed: int = 0, scale: float = 1.0) -> LowRank:
    """Return a random float64 low-rank change (o, i)."""
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, i, generator=g, dtype=torch.float64)
    return LowRank(down, scale * torch.randn(o, rank, generator=g, dtype=torch.float64))


def matrices(n: int = 3, o: int = 7, i: int = 5, seed: int = 0) -> list[Tensor]:
    """Return n random float64 matrices (o, i)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o, i, generator=g, dtype=torch.float64) for _ in range(n)]


def model_folder(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Write a model folder: config, tokenizer, hidden cache, and the tensors in one file or several with an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "float32"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "extra").mkdir()
    (path / "extra" / "template.jinja").write_text("hello")
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").write_text("x")
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = list(tensors)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[s::shards]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def lora_folder(path: Path, modules: dict[str, tuple[Tensor, Tensor]], **config: object) -> Path:
    """Write a PEFT LoRA folder from module -> (A (r, i), B (o, r)); r and lora_alpha from the first unless given."""
    path.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, path / "adapter_model.safetensors")
    r = next(iter(modules.values()))[0].shape[0]
    full = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "base_model_name_or_path": "toy/base",
        "bias": "none",
    } | config
    (path / "adapter_config.json").write_text(json.dumps(full))
    return path


def snapshot(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder, the list of what moa wrote left out."""
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != MANIFEST]
    return {str(f.relative_to(path)): f.read_bytes() for f in files}
