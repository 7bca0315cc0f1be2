"""A base without some of its attention heads and feed-forward channels: what is kept, and where it is in each layer.

A pruned model is a function of the full one and of the kept indices, which lie in its configuration under `moa_pruned`.
Its hidden size, embeddings and head are the full one's; its layers may have different numbers of heads and channels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, shown
from ..layers import features, is_dense
from ..mixture import backbone_prefix

KEY = "moa_pruned"  # in a configuration: name of a group below the body -> {"of": units, "kept": [their numbers]}
Kept = Mapping[str, Mapping[str, Any]]
COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size")


@dataclass(frozen=True)
class Layout:
    """How a kind of block names what is pruned together.

    Args:
        kind: "attention" or "feed-forward".
        outs: layers whose rows are units, below the group's module.
        ins: the layer whose columns are units.
        head_dim: attribute with the features of one head; "" where a unit is one channel.
    """

    kind: str
    outs: tuple[str, ...]
    ins: str
    head_dim: str = ""


LAYOUTS = (
    Layout("attention", ("q_proj", "k_proj", "v_proj"), "o_proj", "head_dim"),
    Layout("attention", ("self.query", "self.key", "self.value"), "output.dense", "self.attention_head_size"),
    Layout("feed-forward", ("gate_proj", "up_proj"), "down_proj"),
    Layout("feed-forward", ("intermediate.dense",), "output.dense"),
)


@dataclass(frozen=True)
class Group:
    """What is pruned together: in every layer a unit is n / units features in a row, whatever the layer's own n.

    A unit of attention is a key-value head with the query heads that read it, one of feed-forward is a channel.

    Args:
        name: of the module that holds the layers, below the body.
        kind: as in `Layout`.
        n_units: of the full model.
        layers: dotted name in the model -> axis of its weight (o, i) that is pruned.
    """

    name: str
    kind: str
    n_units: int
    layers: Mapping[str, int]


@dataclass(frozen=True)
class Cut:
    """Which features of a layer are kept.

    Args:
        axis: of the weight: 0 outputs, 1 inputs.
        n: features of the full layer.
        at: (k,) int64, the kept ones, ascending.
    """

    axis: int
    n: int
    at: Tensor

    def narrow(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the kept features (…, k, …) of a tensor (…, n, …) along an axis."""
        return tensor.index_select(axis, self.at.to(tensor.device))


def groups(model: nn.Module) -> dict[str, Group]:
    """Return what could be pruned of a full model, (B, S) -> its outputs, by name below its body.

    Raises:
        ConfigError: a group in which something else depends on the number of its heads or channels; it is named.
    """
    prefix = backbone_prefix(model)
    found = {}
    for path, module in model.named_modules():
        if not path.startswith(prefix):
            continue
        inner = dict(module.named_modules())
        for layout in LAYOUTS:
            sizes = {name: features(inner[name]) for name in (*layout.outs, layout.ins) if name in inner}
            if len(sizes) == len(layout.outs) + 1 and all(sizes.values()):
                group = _group(path, prefix, module, layout, sizes)
                found[group.name] = group
    return found


def _group(path: str, prefix: str, module: nn.Module, layout: Layout, sizes: Mapping[str, Any]) -> Group:
    layers = {**dict.fromkeys(layout.outs, 0), layout.ins: 1}
    n = {name: sizes[name][1 - axis] for name, axis in layers.items()}
    head_dim = 1
    if layout.head_dim:
        holder, _, attribute = layout.head_dim.rpartition(".")
        head_dim = getattr(module.get_submodule(holder), attribute, 0)
    n_units = min(n.values()) // head_dim if head_dim else 0
    if not n_units or any(size % n_units for size in n.values()):
        raise ConfigError(
            f"{path}: {', '.join(f'{name} has {size}' for name, size in n.items())} features, which are not as many "
            f"for each {'head' if layout.head_dim else 'channel'}: this {layout.kind} cannot be pruned."
        )
    beside = {name.rpartition(".")[0] for name in layout.outs}
    widths = {*n.values(), *(size // head_dim for size in n.values())} - {head_dim}
    for name, tensor in module.named_parameters():
        holder = name.rpartition(".")[0]
        near = holder not in layers and bool(beside & {holder, holder.rpartition(".")[0]})
        if near and widths & set(tensor.shape):
            raise ConfigError(
                f"{path}.{name} {tuple(tensor.shape)} depends on the number of {layout.kind} units, and only "
                f"{', '.join(layers)} are known to: this model cannot be pruned."
            )
    return Group(path.removeprefix(prefix), layout.kind, n_units, {f"{path}.{name}": a for name, a in layers.items()})


def cuts(model: nn.Module, kept: Kept) -> dict[str, Cut]:
    """Return by dotted name what is kept of each layer of a full model, (B, S) -> its outputs.

    Args:
        model: full; its layers may be quantised, as only their sizes are read.
        kept: as in a configuration.

    Raises:
        ConfigError: a group that the model has not, another number of units, or numbers that are none of them.
    """
    there = groups(model)
    found = {}
    for name, row in kept.items():
        group, numbers = there.get(name), list(row["kept"])
        if group is None:
            raise ConfigError(
                f"the kept indices do not fit this {type(model).__name__}: it has no {shown(name)} with "
                f"{' or '.join(', '.join((*layout.outs, layout.ins)) for layout in LAYOUTS)}."
            )
        if row["of"] != group.n_units:
            raise ConfigError(
                f"the kept indices do not fit this {type(model).__name__}: they are of {row['of']} units of {name}, "
                f"and it has {group.n_units}."
            )
        if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= group.n_units:
            raise ConfigError(f"{name}: kept must be ascending numbers from 0 to {group.n_units - 1}, at least one.")
        units = torch.tensor(numbers, device="cpu")
        for layer, axis in group.layers.items():
            size = features(model.get_submodule(layer))
            assert size is not None
            n = size[1 - axis]
            width = n // group.n_units
            at = (units[:, None] * width + torch.arange(width, device="cpu")).flatten()  # (k,)
            found[layer] = Cut(axis, n, at)
    return found


def kept_of(config: Any) -> Kept | None:
    """Return the kept indices of a configuration's values, of a model or of one around an encoder; None of a full one.

    Args:
        config: a configuration or its plain values; no tensors, so no shapes.

    Raises:
        ConfigError: they are not written as `prune` writes them.
    """
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    inner = values.get("encoder")
    found = values.get(KEY) or (inner.get(KEY) if isinstance(inner, Mapping) else None)
    if not found:
        return None
    whole = isinstance(found, Mapping) and all(
        isinstance(row, Mapping)
        and type(row.get("of")) is int
        and isinstance(row.get("kept"), list)
        and all(type(number) is int for number in row["kept"])
        for row in found.values()
    )
    if not whole:
        raise ConfigError(f'{KEY} must be {{group: {{"of": units, "kept": [numbers]}}}}, got {shown(repr(found))}.')
    return found  # type: ignore[no-any-return]


def check_prunable(model: nn.Module, layers: Iterable[str]) -> None:
    """Check that layers (*rows, i) -> (*rows, o) are plain linears whose weights are at hand.

    Raises:
        ConfigError: a quantised one, one with experts, or one whose weight is on the meta device or offloaded.
    """
    for name in layers:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear or not is_dense(layer.weight):
            raise ConfigError(
                f"{name} is a {type(layer).__name__} that is quantised or carries experts: prune the base as floats, "
                "save it, and quantise it or build on it then."
            )
        if layer.weight.is_meta:
            raise ConfigError(f"{name} is on the meta device or offloaded: load the base into memory to prune it.")


def smaller(model: nn.Module, kept: Kept) -> nn.Module:
    """Return a copy of a full model, (B, S) -> its outputs, that has only what is kept; it shares nothing with it.

    Args:
        model: full, left as it is.
        kept: as in a configuration.

    Raises:
        ConfigError: as `cuts` and `check_prunable`.
    """
    found = cuts(model, kept)
    check_prunable(model, found)
    # in place of a layer the copy gets its smaller one, so that no second full copy exists
    memo: dict[int, Any] = {id(model.get_submodule(name)): layer for name, layer in _narrowed(model, found).items()}
    made = copy.deepcopy(model, memo)
    _say_what_is_kept(made, kept)
    return made


def shrink(model: nn.Module, kept: Kept) -> None:
    """Take out of a full model, (B, S) -> its outputs, what is not kept, in place.

    Args:
        model: full, changed.
        kept: as in a configuration.

    Raises:
        ConfigError: as `cuts`.
    """
    for name, layer in _narrowed(model, cuts(model, kept)).items():
        model.set_submodule(name, layer)
    _say_what_is_kept(model, kept)


def _narrowed(model: nn.Module, found: Mapping[str, Cut]) -> dict[str, nn.Linear]:
    made = {}
    for name, cut in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = cut.narrow(layer.weight.detach(), cut.axis)  # (o, i)
        small = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        small.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            bias = layer.bias.detach()
            bias = bias.clone() if cut.axis else cut.narrow(bias, 0)  # (o,)
            small.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        made[name] = small.train(layer.training)
    return made


def _say_what_is_kept(model: nn.Module, kept: Kept) -> None:
    """Write what is kept into the configuration of the body, and the number of heads where attention says one."""
    prefix = backbone_prefix(model)
    for name, row in kept.items():
        module = model.get_submodule(prefix + name)
        for part in (module, *module.children()):
            for count in COUNTS:
                whole = vars(part).get(count)
                if isinstance(whole, int):
                    setattr(part, count, whole * len(row["kept"]) // row["of"])
    body = model.get_submodule(prefix.removesuffix("."))
    plain = {name: {"of": row["of"], "kept": list(row["kept"])} for name, row in kept.items()}
    setattr(body.config, KEY, plain)


@functools.cache
def _shrinking(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a class that makes the layers of a pruned model, as its configuration says, for weights to be read in."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        shrink(self, kept_of(config) or {})

    members = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), members)


def read_pruned(cls: Any, name_or_path: Any, **kwargs: Any) -> Any:
    """Return the pruned model, (B, S) -> its outputs, that a folder holds, by the class's own `from_pretrained`.

    Args:
        cls: a class of transformers, not one of its automatic ones.
        name_or_path: folder or hub id.
        kwargs: for `from_pretrained`.
    """
    model = _shrinking(cls).from_pretrained(name_or_path, **kwargs)  # type: ignore[attr-defined]
    model.__class__ = cls
    return model
