"""The architecture of an exported folder: any causal model of transformers on the engine's layers, with mixtures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from ...errors import BackendError, CheckpointError, ConfigError
from ...mixture import Branch
from ...types import Context
from ..rebuild import Mixtures
from .engine_layers import attach, check_alone, sizes
from .registration import check_version, engine_version
from .routing_load import RoutingLoad

PREFIX = "moa."  # of the mixtures' tensors in a folder's files


class MoaForCausalLM(TransformersForCausalLM):
    """A causal model whose linear layers carry mixtures, (*rows, i) -> (*rows, o).

    Raises:
        BackendError: a version of the engine that is not known, LoRA of the engine's own beside the mixtures, or a
            second compiled engine in one process.
        ConfigError: a router that is not a function of the row.
        CheckpointError: files whose mixtures are not those of the configuration.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_version(engine_version())
        if vllm_config.lora_config is not None:
            raise BackendError(
                "enable_lora beside a mixture would act on a part of the layers: serve the base with LoRA, or the "
                "mixture without it."
            )
        check_alone(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        recipes = self.config.moa["recipes"]
        places = {name: self._place(name) for row in recipes for name in row["layers"]}
        shapes = {name: sizes(self.get_submodule(layer), shard) for name, (layer, shard) in places.items()}
        with torch.device(self.device_config.device):
            load = RoutingLoad.of_engine(vllm_config) if get_tensor_model_parallel_rank() == 0 else None
            self.mixtures = Mixtures(recipes, shapes, Context(trace=load))
        by_layer: dict[str, dict[Any, Any]] = {}
        for name, mixture in self.mixtures.by_name.items():
            for branch in mixture.branches:
                assert isinstance(branch, Branch)
                if not branch.router.rowwise:
                    raise ConfigError(f"{name}: {type(branch.router).__name__} does not route each row by itself.")
            layer, shard = places[name]
            by_layer.setdefault(layer, {})[shard] = mixture
        for layer, found in by_layer.items():
            attach(self.get_submodule(layer), layer, found, load)
        for parameter in self.mixtures.parameters():
            set_weight_attrs(parameter, {"weight_loader": default_weight_loader})
        self._filled = False

    def _place(self, name: str) -> tuple[str, Any]:
        """Return the engine's layer that an original layer became, and which shard of it; None is the whole."""
        found = self.hf_to_vllm_mapper._map_name_with_shard(f"{name}.weight")
        if found is None:
            raise BackendError(f"the engine has no layer for {name}.")
        return found[0].removesuffix(".weight"), found[1]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill base and mixtures from (name, tensor of any shape), and return the names of what was filled.

        Raises:
            CheckpointError: tensors of the mixtures are missing, unexpected or of another shape.
        """
        own: dict[str, Tensor] = {}

        def rest() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(PREFIX):
                    own[name.removeprefix(PREFIX)] = tensor
                else:
                    yield name, tensor

        loaded: set[str] = super().load_weights(rest())
        if own or not self._filled:
            loaded |= self._fill(own)
        return loaded | {f"mixtures.{name}" for name, _ in self.mixtures.named_parameters()}

    def _fill(self, tensors: dict[str, Tensor]) -> set[str]:
        names = self.mixtures.checkpoint_names()
        own = {**dict(self.mixtures.named_parameters()), **dict(self.mixtures.named_buffers())}
        first: dict[int, str] = {}
        wanted = {n: names[n] for n in names if first.setdefault(id(own[n]), n) == n}  # shared tensors are stored once
        missing, unexpected = set(wanted.values()) - tensors.keys(), tensors.keys() - set(names.values())
        if missing or unexpected:
            shown = "; ".join(sorted(missing | unexpected)[:4])
            raise CheckpointError(
                f"the mixtures' tensors do not fit: {len(missing)} missing, {len(unexpected)} unexpected ({shown}). "
                "Export the checkpoint again: moa export CHECKPOINT --to vllm OUT."
            )
        for name, stored in wanted.items():
            target, tensor = own[name], tensors[stored]
            if target.shape != tensor.shape:
                raise CheckpointError(f"{stored} is {tuple(tensor.shape)}, the engine has {tuple(target.shape)}.")
            getattr(target, "weight_loader", default_weight_loader)(target, tensor)
        self._filled = True
        return {f"mixtures.{name}" for name in names}
