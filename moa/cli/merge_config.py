"""A merge in a file: YAML or plain values in, a frozen dataclass out, every key checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..formats.foreign import CONFIG, Foreign, read_foreign
from ..formats.peft_folder import PREFIX, peft_deltas
from ..formats.tensor_files import Checkpoint
from ..merge import Deltas, read_difference, read_peft
from ..runs.yaml_values import is_folder, read_dataclass, shortened


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
        missing: "refuse" adapters that hold other layers, or "zero": what is missing changes nothing.
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
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}.")
        if self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes must be at least 1, got {self.max_shard_bytes}.")

    @property
    def weights(self) -> list[float] | None:
        """One number per adapter, or None."""
        values = [source.weight for source in self.adapters if source.weight is not None]
        return values or None

    def read(self) -> list[Deltas]:
        """Return the adapters' deltas, each (o, i), read when asked for.

        Raises:
            CheckpointError: a folder is neither an adapter nor a checkpoint, or is damaged.
        """
        return [self._read(Path(source.path)) for source in self.adapters]

    def _read(self, folder: Path) -> Deltas:
        if not is_folder(folder):
            raise ConfigError(f"{shortened(folder)} is not a folder (looked from {Path.cwd()}).")
        whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        if not whole:
            return self._read_adapter(folder)
        if self.base is None:
            raise ConfigError(
                f"{folder} is a whole checkpoint: its change is what differs from the base, so name base."
            )
        return read_difference(folder, self.base)

    def _read_adapter(self, folder: Path) -> Deltas:
        """Return a PEFT LoRA's deltas; heads that were trained whole, and that the base does not have, are left out."""
        found = read_foreign(folder)
        heads = self._heads(found)
        if not heads:
            return read_peft(folder, self.base)
        kept = {key: tensor for key, tensor in found.tensors.items() if key not in heads}
        return peft_deltas(kept, found.config, source=str(folder), base=self.base)

    def _heads(self, found: Foreign) -> list[str]:
        """Return the keys of an adapter's modules_to_save that have no place in a merge."""
        modules = found.config.get("modules_to_save")
        if not isinstance(modules, list):
            return []
        heads = [
            key
            for key in found.tensors
            if ".lora_" not in key and any(f".{module}." in f".{key}" for module in modules)
        ]
        if self.base is None or not heads:
            return heads
        known = Checkpoint(self.base)
        return [key for key in heads if key.removeprefix(PREFIX) not in known]

    def left_out(self) -> Iterator[str]:
        """Yield what of the adapters is not merged, in words."""
        for source in self.adapters:
            folder = Path(source.path)
            if (folder / CONFIG).is_file():
                heads = self._heads(read_foreign(folder))
                if heads:
                    modules = ", ".join(sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in heads}))
                    yield f"{folder}: {modules} was trained whole and is left out; only adapters are merged."


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
