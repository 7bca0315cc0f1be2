"""A model of one's own, adapted by layer names, with experts by field type: `python -m experiments.morph`.

Its shape is that of MORPH (Rautela et al. 2025, arXiv 2509.21670), in small: a convolution on every field, attention
along rows and columns, attention across the fields of a sample, and a convolution back. It learns one step of fields
that diffuse; then, frozen, it meets three types of field, two of which move in other ways. Each type has a routing of
its own: the task ids of a batch are the types of its fields. A LoRA of as many parameters, which is not told the types,
is compared by the rule of `moa.compare`. Data is made here, exact in Fourier space; about two minutes of one core.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from experiments.bench.common import write
from moa.monitor.compare import Scored

TYPES = ("diffuses", "is carried", "decays")
FIELDS, GRID, BATCH = 2, 12, 16  # fields of a sample, points a side, samples a batch
# a regex on the names of layers; attention across fields is left out: there a row is of several types
TARGETS = r"embed|along_(rows|columns)\.\w+|mlp\.\d|back"
RECIPES: dict[str, dict[str, Any]] = {
    "LoRA": {"router": "fixed", "n_experts": 1, "rank": 6},
    "by field type": {"router": "poly", "n_experts": 3, "rank": 2, "n_tasks": len(TYPES)},
}
RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256)


class Attention(nn.Module):
    """Two-headed attention over S of (N, S, C), on what is normalised, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, S, C)."""
        own = self.norm(x)
        heads = [f(own).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        return x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Fields(nn.Module):
    """The next step (B, f, H, W) of f fields on a grid."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 3, padding=1, padding_mode="circular")
        self.along_rows, self.along_columns, self.across = (Attention(width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.back = nn.Conv2d(width, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        """Return the next step of x (B, f, H, W)."""
        b, f, h, w = x.shape
        y = self.embed(x.reshape(b * f, 1, h, w)).permute(0, 2, 3, 1)  # (B f, H, W, C)
        y = self.along_rows(y.flatten(0, 1)).view(b * f, h, w, -1)
        y = self.along_columns(y.transpose(1, 2).flatten(0, 1)).view(b * f, w, h, -1).transpose(1, 2)
        y = self.across(y.reshape(b, f, h * w, -1).transpose(1, 2).flatten(0, 1))  # (B H W, f, C)
        y = y.view(b, h * w, f, -1).transpose(1, 2).reshape(b * f, h, w, -1)
        y = y + self.mlp(y)
        return x + self.back(y.permute(0, 3, 1, 2)).view(b, f, h, w)


def made(n: int, types: Sequence[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return n samples: fields (n, f, H, W), their next step, and the type of each field (n, f).

    Args:
        n: samples.
        types: that their fields are drawn from.
        seed: of the draw.
    """
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.tensor(types)[torch.randint(len(types), (n, FIELDS), generator=rng)]
    k = torch.fft.fftfreq(GRID) * GRID
    square = k[:, None] ** 2 + k[None] ** 2  # (H, W)
    noise = torch.randn(n, FIELDS, GRID, GRID, generator=rng)
    start = torch.fft.fft2(noise) * torch.exp(-square / 8)  # smooth
    start = start / torch.fft.ifft2(start).real.std()
    steps = torch.stack(
        [
            torch.exp(-0.1 * square).to(start.dtype),
            torch.exp(-2j * torch.pi / GRID * (k[:, None] + 2 * k[None])),  # one point down, two to the right
            torch.full_like(start[0, 0], 0.4),
        ]
    )  # (types, H, W)
    after = start * steps[kinds] + 0.1 * start.mean(1, keepdim=True)
    return torch.fft.ifft2(start).real, torch.fft.ifft2(after).real, kinds


def fit(model: nn.Module, groups: Any, steps: int, types: Sequence[int], seed: int, told: bool) -> None:
    """Train a model in place on new samples at every step.

    Args:
        model: of fields (B, f, H, W).
        groups: of AdamW's parameters.
        steps: optimizer steps.
        types: of the samples' fields.
        seed: of the samples.
        told: the model takes task ids, the types (B f,).
    """
    optimizer = torch.optim.AdamW(groups)
    for step in range(steps):
        x, y, kinds = made(BATCH, types, 1000 * seed + step)
        F.mse_loss(model(x, **({"task_ids": kinds.flatten()} if told else {})), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def pretrained(steps: int) -> Fields:
    """Return a model that knows how fields diffuse."""
    torch.manual_seed(0)
    model = Fields()
    fit(model, [{"params": list(model.parameters()), "lr": 3e-3}], steps, [0], 1, told=False)
    return model.eval().requires_grad_(False)


def adapted(base: Fields, arm: str, learning_rate: float, steps: int, seed: int) -> moa.MoAModel:
    """Return a copy of the base with an arm's recipe in it, trained on all types of field."""
    torch.manual_seed(seed)
    model = moa.build(copy.deepcopy(base), targets=TARGETS, **RECIPES[arm])
    fit(model, model.optimizer_groups(learning_rate), steps, range(len(TYPES)), seed + 2, told=True)
    return model.eval()


@torch.no_grad()
def errors(model: nn.Module, n: int, seed: int, told: bool = True) -> Mapping[str, float]:
    """Return minus the squared error of n samples by their number, of all their fields (f, H, W)."""
    x, y, kinds = made(n, range(len(TYPES)), seed)
    off = (model(x, **({"task_ids": kinds.flatten()} if told else {})) - y).square().mean((1, 2, 3))
    return {f"{seed}-{row}": -value for row, value in enumerate(off.tolist())}


def study(folder: Path, pretraining: int, steps: int, samples: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Return what both arms score, and the frozen base.

    Args:
        folder: where finished trainings are kept.
        pretraining: steps of the base.
        steps: of each arm.
        samples: of validation, and of the test.
        seeds: of the arms.
    """
    base = pretrained(pretraining)

    def train(arm: str, learning_rate: float, seed: int) -> Scored:
        model = adapted(base, arm, learning_rate, steps, seed)
        return Scored(errors(model, samples, 10**7), errors(model, samples, 10**7 + 1), steps)

    sizes = {"pretraining": pretraining, "samples": samples, "steps": steps}
    found = moa.compare(train, dict.fromkeys(RECIPES, RATES), folder, seeds=seeds, baseline="LoRA", settings=sizes)
    frozen = errors(base, samples, 10**7 + 1, told=False)
    return {**found, "frozen": sum(frozen.values()) / len(frozen)}


def main() -> None:
    """Write the squared errors of the frozen base and of both arms to experiments/results/morph.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/morph"), help="finished trainings, to go on from")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = study(options.work, 2 * options.steps, options.steps, 64, range(options.seeds))
    write("morph", found, f"python -m experiments.morph --steps {options.steps} --seeds {options.seeds}")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
