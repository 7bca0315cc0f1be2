"""Find the layers a recipe is for, and put mixtures in their place."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable

import torch
from torch import nn

from .errors import ConfigError
from .layers import features, is_convolution
from .mixture import Mixture
from .recipes import Recipe, Site
from .types import Context


def linear_sites(model: nn.Module) -> list[Site]:
    """Return every linear layer and convolution (i -> o) below model that is called as a module, in order, each once.

    Left out: children of `nn.MultiheadAttention`, which reads their weight and never calls them, and what already
    is inside a mixture.
    """
    sites: list[Site] = []
    hidden: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        if isinstance(module, (nn.MultiheadAttention, Mixture)):
            hidden.add(f"{name}.")
            continue
        size = features(module)
        if size is not None and name:
            sites.append(Site(name, module, *size))
    return sites


def backbone_prefix(model: nn.Module) -> str:
    """Return the dotted prefix of the pretrained body below a head, "" where the model has no head.

    transformers names it in `base_model_prefix`; heads outside it are new or are output embeddings.
    """
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def find_sites(model: nn.Module, targets: str | tuple[str, ...]) -> list[Site]:
    """Return the layers that targets names.

    Args:
        model: any module.
        targets: "all-linear" (every linear of the body, heads left out), "attention" or "ffn" (those of it inside or
            outside attention blocks; ffn layers come as a pair d -> f, f -> d), a tuple of name endings, or a regex
            on the whole name. The last two find convolutions too.

    Raises:
        ConfigError: nothing matches (near misses are named), or a grouped convolution does.
    """
    sites = linear_sites(model)
    if isinstance(targets, tuple):
        found = [s for s in sites if any(s.name == t or s.name.endswith(f".{t}") for t in targets)]
    elif targets in ("all-linear", "attention", "ffn"):
        prefix = backbone_prefix(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()  # where the body has no name of its own
        body = [s for s in sites if s.name.startswith(prefix) and s.module is not head and not is_convolution(s.module)]
        attention = [s for s in body if re.search(r"attn|attention", s.name, re.IGNORECASE)]
        if targets == "ffn":
            rest = [s for s in body if s not in attention]
            sizes = {(s.d_in, s.d_out) for s in rest}
            found = [s for s in rest if s.d_in != s.d_out and (s.d_out, s.d_in) in sizes]
        else:
            found = body if targets == "all-linear" else attention
    else:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(f"targets={targets!r} is not a regular expression: {error}.") from error
        found = [s for s in sites if pattern.fullmatch(s.name)]
    if not found:
        raise ConfigError(_no_match(model, targets, sites))
    for site in found:
        if getattr(site.module, "groups", 1) != 1:
            raise ConfigError(
                f"{site.name} is a {type(site.module).__name__} of {site.module.groups} groups, each of which sees its "
                "own channels: experts would mix them, which no grouped weight equals. Choose other targets."
            )
    return found


def _no_match(model: nn.Module, targets: str | tuple[str, ...], sites: list[Site]) -> str:
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not sites:
        return f"{type(model).__name__} has no linear layer that can get experts (targets={targets!r})."
    endings = sorted({s.name.rsplit(".", 1)[-1] for s in sites if not s.name.rsplit(".", 1)[-1].isdigit()})
    near = [m for w in wanted for m in difflib.get_close_matches(w.rsplit(".", 1)[-1], endings, n=3, cutoff=0.4)]
    hint = f" Near: {', '.join(near)}." if near else ""
    taken = [name for name, m in model.named_modules() if isinstance(m, Mixture)]
    already = f" {len(taken)} layers already carry experts." if taken else ""
    how = " A string is a regex on the whole name; a list holds name endings." if isinstance(targets, str) else ""
    return (
        f"targets={targets!r} matches no linear layer of {type(model).__name__}.{hint} "
        f"Linear layers end in: {', '.join(endings[:20])}.{already}{how}"
    )


def inject(model: nn.Module, recipe: Recipe, context: Context, sites: Iterable[Site] | None = None) -> list[Mixture]:
    """Replace the layers of a recipe in place by mixtures, and return them in order.

    A module that several parents share is replaced in each of them by the same mixture.

    Args:
        model: changed in place.
        recipe: which layers (unless sites are given), router and bank.
        context: shared by the mixtures.
        sites: layers to use instead of the recipe's targets, each (*rows, i) -> (*rows, o).

    Raises:
        ConfigError: nothing matches, a layer already carries experts, or a layer's weight is read without a call.
    """
    chosen = list(find_sites(model, recipe.targets) if sites is None else sites)
    made: dict[int, Mixture] = {}
    for site, mixture in zip(chosen, recipe.mixtures(chosen, context), strict=True):
        parent = model.get_submodule(site.name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            # its inference fast path reads linear1.weight and would skip the experts; this switch turns it off
            parent.activation_relu_or_gelu = 0
        mixture.branches.to(*placement(site.module))
        if not recipe.train_experts:
            for branch in mixture.branches:
                branch.bank.requires_grad_(False)
        mixture.train(site.module.training)
        made[id(site.module)] = mixture
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            parent_name, _, child = path.rpartition(".")
            parent = model.get_submodule(parent_name)
            if not isinstance(parent, Mixture):
                setattr(parent, child, made[id(module)])
    return list(made.values())


def take_out(model: nn.Module, chosen: set[int] | None = None) -> None:
    """Put the layers of mixtures back in their place, their weights (o, i) untouched.

    Args:
        model: changed in place.
        chosen: ids of the mixtures; None takes all of them.
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
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
    """Return where new parameters go: the layer's device; fp32 whatever the base is in, fp64 for an fp64 base."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    double = any(t.dtype == torch.float64 for t in tensors)
    return device, torch.float64 if double else torch.float32
