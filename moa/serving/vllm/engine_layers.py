"""The engine's linear layers with mixtures: one opaque op each, so that its graphs hold one node."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear

from ...errors import BackendError
from ...mixture import Mixture
from .axis import Axis
from .routing_load import RoutingLoad
from .sharding import Part, ServedLayer

# by a name that the op can carry through a graph; an engine that is gone takes its own along
_LAYERS: weakref.WeakValueDictionary[str, ServedLayer] = weakref.WeakValueDictionary()


def check_alone(config: Any) -> None:
    """Check that an engine whose graphs are compiled is alone in its process; no tensors.

    A compiled graph, which the engine keeps on disk, holds names of layers: those of a second engine are others.

    Args:
        config: of the engine.

    Raises:
        BackendError: it is not.
    """
    if getattr(getattr(config.compilation_config, "mode", None), "name", "NONE") == "NONE":
        return
    gc.collect()  # an engine that nobody holds any longer is a cycle
    if _LAYERS:
        raise BackendError(
            "a second engine of mixtures in one process cannot be compiled: give it a process of its own "
            "(VLLM_ENABLE_V1_MULTIPROCESSING=1, the default), or enforce_eager=True."
        )


@torch.library.custom_op("moa::served_layer", mutates_args=())
def served_layer(x: Tensor, key: str) -> Tensor:
    """Return the output (*rows, o) of a layer and its mixtures for x (*rows, i)."""
    return _LAYERS[key](x)


@served_layer.register_fake
def _(x: Tensor, key: str) -> Tensor:
    return _LAYERS[key].like(x)


@functools.cache
def _with_mixtures(cls: type) -> type:
    """Return a class of the engine whose forward goes through the op: its parameters keep their names."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the output (*rows, o) of x (*rows, i)."""
        if torch.compiler.is_compiling():
            found: Tensor = served_layer(x, self.moa_key)
            return found
        return _LAYERS[self.moa_key](x)

    return type(cls.__name__, (cls,), {"forward": forward})


def attach(layer: nn.Module, name: str, mixtures: Mapping[Any, Mixture], load: RoutingLoad | None = None) -> None:
    """Give a layer of the engine the mixtures of the layers that it stands for.

    Args:
        layer: a linear, fused or not, (*rows, i) -> (*rows, o).
        name: dotted, in the engine's model.
        mixtures: by the shard that each original layer became; None is the whole layer.
        load: where the routing's load is counted, or None.

    Raises:
        BackendError: a layer of a kind that the plug-in does not know.
    """
    if not isinstance(layer, LinearBase) or getattr(layer, "return_bias", False):
        raise BackendError(f"{name} is a {type(layer).__name__}: moa's plug-in knows the engine's linear layers.")
    own: Any = type(layer)
    run = functools.partial(own.forward, layer)
    parts = _parts(layer, mixtures)
    served = ServedLayer(run, _input(layer), parts, lambda: layer.bias, load)
    key = next(free for n in itertools.count() if (free := f"{name}#{n}") not in _LAYERS)
    layer.moa_served, layer.moa_key = served, key
    _LAYERS[key] = served
    layer.__class__ = _with_mixtures(own)


def sizes(layer: Any, shard: Any) -> tuple[int, int]:
    """Return i and o, whole, of the original layer that became one shard of a layer; None is the whole layer."""
    if isinstance(layer, QKVParallelLinear) and shard is not None:
        heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
        return layer.input_size, heads * (layer.v_head_size if shard == "v" else layer.head_size)
    return layer.input_size, layer.output_size if shard is None else layer.output_sizes[shard]


def _gather(x: Tensor) -> Tensor:
    found: Tensor = tensor_model_parallel_all_gather(x.contiguous(), -1)
    return found


def _axis(layer: Any, size: int, copies: int = 1) -> Axis:
    return Axis(size, layer.tp_size, layer.tp_rank, copies, _gather)


def _input(layer: Any) -> Axis:
    if isinstance(layer, RowParallelLinear) and layer.input_is_parallel:
        return _axis(layer, layer.input_size_per_partition)
    return Axis(layer.input_size)


def _parts(layer: Any, mixtures: Mapping[Any, Mixture]) -> Sequence[Part]:
    if isinstance(layer, QKVParallelLinear):
        kv, copies = layer.num_kv_heads, layer.num_kv_head_replicas
        shapes = {
            "q": _axis(layer, layer.num_heads * layer.head_size),
            "k": _axis(layer, kv * layer.head_size, copies),
            "v": _axis(layer, kv * layer.v_head_size, copies),
        }
        return [Part(mixtures.get(shard), axis) for shard, axis in shapes.items()]
    if None not in mixtures:
        return [Part(mixtures.get(n), _axis(layer, o // layer.tp_size)) for n, o in enumerate(layer.output_sizes)]
    cut = isinstance(layer, ColumnParallelLinear) and not layer.gather_output
    axis = _axis(layer, layer.output_size_per_partition) if cut else Axis(layer.output_size)
    return [Part(mixtures[None], axis)]
