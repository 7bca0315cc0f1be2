"""Disks that are full, read-only or over quota, and two savers at once: the library's own error, and nothing is left.

Run: pytest tests/formats/test_faulty_places.py
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moa
from moa.errors import WriteError
from tests import models
from tests.merge.tools import snapshot


def mixture(value: float) -> Any:
    """Return a mixture whose experts all hold one value."""
    model = moa.build(models.llama(), "topk", n_experts=3, rank=2, targets=["q_proj"])
    with torch.no_grad():
        for _, branch in model.branches():
            for parameter in branch.bank.parameters():
                parameter.fill_(value)
    return model


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


WAYS: dict[str, Callable[[Any, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "export_expert": lambda model, folder: moa.export_expert(model, 0, folder, overwrite=True),
}
ways = pytest.mark.parametrize("way", WAYS)


def refused(way: str, place: Path, reason: int) -> None:
    """A write over an older one, and into a new folder, is refused by name; all that was there stays as it was."""
    before = snapshot(place)
    for folder in (place / "old", place / "deep" / "new"):
        with pytest.raises(WriteError, match=os.strerror(reason)) as caught:
            WAYS[way](mixture(2.0), folder)
        assert str(folder) in str(caught.value), "the folder is not named"
        assert snapshot(place) == before


@ways
def test_a_full_disk(way: str, small_disk: Path) -> None:
    WAYS[way](mixture(1.0), small_disk / "old")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), (small_disk / "filler").open("wb", 0) as filler:
        while True:
            filler.write(bytes(4096))
    refused(way, small_disk, errno.ENOSPC)
    (small_disk / "filler").unlink()
    WAYS[way](mixture(2.0), small_disk / "old")  # with room it goes on


@ways
def test_a_read_only_disk(way: str, small_disk: Path) -> None:
    WAYS[way](mixture(1.0), small_disk / "old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(way, small_disk, errno.EROFS)


@ways
def test_a_quota_that_is_used_up(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WAYS[way](mixture(1.0), tmp_path / "old")

    def full(handle: int) -> None:  # where a file system over the network says it
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    refused(way, tmp_path, errno.EDQUOT)


def content(folder: Path) -> dict[str, Any]:
    """Return what the files of a folder say: tensors by name, other files by theirs."""
    (weights,) = folder.glob("*.safetensors")
    others = {p.name: p.read_text() for p in folder.iterdir() if p.is_file() and p != weights}
    return {**load_file(weights), **others}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@ways
def test_two_savers_at_once(way: str, tmp_path: Path) -> None:
    """What is there at any end is one of the two, whole; a saver that lost says so."""
    savers = [mixture(1.0), mixture(2.0)]
    for number, model in enumerate(savers):
        WAYS[way](model, tmp_path / "apart" / str(number) / "out")
    whole = [content(tmp_path / "apart" / str(number) / "out") for number in range(2)]
    assert not same(*whole)

    def save(model: Any) -> str:
        try:
            WAYS[way](model, tmp_path / "out")
        except WriteError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            said = list(pool.map(save, savers))
            assert "" in said, said
            assert any(same(content(tmp_path / "out"), one) for one in whole), "a mixture of two"
            assert {path.name for path in tmp_path.iterdir()} == {"apart", "out"}, "something is left"
