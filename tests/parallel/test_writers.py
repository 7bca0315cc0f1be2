"""Several processes that save, export or fold one model write it once."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import moa
from tests import models

from .processes import run_together


def test_several_processes_write_once(tmp_path: Path) -> None:
    run_together("tests.parallel.writers", 2, str(tmp_path))
    first, last = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["written"] == ["all", "exported", "folded"]
    assert last["written"] == ["last"], "where is_main_process says so"
    for said in (first["refused"], last["refused"]):
        assert "spread over processes: save the model with save_pretrained" in said
    assert not (tmp_path / "sharded").exists()
    one, other = (moa.load(tmp_path / name, models.llama(num_hidden_layers=1)) for name in ("all", "last"))
    other_state = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other_state[name]), name
