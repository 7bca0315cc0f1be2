"""Folders appear whole or not at all; files are what safetensors reads.  pytest tests/formats/test_atomic.py"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.errors import CheckpointError, ConfigError
from moa.formats.atomic import staged
from moa.formats.tensor_writing import file_order, plan_shards, write_safetensors
from moa.merge import Checkpoint
from tests.merge.tools import snapshot


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_block_that_ends_makes_the_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
        assert tmp_path / "deep" in partial.parents, "on the same file system"
    assert snapshot(tmp_path / "deep" / "out") == {"file": b"x"}
    assert left(tmp_path / "deep") == ["out"]


OLD = '{"model_type": "old"}'


def write_old(out: Path, *names: str) -> None:
    with staged(out) as partial:
        (partial / "config.json").write_text(OLD)
        for name in names:
            (partial / name).write_text("old")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("boom")])
@pytest.mark.parametrize("old", [False, True])
def test_a_block_that_raises_leaves_no_trace(tmp_path: Path, error: BaseException, old: bool) -> None:
    out = tmp_path / "out"
    if old:
        write_old(out)
    with (
        pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)),
        staged(out, overwrite=old) as partial,
    ):
        (partial / "half").write_text("x")
        raise error
    assert left(tmp_path) == (["out"] if old else [])
    assert not old or snapshot(out) == {"config.json": OLD.encode()}


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_old(out, "stale.safetensors", "deep_stale.txt")
    with staged(out, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert snapshot(out) == {"config.json": b"new"}
    assert left(tmp_path) == ["out"]


def test_a_failed_swap_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_old(out)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name == "folder":
            raise OSError("denied")
        real(source, target)

    monkeypatch.setattr("moa.formats.scratch.os.rename", rename)
    with pytest.raises(CheckpointError, match="cannot be written: denied"), staged(out, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert snapshot(out) == {"config.json": OLD.encode()}
    assert left(tmp_path) == ["out"]


def test_what_exists_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"), staged(out):
        pass
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no folder with a checkpoint"), staged(out, overwrite=True):
        pass
    with pytest.raises(CheckpointError, match="no folder with"), staged(out / "thesis.txt", overwrite=True):
        pass
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(CheckpointError, match="no folder with"), staged(tmp_path / "link", overwrite=True):
        pass
    assert snapshot(out) == {"thesis.txt": b"years of work"}


PROJECT = {"src/code.py": "x = 1", "notes.txt": "years", ".git/HEAD": "ref", "data/vocab.txt": "mine", "a.json": "{}"}


def project(out: Path, config: str) -> None:
    for name, text in {**PROJECT, "config.json": config}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


@pytest.mark.parametrize("config", ['{"my": "app"}', "no JSON", "[1]"])
def test_a_folder_with_another_programs_config_is_not_replaced(tmp_path: Path, config: str) -> None:
    project(tmp_path / "out", config)
    before = snapshot(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder with a checkpoint"), staged(tmp_path / "out", overwrite=True):
        pass
    assert snapshot(tmp_path / "out") == before


def test_a_model_of_another_writer_is_not_replaced(tmp_path: Path) -> None:
    """A config.json of a model says nothing of who wrote the folder."""
    project(tmp_path / "out", OLD)
    before = snapshot(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder with a checkpoint"), staged(tmp_path / "out", overwrite=True):
        pass
    assert snapshot(tmp_path / "out") == before


def test_what_moa_did_not_write_outlives_what_it_wrote(tmp_path: Path) -> None:
    """A project that holds a model: its code, notes and history stay, whatever they are called; the old files go."""
    out = tmp_path / "out"
    write_old(out, "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt", "adapter_model.bin", "b.json")
    project(out, OLD)
    (out / "mine.safetensors").write_text("mine")
    with staged(out, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
        (partial / "a.json").write_text("new")
    mine = {name: text.encode() for name, text in PROJECT.items()} | {"mine.safetensors": b"mine"}
    moved = {"a.json.old": mine.pop("a.json")}
    assert snapshot(out) == {**mine, **moved, "config.json": b"new", "a.json": b"new"}
    assert left(tmp_path) == ["out"]
    with staged(out, overwrite=True) as partial:
        (partial / "c.json").write_text("newer")
    assert snapshot(out) == {**mine, **moved, "c.json": b"newer"}


@pytest.mark.parametrize("there", [True, False])
def test_what_a_dead_process_left_is_cleared_up(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    write_old(out)
    hidden = [tmp_path / f".out.{'0' * 11}{n}.{kind}" for n, kind in enumerate(("partial", "replaced"))]
    shutil.copytree(out, hidden[0])
    if there:
        shutil.copytree(out, hidden[1])
    else:
        os.rename(out, hidden[1])
    foreign = tmp_path / ".out.partial"  # no name of ours
    foreign.mkdir()
    with staged(tmp_path / "other") as partial:
        (partial / "x").write_text("x")
    assert all(path.exists() for path in hidden), "those of another target are left alone"
    with pytest.raises(CheckpointError, match="exists already"), staged(out):
        pass
    assert left(tmp_path) == [".out.partial", "other", "out"] and snapshot(out) == {"config.json": OLD.encode()}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as first:
        (first / "x").write_text("first")
        with staged(tmp_path / "out") as second:
            (second / "x").write_text("second")
        with pytest.raises(CheckpointError, match="exists already"), staged(tmp_path / "out"):
            pass
        shutil.rmtree(tmp_path / "out")
    assert snapshot(tmp_path / "out") == {"x": b"first"} and left(tmp_path) == ["out"]


def test_the_second_of_two_savers_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"), staged(tmp_path / "out") as first:
        (first / "x").write_text("first")
        with staged(tmp_path / "out") as second:
            (second / "x").write_text("second")
    assert snapshot(tmp_path / "out") == {"x": b"second"} and left(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"), staged(tmp_path / "a" / "out"):
            pass
    finally:
        tmp_path.chmod(0o755)


def test_inputs_are_never_replaced(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    for out in (base, base / "inside", tmp_path):
        with pytest.raises(ConfigError, match="holds the other"), staged(out, overwrite=True, inputs=[base]):
            pass
    assert left(base) == ["config.json"]


TENSORS = {
    "wide": torch.randn(3, 4, dtype=torch.float64),
    "half": torch.randn(5).bfloat16(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "single": torch.tensor(2.5),
    "none": torch.zeros(0, 7),
    "turned": torch.randn(4, 6).T,
    "é/ü": torch.ones(1, dtype=torch.int64),
}


def test_written_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    order = file_order(TENSORS, {n: t.dtype for n, t in TENSORS.items()})
    specs = {n: (TENSORS[n].dtype, tuple(TENSORS[n].shape)) for n in order}
    nbytes = write_safetensors(file, specs, ((n, TENSORS[n]) for n in order), {"who": "test"})
    assert nbytes == file.stat().st_size
    read = load_file(file)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"format": "pt", "who": "test"}


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2,)), "b": (torch.float32, (1,))}

    def write(*tensors: tuple[str, Tensor]) -> None:
        write_safetensors(tmp_path / "x.safetensors", specs, iter(tensors))

    for tensors in (
        [("b", torch.ones(1))],
        [("a", torch.ones(3))],
        [("a", torch.ones(2).double())],
        [("a", torch.ones(2)), ("b", torch.ones(1)), ("c", torch.ones(1))],
    ):
        with pytest.raises(CheckpointError, match="expected"):
            write(*tensors)
    with pytest.raises(CheckpointError, match="ended before 'b'"):
        write(("a", torch.ones(2)))


def test_shards_are_filled_in_order(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 10, "c": 50, "d": 5}
    save_file({n: torch.zeros(s) for n, s in sizes.items()}, tmp_path / "x.safetensors")
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    assert plan_shards(checkpoint, checkpoint.dtypes, 100) == [["a", "b"], ["c"], ["d"]]
    assert plan_shards(checkpoint, checkpoint.dtypes, 1) == [["a"], ["b"], ["c"], ["d"]]
    assert len(plan_shards(checkpoint, checkpoint.dtypes, 10**6)) == 1


def test_iterators_are_consumed_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        import weakref

        last: weakref.ref[Tensor] | None = None
        for n in "abc":
            alive.append(0 if last is None or last() is None else 1)
            tensor = torch.ones(2)
            last = weakref.ref(tensor)
            yield n, tensor
            del tensor

    write_safetensors(tmp_path / "x.safetensors", {n: (torch.float32, (2,)) for n in "abc"}, stream())
    assert sum(alive) <= 2, "at most the tensor being written is still alive"
