"""A saved mixture back into a model: checkpoints of moa and folders of other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..errors import CheckpointError, ConfigError
from ..formats import checkpoint, foreign
from ..formats.adopters import adopt
from ..formats.precision_folders import set_for
from ..recipes.origins import rebuilt
from .heads import load_base
from .host import Host
from .pruned import KEY, kept_of
from .rollback import all_or_nothing

TASKS = {"CAUSAL_LM": "AutoModelForCausalLM", "QUESTION_ANS": "AutoModelForCausalLM"}  # the latter is MixLoRA's word
H = TypeVar("H", bound=Host)


def load_host(
    around: Callable[[nn.Module], H],
    path: str | Path,
    base: nn.Module | None = None,
    *,
    check_base: bool = True,
    is_trainable: bool = True,
    **kwargs: Any,
) -> H:
    """Return the host of a saved mixture; see `MoAModel.from_pretrained`, whose arguments and errors it has.

    Args:
        around: makes a host of a base, (B, S) -> outputs.
        path, base, check_base, is_trainable, kwargs: see there.
    """
    if base is not None and kwargs:
        raise ConfigError(f"{', '.join(sorted(kwargs))}: keywords are for loading a base, and one was given as base=.")
    folder = checkpoint.locate(path)
    if base is not None:
        folder = set_for(folder, base)
    if foreign.is_foreign(folder):
        found = foreign.read_foreign(folder)
        out = around(_foreign_base(found, kwargs) if base is None else base)
        with all_or_nothing(out.base):
            adopt(out, found)
        return _ready(out, is_trainable)
    description, tensors = checkpoint.read_mixture(folder)
    if base is None:
        base = load_base(description["base"], folder, kwargs)
    elif kept_of(description["base"]["config"] or {}) and kept_of(getattr(base, "config", None)) is None:
        raise CheckpointError(
            f"{folder} was made on a pruned base, and this {type(base).__name__} is a full one: give the pruned one, "
            f"or none; moa.recover({str(folder)!r}, base) takes it to the full one."
        )
    if check_base:
        checkpoint.check_fingerprint(description["base"], base, folder)
    with all_or_nothing(base):
        out = around(base)
        add_described(out, description, str(folder))
        checkpoint.fill(out.adapter_state_dict(), tensors, folder)
    return _ready(out, is_trainable)


def add_described(out: Host, description: Mapping[str, Any], source: str) -> None:
    """Put the recipes that a checkpoint describes into a host, on the same layers (*rows, i) -> (*rows, o).

    Args:
        out: without mixtures.
        description: of the checkpoint.
        source: named in errors.

    Raises:
        ConfigError: a layer that is not there; a recipe or family that is not known.
    """
    out.train_whole(description["modules_to_save"])
    for row in description["recipes"]:
        options = {key: value for key, value in row.items() if key != "sites"}
        out.add_recipe(rebuilt(options, description.get("origins") or {}, source), row["sites"])


def _ready(out: H, is_trainable: bool) -> H:
    if not is_trainable:
        out.requires_grad_(False)
    return out.eval()


def base_from(path: str | Path, name: str, **kwargs: Any) -> nn.Module:
    """Return the base of a saved mixture, (B, S) -> outputs, loaded from another place than the one it names.

    It is as it is there: where the mixture was made on a pruned base, this may be the full one.

    Args:
        path: folder of the checkpoint, or hub id.
        name: folder or hub id of the base.
        kwargs: for the base's `from_pretrained`.

    Raises:
        CheckpointError: no checkpoint there, or nothing of the base's class can be loaded from there.
    """
    folder = checkpoint.locate(path)
    if foreign.is_foreign(folder):
        found = foreign.read_foreign(folder)
        return _foreign_base(
            dataclasses.replace(found, config={**found.config, "base_model_name_or_path": name}), kwargs
        )
    row = checkpoint.read(folder)[0]["base"]
    config = {key: value for key, value in (row["config"] or {}).items() if key != KEY}
    if kept_of(config) is not None:
        config["encoder"] = {key: value for key, value in config["encoder"].items() if key != KEY}
    if config.get("encoder_name_or_path") == row["name_or_path"] != "":
        config = {**config, "encoder_name_or_path": name}
    return load_base({**row, "name_or_path": name, "config": config}, folder, kwargs)


def _foreign_base(found: foreign.Foreign, kwargs: Mapping[str, Any]) -> nn.Module:
    """Return the base model that a folder names.

    Args:
        found: the folder.
        kwargs: for the base's `from_pretrained`.

    Raises:
        CheckpointError: it names none, or a task whose model class is not known.
    """
    task = found.config.get("task_type")
    if task not in TASKS:
        raise CheckpointError(
            f"{found.path} has task_type {task!r}: the class of its base is known only for {', '.join(TASKS)}. "
            "Pass load(path, base=model)."
        )
    row = {"class": TASKS[task], "name_or_path": found.config.get("base_model_name_or_path"), "config": None}
    return load_base(row, found.path, kwargs)
