"""What every merging method is built from: one row of the table, one tensor's job, the streams between them.

Elementwise rows are sparsify × agree × scale; see `moa.merge.methods` for the rows and their papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank, work_dtype
from ..errors import ConfigError, MoaError, ShapeError, unknown_name
from ..formats.named_deltas import Deltas, check_finite
from .consensus import agreeing_sum, weighted_sum
from .cutoff import model_threshold
from .options import REQUIRED, Option
from .sparsify import check_density, drop_by_rank, drop_random, generator_for, keep_above, keep_largest, keep_middle
from .subspace import total

# Sparsified deltas of one tensor are kept between the two passes of a sign vote up to this size, else made again:
# both give the same numbers.
KEEP_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Method:
    """One row of the table of merging methods.

    Args:
        name: what `merge(method=…)` takes.
        paper: where it comes from.
        definition: what it computes, with w_t the weights and δ_t the deltas.
        run: merges one tensor.
        options: its keywords.
        weights: how given weights are read: "normalised" to sum 1, "sum" as they are, "none" if it takes none.
        prepare: runs once before the tensors, over all of them; its result is `Job.state`.
        fits: (shape, number of adapters) -> whether it is defined for such a tensor; the others are averaged with the
            same weights, as the papers do with what is not a matrix. None: it is defined for every shape.
        keeps_factors: low-rank changes merge to a low-rank change.
        sparsify: for elementwise rows, how entries are dropped.
        agree: for elementwise rows, whether signs are elected.
    """

    name: str
    paper: str
    definition: str
    run: Callable[[Job], Delta]
    options: Mapping[str, Option] = field(default_factory=dict)
    weights: Literal["normalised", "sum", "none"] = "sum"
    prepare: Callable[[Plan], Any] | None = None
    fits: Callable[[Sequence[int], int], bool] | None = None
    keeps_factors: bool = False
    sparsify: str | None = None
    agree: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that has been checked but not run.

    Args:
        method: the row.
        adapters: n sets of deltas with the shapes known, each (o, i).
        names: the tensors, in order.
        weights: (n,) numbers.
        options: the method's keywords, complete.
    """

    method: Method
    adapters: Sequence[Deltas]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    options: Mapping[str, Any]

    def delta(self, index: int, name: str) -> Delta | None:
        """Return one adapter's finite delta (o, i) in its work type, None where it has none.

        Raises:
            NumericsError: it holds NaN or infinity.
            ShapeError: it holds integers.
        """
        adapter = self.adapters[index]
        if name not in adapter:
            return None
        with naming(name):
            delta = adapter[name]
            return check_finite(delta.to(work_dtype(delta.dtype)), name, adapter.source)

    def aligned(self, name: str) -> list[Delta]:
        """Return every adapter's delta of one tensor, of one shape (o, i) and one type; zero where one has none.

        Raises:
            ShapeError: the shapes differ.
            NumericsError: one holds NaN or infinity.
        """
        found = [self.delta(t, name) for t in range(len(self.adapters))]
        shapes = {a.source: tuple(d.shape) for a, d in zip(self.adapters, found, strict=True) if d is not None}
        if len(set(shapes.values())) > 1:
            raise ShapeError(
                f"{name!r} has another shape in some adapters ({shapes}): they belong to different base models."
            )
        return wide(zero_like(found))


@dataclass(frozen=True, eq=False)
class Job:
    """The merge of one tensor.

    Args:
        plan: the merge it belongs to.
        name: the tensor.
        deltas: n deltas of one shape, e.g. (o, i).
        state: what the method's `prepare` returned.
    """

    plan: Plan
    name: str
    deltas: Sequence[Delta]
    state: Any = None

    @property
    def weights(self) -> tuple[float, ...]:
        """One number per adapter."""
        return self.plan.weights

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's keywords."""
        return self.plan.options


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Run a block about one tensor (any shape): an error of moa that does not name the tensor gets its name."""
    try:
        yield
    except MoaError as error:
        if repr(name) in str(error):
            raise
        raise type(error)(f"merging {name!r}: {error}") from error


def read_options(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every keyword of a method with its value; what is not given has the chosen `definition`'s default.

    Raises:
        ConfigError: an unknown keyword (the nearest is named), a missing one, a value that is not a choice,
            text or NaN where a number belongs.
    """
    for key in given:
        if key not in method.options:
            raise ConfigError(unknown_name("option", key, method.options, f"method {method.name!r}"))

    def value_of(key: str, definition: str | None = None) -> Any:
        option = method.options[key]
        value = given[key] if key in given else option.elsewhere.get(definition or "", option.default)
        if value is REQUIRED:
            raise ConfigError(f"method {method.name!r} needs {key}=: {option.doc}.")
        if option.choices and value not in option.choices:
            raise ConfigError(unknown_name(key, value, option.choices, f"method {method.name!r}"))
        numeric = isinstance(option.default, int | float) or option.default is REQUIRED
        for one in value if isinstance(value, list | tuple) else [value]:
            if numeric and not option.choices and isinstance(one, str):
                kind = "true or false" if isinstance(option.default, bool) else "a number"
                raise ConfigError(f"method {method.name!r}: {key} must be {kind}, got {one!r}.")
            if isinstance(one, float) and not math.isfinite(one):
                raise ConfigError(f"method {method.name!r}: {key} must be a finite number, got {one}.")
        return value

    definition = value_of("definition") if "definition" in method.options else None
    return {key: value_of(key, definition) for key in method.options}


def per_adapter(value: Any, n: int, what: str) -> tuple[float, ...]:
    """Return one number per adapter from one number, or from a sequence of n.

    Raises:
        ConfigError: a sequence of another length, or no number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),) * n
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != n:
        raise ConfigError(f"{what} is {value!r}; expected a number, or one per adapter ({n}).")
    return tuple(float(v) for v in value)


def scope(options: Mapping[str, Any]) -> str:
    """Return over what magnitudes are ranked: the "model" (the paper's TIES) or each "tensor"; no tensors involved."""
    return options["scope"] or ("model" if options.get("definition") == "paper" else "tensor")


def thresholds(plan: Plan) -> tuple[float, ...] | None:
    """Return each adapter's magnitude threshold over the whole model, or None if each tensor is trimmed by itself."""
    densities = per_adapter(plan.options["density"], len(plan.adapters), "density")
    for density in densities:
        check_density(density, plan.method.name)
    if scope(plan.options) != "model":
        return None

    def threshold(index: int, density: float) -> float:
        if density == 1:  # all entries are kept, and no pass over the model is needed to know it
            return 0.0
        held = [name for name in plan.names if name in plan.adapters[index]]

        def stream() -> Iterator[Tensor]:
            for name in held:
                delta = plan.delta(index, name)
                assert delta is not None
                yield delta.dense()

        first = plan.delta(index, held[0]) if held else None
        dtype = first.dtype if first is not None else torch.float32
        return model_threshold(stream, sum(sizes[name] for name in held), density, dtype)

    sizes = {}
    for name in plan.names:
        known = plan.delta(next(t for t, a in enumerate(plan.adapters) if name in a), name)
        assert known is not None
        sizes[name] = known.shape.numel()
    return tuple(threshold(t, density) for t, density in enumerate(densities))


def sparsified(job: Job, tensors: Sequence[Delta | Tensor] | None = None) -> Callable[[], Iterator[Tensor]]:
    """Return a function that starts a pass over a job's sparsified deltas, dense, each (o, i).

    Args:
        job: whose method row says how.
        tensors: instead of the job's deltas, other tensors to treat the same way.
    """
    kind, options, n = job.plan.method.sparsify, job.options, len(job.deltas)
    kind = options.get("sparsify", kind)
    definition = "mergekit" if options.get("definition") == "mergekit" else "paper"
    source = job.deltas if tensors is None else tensors
    densities = per_adapter(options.get("density", 1.0), n, "density")

    def one(index: int) -> Tensor:
        item = source[index]
        delta = item if isinstance(item, Tensor) else item.dense()
        density = densities[index]
        if kind == "magnitude":
            if job.state is not None and tensors is None:
                return keep_above(delta, job.state[index])
            return keep_largest(delta, density, least=1 if definition == "mergekit" else 0)
        if kind == "random":
            generator = generator_for(options["seed"], index, job.name)
            return drop_random(delta, density, generator, definition=definition, rescale=options["rescale"])
        if kind == "rank":
            generator = generator_for(options["seed"], index, job.name)
            spread, rescale = options["epsilon"], options["rescale"]
            return drop_by_rank(delta, density, spread, generator, definition=definition, rescale=rescale)
        if kind == "middle":
            return keep_middle(delta, density, options["gamma"])
        return delta

    first = source[0]
    size = first.shape.numel() * first.dtype.itemsize * n
    if size > KEEP_BYTES:
        return lambda: (one(t) for t in range(n))
    kept: list[Tensor] = []

    def stream() -> Iterator[Tensor]:
        for t in range(n):
            if t == len(kept):
                kept.append(one(t))
            yield kept[t]

    return stream


def elementwise(job: Job) -> Delta:
    """Return sparsify × agree × scale of one tensor's deltas (o, i): the elementwise rows of the table."""
    method, scale = job.plan.method, float(job.options.get("scale", 1.0))
    if method.sparsify is None and not method.agree:
        return total(job.deltas, [w * scale for w in job.weights])
    stream = sparsified(job)
    result = vote(job, stream) if method.agree else weighted_sum(stream(), job.weights)
    return Dense(result if scale == 1 else result * scale)


def vote(job: Job, stream: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Return the sign-agreeing combination (o, i) of a job's sparsified deltas, by the options of its row."""
    options = job.options
    return agreeing_sum(
        stream, job.weights, options["definition"], vote=options["vote"], normalize=options["normalize"]
    )


def zero_like(deltas: Sequence[Delta | None]) -> list[Delta]:
    """Return the deltas (o, i) with zero changes, of rank 0 where low-rank is possible, in place of missing ones."""
    present = next(d for d in deltas if d is not None)
    return [d if d is not None else present.zeros() for d in deltas]


def low_rank_only(job: Job) -> list[LowRank]:
    """Return a job's deltas, all low-rank.

    Raises:
        ConfigError: one is dense.
    """
    parts = [d for d in job.deltas if isinstance(d, LowRank)]
    if len(parts) < len(job.deltas):
        raise ConfigError(
            f"method {job.plan.method.name!r} joins low-rank factors, and {job.name!r} is dense in "
            f"{len(job.deltas) - len(parts)} of {len(job.deltas)} adapters: squeeze it first, or use task_arithmetic."
        )
    return parts


def wide(values: Sequence[Delta]) -> list[Delta]:
    """Return the deltas (o, i) all in the widest type among them, so that no method meets two types."""
    dtype = values[0].dtype
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return [v.to(dtype) for v in values]
