"""A mixture as a folder that vLLM runs: `vllm serve OUT`, `vllm.LLM(OUT)`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ConfigError
from ...formats.atomic import staged
from ...formats.checkpoint import original_name, plain_config
from ...formats.sharded import writes_whole
from ...formats.tensor_writing import copy_rest
from ...model.host import Host
from ...recipes.origins import origins
from ..servable import check_servable
from . import ARCHITECTURE, MODEL_TYPE

MIXTURES, BASE, INDEX = "moa.safetensors", "model.safetensors", "model.safetensors.index.json"
GENERATES = "ForCausalLM", "LMHeadModel"


def export_vllm(model: Host, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write base and mixtures as a folder that vLLM runs where moa is installed beside it, and return its path.

    The base's files are linked where they lie on the same disk, copied where they do not, and written from memory
    where the base came from no folder of safetensors. Of several processes the first of each machine writes, and the
    others return.

    Args:
        model: a `MoAModel` on a causal language model.
        folder: made if it does not exist.
        overwrite: allow replacing a folder that moa wrote.

    Raises:
        ConfigError: a base that is not a causal language model, or a mixture that is not a function of each row (i,):
            the reason and the next best thing are named.
        CheckpointError: the folder exists, or other processes hold parts of the model.
    """
    base: Any = model.base
    if not type(base).__name__.endswith(GENERATES):
        raise ConfigError(f"vLLM is for causal language models; the base is a {type(base).__name__}.")
    check_servable(model)
    if not writes_whole(model):
        return Path(folder)
    with staged(folder, overwrite=overwrite) as out:
        _write(model, base, out)
    return Path(folder)


def _write(model: Host, base: Any, out: Path) -> None:
    source = Path(getattr(base, "name_or_path", "") or "")
    tensors = {f"moa.{name}": tensor.cpu().contiguous() for name, tensor in model.adapter_state_dict().items()}
    save_file(tensors, out / MIXTURES, metadata={"format": "pt"})
    if source.is_dir() and any(source.glob("*.safetensors")):
        copy_rest(source, out)
        _link_weights(source, out, tensors)
    else:
        weights = {
            original_name(name): tensor.detach().cpu().contiguous()
            for name, tensor in base.named_parameters()
            if ".branches." not in name
        }
        save_file(weights, out / BASE, metadata={"format": "pt"})
        base.generation_config.save_pretrained(out)
    config = plain_config(base.config.to_dict())
    if all(parameter.is_floating_point() for parameter in base.parameters()):
        config.pop("quantization_config", None)  # of a GGUF file, which transformers has made dense
    values = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "base_config": config,
        "moa": {
            "recipes": [{**recipe.to_dict(), "layers": names} for recipe, names in model.recipes],
            "origins": {name: module for recipe, _ in model.recipes for name, module in origins(recipe).items()},
        },
    }
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _link_weights(source: Path, out: Path, mixtures: Mapping[str, Tensor]) -> None:
    """Link the base's files; an index lists the mixtures' file too, else the engine would pass over it."""
    for file in sorted(source.glob("*.safetensors")):
        _link(file.resolve(), out / file.name)
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text())
    else:
        index = {"metadata": {}, "weight_map": {}}
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                index["weight_map"] |= dict.fromkeys(opened.keys(), file.name)
    index["weight_map"] |= dict.fromkeys(mixtures, MIXTURES)
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _link(file: Path, to: Path) -> None:
    to.unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError:  # another disk
        shutil.copyfile(file, to)
