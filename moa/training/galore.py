"""GaLore: parameter groups for galore-torch, whose Adam keeps moments of projected gradients, and their size.

Zhao et al. 2024, arXiv 2403.03507.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, unknown_name

PROJECTIONS = ("std", "reverse_std", "right", "left", "full")
MOST = 2**31


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
        ConfigError: see `check_galore`, or a model without a matrix to project.
    Source: arXiv 2403.03507, algorithm 2.
    """
    check_galore(rank, every, scale, projection)
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


def galore_adamw(
    model: nn.Module,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    projection: str = "std",
    **options: Any,
) -> torch.optim.Optimizer:
    """Return galore-torch's AdamW over a model's trained parameters, of any shape; Trainer can resume its state.

    Args:
        model: as in `galore_groups`, with all up to projection.
        rank: r.
        every: steps.
        scale: of the steps.
        projection: of the gradient.
        options: lr, betas, eps and weight_decay.

    Raises:
        ConfigError: as `galore_groups`, or galore-torch cannot be imported.
    """
    groups = galore_groups(model, rank, every, scale, projection)
    try:
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector
    except ImportError as error:
        raise ConfigError(
            f"GaLore needs galore-torch and the bitsandbytes that it imports ({error}): pip install galore-torch."
        ) from error
    torch.serialization.add_safe_globals([GaLoreProjector])  # its state holds them, and Trainer reads tensors only
    made: torch.optim.Optimizer = GaLoreAdamW(groups, no_deprecation_warning=True, **options)
    return made


def check_galore(rank: int, every: int, scale: float, projection: str) -> None:
    """Check what can be checked without a model; no tensors, so no shapes.

    Raises:
        ConfigError: a rank or every below 1, a scale that is not positive, or an unknown projection.
    """
    if rank < 1 or every < 1:
        raise ConfigError(f"rank and every must be at least 1, got {rank} and {every}.")
    if max(rank, every) > MOST:
        raise ConfigError(f"rank and every must be at most {MOST:,}, got {rank} and {every}.")
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale must be positive, got {scale}.")
    if projection not in PROJECTIONS:
        raise ConfigError(unknown_name("projection", projection, PROJECTIONS, "GaLore"))


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
