"""Running statistics of a frozen base stay; trained ones move once a step. Run: pytest tests/model/test_running.py"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import MoaWarning
from tests import laws

KINDS = {"batch": nn.BatchNorm1d, "cumulative": lambda d: nn.BatchNorm1d(d, momentum=None)}


class Scaled(nn.Module):
    """Somebody's own module that divides by a running size."""

    running_size: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("running_size", torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_size.lerp_(x.detach().abs().mean(0), 0.5)
        return x / self.running_size


def network(norm) -> nn.Module:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), norm(16), nn.ReLU(), nn.Linear(16, 16), norm(16), nn.Linear(16, 3))


def steps(model: moa.MoAModel, x: Tensor, n: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(n):
        model.routed_loss(lambda: model(x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("norm", [*KINDS.values(), Scaled], ids=[*KINDS, "own"])
@pytest.mark.parametrize("name", ["topk", "remix"])
def test_the_bases_statistics_stay_and_a_checkpoint_is_whole(norm, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, x = network(norm), 3 * torch.randn(32, 8) + 1
    fresh = copy.deepcopy(base)
    model = moa.build(base, name, n_experts=4, k=2, targets=["0", "3"]).train()
    steps(model, x)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(moa.load(tmp_path, base=copy.deepcopy(fresh)).eval()(x), model(x))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x), fresh.eval()(x))
    unloaded = model.train().unload()
    assert all(module.training for module in unloaded.modules()), "a base is given back whole"


@pytest.mark.parametrize("norm", [*KINDS.values(), Scaled], ids=[*KINDS, "own"])
def test_trained_statistics_move_once_a_step(norm) -> None:  # type: ignore[no-untyped-def]
    """M selections on one batch move them as one forward does, which plain PyTorch shows."""
    base, x = network(norm), 3 * torch.randn(32, 8) + 1
    alone = copy.deepcopy(base[1]).train()
    model = moa.build(base, "remix", n_experts=4, k=2, targets=["3"], modules_to_save=["1"]).train()
    with torch.no_grad():
        alone(base[0](x))
    model.routed_loss(lambda: model(x).square().mean()).backward()
    for (key, got), want in zip(base[1].named_buffers(), dict(alone.named_buffers()).values(), strict=True):
        laws.assert_close(got, want, 1e-6, key)


def test_statistics_of_a_trained_norm_are_saved(tmp_path: Path) -> None:
    base, x = network(nn.BatchNorm1d), 3 * torch.randn(32, 8) + 1
    fresh = copy.deepcopy(base)
    model = moa.build(base, "topk", n_experts=4, k=2, targets=["0", "3"], modules_to_save=["1"]).train()
    steps(model, x)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(moa.load(tmp_path, base=fresh).eval()(x), model(x))
    assert not torch.equal(model.base[1].running_mean, torch.zeros(16))  # type: ignore[index]


class Centred(nn.Module):
    """Somebody's own module that takes off a running mean, of a name that says nothing."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = self.centre.lerp(x.detach().mean(0), 0.5)
        return x - self.centre


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["own", "spectral"])
def test_buffers_that_move_are_saved_or_told_of(kind: str, saved: bool, tmp_path: Path) -> None:
    """What moves by itself is found by its values: the checkpoint holds it, or the user is told by name."""
    torch.manual_seed(0)
    first = nn.utils.spectral_norm(nn.Linear(8, 16)) if kind == "spectral" else nn.Linear(8, 16)
    base, x = nn.Sequential(first, Centred(16), nn.Linear(16, 3)), 3 * torch.randn(32, 8) + 1
    fresh, names = copy.deepcopy(base), ["0", "1"] if kind == "spectral" else ["1"]
    model = moa.build(base, "topk", n_experts=4, k=2, targets=["2"], modules_to_save=names if saved else None).train()
    model.save_pretrained(tmp_path)  # nothing has moved
    steps(model, x)
    if not saved:
        with pytest.warns(
            MoaWarning, match=rf"buffers of the frozen base have moved .*\({0 if kind == 'spectral' else 1}"
        ):
            model.eval().save_pretrained(tmp_path)
        return
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(moa.load(tmp_path, base=fresh).eval()(x), model(x), atol=1e-5)
