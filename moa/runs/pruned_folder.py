"""A pruned base as a folder of its own: `moa prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from ..errors import ConfigError, MoaError
from ..formats.atomic import staged
from ..formats.tensor_writing import copy_rest
from ..model.pruned import kept_of
from ..training.pruning import prune
from .yaml_values import one_line


def prune_folder(
    source: str,
    out: str | Path,
    ratio: float,
    layers: Sequence[int] | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> str:
    """Write a pruned copy of a base, its tokenizer and other files included, and return what was kept in words.

    Args:
        source: folder or hub id of the full base, whose weights (o, i) are read as they are stored.
        out: the folder to make; it appears whole or not at all.
        ratio, layers: as in `moa.prune`.
        overwrite: replace what moa wrote in `out`.
        dry_run: write nothing.

    Raises:
        ConfigError: no such base, or one that cannot be pruned.
        CheckpointError: `out` exists.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if kept_of(config) is not None:
            raise ConfigError(f"{source} is pruned already: prune the full base, with a higher ratio.")
        names = [name for name in config.architectures or () if hasattr(transformers, name)]
        cls: Any = getattr(transformers, names[0]) if names else transformers.AutoModel
        full = cls.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, MoaError):
            raise
        raise ConfigError(f"{source!r} cannot be loaded: {one_line(error)}") from error
    small: Any = prune(full, ratio, layers)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (full, small))
    if not dry_run:
        del full
        folder = Path(source)
        with staged(out, overwrite=overwrite, inputs=[folder] if folder.is_dir() else []) as partial:
            if folder.is_dir():
                copy_rest(folder, partial)
            else:
                transformers.AutoTokenizer.from_pretrained(source).save_pretrained(partial)
            small.save_pretrained(partial)
    return f"{after:,} of {before:,} parameters are kept, {len(kept_of(small.config) or ())} groups of layers pruned"
