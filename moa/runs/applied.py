"""A checkpoint to apply to new rows: what its run says of its tasks, and a file for what comes out."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name
from ..formats.atomic import replacing, said_of
from .config import TrainConfig, read_config
from .run_folder import CONFIG, MODEL, check_writable
from .tasks import Task
from .yaml_values import is_folder

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".jsonl", *DELIMITERS)


@dataclass(frozen=True)
class Applied:
    """A checkpoint, and the configuration of its run where there is one.

    Args:
        folder: of the checkpoint.
        config: whose tasks it was trained on; None for a checkpoint that stands by itself.
    """

    folder: Path
    config: TrainConfig | None

    def task(self, given: str | None) -> Task | None:
        """Return the run's task of a name or an id; None where no configuration says.

        Raises:
            ConfigError: no such task, or several and none is chosen.
        """
        if self.config is None:
            return None
        number = task_id(given, list(self.config.tasks), str(self.folder))
        return None if number is None else list(self.config.tasks.values())[number]

    def loaded(self) -> tuple[Any, Any]:
        """Return the model, in evaluation mode on an accelerator where there is one, and its tokenizer.

        Raises:
            CheckpointError: no checkpoint there, or its base cannot be loaded.
            ConfigError: neither the checkpoint nor its base has a tokenizer.
        """
        import torch

        from ..model.build import load
        from .run_model import load_tokenizer

        model: Any = load(self.folder)
        own = (self.folder / "tokenizer_config.json").is_file()
        base = getattr(model.config, "encoder_name_or_path", None) or model.base.name_or_path
        tokenizer = load_tokenizer(str(self.folder) if own else base)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def find_applied(checkpoint: str | Path, config: str | Path | None = None) -> Applied:
    """Return a checkpoint with the configuration of its run; nothing heavy is imported.

    Args:
        checkpoint: folder of a run, or of a checkpoint.
        config: YAML file with its tasks; None takes config.yaml of the run that the checkpoint lies in.

    Raises:
        ConfigError: no such folder or configuration.
    """
    folder = Path(checkpoint)
    if not is_folder(folder):
        raise ConfigError(f"there is no folder {checkpoint} (looked from {Path.cwd()}).")
    inside = folder.resolve().name == MODEL or folder.resolve().name.startswith("checkpoint-")
    file = folder / CONFIG
    if inside and not file.is_file():
        file = folder.resolve().parent / CONFIG
    own = read_config(config or file, recipe=False) if config is not None or file.is_file() else None
    return Applied(folder / MODEL if is_folder(folder / MODEL) else folder, own)


def task_id(given: str | None, names: Sequence[str], where: str) -> int | None:
    """Return the id of a task that is given by its name or its id; None where there is none to choose.

    Args:
        given: by the user, or None.
        names: of the tasks in the order of their ids; empty where they are not known.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: no such task, or several and none is given.
    """
    if given is None:
        if len(names) > 1:
            raise ConfigError(f"{where} has the tasks {', '.join(names)}: choose one with --task.")
        return 0 if names else None
    if given in names:
        return names.index(given)
    if given.isascii() and given.isdecimal() and (not names or int(given) < len(names)):
        return int(given)
    if not names:
        raise ConfigError(f"--task {given}: {where} does not say the names of its tasks, so give the id, from 0 on.")
    raise ConfigError(unknown_name("task", given, names, where))


def check_file(out: str | Path, overwrite: bool, option: str = "--out", endings: Sequence[str] = ENDINGS) -> None:
    """Check that a file may be written.

    Args:
        out: the file.
        overwrite: one that is there may be replaced.
        option: that names it.
        endings: one of them is its.

    Raises:
        ConfigError: another ending, a file that is there already, a place that cannot be written.
    """
    target = Path(out).absolute()
    if target.suffix.lower() not in endings:
        raise ConfigError(f"{option} {out} must end in {'one of ' * (len(endings) > 1)}{', '.join(endings)}.")
    check_writable(target.parent, option)
    if target.is_dir():
        raise ConfigError(f"{option} {out} is a folder: name a file.")
    if target.exists() and not overwrite:
        raise ConfigError(f"{option} {out} exists already: choose another file, or pass --overwrite to replace it.")


def write_rows(rows: Iterable[Mapping[str, Any]], out: str | Path) -> None:
    """Write rows, whole or not at all, as JSON lines or with a header line; a mapping becomes a column a key.

    Args:
        rows: each with the same columns.
        out: file that `check_file` accepted.

    Raises:
        WriteError: the disk is full, or the place cannot be written.
    """
    target = Path(out).absolute()
    with said_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            if target.suffix.lower() == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                return
            flat = [_flat(row) for row in rows]
            lines = csv.DictWriter(file, list(flat[0]), delimiter=DELIMITERS[target.suffix.lower()])
            lines.writeheader()
            lines.writerows(flat)


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON in which what does not print is escaped as JSON does it."""
    text = json.dumps(row, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in row.items():
        out |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return out
