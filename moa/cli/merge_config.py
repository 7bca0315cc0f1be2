"""A merge in a file: YAML or plain values in, a frozen dataclass out, every key checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..merge import Deltas, read_difference, read_peft
from ..runs.config import read_dataclass, read_yaml


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the adapters to merge.

    Args:
        path: PEFT LoRA folder; or, where `base` is given, the folder of a fine-tuned checkpoint of that base.
        weight: its weight; given for all adapters or for none.
    """

    path: str
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Everything that makes a merge.

    Args:
        adapters: the adapters in order, each a path, or keys path and weight.
        out: folder to write: a PEFT LoRA folder, or with `base` a whole checkpoint.
        method: name of a merging method.
        options: keywords of the method.
        base: folder of the base model: the merged change is added to it.
        rank: squeeze every layer's merged change to this rank; needed where a method leaves no factors and `base` is
            not given.
        missing: "refuse" adapters that hold other layers, or "zero": what is missing is no change.
        same_base: refuse adapters that name different bases.
        task_type: PEFT's, for the adapter's configuration, e.g. CAUSAL_LM.
        max_shard_bytes: of a checkpoint's files.
        overwrite: replace what `out` holds.

    Raises:
        ConfigError: no adapters, weights for some of them only, or keys that exclude each other.
    """

    adapters: Sequence[Source]
    out: str
    method: str = "ties"
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    rank: int | None = None
    missing: str = "refuse"
    same_base: bool = True
    task_type: str | None = None
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ConfigError("adapters is empty: name the folders to merge.")
        lacking = [source.path for source in self.adapters if source.weight is None]
        if 0 < len(lacking) < len(self.adapters):
            raise ConfigError(f"{', '.join(lacking)} has no weight and others have: give one to each adapter, or none.")
        if self.base is not None and self.rank is not None:
            raise ConfigError("rank squeezes an adapter; with base the merged change is added whole: leave one out.")

    @property
    def weights(self) -> list[float] | None:
        """One number per adapter, or None."""
        values = [source.weight for source in self.adapters if source.weight is not None]
        return values or None

    def read(self) -> list[Deltas]:
        """Return the adapters' deltas, each (o, i), read when asked for.

        Raises:
            CheckpointError: a folder is no adapter and no checkpoint, or is damaged.
        """
        return [self._read(Path(source.path)) for source in self.adapters]

    def _read(self, folder: Path) -> Deltas:
        whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        if not whole:
            return read_peft(folder, self.base)
        if self.base is None:
            raise ConfigError(
                f"{folder} is a whole checkpoint: its change is what differs from the base, so name base."
            )
        return read_difference(folder, self.base)


def read_merge(values: Mapping[str, Any], where: str) -> MergeConfig:
    """Return the merge that plain values describe; no tensors, so no shapes.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), or a value of another type.
    """
    adapters = values.get("adapters")
    if isinstance(adapters, Sequence) and not isinstance(adapters, str):
        adapters = [{"path": one} if isinstance(one, str) else one for one in adapters]
        values = {**values, "adapters": adapters}
    config: MergeConfig = read_dataclass(MergeConfig, values, where)
    return config


def merge_values(path: str | Path) -> dict[str, Any]:
    """Return the keys and values of a merge's YAML file; no tensors, so no shapes.

    Raises:
        ConfigError: no such file, not YAML, or no keys in it.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no configuration {path} (looked from {Path.cwd()}).")
    values = read_yaml(file.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold key: value lines, got {type(values).__name__}.")
    return values
