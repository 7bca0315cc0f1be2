"""Find the layers that a recipe is for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import ConfigError
from ..layers import Site, features, is_convolution
from .mixture import BlockMixture, Mixture


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
        found = [s for s in sites if _pattern(targets).fullmatch(s.name)]
    if not found:
        raise ConfigError(_no_match(model, targets, sites))
    for site in found:
        if getattr(site.module, "groups", 1) != 1:
            raise ConfigError(
                f"{site.name} is a {type(site.module).__name__} of {site.module.groups} groups, each of which sees its "
                "own channels: experts would mix them, which no grouped weight equals. Choose other targets."
            )
    return found


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


def find_blocks(model: nn.Module, targets: str | tuple[str, ...]) -> list[Site]:
    """Return the blocks, (B, S, d) -> (B, S, d), that targets names.

    Args:
        model: any module.
        targets: "all-linear" (every block of the body), a tuple of name endings, or a regex on the whole name.

    Raises:
        ConfigError: nothing matches.
    """
    sites = block_sites(model)
    if targets == "all-linear":
        found = [site for site in sites if site.name.startswith(backbone_prefix(model))]
    elif isinstance(targets, tuple):
        found = [s for s in sites if any(s.name == t or s.name.endswith(f".{t}") for t in targets)]
    else:
        found = [site for site in sites if _pattern(targets).fullmatch(site.name)]
    if not found:
        names = ", ".join(site.name for site in sites[:8]) or "none"
        raise ConfigError(f"targets={targets!r} matches no block of {type(model).__name__}; its blocks are: {names}.")
    return found


def _pattern(targets: str) -> re.Pattern[str]:
    try:
        return re.compile(targets)
    except re.error as error:
        raise ConfigError(f"targets={targets!r} is not a regular expression: {error}.") from error


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


def feed_forward_blocks(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the feed-forward blocks among the sites: the layers d -> f that open one, then the f -> d' that closes it.

    Told from sizes and order, not from names, but for attention, which is left out by its name.

    Args:
        sites: of one model, in order.
    """
    blocks: list[list[Site]] = []
    opened: list[Site] = []
    for site in sites:
        if re.search(r"attn|attention", site.name, re.IGNORECASE) or is_convolution(site.module):
            continue
        together = bool(opened) and _numbers(site) == _numbers(opened[0])
        if together and site.d_in == opened[0].d_out:
            blocks.append([*opened, site])
            opened = []
        elif together and (site.d_in, site.d_out) == (opened[0].d_in, opened[0].d_out):
            opened.append(site)
        else:
            opened = [site] if site.d_in != site.d_out else []
    return blocks


def _numbers(site: Site) -> list[str]:
    """Return the numbered parts of a layer's name: layers of one block agree in them."""
    return [part for part in site.name.split(".") if part.isdigit()]
