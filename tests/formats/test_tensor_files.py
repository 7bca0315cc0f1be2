"""Reading checkpoints and differences; broken files.  pytest tests/formats/test_tensor_files.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moa.formats.tensor_files as module
from moa.errors import CheckpointError, ConfigError, ShapeError
from moa.merge import Checkpoint, difference, read_difference
from tests.merge.tools import model_folder

TENSORS = {
    "a.weight": torch.randn(6, 4),
    "b.weight": torch.randn(3, 6).bfloat16(),
    "b.bias": torch.randn(3),
    "ids": torch.arange(5),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("remap", [0, 2**30], ids=["map anew", "keep map"])
def test_reads_every_tensor_bit_for_bit(
    tmp_path: Path, shards: int, remap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMAP_BYTES", remap)
    checkpoint = Checkpoint(model_folder(tmp_path / "m", TENSORS, shards))
    assert set(checkpoint) == set(TENSORS)
    assert len(checkpoint) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint[name], tensor), name
        assert checkpoint.dtypes[name] == tensor.dtype
        assert checkpoint.shapes[name] == tensor.shape


def test_difference_of_sharded_and_single(tmp_path: Path) -> None:
    tuned = {n: t + 1 if t.is_floating_point() else t for n, t in TENSORS.items()}
    lazy = read_difference(model_folder(tmp_path / "tuned", tuned, 2), model_folder(tmp_path / "base", TENSORS, 3))
    assert set(lazy) == set(TENSORS) - {"ids"}, "integer tensors that are equal are left out"
    for name in lazy:
        expected = tuned[name].float() - TENSORS[name].float()
        assert torch.equal(lazy[name].dense(), expected), name
    assert lazy.base == str((tmp_path / "base").resolve())


def test_difference_of_state_dicts_refuses_what_does_not_match() -> None:
    base = {"a": torch.ones(2), "n": torch.tensor([1, 2])}
    with pytest.raises(ConfigError, match="only in tuned 'head'"):
        difference({**base, "head": torch.ones(1)}, base)
    assert "head" not in difference({**base, "head": torch.ones(1)}, base, ignore=["head"])
    with pytest.raises(ConfigError, match="only in the base 'n'"):
        difference({"a": torch.ones(2)}, base)
    with pytest.raises(ShapeError, match="integer tensor 'n' differs"):
        difference({**base, "n": torch.tensor([1, 3])}, base)
    lazy = difference({**base, "a": torch.ones(3)}, base)
    with pytest.raises(ShapeError, match=r"'a' is \(3,\) in tuned and \(2,\) in the base"):
        lazy["a"]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("cut", [4, -1, -40], ids=["header cut", "last byte cut", "data cut"])
def test_a_truncated_shard_is_named(tmp_path: Path, shards: int, cut: int) -> None:
    folder = model_folder(tmp_path / "m", TENSORS, shards)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=rf"{shard.name} .*cannot be read.*truncated or damaged"):
        Checkpoint(folder)


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", TENSORS)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"\x00\xff\x00\xff"
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Checkpoint(folder)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", TENSORS, 2)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["ghost"] = next(iter(value["weight_map"].values()))
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="do not hold: 'ghost'"):
        Checkpoint(folder)
    next(iter(folder.glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="is missing, though the checkpoint's index names it"):
        Checkpoint(folder)
    index.unlink()
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files and no index"):
        Checkpoint(folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")


def test_pickles_and_bad_indices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no safetensors file \(pickled weights there: 'pytorch_model.bin'\)"):
        Checkpoint(tmp_path / "p")
    index = tmp_path / "p" / "model.safetensors.index.json"
    for text, match in (("{", "is not JSON"), ("[]", "holds a list"), ("{}", "no weight_map")):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=match):
            Checkpoint(tmp_path / "p")
