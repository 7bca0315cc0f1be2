"""What competes with the package's launches, on which operands, and what plain PyTorch gives for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.kernels.triton import launches, routed
from moa.kernels.triton.thin import Sizes

from ..bench.kernels import make_inputs
from . import table
from .candidates import bulk, extended, filled, once, siblings
from .machine import Machine
from .shapes import ROWS, D

Values = Sequence[Tensor]
Step = Callable[[], Values]

# Rows, columns, features, warps, stages. Columns are those of the table, 64.
BULK = (Sizes(64, 64, 64, 4, 4), Sizes(64, 64, 128, 4, 4), Sizes(64, 64, 64, 8, 6))
APART = (Sizes(64, 64, 64, 4, 6), Sizes(64, 64, 128, 4, 4))  # warps are set apart only beside four others
BULK_GRAM = (Sizes(64, 64, 128, 4, 4), Sizes(128, 64, 128, 4, 3), Sizes(64, 64, 256, 8, 3))
APART_GRAM = (Sizes(64, 64, 128, 4, 4), Sizes(128, 64, 128, 4, 3))
SPLIT = ((Sizes(64, 64, 64, 4, 4), 4), (Sizes(64, 64, 64, 4, 4), 8), (Sizes(128, 64, 64, 8, 3), 8))
PERSISTENT = (Sizes(32, 64, 128, 4, 3), Sizes(64, 64, 64, 8, 4))
SIBLINGS = (Sizes(64, 64, 64, 8, 3), Sizes(128, 64, 64, 8, 3))
ONCE = ((Sizes(64, 64, 64, 8, 3), 512), (Sizes(64, 64, 64, 8, 3), 1024))
ONTO = (Sizes(128, 64, 128, 8, 3), Sizes(64, 64, 256, 8, 2))
EXTENDED = ((Sizes(128, 64, 64, 8, 3), 256), (Sizes(128, 64, 64, 8, 4), 128))


@dataclass(frozen=True)
class Contest:
    """What competes.

    Args:
        names: of the values.
        plain: gives them by plain PyTorch, in a dtype.
        before: gives them as the package does.
        after: the candidates, which give them too.
    """

    names: tuple[str, ...]
    plain: Callable[[torch.dtype], Values]
    before: Step
    after: dict[str, Step]


@dataclass(frozen=True)
class Given:
    """Operands: x (T, i), grad (T, o), a (E, r, i), b (E, r, o), weights (T, K), indices (T, K) or None.

    What earlier launches gave is drawn as well: hidden (T, K, r) and mixed (T, E·r).
    """

    x: Tensor
    grad: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor
    indices: Tensor | None
    hidden: Tensor
    mixed: Tensor

    def gate(self, dtype: torch.dtype) -> Tensor:
        """Return each expert's weight (T, E)."""
        if self.indices is None:
            return self.weights.to(_wide(dtype))
        none = self.weights.new_zeros(len(self.x), len(self.a))
        return none.scatter(1, self.indices, self.weights).to(_wide(dtype))

    def chosen(self, values: Tensor) -> Tensor:
        """Return the chosen experts' part (T, K, r) of values (T, E, r)."""
        if self.indices is None:
            return values
        return values.gather(1, self.indices[:, :, None].expand(-1, -1, values.shape[2]))

    def placed(self, dtype: torch.dtype) -> Tensor:
        """Return hidden in the place of its experts (T, E, r), 0 elsewhere."""
        hidden = self.hidden.to(dtype)
        if self.indices is None:
            return hidden
        none = hidden.new_zeros(len(self.x), len(self.b), hidden.shape[2])
        return none.scatter(1, self.indices[:, :, None].expand(-1, -1, hidden.shape[2]), hidden)


def given(machine: Machine, rows: int = ROWS, toy: int = 17) -> Given:
    """Return random operands on the device."""
    made = make_inputs(*machine.pick((rows, D), (toy, 64)), dtype=machine.low, device=machine.device)
    x, a, b, weights, grad = (value.detach() for value in (made.x, made.a, made.b, made.weights, made.grad))
    n_experts, rank, _ = a.shape
    hidden = torch.randn(*weights.shape, rank, device=machine.device).to(machine.low)
    mixed = torch.randn(len(x), n_experts * rank, device=machine.device).to(machine.low)
    return Given(x, grad, a, b, weights, made.indices, hidden, mixed)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _label(size: Sizes, *rest: object) -> str:
    tiles = f"{size.block_t} x {size.block_d}, {size.warps} warps, {size.stages} stages"
    return ", ".join((tiles, *map(str, rest)))


def shrunk(own: Given, a: Tensor, dtype: torch.dtype) -> Values:
    """Return hidden (T, K, r) and mixed (T, E·r)."""
    every = (own.x.to(dtype) @ a.to(dtype).flatten(0, 1).T).unflatten(1, a.shape[:2])  # (T, E, r)
    mixed = (every * own.gate(dtype)[:, :, None]).to(dtype)
    return own.chosen(every), mixed.flatten(1)


def _shrink(own: Given, launch: Callable[..., None], *rest: Any) -> Values:
    hidden, mixed = own.x.new_empty(own.hidden.shape), own.x.new_empty(own.mixed.shape)
    launch(own.x, own.a, own.weights, own.indices, hidden, mixed, *rest)
    return hidden, mixed


def shrink(machine: Machine, rows: int = ROWS) -> Contest:
    """Return the shrink against one whose tiles the copy engine brings, split ones and persistent ones."""
    own = given(machine, rows)
    after: dict[str, Step] = {}
    for size in BULK[:2] if rows < ROWS else BULK:
        after[f"copy engine, {_label(size)}"] = partial(_shrink, own, bulk.shrink, size, False)
    for size, splits in SPLIT:
        label = _label(size, f"{splits} splits")
        after[label] = partial(_shrink, own, filled.split_shrink, size, splits)
        after[f"copy engine, {label}"] = partial(_shrink, own, filled.split_shrink, size, splits, True)
    for size in PERSISTENT if rows == ROWS else ():
        run = partial(_shrink, own, filled.persistent_shrink, size, processors(machine))
        after[f"persistent, {_label(size)}"] = run
    return Contest(("hidden", "mixed"), partial(shrunk, own, own.a), partial(_shrink, own, launches.shrink), after)


def shrink_apart(machine: Machine) -> Contest:
    """Return the shrink against one some of whose warps do nothing but bring tiles."""
    own = given(machine)
    after: dict[str, Step] = {_label(size): partial(_shrink, own, bulk.shrink, size, True) for size in APART}
    return Contest(("hidden", "mixed"), partial(shrunk, own, own.a), partial(_shrink, own, launches.shrink), after)


def unmixed(own: Given, dtype: torch.dtype) -> Values:
    """Return grad_hidden (T, E·r), mixed (T, E·r) and grad_weights (T, K)."""
    n_experts, rank, _ = own.b.shape
    total = (own.grad.to(dtype) @ own.b.to(dtype).flatten(0, 1).T).unflatten(1, (n_experts, rank))  # (T, E, r)
    gate = own.gate(dtype)[:, :, None]
    hidden = own.placed(dtype)
    to_weights = own.chosen(total * hidden).to(_wide(dtype)).sum(-1)
    return ((total * gate).to(dtype).flatten(1), (hidden * gate).to(dtype).flatten(1), to_weights)


UNMIXED = ("grad_hidden", "mixed", "grad_weights")


def _unmix(own: Given) -> Values:
    return launches.unmix(own.grad, own.b, own.weights, own.indices, own.hidden, True, True, True)  # type: ignore[return-value]


def unmix(machine: Machine, apart: bool = False) -> Contest:
    """Return unmix against one whose tiles the copy engine brings, with warps set apart for it or not."""
    own = given(machine)
    after: dict[str, Step] = {
        _label(size): partial(bulk.unmix, own.grad, own.b, own.weights, own.indices, own.hidden, size, apart)
        for size in (APART if apart else BULK)
    }
    return Contest(UNMIXED, partial(unmixed, own), partial(_unmix, own), after)


def grammed(own: Given, dtype: torch.dtype) -> Values:
    """Return mixedᵀ grad (E, r, o)."""
    return [(own.mixed.to(dtype).T @ own.grad.to(dtype)).view_as(own.b)]


def gram(machine: Machine, apart: bool = False) -> Contest:
    """Return a weight gradient against one whose tiles the copy engine brings."""
    own = given(machine)
    after: dict[str, Step] = {
        _label(size): lambda size=size: [bulk.gram(own.mixed, own.grad, own.b, size, apart)]  # type: ignore[misc]
        for size in (APART_GRAM if apart else BULK_GRAM)
    }

    return Contest(("grad_b",), partial(grammed, own), lambda: [launches.gram(own.mixed, own.grad, own.b)], after)


def all_shrunk(own: Given, factors: Values, dtype: torch.dtype) -> Values:
    """Return hidden (S, T, K, r) and mixed (S, T, E·r) of S linears."""
    return [torch.stack(values) for values in zip(*(shrunk(own, a, dtype) for a in factors), strict=True)]


def shared_shrink(machine: Machine, count: int) -> Contest:
    """Return the shrinks of linears that share rows and routing against one pass over x for all of them."""
    own = given(machine)
    factors = [own.a, own.a.flip(0).contiguous(), own.a.flip(1).contiguous()][:count]

    def empty() -> tuple[Tensor, Tensor]:
        return tuple(own.x.new_empty(count, *value.shape) for value in (own.hidden, own.mixed))  # type: ignore[return-value]

    def before() -> Values:
        hidden, mixed = empty()
        for n, a in enumerate(factors):
            launches.shrink(own.x, a, own.weights, own.indices, hidden[n], mixed[n])
        return hidden, mixed

    def one(size: Sizes, by_engine: bool) -> Values:
        hidden, mixed = empty()
        siblings.sibling_shrink(own.x, factors, own.weights, own.indices, hidden, mixed, size, by_engine)
        return hidden, mixed

    after: dict[str, Step] = {_label(size): partial(one, size, False) for size in SIBLINGS}
    after |= {f"copy engine, {_label(size)}": partial(one, size, True) for size in SIBLINGS}
    return Contest(("hidden", "mixed"), partial(all_shrunk, own, factors), before, after)


def unmixed_and_grammed(own: Given, dtype: torch.dtype) -> Values:
    """Return grad_hidden (T, E·r), grad_weights (T, K) and grad_b (E, r, o)."""
    grad_hidden, mixed, grad_weights = unmixed(own, dtype)
    return grad_hidden, grad_weights, *grammed(replace(own, mixed=mixed), dtype)


def dy_once(machine: Machine) -> Contest:
    """Return unmix and the gram of dB, which both read dy, against one launch that walks it by chunks."""
    own = given(machine)

    def before() -> Values:
        grad_hidden, mixed, grad_weights = _unmix(own)
        return grad_hidden, grad_weights, launches.gram(mixed, own.grad, own.b)

    after: dict[str, Step] = {
        _label(size, f"chunks of {chunk}"): partial(
            once.unmix_gram, own.grad, own.b, own.weights, own.indices, own.hidden, size, machine.pick(chunk, 64)
        )
        for size, chunk in ONCE
    }
    return Contest(("grad_hidden", "grad_weights", "grad_b"), partial(unmixed_and_grammed, own), before, after)


def based(own: Given, weight: Tensor, dtype: torch.dtype) -> Values:
    """Return x weightᵀ + mixed b (T, o)."""
    base = own.x.to(dtype) @ weight.to(dtype).T
    return [base + own.mixed.to(dtype) @ own.b.to(dtype).flatten(0, 1)]


def base_and_expand(machine: Machine, rows: int = ROWS) -> Contest:
    """Return expand and then the base onto it, against the other order and against one product of both."""
    own = given(machine, rows)
    weight = table.base_weight(machine, own.x.shape[1])

    def before() -> Values:
        return [launches.expand(own.mixed, own.b, None).addmm_(own.x, weight.T)]

    def onto(size: Sizes) -> Values:
        return [extended.added(own.mixed, own.b, torch.mm(own.x, weight.T), size)]

    def one(size: Sizes, outs: int, by_engine: bool) -> Values:
        return [extended.extended(own.x, weight, own.mixed, own.b, size, outs, by_engine)]

    after: dict[str, Step] = {f"base first, {_label(size)}": partial(onto, size) for size in ONTO}
    for size, outs in EXTENDED:
        after[f"one product, {_label(size, outs)}"] = partial(one, size, outs, False)
        after[f"one product, copy engine, {_label(size, outs)}"] = partial(one, size, outs, True)
    return Contest(("y",), partial(based, own, weight), before, after)


def router(machine: Machine) -> Contest:
    """Return the router apart, its top-k and the shrink, against the shrink with its router, which the package has."""
    own = given(machine, toy=70)  # fewer rows have no such kernel
    d = own.x.shape[1]
    gate = torch.randn(len(own.a), d, device=machine.device) / d**0.5

    def routing(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept, indices = F.linear(own.x.to(_wide(dtype)), gate.to(_wide(dtype))).topk(2, -1)
        return kept.softmax(-1), indices

    def plain(dtype: torch.dtype) -> Values:
        weights, indices = routing(dtype)
        mixed = shrunk(replace(own, weights=weights, indices=indices), own.a, dtype)[1]
        return [mixed @ own.b.to(dtype).flatten(0, 1)]

    def before() -> Values:
        weights, indices = routing(own.x.dtype)
        mixed = _shrink(replace(own, weights=weights, indices=indices), launches.shrink)[1]
        return [launches.expand(mixed, own.b, None)]

    def after() -> Values:
        found = routed.routed(own.x, gate, own.a, own.b, 2, 1.0, None, None)
        assert found is not None
        return [found[0]]

    return Contest(("y",), plain, before, {"router in the shrink": after})


def processors(machine: Machine) -> int:
    """Return how many programs run at once, one for each multiprocessor; a Hopper GPU's where there is none."""
    if machine.device != "cuda":
        return machine.pick(132, 2)
    return int(torch.cuda.get_device_properties(machine.device).multi_processor_count)


CONTESTS: dict[str, Callable[[Machine], Contest]] = {
    "shrink": shrink,
    **{f"shrink of {rows} rows": partial(shrink, rows=rows) for rows in (4096, 2048, 512)},
    "unmix": unmix,
    "gram": gram,
    "one shrink of q, k, v": partial(shared_shrink, count=3),
    "one shrink of gate, up": partial(shared_shrink, count=2),
    "dy read once": dy_once,
    "base and expand": base_and_expand,
    "base and expand of 2048 rows": partial(base_and_expand, rows=2048),
    "router": router,
}
# These may hang where the compiler's barriers are wrong: they come last, and the first that hangs ends them.
WARPS_APART: dict[str, Callable[[Machine], Contest]] = {
    "shrink, warps apart": shrink_apart,
    "unmix, warps apart": partial(unmix, apart=True),
    "gram, warps apart": partial(gram, apart=True),
}
