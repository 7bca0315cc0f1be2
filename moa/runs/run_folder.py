"""The folder of a run: what it holds, whether it may be written, how an old run makes room for a new one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..formats.atomic import said_of
from ..formats.scratch import put, sweep
from ..training.checkpoints import checkpoints, newest_checkpoint, number, processes_of
from .config import TrainConfig, read_config
from .joint import n_processes
from .yaml_values import shortened

RESULTS, FIGURE, CONFIG, MODEL, DATA = "results.json", "routing.png", "config.yaml", "model", "trained_on.json"
OWN = (
    RESULTS,
    FIGURE,
    CONFIG,
    MODEL,
    DATA,
    "routing.jsonl",
    "report.html",
    "runs",
    "trainer_state.json",
    "scales.safetensors",
)
HEADER = "# Written by moa train.\n"
LONGEST_NAME = 240  # bytes; file systems take 255, and what stands beside it has a longer one
# what may differ when a run is resumed: nothing of it changes a step that was or will be done, except how many
FREE = {"output", "overwrite", "score_before", "compare", "generate", "patience", "import"}
FREE_TRAINING = re.compile(
    r"(logging|log|eval|save|dataloader|disable|report|run|hub|push)_\w+|use_cpu|max_steps|num_train_epochs|"
    r"per_device_eval_batch_size|load_best_model_at_end|metric_for_best_model|greater_is_better|project"
)
# a step's rows are those of all processes: of another number each may take more or fewer
SHARED = {"training.per_device_train_batch_size", "training.gradient_accumulation_steps"}


class RunFolder:
    """Where a run is written: its output folder, or beside it while an old run is still there.

    Nothing is written before `begin`. A run that replaces another one is written into `.NAME.partial` and moved in by
    `commit`, so that the old one is whole until the new one is.

    Args:
        config: output and overwrite are read.
        resume: go on with what is there.

    Raises:
        ConfigError: a place that cannot be written, a run that is already there, nothing to resume, or a stored
            configuration that differs.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.config, self.resume = config, resume
        self.out = Path(config.output).absolute()
        if not self.out.name:
            raise ConfigError(f"output: {config.output} is a name that a folder cannot have.")
        self.beside = self.out.with_name(f".{self.out.name}.partial")
        self.made: list[Path] = []
        self.old: set[Path] = set()
        self.checkpoint: Path | None = None
        check_writable(self.out)
        with said_of(self.out):
            sweep(self.out)  # a run that was killed while it took the place of another one
        if resume:
            self.work = self.beside if (self.beside / CONFIG).is_file() else self.out
            self.checkpoint = newest_checkpoint(self.work)
            if self.checkpoint is None:
                raise ConfigError(f"nothing to resume: {config.output} holds no whole checkpoint-N folder of Trainer.")
            self._compare()
        elif holds_run(self.out):
            if not config.overwrite:
                raise ConfigError(
                    f"output: {config.output} already holds a run. Name another folder, set overwrite=true, or resume "
                    "it (moa train --resume)."
                )
            self.work = self.beside
        else:
            self.work = self.out
            file = self.out / CONFIG
            if file.exists() and not _is_ours(file):
                raise ConfigError(f"output: {file} was written by no run, and would be lost: name another folder.")

    def _compare(self) -> None:
        """Refuse a configuration under which the stored run would be another one."""
        file = self.work / CONFIG
        if not file.is_file():
            raise ConfigError(f"nothing to resume: {self.work} has no {CONFIG} that says what was trained.")
        stored = _flat(read_config(file, recipe=False).to_dict())
        now = _flat(self.config.to_dict())
        free = SHARED if self.others else set()
        different = [
            f"{key} was {shortened(stored.get(key), 60)} and is now {shortened(now.get(key), 60)}"
            for key in sorted(stored.keys() | now.keys())
            if stored.get(key) != now.get(key) and key not in free and not _is_free(key)
        ]
        if different:
            raise ConfigError(
                f"--resume: this run was trained with another configuration: {'; '.join(different)}. Set it back, or "
                "train anew with another output."
            )

    @property
    def others(self) -> int:
        """How many processes wrote the checkpoint that the run goes on from, where these are more or fewer; else 0."""
        wrote = n_processes() if self.checkpoint is None else processes_of(self.checkpoint)
        return 0 if wrote == n_processes() else wrote

    def notes(self, n_rows: int) -> list[str]:
        """Return what is not as it was when the checkpoint was written; a step takes n rows now."""
        if not self.others:
            return []
        return [
            f"{self.checkpoint} was written by another number of processes ({self.others}, now {n_processes()}): "
            "weights, optimizer and schedule go on, what is drawn at random (dropout, jitter) is drawn anew, and "
            f"a step takes {n_rows} rows."
        ]

    def check_rows(self, rows: Mapping[str, Any]) -> None:
        """Refuse to resume on other rows than the run was trained on.

        Args:
            rows: task -> what `EncodedTask.fingerprint` returns.

        Raises:
            ConfigError: a task's rows or labels differ.
        """
        file = self.work / DATA
        if not self.resume or not file.is_file():
            return
        stored = json.loads(file.read_text(encoding="utf-8"))
        for task, now in rows.items():
            for what in ("labels", "rows"):
                if stored.get(task, {}).get(what) != now[what]:
                    raise ConfigError(
                        f"--resume: the training {what} of task {task!r} are not those that this run was trained on: "
                        "put the old file back, or train anew with another output."
                    )

    def check_space(self, n_bytes: int) -> None:
        """Refuse a disk without room for so many bytes.

        Raises:
            ConfigError: there is less.
        """
        free = shutil.disk_usage(_existing(self.out)).free
        if free < n_bytes:
            raise ConfigError(
                f"output: {free / 1e6:.0f} MB are free at {self.config.output}, and a checkpoint with its optimizer "
                f"takes about {n_bytes / 1e6:.0f} MB: make room or name another folder."
            )

    # ---------------------------------------------------------------- writing

    def begin(self, rows: Mapping[str, Any]) -> None:
        """Make the folder and write what the run is; only the first process calls this.

        Args:
            rows: task -> what `EncodedTask.fingerprint` returns.
        """
        if self.resume:
            for folder in checkpoints(self.work):
                if number(folder) > number(self.checkpoint or folder):
                    shutil.rmtree(folder)  # half-written
        else:
            if self.work == self.beside and self.beside.exists():
                shutil.rmtree(self.beside)
            if _is_ours(self.work / CONFIG):  # left by a run that never got going
                self._clear()
        self.made = [folder for folder in (self.work, *self.work.parents) if not folder.exists()]
        self.work.mkdir(parents=True, exist_ok=True)
        self.old = set(self.work.iterdir())
        text = HEADER + yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
        (self.work / CONFIG).write_text(text, encoding="utf-8")
        (self.work / DATA).write_text(json.dumps(rows) + "\n", encoding="utf-8")

    def _clear(self) -> None:
        """Remove what a run writes, and was not in the folder before it."""
        for path in {self.work / name for name in OWN} - self.old:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave no trace of a start that failed; a run that got as far as its first log line or checkpoint is kept."""
        log = self.work / "routing.jsonl"
        if self.resume or checkpoints(self.work) or (log.is_file() and log.stat().st_size):
            return
        self._clear()
        for folder in self.made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def commit(self) -> None:
        """Put the finished run where it belongs; what no run wrote in the old folder goes along."""
        if self.work == self.out:
            return
        for path in sorted(self.out.iterdir()):
            if path.name not in OWN and not re.fullmatch(r"checkpoint-\d+", path.name):
                _copy(path, self.work / path.name)
        with said_of(self.out):
            put(self.work, self.out)
        self.work = self.out

    def way_on(self) -> str:
        """Return how to go on after a stop."""
        checkpoint = newest_checkpoint(self.work)
        if checkpoint is None:
            return "nothing was saved yet: start it again."
        return f"{checkpoint.name} is saved: go on with moa train CONFIG --resume."


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def holds_run(folder: Path) -> bool:
    """Tell whether something was trained in a folder."""
    return (folder / MODEL).exists() or (folder / RESULTS).exists() or bool(checkpoints(folder))


def _is_ours(config: Path) -> bool:
    """Tell whether a run wrote a configuration: one that a user wrote is kept."""
    return config.is_file() and config.read_bytes().startswith(HEADER.encode())


def _is_free(key: str) -> bool:
    top, _, rest = key.partition(".")
    return top in FREE or (top == "training" and FREE_TRAINING.fullmatch(rest) is not None)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_writable(out: Path, what: str = "output") -> None:
    """Check that a folder can be made and written, by making one of a passing name beside it or in it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in out.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{what}: {out} is a file, name a folder.")
        if "\0" in str(out):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.rmdir(tempfile.mkdtemp(prefix=".moa.", dir=_existing(out)))
    except OSError as error:
        raise ConfigError(f"{what}: {shortened(repr(str(out)))} cannot be written: {error.strerror}.") from error
