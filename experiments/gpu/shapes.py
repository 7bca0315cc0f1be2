"""The sizes of mixtures on which kernels are checked and timed, and their operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moa.kernels import Operands

D, ROWS = 4096, 8192
# E, r: with k = 1, 2, 4 the 18 shapes on which the dispatcher is judged.
REGRET = tuple((n, r, k) for n, r in ((8, 8), (8, 16), (16, 16), (8, 64), (64, 16), (128, 8)) for k in (1, 2, 4))


@dataclass(frozen=True)
class Shape:
    """One mixture: T rows, i and o features, E experts of rank r, k per row (None: all, without indices)."""

    rows: int = ROWS
    d_in: int = D
    d_out: int = D
    n_experts: int = 8
    rank: int = 8
    k: int | None = 2
    routing: str = "random"  # or "one expert", "half the experts", "one for all rows"
    strided: bool = False

    def toy(self) -> Shape:
        """Return the same kind of shape, small enough for an interpreter."""
        small = replace(self, rows=min(self.rows, 70), d_in=_toy(self.d_in), d_out=_toy(self.d_out))
        experts = min(self.n_experts, 6)
        k = self.k if self.k is None or self.k < self.n_experts else experts
        return replace(small, n_experts=experts, rank=min(self.rank, 20), k=k if k is None else min(k, experts))


def _toy(d: int) -> int:
    return 64 if d % 64 == 0 else 33 + d % 7


# What numerics are checked on: how many rows there are, how they are routed, ranks, and sizes that no block divides.
NUMERICS: dict[str, Shape] = {
    "usual": Shape(2048, 1024, 1024),
    "odd sizes": Shape(333, 523, 1111, 5, 7, 3),
    "0 rows": Shape(0, 256, 256),
    "1 row": Shape(1, 1024, 1024),
    "3 rows": Shape(3, 777, 520),
    "16 rows": Shape(16, 1024, 3072),
    "64 rows": Shape(64, 1024, 1024, 64, 16),
    "65 rows": Shape(65, 1024, 1024),
    "40,000 rows": Shape(40_001, 512, 256),
    "experts without rows": Shape(1000, 512, 512, routing="half the experts"),
    "one hot expert": Shape(3000, 512, 512, routing="one expert", k=1),
    "one routing for all rows": Shape(1200, 256, 256, routing="one for all rows"),
    "dense": Shape(700, 256, 512, k=None),
    "k = E": Shape(700, 256, 512, 4, 8, 4),
    "one expert": Shape(700, 256, 512, 1, 64, 1),
    "64 experts": Shape(2048, 512, 512, 64, 16),
    "128 experts": Shape(2048, 512, 512, 128, 8, 4),
    "strided rows": Shape(500, 512, 512, strided=True),
    **{f"rank {r}": Shape(600, 520, 776, 4, r) for r in (1, 2, 4, 16, 32, 100, 256)},
}
ENGINES = ("triton_concat", "triton_grouped")
# Those that are checked in every dtype; the others in bf16 only.
EVERY_DTYPE = ("usual", "odd sizes", "64 rows", "0 rows", "one hot expert", "dense", "rank 1", "rank 256")
LAYER = Shape(600, 512, 768)
ROUTED = Shape(4096, 512, 768)
SLOTS = Shape(700, 256, 256, 64, 48)
REPLAYED = (1, 16, 512)  # rows
SANITIZED = (Shape(5, 40, 72, 4, 3), Shape(333, 200, 136, 5, 7), Shape(600, 256, 256), Shape(130, 72, 40, k=None))
PAST = Shape(2**19 + 77, 4160, 4160, 4, 8)  # T·d is past 2^31


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model, and the tokens of its training step."""

    width: int
    inner: int
    layers: int
    heads: int
    batch: int
    length: int


SIZES = {"1 B": Size(2048, 8192, 16, 32, 8, 1024), "0.2 B": Size(1024, 2816, 16, 16, 1, 512)}
TOY = Size(32, 48, 1, 4, 2, 4)
PROMPT = 16  # tokens before those that are decoded


def draw(shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Return fp64 leaves [x (T, i), a (E, r, i), b (E, r, o), weights (T, K)], indices (T, K), grad of y (T, o)."""
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, device=device, generator=rng)

    n, e, r = shape.rows, shape.n_experts, shape.rank
    x, grad = normal(n, shape.d_in), normal(n, shape.d_out)
    a, b = normal(e, r, shape.d_in) / shape.d_in**0.5, normal(e, r, shape.d_out) / r**0.5
    weights = normal(n, shape.k or e)
    if shape.strided:
        x, grad = (torch.cat([value, value], -1)[:, : value.shape[1]] for value in (x, grad))
    return [x, a, b, weights], indices_of(shape, rng), grad


def indices_of(shape: Shape, rng: torch.Generator) -> Tensor | None:
    """Return distinct experts of each row (T, K), as the shape's routing says, None where it is dense."""
    if shape.k is None:
        return None
    n, e = shape.rows, shape.n_experts
    if shape.routing == "one expert":
        return torch.full((n, 1), e - 1, device=rng.device)
    scores = torch.rand(n, e, device=rng.device, generator=rng)
    if shape.routing == "half the experts":
        scores[:, 1::2] = -1
    if shape.routing == "one for all rows":
        scores = scores[:1].expand(n, e)
    return scores.topk(shape.k, -1).indices


def operands(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Operands, Tensor]:
    """Return operands with values, on a GPU, or without any, on a CPU, where kernels are only compiled; and grad."""
    make: Callable[..., Tensor] = torch.empty if torch.device(device).type == "cpu" else torch.randn
    n, e, r, k = shape.rows, shape.n_experts, shape.rank, shape.k or shape.n_experts
    sizes = (n, shape.d_in), (e, r, shape.d_in), (e, r, shape.d_out), (n, shape.d_out)
    x, a, b, grad = (make(size, dtype=dtype, device=device) for size in sizes)
    if shape.strided:
        x, grad = (make(n, 2 * v.shape[1], dtype=dtype, device=device)[:, : v.shape[1]] for v in (x, grad))
    if make is torch.randn:
        a, b = a / shape.d_in**0.5, b / r**0.5
        indices = indices_of(shape, torch.Generator(device).manual_seed(0))
        return Operands(x, a, b, torch.rand(n, k, device=device), indices), grad
    indices = None if shape.k is None else torch.zeros(n, k, dtype=torch.int64, device=device)
    return Operands(x, a, b, torch.empty(n, k, device=device), indices), grad
