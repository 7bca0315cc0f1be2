"""One line on what carries experts in a model and what does not."""

from __future__ import annotations

from torch import nn

from .base_experts import fused_experts
from .mixture import Mixture
from .sites import idle_sites
from .unadapted import said_of_sizeless


def summary(model: nn.Module) -> str:
    """Return one line on what carries experts in a model and what does not.

    Args:
        model: the base, mixtures (*rows, i) -> (*rows, o) inside.
    """
    adapted = {id(m): m for m in model.modules() if isinstance(m, Mixture)}
    kinds = [type(m.base).__name__ for m in adapted.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "no layer"
    said = f"experts on {counts}"
    fused = fused_experts(model)
    if fused:
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in fused))
        share = sum(p.numel() for _, p in fused) / sum(
            p.numel() for n, p in model.named_parameters() if ".branches." not in n
        )
        said += (
            f"; {len(fused)} fused expert tensors of 3 axes ({names}), {share:.0%} of the base's weights, are not "
            "linear layers and carry none: targets='moe-experts' adapts them"
        )
    idle = idle_sites(model)
    if idle:
        names = ", ".join(dict.fromkeys(".".join(site.name.split(".")[-2:]) for site in idle))
        said += (
            f"; groups of targets leave out {len(idle)} linear {'layer' if len(idle) == 1 else 'layers'} ({names}), on "
            "which experts would learn or change nothing, or which are not x -> W x + b"
        )
    sizeless = said_of_sizeless(model)
    return f"{said}; {sizeless}." if sizeless else f"{said}."
