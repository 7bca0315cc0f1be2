"""Key-value caches whose rows stand for more than the caller counts: a second cache that follows, several streams."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor


class JointCache:
    """What is added to a cache's class: each call that moves rows or positions reaches all that belong together.

    A joint cache holds the layers of the one it was made from, so that both show the same keys and values; that one
    is not changed. It is given to the base in its place, comes back as `past_key_values` of the outputs, and so is
    what generation reorders, crops and repeats from then on.

    Attributes:
        follower: the cache of a first pass over the same tokens, whose rows (B, …) are the caller's; None for none.
        n_streams: n; the rows are (n · B, …) where the caller knows B.
        n_rows: B of the latest forward, where n > 1.
    """

    follower: Any = None
    n_streams: int = 1
    n_rows: int = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows beam_idx (B,), of every stream."""
        super().reorder_cache(self._places(beam_idx))  # type: ignore[misc]
        self._follow("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows indices (B',), of every stream."""
        super().batch_select_indices(self._places(indices))  # type: ignore[misc]
        self.n_rows = indices.numel()
        self._follow("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row (B, …), which keeps the streams one after the other."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.n_rows *= repeats
        self._follow("batch_repeat_interleave", repeats)

    def crop(self, *args: Any) -> None:
        """Drop the latest positions of (B, S)."""
        super().crop(*args)  # type: ignore[misc]
        self._follow("crop", *args)

    def reset(self) -> None:
        """Forget all positions of (B, S)."""
        super().reset()  # type: ignore[misc]
        self._follow("reset")

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` needs of (B, S), where layers drop it otherwise."""
        super().activate_past_recording()  # type: ignore[misc]
        self._follow("activate_past_recording")

    @property
    def batch_size(self) -> int:
        """B, the rows that the caller counts; -1 before the first forward."""
        rows: int = super().batch_size  # type: ignore[misc]
        return rows if rows < 0 else rows // self.n_streams

    def _places(self, rows: Tensor) -> Tensor:
        """Return the places (n · B',) in the streams of the caller's rows (B',), each one of B."""
        starts = torch.arange(self.n_streams, device=rows.device)[:, None] * self.n_rows
        return (starts + rows).flatten()

    def _follow(self, method: str, *args: Any) -> None:
        if self.follower is not None:
            getattr(self.follower, method)(*args)


def with_follower(cache: Any) -> Any:
    """Return a joint cache of an empty one, followed by another of its kind, empty too; both of rows (B, …)."""
    joint = _joint(cache)
    joint.follower = copy.deepcopy(cache)
    return joint


def cache_in_streams(cache: Any, n: int, n_rows: int) -> Any:
    """Return a joint cache whose rows (n · B, …) are those of n streams, one after the other, given B = n_rows."""
    joint = cache if isinstance(cache, JointCache) and cache.n_streams == n else _joint(cache)
    joint.n_streams, joint.n_rows = n, n_rows
    return joint


def is_cache(value: Any) -> bool:
    """Tell whether a value among a model's inputs is a key-value cache, (B, …)."""
    return hasattr(value, "reorder_cache")


def _joint(cache: Any) -> Any:
    kind: Any = type(cache)
    if not isinstance(cache, JointCache):
        kind = _class(kind)
    joint = kind.__new__(kind)
    vars(joint).update(vars(cache))
    return joint


@functools.cache
def _class(kind: Any) -> Any:
    return type(f"Joint{kind.__name__}", (JointCache, kind), {"__module__": __name__, "__doc__": JointCache.__doc__})
