"""Find the layers that a recipe is for."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import ConfigError
from ..layers import Site, features, is_convolution
from .base_experts import fused_experts
from .fused_layouts import layout_of
from .mixture import BlockMixture, Mixture
from .narrow import Narrowing, ends_in, pattern
from .unadapted import said_of_sizeless
from .uncalled import is_idle_in, is_left_out, maps_linearly

GROUPS = ("all-linear", "attention", "ffn", "moe-experts")
ALL = Narrowing()


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
        if isinstance(module, BlockMixture):
            hidden.add(f"{name}.branches.")  # the block's own layers are free
            continue
        if isinstance(module, (nn.MultiheadAttention, Mixture)):
            hidden.add(f"{name}.")
            continue
        size = features(module)
        if size is not None and name:
            sites.append(Site(name, module, *size))
    return sites


def experts_sites(model: nn.Module) -> list[Site]:
    """Return the modules of fused experts below model, (T, d) -> (T, d), whose way to compute is known, in order."""
    found = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name, _ in fused_experts(model)):
        module = model.get_submodule(path)
        layout = layout_of(module)
        if layout is not None:
            _, d_in, _ = layout.size(module, layout.up)
            found.append(Site(path, module, d_in, layout.size(module, layout.down)[2]))
    return found


def all_sites(model: nn.Module) -> list[Site]:
    """Return what a recipe for layers may sit on, (*rows, i) -> (*rows, o): linear layers, fused experts, in order."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted([*linear_sites(model), *experts_sites(model)], key=lambda site: order[site.name])


def backbone_prefix(model: nn.Module) -> str:
    """Return the dotted prefix of the pretrained body below a head, "" where the model has no head.

    transformers names it in `base_model_prefix`; heads outside it are new or are output embeddings.
    """
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def find_sites(model: nn.Module, targets: str | tuple[str, ...], narrowing: Narrowing = ALL) -> list[Site]:
    """Return the layers that targets names and narrowing keeps.

    Args:
        model: any module.
        targets: "all-linear" (every linear of the body, heads left out), "attention" or "ffn" (those of it inside or
            outside attention blocks; ffn layers come as a pair d -> f, f -> d), "moe-experts" (the base's own fused
            experts), a tuple of name endings and of these words, or a regex on the whole name. Endings and regex
            find convolutions too. The first three leave out layers that are known to be read and not called, and
            linear classes of a model's own that are not a linear map, as routers are.
        narrowing: leaves out some of them.

    Raises:
        ConfigError: nothing matches, or nothing matches one name of several (near misses are named), or nothing is
            kept; a grouped convolution is; fused experts whose class computes in a way that is not known.
    """
    if not targets:
        raise ConfigError(_no_match(model, "", linear_sites(model)))
    alone = isinstance(targets, str)
    names: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = _named_by(model, target, ending=not alone)
        if not found:
            raise ConfigError(_no_match(model, target, linear_sites(model), group=alone))
        names |= {site.name for site in found}
    chosen = narrowing.of(model, [site for site in all_sites(model) if site.name in names])
    for site in chosen:
        if getattr(site.module, "groups", 1) != 1:
            raise ConfigError(
                f"{site.name} is a {type(site.module).__name__} of {site.module.groups} groups, each of which sees its "
                "own channels: experts would mix them, which no grouped weight equals. Choose other targets."
            )
    return chosen


def _named_by(model: nn.Module, target: str, *, ending: bool) -> list[Site]:
    """Return the layers (i -> o) that one word names: a group, the ending of their names, or a regex."""
    sites = linear_sites(model)
    if target == "moe-experts":
        return _fused(model)
    if target in GROUPS:
        body = _body(model, sites)
        attention = [s for s in body if _is_attention(s)]
        if target == "ffn":
            return _feed_forward(model, [s for s in body if s not in attention])
        return body if target == "all-linear" else attention
    if ending:
        return [s for s in [*sites, *experts_sites(model)] if ends_in(s.name, target)]
    return [s for s in sites if pattern("targets", target).fullmatch(s.name)]


def _fused(model: nn.Module) -> list[Site]:
    """Return the sites of fused experts, (T, d) -> (T, d).

    Raises:
        ConfigError: the class of some is not known.
    """
    found = experts_sites(model)
    known = {site.name for site in found}
    for name, tensor in fused_experts(model):
        path = name.rpartition(".")[0]
        if path not in known:
            kind = type(model.get_submodule(path)).__name__
            raise ConfigError(
                f"{name} {tuple(tensor.shape)} belongs to a {kind}, whose way to compute is not known: "
                "targets='moe-experts' is for classes that transformers runs by its own kernels "
                "(use_experts_implementation), and for Llama 4's."
            )
    return found


def _is_attention(site: Site) -> bool:
    return re.search(r"attn|attention", site.name, re.IGNORECASE) is not None


def idle_sites(model: nn.Module) -> list[Site]:
    """Return the linear layers (i -> o) of a model's body that groups of targets leave out for what they are."""
    sites = linear_sites(model)
    meant = {site.name for site in _body(model, sites)}
    return [site for site in _body(model, sites, idle=True) if site.name not in meant]


def _body(model: nn.Module, sites: Sequence[Site], *, idle: bool = False) -> list[Site]:
    """Return the layers (i -> o) of a model's body that groups of targets mean, or also those that do nothing."""
    prefix = backbone_prefix(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()  # where the body has no name of its own
    body: list[Site] = []
    for site in sites:
        parent, _, child = site.name.rpartition(".")
        outside = not site.name.startswith(prefix) or site.module is head or is_convolution(site.module)
        known = is_left_out(model.get_submodule(parent), child) or is_idle_in(model, site.name)
        if not outside and (idle or (not known and maps_linearly(site.module))):
            body.append(site)
    return body


def _feed_forward(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Return the layers of feed-forward blocks: d -> f and f -> d in one block of a stack, or d -> 2f and f -> d.

    The last are a fused gate and up projection; they are a block where their parent holds nothing else, as that of a
    state-space layer does.
    """
    numbers = block_numbers(sites)
    stacked = [site for site in sites if numbers[site.name]] or sites
    sizes = {(site.d_in, site.d_out, *numbers[site.name]) for site in stacked}
    found = [s for s in stacked if s.d_in != s.d_out and (s.d_out, s.d_in, *numbers[s.name]) in sizes]
    names = {site.name for site in found}
    for first, last in itertools.pairwise(stacked):
        parent = first.name.rpartition(".")[0]
        if _is_fused(first, last) and not {first.name, last.name} & names:
            held = {id(p) for p in model.get_submodule(parent).parameters()}
            if held == {id(p) for site in (first, last) for p in site.module.parameters()}:
                names |= {first.name, last.name}
    return [site for site in stacked if site.name in names]


def _is_fused(first: Site, last: Site) -> bool:
    """Tell whether two layers of one parent are gate and up in one, d -> 2f, and down, f -> d."""
    together = first.name.rpartition(".")[0] == last.name.rpartition(".")[0]
    return together and first.d_out == 2 * last.d_in and first.d_in == last.d_out


def named_sites(model: nn.Module, free: Sequence[Site], names: Iterable[str]) -> list[Site]:
    """Return the sites, (*rows, i) -> (*rows, o), of some names, in the order in which they run.

    Raises:
        ConfigError: a name that no free site has.
    """
    wanted = set(names)
    missing = sorted(wanted - {site.name for site in free})
    if missing:
        raise ConfigError(f"no free linear layer or block named {', '.join(missing)} in {type(model).__name__}.")
    return [site for site in free if site.name in wanted]


def block_sites(model: nn.Module) -> list[Site]:
    """Return the blocks of a model's stacks, (B, S, d) -> (B, S, d): the members of its outermost module lists.

    Their width d is the configuration's hidden_size, or the features of the last linear layer inside.
    """
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    sites: list[Site] = []
    for path, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or any(part.isdigit() for part in path.split(".")):
            continue
        for name, block in stack.named_children():
            linears = linear_sites(block)
            if features(block) is None and not isinstance(block, Mixture) and (width or linears):
                d = width or linears[-1].d_out
                sites.append(Site(f"{path}.{name}" if path else name, block, d, d))
    return sites


def find_blocks(model: nn.Module, targets: str | tuple[str, ...], narrowing: Narrowing = ALL) -> list[Site]:
    """Return the blocks, (B, S, d) -> (B, S, d), that targets names and narrowing keeps.

    Args:
        model: any module.
        targets: "all-linear" (every block of the body), a tuple of name endings, or a regex on the whole name.
        narrowing: leaves out some of them.

    Raises:
        ConfigError: nothing matches, or nothing is kept.
    """
    sites = block_sites(model)
    if targets == "all-linear":
        found = [site for site in sites if site.name.startswith(backbone_prefix(model))]
    elif isinstance(targets, tuple):
        found = [s for s in sites if any(ends_in(s.name, t) for t in targets)]
    else:
        found = [site for site in sites if pattern("targets", targets).fullmatch(site.name)]
    if not found:
        names = ", ".join(site.name for site in sites[:8]) or "none"
        raise ConfigError(f"targets={targets!r} matches no block of {type(model).__name__}; its blocks are: {names}.")
    return narrowing.of(model, found)


def _no_match(model: nn.Module, target: str, sites: list[Site], *, group: bool = True) -> str:
    """Return the message for a target that matches nothing."""
    if target == "moe-experts":
        return f"targets={target!r}: {type(model).__name__} has no fused experts, tensors of 3 axes, without adapters."
    fused = [f"{name} {tuple(p.shape)}" for name, p in fused_experts(model)]
    tensors = (
        f" Fused expert tensors of 3 axes are not linear layers: {', '.join(fused[:2])}, …; targets='moe-experts' "
        "adapts them."
        if fused
        else ""
    )
    sizeless = said_of_sizeless(model)
    sizeless = f" {sizeless}." if sizeless else ""
    if not sites:
        return (
            f"{type(model).__name__} has no linear layer that can get experts (targets={target!r}).{sizeless}{tensors}"
        )
    linear = _endings(site for site in sites if not is_convolution(site.module))
    convolved = _endings(site for site in sites if is_convolution(site.module))
    known = [name for name in (*linear, *convolved, *GROUPS) if name != target]
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], known, n=3, cutoff=0.4)
    there = f" Linear layers end in: {', '.join(linear[:20])}." if linear else ""
    there += f" Convolutions, which have to be named, end in: {', '.join(convolved[:20])}." if convolved else ""
    hint = f" Near: {', '.join(near)}." if near else ""
    others = [(n, m) for n, m in model.named_modules() if ends_in(n, target)]
    kind = f" {others[0][0]} is of class {type(others[0][1]).__name__}." if others else ""
    taken = [name for name, m in model.named_modules() if isinstance(m, Mixture)]
    already = f" {len(taken)} layers already carry experts." if taken else ""
    how = " A string is a regex on the whole name; a list holds name endings." if group else ""
    return (
        f"targets={target!r} matches no linear layer of {type(model).__name__}.{kind}{sizeless}{hint}"
        f"{there}{already}{tensors}{how}"
    )


def _endings(sites: Iterable[Site]) -> list[str]:
    """Return the last parts of names, but for numbers."""
    return sorted({last for site in sites if not (last := site.name.rsplit(".", 1)[-1]).isdigit()})


def feed_forward_blocks(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the feed-forward blocks among the sites: the layers d -> f that open one, then the f -> d' that closes it.

    Told from sizes and order, not from names, but for attention, which is left out by its name. Gate and up may be one
    layer d -> 2f. In a model with a stack, what stands outside the stack is not a block.

    Args:
        sites: of one model, in order.
    """
    blocks: list[list[Site]] = []
    opened: list[Site] = []
    numbers = block_numbers(sites)
    stacked = any(numbers.values())
    for site in sites:
        if _is_attention(site) or is_convolution(site.module) or (stacked and not numbers[site.name]):
            continue
        together = bool(opened) and numbers[site.name] == numbers[opened[0].name]
        if together and (site.d_in == opened[0].d_out or (len(opened) == 1 and _is_fused(opened[0], site))):
            blocks.append([*opened, site])
            opened = []
        elif together and (site.d_in, site.d_out) == (opened[0].d_in, opened[0].d_out):
            opened.append(site)
        else:
            opened = [site] if site.d_in != site.d_out else []
    return blocks


def block_numbers(sites: Sequence[Site]) -> dict[str, list[str]]:
    """Return name -> the numbers in a layer's name that tell its block: layers of one block agree in them.

    Layers that are numbered themselves and follow on one another, each (*rows, i) -> the next one's i, are the steps of
    one `nn.Sequential`; their own number tells no block. Those of a list of experts, all d -> f, do not follow so.

    Args:
        sites: of one model, in order.
    """
    lists: dict[str, list[Site]] = {}
    for site in sites:
        parent, _, last = site.name.rpartition(".")
        if last.isdigit():
            lists.setdefault(parent, []).append(site)
    steps = {
        site.name
        for members in lists.values()
        if all(one.d_out == other.d_in for one, other in itertools.pairwise(members))
        for site in members
    }
    found = {}
    for site in sites:
        parts = site.name.split(".")
        found[site.name] = [part for part in parts[: -1 if site.name in steps else None] if part.isdigit()]
    return found
