"""GaLore: parameter groups for galore-torch, whose Adam keeps moments of projected gradients, and their size.

Zhao et al. 2024, arXiv 2403.03507.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError

PROJECTIONS = ("std", "reverse_std", "right", "left", "full")


def galore_groups(
    model: nn.Module, rank: int = 128, every: int = 200, scale: float = 0.25, projection: str = "std"
) -> list[dict[str, Any]]:
    """Return a model's trained parameters in groups: matrices to project, and all else as it is.

    `GaLoreAdamW(galore_groups(model, rank=64), lr=1e-3)`. A matrix (m, n) is projected where min(m, n) > rank: routers,
    whole modules of the base. Experts are (E, …) in one tensor, which galore-torch cannot project, and their factors
    are low-rank already.

    Args:
        model: whose parameters of any shape are trained.
        rank: r of the projection.
        every: steps after which it is taken anew from the gradient.
        scale: of the projected steps.
        projection: "std" (the smaller side), "reverse_std", "right", "left" or "full", as galore-torch has them.

    Returns:
        One or two groups, the projected matrices first.

    Raises:
        ConfigError: a rank or every below 1, an unknown projection, or a model without a matrix to project.
    Source: arXiv 2403.03507, algorithm 2.
    """
    if rank < 1 or every < 1:
        raise ConfigError(f"rank and every must be at least 1, got {rank} and {every}.")
    if projection not in PROJECTIONS:
        raise ConfigError(f"unknown projection {projection!r}. Known: {', '.join(PROJECTIONS)}.")
    trained = [p for p in model.parameters() if p.requires_grad]
    projected = [p for p in trained if p.ndim == 2 and min(p.shape) > rank]
    if not projected:
        largest = max((min(p.shape) for p in trained if p.ndim == 2), default=0)
        raise ConfigError(
            f"rank={rank}: no trained matrix is larger (the smaller side of the largest is {largest}), and expert "
            "tensors (E, …) are not projected: choose a smaller rank, or modules_to_save to train part of the base."
        )
    own = set(projected)
    rest = [p for p in trained if p not in own]
    told = {"rank": rank, "update_proj_gap": every, "scale": scale, "proj_type": projection}
    groups: list[dict[str, Any]] = [{"params": projected, **told}, {"params": rest}]
    return groups[: 1 + bool(rest)]


def galore_state_bytes(groups: list[dict[str, Any]]) -> int:
    """Return the bytes that GaLore's Adam keeps: moments and projections.

    A matrix (m, n) has two moments (max(m, n), r) and a projection (r, min(m, n)) under "std"; what is not projected
    has two moments of its size. Counts of steps are left out.

    Args:
        groups: as `galore_groups` makes them.

    Raises:
        ConfigError: a projection other than "std".
    Source: arXiv 2403.03507, table 1.
    """
    total = 0
    for group in groups:
        if group.get("proj_type", "std") != "std":
            raise ConfigError(f"the size is known of projection 'std', not of {group['proj_type']!r}.")
        for p in group["params"]:
            numbers = 2 * p.numel()
            if "rank" in group:
                numbers = group["rank"] * (2 * max(p.shape) + min(p.shape))
            total += numbers * p.element_size()
    return total
