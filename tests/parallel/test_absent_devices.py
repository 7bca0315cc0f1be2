"""A configuration for devices that this machine does not have is refused before anything is read or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import moa
from moa.errors import ConfigError
from moa.runs.arguments import check_device
from tests import models


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no accelerator, and be one of two processes."""
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose base lies beside it."""
    home = tmp_path_factory.mktemp("saved")
    models.llama().save_pretrained(home / "base")
    moa.build(LlamaForCausalLM.from_pretrained(home / "base"), "topk", n_experts=2, k=1).save_pretrained(home / "out")
    return home / "out"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "place", ["cuda", "cuda:0", 0, {"": 0}, {"model": "cpu", "lm_head": "cuda:3"}, torch.device("xpu")], ids=str
)
def test_a_device_map_names_devices_that_are_there(place: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"device_map names the device .*, and torch sees no accelerator here"):
        moa.load(folder, device_map=place)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, None], ids=str)
def test_a_map_of_what_is_there_loads(place: Any, folder: Path) -> None:
    assert moa.load(folder, device_map=place).device.type == "cpu"


def test_a_device_beyond_the_last_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    for place in (2, "cuda:2", "xpu"):
        with pytest.raises(ConfigError, match="and torch sees 2 of cuda here"):
            moa.load(folder, device_map=place)


@pytest.mark.usefixtures("on_cpu")
def test_a_backend_talks_between_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device({"ddp_backend": "gloo"})
    with pytest.raises(ConfigError, match=r"ddp_backend: nccl talks between cuda devices, and this run is on CPUs"):
        check_device({"ddp_backend": "nccl"})
    with pytest.raises(ConfigError, match=r"unknown backend 'ncl' .*nccl"):
        check_device({"ddp_backend": "ncl"})
    monkeypatch.setattr("torch.distributed.is_mpi_available", lambda: False)
    with pytest.raises(ConfigError, match="this torch was built without mpi"):
        check_device({"ddp_backend": "mpi"})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    check_device({"ddp_backend": "nccl"})
    with pytest.raises(ConfigError, match="nccl talks between cuda devices"):
        check_device({"ddp_backend": "nccl", "use_cpu": True})


@pytest.mark.usefixtures("on_cpu")
def test_one_process_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster's configuration runs on a laptop."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_device({"ddp_backend": "nccl"})
