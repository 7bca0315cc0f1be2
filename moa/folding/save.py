"""A static mixture as a plain checkpoint, which transformers loads without moa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..formats.atomic import staged
from ..formats.named_deltas import check_tensors
from ..formats.sharded import writes_whole
from ..formats.tensor_writing import copy_rest
from ..mixture import Mixture, copy_sharing, take_out
from .weights import check_untied, fold, folded_change


def save_folded(
    model: Any,
    out: str | Path,
    *,
    task_id: int | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the base with every mixture folded in, as a checkpoint that transformers loads without moa.

    Sharded safetensors with the base's config; where the base came from a folder, its other files (tokenizer, licence)
    go along. The folder appears whole or not at all. The model is left as it was. Of several
    processes the first of each machine writes, and the others return.

    Args:
        model: whose mixtures are static, on a transformers base; layers (*rows, i) -> (*rows, o).
        out: the folder to make.
        task_id: fold what this task's inputs get.
        max_shard_size: above which a new file begins, bytes or "5GB".
        overwrite: replace `out` if it holds a checkpoint.

    Returns:
        `out` as a path.

    Raises:
        FoldError: a mixture has no exact weight; the layer and the reason are named.
        ConfigError: the base is not a transformers model, or `out` is the base's folder.
        CheckpointError: `out` exists, or other processes hold parts of the model.
    """
    base: Any = model.base
    if not hasattr(base, "save_pretrained"):
        raise ConfigError(
            f"a {type(base).__name__} is no transformers model: call merge_and_unload() and save its state_dict."
        )
    source = Path(getattr(base, "name_or_path", "") or "")
    known = source != Path() and source.is_dir()
    check_folds(model, task_id)
    if not writes_whole(model):
        return Path(out)
    with staged(out, overwrite=overwrite, inputs=[source] if known else []) as partial:
        if known:
            copy_rest(source, partial)
        plain: Any = copy_sharing(base)
        for mixture in [m for m in plain.modules() if isinstance(m, Mixture)]:
            fold(mixture, task_id)
        take_out(plain)
        plain.save_pretrained(partial, max_shard_size=max_shard_size)
    return Path(out)


def check_folds(model: Any, task_id: int | None = None) -> None:
    """Check that every mixture, (*rows, i) -> (*rows, o), has an exact weight, and change nothing.

    Raises:
        FoldError: one has not; the layer and the reason are named.
        NumericsError: an expert, or a module trained whole, holds NaN or infinity; the tensor is named.
    """
    for mixture in model.mixtures().values():
        check_untied(model.base, mixture)
        folded_change(mixture, task_id)
    check_whole(model)


def check_whole(model: Any) -> None:
    """Check that the modules trained whole, e.g. a head (d -> C), hold only numbers, before their base is handed on.

    Raises:
        NumericsError: one holds NaN or infinity; the tensor is named.
    """
    for name in model.modules_to_save:
        check_tensors(model.base.get_submodule(name).state_dict(prefix=f"{name}."), "nothing was folded")
