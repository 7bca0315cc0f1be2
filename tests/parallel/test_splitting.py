"""Sparse copies (MoSA) in several processes: one's weights on the joined batch, its masks, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import torch

from .processes import run_together
from .splitting import CASE, trained
from .test_processes import assert_moved_alike


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Rows are uneven, so that a consistency of each process's own rows would be another one."""
    run_together("tests.parallel.splitting", 2, str(tmp_path))
    expected, masks, _ = trained(2, None)
    for rank in range(2):
        got, found, half = torch.load(tmp_path / f"{rank}.pt")
        assert_moved_alike(CASE, got, expected)
        assert found.keys() == masks.keys() and all(torch.equal(found[name], mask) for name, mask in masks.items())
    further, found, _ = trained(2, None, half)
    assert_moved_alike(CASE, further, expected)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
