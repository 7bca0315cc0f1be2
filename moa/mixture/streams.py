"""Streams: n copies of a model's body side by side in one batch, crossing after every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import own_view
from ..errors import ConfigError
from ..rows import in_streams
from ..types import Scope
from .caches import cache_in_streams, is_cache

POSITIONS = "position_ids"  # with three axes, several of each token: (n axes, B, S)
FIRST_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


class Crossing(nn.Module):
    """Lets n streams read each other: directly, and by their differences.

    z = W [h_1; …; h_n];  h̃_m = h_m + Σ_{m'≠m} [ β z^dir_{m,m'} h_{m'} + γ z^diff_{m,m'} (h_m − h_{m'}) ]

    | parameter | shape | start |
    |---|---|---|
    | weight (W) | (2 n (n − 1), n · d) | zero: the streams start apart |

    z is linear in the row, neither normalised nor positive, and has a gradient at W = 0.

    Args:
        n: streams.
        d: features of a hidden state.
        beta: β.
        gamma: γ.
    """

    pairs: Tensor

    def __init__(self, n: int, d: int, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.n, self.beta, self.gamma = n, beta, gamma
        self.weight = nn.Parameter(torch.zeros(2 * n * (n - 1), n * d))
        pairs = [m * n + other for m in range(n) for other in range(n) if other != m]
        self.register_buffer("pairs", torch.tensor(pairs, dtype=torch.long), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return the crossed streams (n, *rows, d) of h (n, *rows, d)."""
        together = rearrange(h, "n ... d -> ... n d")
        z = F.linear(rearrange(together, "... n d -> ... (n d)"), self.weight.to(h.dtype))  # (*rows, 2 n (n - 1))
        direct, difference = z.chunk(2, -1)
        rows = z.shape[:-1]
        full = z.new_zeros(*rows, self.n * self.n)
        where = self.pairs.expand(*rows, -1)
        by_pair = "... (n other) -> ... n other"
        read = self.beta * rearrange(full.scatter(-1, where, direct), by_pair, n=self.n)
        differ = self.gamma * rearrange(full.scatter(-1, where, difference), by_pair, n=self.n)
        own = differ.sum(-1, keepdim=True) * together
        return rearrange(together + (read - differ) @ together + own, "... n d -> n ... d")


class Streams(nn.Module):
    """n streams of one body: its inputs are folded into the batch, cross after every block, and end as one.

    h = Σ_m w_m h̃_m after the last block, so that what follows (norm, pooler, head) sees the batch as it came.

    | parameter | shape | start |
    |---|---|---|
    | crossings.*.weight | (2 n (n − 1), n · d) | zero |
    | weights (w) | (n,) | 1/n |

    Args:
        n: streams.
        d: features of a hidden state.
        body: the module whose forward takes a batch.
        blocks: its blocks in order, each (rows, S, d) -> (rows, S, d) or a tuple that begins with it.
        scope: of the mixtures inside.
        beta, gamma: of the crossings.
    """

    def __init__(
        self,
        n: int,
        d: int,
        body: nn.Module,
        blocks: Sequence[nn.Module],
        scope: Scope,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.n, self.scope = n, scope
        self.crossings = nn.ModuleList(Crossing(n, d, beta, gamma) for _ in blocks)
        self.weights = nn.Parameter(torch.full((n,), 1.0 / n))
        last = len(blocks) - 1
        self._hooks = [body.register_forward_pre_hook(Fold(self), with_kwargs=True)]
        self._hooks += [
            block.register_forward_hook(Cross(self, crossing, number == last))
            for number, (block, crossing) in enumerate(zip(blocks, self.crossings, strict=True))
        ]

    @property
    def running(self) -> bool:
        """Whether the streams run: not while the experts are switched off, nor with one of them pinned."""
        context = self.scope.current()
        return context.enabled and context.pinned is None

    def fold_last(self) -> None:
        """Fold the batch (B, …) after all that looks at it where it enters the body: hooks run in this order."""
        hooks: Any = self._hooks[0].hooks_dict_ref()
        hooks.move_to_end(self._hooks[0].id)

    def remove(self) -> None:
        """Take the hooks out: the body is as before."""
        for hook in self._hooks:
            hook.remove()

    def cross(self, hidden: Tensor, crossing: nn.Module, last: bool) -> Tensor:
        """Return the streams after a block, (n · B, S, d), or their weighted sum (B, S, d) after the last."""
        apart: Tensor = crossing(rearrange(hidden, "(n b) ... -> n b ...", n=self.n))
        if not last:
            crossed = rearrange(apart, "n b ... -> (n b) ...")
        else:
            crossed = torch.einsum("n...,n->...", apart, self.weights.to(apart.dtype))
        whole = own_view(crossed.contiguous(), crossed.shape)  # FSDP2 hangs a hook on it, which a view may lose
        if last:
            self.scope.run_in(1)
        return whole


class Fold:
    """The hook that repeats a body's inputs for each stream, stream after stream."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the inputs with (n · B, …) in place of (B, …), and have the context follow."""
        if not self.streams.running:
            return None
        given = [kwargs[name] for name in FIRST_INPUTS if isinstance(kwargs.get(name), Tensor)]
        size = (given or [a for a in args if isinstance(a, Tensor)])[0].shape[0]
        self.streams.scope.run_in(self.streams.n)
        return self._repeat(args, size), self._repeat(kwargs, size)

    def _named(self, name: Any, value: Any, size: int) -> Any:
        if name == POSITIONS and isinstance(value, Tensor) and value.ndim == 3:
            return self._repeat(value.transpose(0, 1), size).transpose(0, 1)
        return self._repeat(value, size)

    def _repeat(self, value: Any, size: int) -> Any:
        if isinstance(value, Tensor):
            if value.ndim < 2 or value.shape[0] != size:
                return value
            return in_streams(value, self.streams.n)
        if isinstance(value, Mapping):
            return {name: self._named(name, item, size) for name, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._repeat(item, size) for item in value)
        return cache_in_streams(value, self.streams.n, size) if is_cache(value) else value


class Cross:
    """The hook after a block."""

    def __init__(self, streams: Streams, crossing: nn.Module, last: bool) -> None:
        self.streams, self.crossing, self.last = streams, crossing, last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the block's output with its hidden states crossed."""
        if not self.streams.running:
            return None
        if isinstance(output, Tensor):
            return self.streams.cross(output, self.crossing, self.last)
        return (self.streams.cross(output[0], self.crossing, self.last), *output[1:])


def find_body(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, list[nn.Module]]:
    """Return the module that takes a batch and its blocks, given layers (i -> o) that lie inside the blocks.

    Args:
        model: holds them.
        names: dotted names of the layers.

    Raises:
        ConfigError: a layer outside the blocks, blocks in more than one list, or no module that takes a batch.
    """
    lists: dict[str, nn.ModuleList] = {}
    outside = []
    for name in names:
        parts = name.split(".")
        path = next((".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()), None)
        holder = model.get_submodule(path) if path is not None else None
        if isinstance(holder, nn.ModuleList):
            lists[str(path)] = holder
        else:
            outside.append(name)
    if outside or len(lists) != 1:
        what = f"{', '.join(outside[:4])} lie outside" if outside else f"there are several: {', '.join(lists)}"
        raise ConfigError(
            f"streams run through one stack of blocks, and {what} in {type(model).__name__}: choose other targets, or "
            "adapters of only the blocks."
        )
    path, blocks = next(iter(lists.items()))
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        body = model.get_submodule(".".join(parts[:depth]))
        if hasattr(body, "get_input_embeddings"):
            return body, list(blocks)
    raise ConfigError(f"no module around {path} takes a batch (none has get_input_embeddings).")
