"""Put mixtures in the place of layers, and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..errors import ConfigError
from ..layers import Site
from ..offload import execution_device
from .mixture import Mixture


def inject(model: nn.Module, sites: Sequence[Site], mixtures: Sequence[Mixture]) -> None:
    """Put mixtures in the place of the layers of their sites; a layer that several parents share is replaced in each.

    Args:
        model: changed in place.
        sites: of the model, each a layer (*rows, i) -> (*rows, o).
        mixtures: one for each site, on its layer.
    """
    made: dict[int, Mixture] = {}
    for site, mixture in zip(sites, mixtures, strict=True):
        parent = model.get_submodule(site.name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            # its inference fast path reads linear1.weight and would skip the experts; this switch turns it off
            parent.activation_relu_or_gelu = 0
        mixture.branches.to(*placement(site.module))
        mixture.train(site.module.training)
        made[id(site.module)] = mixture
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            parent_name, _, child = path.rpartition(".")
            parent = model.get_submodule(parent_name)
            if not isinstance(parent, Mixture):
                setattr(parent, child, made[id(module)])


def take_out(model: nn.Module, chosen: set[int] | None = None) -> None:
    """Put the layers of mixtures back in their place, their weights (o, i) untouched.

    Args:
        model: changed in place.
        chosen: ids of the mixtures; None takes all of them.
    """
    # from the inside out: a block with experts may hold layers with experts
    for path, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(module, Mixture) and (chosen is None or id(module) in chosen):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)


def copy_sharing(model: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """Return a copy of a model that shares its frozen tensors (o, i): its modules can change, its memory hardly grows.

    Args:
        model: with mixtures inside or not; what is trained is copied.
        own: names of modules that are copied though they may be frozen.
    """
    heads = tuple(f"{name}." for name in own)
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and not n.startswith(heads)]
    return copy.deepcopy(model, {id(t): t for t in [*frozen, *model.buffers()]})


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where new parameters go: the layer's device; fp32 whatever the base is in, fp64 for an fp64 base.

    Raises:
        ConfigError: the layer's weights are on the meta device, and nothing brings them to another one when it runs.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":  # offloaded: accelerate brings the weights to this device when the layer runs
        found = execution_device(module)
        if found is None:
            raise ConfigError(
                f"the weights of a {type(module).__name__} are on the meta device, without values, and nothing brings "
                "them to another when it runs: load the base first (from_pretrained, or to_empty and load_state_dict), "
                "or let accelerate dispatch it (device_map, cpu_offload, disk_offload)."
            )
        device = found
    double = any(t.dtype == torch.float64 for t in tensors)
    return device, torch.float64 if double else torch.float32
