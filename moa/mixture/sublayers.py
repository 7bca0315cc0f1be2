"""The sub-layers of a model's blocks, attention and feed-forward, told from the sizes and order of their layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..errors import ConfigError
from ..layers import Site, is_convolution
from .narrow import Narrowing
from .sites import ALL, all_sites, block_numbers, feed_forward_blocks, find_sites

ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def find_sublayers(
    model: nn.Module, targets: str | tuple[str, ...], narrowing: Narrowing = ALL
) -> list[tuple[Site, Site]]:
    """Return the first and the last layer of each sub-layer, (B, S, d) -> (B, S, d), that targets names, in order.

    The first reads the sub-layer's input, in cross-attention the query's; the last writes its output, before the
    residual connection.

    Args:
        model: any module.
        targets: "all-linear" (both kinds, Houlsby's places), "ffn" (Pfeiffer's) or "attention"; a tuple of name endings
            or a regex names the sub-layers by their last layer.
        narrowing: leaves out some of them.

    Raises:
        ConfigError: nothing matches, or no sub-layer ends in one of the layers that targets names.
    """
    sites = all_sites(model)
    chosen = {site.name for site in find_sites(model, targets, narrowing)}
    blocks = [(block[0], block[-1]) for block in feed_forward_blocks(sites)]
    pairs = [(first, last) for first, last in [*blocks, *attention_sublayers(sites)] if last.name in chosen]
    if not pairs:
        raise ConfigError(
            f"targets={targets!r} names no layer of {type(model).__name__} that ends a sub-layer, attention or "
            "feed-forward, whose first layer reads as many features as it writes: choose place='output' or 'block'."
        )
    order = {site.name: number for number, site in enumerate(sites)}
    return sorted(pairs, key=lambda pair: order[pair[1].name])


def attention_sublayers(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """Return the layer that makes queries d -> p, or all of q, k, v, and the one that writes d of each attention.

    Args:
        sites: of one model, in order.
    """
    groups: dict[tuple[str, ...], list[Site]] = {}
    numbers = block_numbers(sites)
    for site in sites:
        parts = site.name.split(".")
        head = next((n for n, part in enumerate(parts) if ATTENTION.search(part)), None)
        if head is not None and not is_convolution(site.module):
            within = sum(part.isdigit() for part in parts[:head])
            groups.setdefault((*parts[: head + 1], *numbers[site.name][within:]), []).append(site)
    found = []
    for group in groups.values():
        for number in range(len(group) - 1, 0, -1):
            last = group[number]
            firsts = [site for site in group[:number] if site.d_in == last.d_out]
            if firsts:
                queries = (site for site in firsts if site.name.rpartition(".")[2].startswith("q"))
                found.append((next(queries, firsts[0]), last))
                break
    return found
