"""New mixtures in a running engine, between steps of a trainer: the base stays where it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ...errors import CheckpointError
from ...formats.atomic import replacing
from ...formats.sharded import writes_whole
from ...model.host import Host
from .vllm_folder import MIXTURES


def save_mixtures(model: Host, folder: str | Path) -> Path:
    """Write a model's mixtures, down (E, r, i) and so on, as a running engine takes them, and return the file.

    Args:
        model: that is being trained; the engine serves an export of it.
        folder: made if it does not exist; the exported one, or another.

    Raises:
        CheckpointError: other processes hold parts of the model.
    """
    target = Path(folder) / MIXTURES
    if not writes_whole(model):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"moa.{name}": tensor.cpu().contiguous() for name, tensor in model.adapter_state_dict().items()}
    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return target


def update_engine(engine: Any, folder: str | Path) -> None:
    """Give a running engine the mixtures, down (E, r, i) and so on, of a folder, and forget what it has cached.

    Names and a path go to the workers, not tensors. Without the reset of the prefix cache, prompts that were seen
    before would be answered from the old mixture.

    Args:
        engine: a `vllm.LLM` on a folder of `export_vllm`. With workers in processes of their own it needs
            VLLM_ALLOW_INSECURE_SERIALIZATION=1, as every function that is sent to them does.
        folder: of `save_mixtures`.

    Raises:
        CheckpointError: the folder has no mixtures.
    """
    file = Path(folder) / MIXTURES
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {MIXTURES}: write it with save_mixtures(model, folder).")
    engine.apply_model(partial(_load, str(file)))
    engine.reset_prefix_cache()


def _load(file: str, model: Any) -> None:
    model.load_weights(load_file(file).items())
