"""Are the kernels right on a GPU: precision, the same bits every time, replayed graphs, recipes against a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.kernels import Gate, gated_linear, grouped_linear, grouped_sum, low_rank_mixture, mixture_linear
from moa.kernels.reference import low_rank_mixture_reference

from . import recipes, sanitizer
from .book import Row
from .launching import direct, unasked
from .machine import Machine
from .shapes import ENGINES, EVERY_DTYPE, LAYER, NUMERICS, PAST, REPLAYED, ROUTED, SLOTS, Shape, draw

# Added to twice the error of plain PyTorch: half a unit in the last place of 16-bit dtypes, some ten in fp32.
EPS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
NAMES = ("y", "grad_x", "grad_a", "grad_b", "grad_weights")
Function = Callable[..., Tensor]


def error(got: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest value; infinite where got is not finite."""
    if exact.numel() == 0:
        return 0.0
    if not got.isfinite().all():
        return float("inf")
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def three_way(
    got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], eps: float, names: Sequence[str] = NAMES
) -> dict[str, Any]:
    """Return each error beside plain PyTorch's, and whether none is more than twice that plus eps."""
    errors = {
        name: [error(one, right), error(other, right)]
        for name, one, other, right in zip(names, got, plain, exact, strict=True)
    }
    worst = max(errors, key=lambda name: errors[name][0] / (2 * errors[name][1] + eps))
    shapes = all(one.shape == right.shape for one, right in zip(got, exact, strict=True))
    holds = shapes and all(mine <= 2 * theirs + eps for mine, theirs in errors.values())
    return {"holds": holds, "worst": worst, "error": errors[worst][0], "plain": errors[worst][1], "errors": errors}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty`, `empty_like` and `Tensor.new_empty` return with NaN: unwritten memory is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let fp32 products run in tf32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def gradients(function: Function, leaves: Sequence[Tensor], indices: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Return y (T, o) and the gradient of every leaf."""
    copies = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*copies, indices)
    return [y.detach(), *torch.autograd.grad(y, copies, grad.to(y.dtype))]


def cast(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return x, a, b in a dtype and the weights in fp32, or fp64 for the truth."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [*(leaf.to(dtype) for leaf in leaves[:3]), leaves[3].to(wide)]


def mixture(machine: Machine, engine: str, shape: Shape, dtype: torch.dtype, fast: bool = False) -> dict[str, Any]:
    """Return the three-way errors of one mixture and all of its gradients."""
    shape = machine.pick(shape, shape.toy())
    leaves, indices, grad = draw(shape, machine.device)
    given, grad = cast(leaves, dtype), grad.to(dtype)
    exact = gradients(low_rank_mixture_reference, cast(given, torch.float64), indices, grad.double())
    with tf32(fast):
        plain = gradients(low_rank_mixture_reference, given, indices, grad)
        with poisoned():
            got = gradients(partial(low_rank_mixture, engine=engine), given, indices, grad)
    # A product in tf32 has 10 bits: what plain PyTorch does in it may be more exact for some shapes than for others.
    return three_way(got, plain, exact, 1e-3 if fast else EPS[dtype])


def layer(machine: Machine, engine: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the errors of a frozen linear with its mixture in one call."""
    shape = machine.pick(LAYER, LAYER.toy())
    leaves, indices, grad = draw(shape, machine.device)
    weight = torch.randn(shape.d_out, shape.d_in, device=machine.device).to(dtype) / shape.d_in**0.5

    def fused(x: Tensor, *rest: Any) -> Tensor:
        return mixture_linear(x, weight, None, *rest, engine=engine)

    def apart(x: Tensor, *rest: Any) -> Tensor:
        return F.linear(x, weight.to(x.dtype)) + low_rank_mixture_reference(x, *rest)

    given, grad = cast(leaves, dtype), grad.to(dtype)
    exact = gradients(apart, cast(given, torch.float64), indices, grad.double())
    plain = gradients(apart, given, indices, grad)
    with poisoned():
        return three_way(gradients(fused, given, indices, grad), plain, exact, EPS[dtype])


def router(machine: Machine, n_experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the errors of the shrink with its router in it, and on how many rows it chose other experts."""
    n, d, o = machine.pick((ROUTED.rows, ROUTED.d_in, ROUTED.d_out), (70, 64, 40))
    rng = torch.Generator(machine.device).manual_seed(0)
    sizes = ((n, d), (n_experts, d), (n_experts, 8, d), (n_experts, 8, o), (o, d), (n, o))
    drawn = [torch.randn(*size, device=machine.device, generator=rng) / size[-1] ** 0.5 for size in sizes]
    *values, base, grad = (value.to(dtype) for value in drawn)

    def run(engine: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        x, gate, a, b = (value.to(dtype).requires_grad_() for value in values)
        y, _, indices, _ = gated_linear(x, base.to(dtype), None, Gate(gate, 2), a, b, engine=engine)
        assert indices is not None
        return indices, [y.detach(), *torch.autograd.grad(y, (x, gate, a, b), grad.to(dtype))]

    with poisoned():
        chosen, got = run("triton_concat", dtype)
    (expected, plain), (_, exact) = run("concat", dtype), run("concat", torch.float64)
    found = three_way(got, plain, exact, EPS[dtype], ("y", "grad_x", "grad_gate", "grad_a", "grad_b"))
    other = int((chosen != expected).any(-1).sum())
    return {**found, "rows with other experts": other, "holds": found["holds"] and not other}


def slots(machine: Machine, engine: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the errors of `grouped_linear` and `grouped_sum`."""
    n, d, e, width = machine.pick((SLOTS.rows, SLOTS.d_in, SLOTS.n_experts, SLOTS.rank), (40, 33, 5, 20))
    rng = torch.Generator(machine.device).manual_seed(0)
    sizes = ((n, d), (e, width, d), (n, 2, width))
    x, weight, values = (torch.randn(*s, device=machine.device, generator=rng).to(dtype) for s in sizes)
    weight = weight / d**0.5
    indices = torch.rand(n, e, device=machine.device, generator=rng).topk(2, -1).indices

    def all_of(linear: Function, summed: Function, dtype: torch.dtype) -> list[Tensor]:
        found = []
        for op, leaf, grad in ((linear, x, values), (summed, values, x)):
            leaves = [value.to(dtype).requires_grad_() for value in (leaf, weight)]
            y = op(*leaves)
            found += [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]
        return found

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("ti,tkpi->tkp", x, w[indices])

    def summed(v: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("tkp,tkpi->ti", v, w[indices])

    with poisoned():
        got = all_of(
            lambda x, w: grouped_linear(x, w, indices, engine=engine),
            lambda v, w: grouped_sum(v, w, indices, engine=engine),
            dtype,
        )
    names = [f"{op} {what}" for op in ("linear", "sum") for what in ("y", "grad", "grad_weight")]
    return three_way(got, all_of(linear, summed, dtype), all_of(linear, summed, torch.float64), EPS[dtype], names)


def repeated(machine: Machine, engine: str, shape: Shape) -> dict[str, Any]:
    """Return whether ten runs give the same bits."""
    shape = machine.pick(shape, shape.toy())
    leaves, indices, grad = draw(shape, machine.device)
    given, grad = cast(leaves, machine.low), grad.to(machine.low)
    function = partial(low_rank_mixture, engine=engine)
    first = gradients(function, given, indices, grad)
    runs = [gradients(function, given, indices, grad) for _ in range(machine.pick(9, 1))]
    moved = [n for n, *values in zip(NAMES, first, *runs, strict=True) if not all(map(values[0].equal, values[1:]))]
    return {"holds": not moved, "moved": moved}


def launched(machine: Machine, engine: str, shape: Shape) -> dict[str, Any]:
    """Return whether direct launches give the bits that Triton's give, from memory that holds none of them."""
    shape = machine.pick(shape, shape.toy())
    leaves, indices, grad = draw(shape, machine.device)
    given = cast(leaves, machine.low), indices, grad.to(machine.low)
    run = partial(gradients, partial(low_rank_mixture, engine=engine), *given)
    with direct(False):
        expected = run()
    with direct(True), poisoned():
        run()  # the first of each kind, which Triton compiles
        with unasked():
            got = run()
    other = [name for name, one, right in zip(NAMES, got, expected, strict=True) if not one.equal(right)]
    return {"holds": not other, "other bits": other}


def replayed(machine: Machine, engine: str, rows: int, routed: bool, way: bool = False) -> dict[str, Any]:
    """Return whether a replayed graph gives what a call gives, for new inputs and other experts in its buffers.

    Args:
        machine: it runs on.
        engine: of the mixture.
        rows: T.
        routed: with its router.
        way: the launches that are captured are direct; those that it is compared with are Triton's.
    """
    shape = replace(NUMERICS["usual"], rows=rows)
    shape = machine.pick(shape, shape.toy())
    cases = [draw(shape, machine.device, seed) for seed in (0, 1)]
    x, a, b, weights = cast(cases[0][0], machine.low)
    indices = cases[0][1]
    assert indices is not None
    base = torch.randn(shape.d_out, shape.d_in, device=machine.device).to(machine.low) / shape.d_in**0.5
    gate = torch.randn(shape.n_experts, shape.d_in, device=machine.device) / shape.d_in**0.5
    buffers = [x.clone(), weights.clone(), indices.clone()]

    def run() -> Tensor:
        with torch.no_grad():
            if routed:
                return gated_linear(buffers[0], base, None, Gate(gate, 2), a, b, engine=engine)[0]
            return mixture_linear(buffers[0], base, None, a, b, buffers[1], buffers[2], engine=engine)

    with direct(way):
        run()
        with unasked() if way else nullcontext():
            captured = machine.capture(run)
    equal = []
    for leaves, chosen, _ in (cases[1], cases[0]):
        assert chosen is not None
        for buffer, new in zip(buffers, (leaves[0], leaves[3], chosen), strict=True):
            buffer.copy_(new)
        with direct(way):  # which a pretended graph, that calls again, has to know
            captured.replay()
        with direct(False):
            equal.append(captured.output.clone().equal(run()))
    return {"holds": all(equal)}


def huge(machine: Machine, engine: str) -> dict[str, Any]:
    """Return the errors of the last rows where T·d is past 2^31, and of the gradients of all of them."""
    shape = machine.pick(PAST, Shape(70, 64, 64, 4, 8))
    rng = torch.Generator(machine.device).manual_seed(0)
    n, d, e, r = shape.rows, shape.d_in, shape.n_experts, shape.rank
    options = {"dtype": machine.low, "device": machine.device, "generator": rng}
    x, grad = (torch.randn(n, d, **options) for _ in range(2))
    a, b = torch.randn(e, r, d, **options) / d**0.5, torch.randn(e, r, d, **options) / r**0.5
    weights = torch.rand(n, 2, device=machine.device, generator=rng)
    indices = torch.rand(n, e, device=machine.device, generator=rng).topk(2, -1).indices
    got = gradients(partial(low_rank_mixture, engine=engine), [x, a, b, weights], indices, grad)
    exact_a, exact_b, block = 0.0, 0.0, machine.pick(2**16, 32)
    for first in range(0, n, block):
        part = slice(first, first + block)
        leaves = cast([x[part], a, b, weights[part]], torch.float64)
        found = gradients(low_rank_mixture_reference, leaves, indices[part], grad[part].double())
        exact_a, exact_b = exact_a + found[2], exact_b + found[3]
    last = slice(-min(block, 256), None)
    tail = cast([x[last], a, b, weights[last]], torch.float64)
    exact = gradients(low_rank_mixture_reference, tail, indices[last], grad[last].double())
    exact[2], exact[3] = exact_a, exact_b
    got = [got[0][last], got[1][last], got[2], got[3], got[4][last]]
    errors = {name: error(one, right) for name, one, right in zip(NAMES, got, exact, strict=True)}
    return {"holds": all(value < 0.02 for value in errors.values()), "errors": errors}


def compiled(machine: Machine) -> dict[str, Any]:
    """Return the errors under torch.compile as one graph, forward and backward."""
    shape = Shape(256, 256, 256).toy() if machine.toy else Shape(256, 256, 256)
    leaves, indices, grad = draw(shape, machine.device)
    given, grad = cast(leaves, torch.float32), grad.float()
    exact = gradients(low_rank_mixture_reference, cast(given, torch.float64), indices, grad.double())
    plain = gradients(low_rank_mixture_reference, given, indices, grad)
    function = torch.compile(low_rank_mixture, fullgraph=True, backend="aot_eager")
    return three_way(gradients(function, given, indices, grad), plain, exact, EPS[torch.float32])


def rows(machine: Machine, found: Callable[[], dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows: each kernel in each dtype, then what else must hold."""
    title = "compute-sanitizer"
    checks = sanitizer.Checks(machine, [name.removeprefix(f"{title} ") for name in found()])
    try:
        yield from _rows(machine)
        for tool in sanitizer.TOOLS:
            yield Row(f"{title} {tool}", partial(checks.ended, tool), kind="sanitizer", slow=True)
    finally:
        checks.close()


def _rows(machine: Machine) -> Iterator[Row]:
    low = machine.low
    for label, dtype in machine.dtypes.items():
        for fast in (False, True) if dtype == torch.float32 else (False,):
            for engine in ENGINES:
                for name, shape in NUMERICS.items():
                    if (dtype == low or name in EVERY_DTYPE) and (engine == "triton_concat" or shape.k is not None):
                        run = partial(mixture, machine, engine, shape, dtype, fast)
                        title = f"{engine} {label}{' tf32' if fast else ''}, {name}"
                        yield Row(title, run, 0.5, kind=f"mixture {engine} {fast}")
    for label, dtype in machine.dtypes.items():
        for engine in ENGINES:
            yield Row(f"layer {engine} {label}", partial(layer, machine, engine, dtype), kind="layer")
        for n_experts in (8, 16):
            run = partial(router, machine, n_experts, dtype)
            yield Row(f"router in the shrink {label}, {n_experts} experts", run, kind="router")
        yield Row(f"slots triton_grouped {label}", partial(slots, machine, "triton_grouped", dtype), kind="slots")
    for engine in ENGINES:
        for name in ("16 rows", "odd sizes", "usual", "one hot expert", "64 experts"):
            run = partial(repeated, machine, engine, NUMERICS[name])
            yield Row(f"same bits {engine}, {name}", run, kind="same bits")
            run = partial(launched, machine, engine, NUMERICS[name])
            yield Row(f"launched directly {engine}, {name}", run, kind="launched directly")
        for n, routed, way in itertools.product(REPLAYED, (False, True), (False, True)):
            title = f"replayed graph {engine}, {n} rows{', its router' * routed}{', launched directly' * way}"
            run = partial(replayed, machine, engine, n, routed, way)
            yield Row(title, run, kind=f"replayed {routed}")
    yield Row("torch.compile", partial(compiled, machine), 5, slow=True)
    yield from recipes.rows(machine)
    for engine in ENGINES:
        yield Row(f"T·d past 2^31 {engine}", partial(huge, machine, engine), 6, kind="huge")
