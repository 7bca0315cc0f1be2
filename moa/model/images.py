"""Where a batch's images stand in its texts, which tells of which example each row of them is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..rows import ImageRows

PIXELS = {  # by the input that brings them: the configuration's names of the token in their places, their mark
    "pixel_values": (("image_token_id", "image_token_index"), 1),
    "pixel_values_videos": (("video_token_id", "video_token_index"), 2),
}
GRID = "grid_thw"  # (images, 3): rows of each along time, height and width


def placed_images(module: nn.Module, inputs: Mapping[str, Any]) -> ImageRows | None:
    """Return of which example rows of images are, where texts (B, S) with places for them come along; else None.

    Args:
        module: a part whose configuration says which token stands in an image's places.
        inputs: of it, by name.
    """
    config: Any = getattr(module, "config", None)
    ids, marks = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
    brought = [kind for name, kind in PIXELS.items() if isinstance(inputs.get(name), Tensor)]
    places: list[Tensor] = []
    for names, mark in brought:
        token = next((n for n in (getattr(config, name, None) for name in names) if n is not None), None)
        if isinstance(marks, Tensor):
            places.append(marks == mark)
        elif isinstance(ids, Tensor) and token is not None:
            places.append(ids == token)
    if not places:
        return None
    # the rows of images and those of videos pass one after the other, and do not say which of both they are
    counts = places[0].sum(-1) if len(brought) == 1 else torch.zeros_like(places[0][:, 0], dtype=torch.long)
    rows = places[0].shape
    return ImageRows(counts, (int(rows[0]), int(rows[1])))


def images_by_themselves(inputs: Mapping[str, Any]) -> ImageRows | None:
    """Return the same for a part that begins a forward with patches (T, d) of images, each of which is an example."""
    grid = inputs.get(GRID)
    return ImageRows(grid.prod(-1)) if isinstance(grid, Tensor) else None
