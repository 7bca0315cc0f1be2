"""The example of a model of one's own: axial attention, convolutions, experts by field type, small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moa
from experiments import morph


def test_next_steps_are_what_they_are_called() -> None:
    x, y, kinds = morph.made(20, [0, 1, 2], 0)
    own = y - 0.1 * x.mean(1, keepdim=True)
    torch.testing.assert_close(own[kinds == 1], x[kinds == 1].roll((1, 2), (-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(own[kinds == 2], 0.4 * x[kinds == 2], atol=1e-5, rtol=0)
    before, after = x[kinds == 0], own[kinds == 0]
    torch.testing.assert_close(before.mean((-2, -1)), after.mean((-2, -1)), atol=1e-5, rtol=0)
    assert (after.var((-2, -1)) < before.var((-2, -1))).all()


def test_each_field_is_routed_by_its_type() -> None:
    """A field alone, a batch of one type, gives what it gives beside a field of another type; and folds to it."""
    torch.manual_seed(0)
    base = morph.Fields()
    torch.nn.init.zeros_(base.across.out.weight)  # so that fields do not see each other
    model = moa.build(base, targets=morph.TARGETS, **morph.RECIPES["by field type"]).eval()
    with torch.no_grad():
        for _, branch in model.branches():
            for parameter in branch.parameters():
                parameter.normal_(std=0.3)
    layers = list(model.mixtures())
    assert {"embed", "back", "along_rows.query", "along_columns.out", "mlp.1"} <= set(layers)
    assert not any(name.startswith("across") for name in layers)
    x = morph.made(3, [0], 0)[0]
    kinds = torch.tensor([[0, 1], [2, 0], [1, 1]])
    together = model(x, task_ids=kinds.flatten())
    for row in range(3):
        for field in range(2):
            alone = model(x[row : row + 1, field : field + 1], task_ids=kinds[row, field : field + 1])
            torch.testing.assert_close(alone[0, 0], together[row, field], atol=1e-5, rtol=1e-5)
    other = model(x, task_ids=kinds.flip(0).flatten())
    assert (other - together).abs().amax((-2, -1))[kinds != kinds.flip(0)].min() > 1e-3
    folded = model.merge_and_unload(task_id=1)
    torch.testing.assert_close(folded(x)[2], together[2], atol=1e-4, rtol=1e-4)


def test_the_study_runs_learns_and_its_model_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(morph, "RATES", (1e-3, 4e-3, 1e-2))
    found = morph.study(tmp_path / "work", 20, 20, 16, [0])
    assert all(row["test"]["mean"] > found["frozen"] + 0.02 for row in found["arms"].values())
    base = morph.pretrained(2)
    model = morph.adapted(base, "by field type", 4e-3, 2, 0)
    model.save_pretrained(tmp_path / "saved")
    again = moa.load(tmp_path / "saved", base)
    assert morph.errors(again, 4, 5) == pytest.approx(morph.errors(model, 4, 5))


def test_arms_are_of_one_size() -> None:
    base = morph.Fields()
    sizes = []
    for recipe in morph.RECIPES.values():
        model = moa.build(base, targets=morph.TARGETS, **recipe)
        sizes.append(sum(p.numel() for _, branch in model.branches() for p in branch.bank.parameters()))
        base = model.unload()
    assert sizes[0] == sizes[1]
