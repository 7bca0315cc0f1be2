"""Candidates of the GPU experiment in Triton's interpreter. Not collected by itself: `test_candidates.py` runs it with
TRITON_INTERPRET=1, which must be set before the kernels are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from experiments.gpu import contests
from experiments.gpu.candidates import bulk, extended, filled, once, siblings
from experiments.gpu.contests import Given
from experiments.gpu.shapes import Shape, draw
from moa.errors import BackendError
from moa.kernels.triton.thin import Sizes

from .compare import EPS, assert_three_way

# The interpreter of triton before 3.9 takes scalars from arrays in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
SHAPES = {
    "no rows": Shape(0, 40, 24, 4, 4),
    "one row": Shape(1, 40, 24, 4, 4),
    "odd rows, sizes that no block divides": Shape(19, 44, 36, 5, 4, 2),
    "several blocks of columns": Shape(17, 16, 24, 9, 4, 3),
    "one hot expert": Shape(35, 24, 24, 3, 4, 1, routing="one expert"),
    "dense": Shape(18, 24, 24, 4, 4, None),
    "rows of a wider matrix": Shape(19, 24, 24, 4, 4, routing="half the experts", strided=True),
}


def given(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Given, Tensor]:
    """Return operands, and a base weight (o, i)."""
    (x, a, b, weights), indices, grad = draw(shape)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(*weights.shape, shape.rank, dtype=torch.float64, generator=rng)
    mixed = torch.randn(shape.rows, shape.n_experts * shape.rank, dtype=torch.float64, generator=rng)
    weight = torch.randn(shape.d_out, shape.d_in, dtype=torch.float64, generator=rng) / shape.d_in**0.5
    values = [value.to(dtype) for value in (x, grad, a, b)]
    if shape.strided:  # `to` gives rows of their own
        values[:2] = (torch.cat([v, v], -1)[:, : v.shape[1]] for v in values[:2])
    return Given(*values, weights.float(), indices, hidden.to(dtype), mixed.to(dtype)), weight.to(dtype)


def sizes(own: Given, features: int = 16) -> Sizes:
    """Return small tiles: every loop takes several turns."""
    return Sizes(16, 32 if own.mixed.shape[1] > 16 else 16, features, 4, 2)


def shrunk(own: Given, launch: Callable[..., None], *rest: object) -> tuple[Tensor, Tensor]:
    hidden, mixed = torch.empty_like(own.hidden), torch.empty_like(own.mixed)
    launch(own.x, own.a, own.weights, own.indices, hidden, mixed, *rest)
    return hidden, mixed


def check(got: Sequence[Tensor], plain: Callable[[torch.dtype], Sequence[Tensor]], dtype=torch.float32) -> None:
    names = range(len(got))
    assert all(value.dtype == torch.float32 or value.dtype == dtype for value in got), names
    pad = [torch.zeros(1, dtype=torch.float64)] * (5 - len(got))  # assert_three_way takes five
    assert_three_way((*got, *pad), (*plain(dtype), *pad), (*plain(torch.float64), *pad), EPS[dtype])


def every_candidate(own: Given, weight: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Check each candidate against the truth."""
    size, unmixing = sizes(own), (own.grad, own.b, own.weights, own.indices, own.hidden)
    for launch, *rest in (
        (bulk.shrink, size, True), (filled.split_shrink, size, 2), (filled.split_shrink, size, 2, True),
        (filled.persistent_shrink, size, 1),
    ):  # fmt: skip
        check(shrunk(own, launch, *rest), partial(contests.shrunk, own, own.a), dtype)
    factors = [own.a, own.a.flip(0).contiguous(), own.a.flip(1).contiguous()]
    for n, by_engine in ((2, len(own.x) % 2 == 0), (3, len(own.x) % 2 == 1)):
        hidden, mixed = (value.new_empty(n, *value.shape) for value in (own.hidden, own.mixed))
        siblings.sibling_shrink(own.x, factors[:n], own.weights, own.indices, hidden, mixed, size, by_engine)
        check((hidden, mixed), partial(contests.all_shrunk, own, factors[:n]), dtype)
    check(bulk.unmix(*unmixing, size, False), partial(contests.unmixed, own), dtype)
    check([bulk.gram(own.mixed, own.grad, own.b, size, False)], partial(contests.grammed, own), dtype)
    check(once.unmix_gram(*unmixing, size, 16), partial(contests.unmixed_and_grammed, own), dtype)
    check([extended.added(own.mixed, own.b, own.x @ weight.T, size)], partial(contests.based, own, weight), dtype)
    for by_engine in (False, True):
        got = extended.extended(own.x, weight, own.mixed, own.b, size, 32, by_engine)
        check([got], partial(contests.based, own, weight), dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_every_candidate_equals_the_truth(name, poisoned):
    every_candidate(*given(SHAPES[name]))


def test_fp16(poisoned):
    every_candidate(*given(Shape(20, 24, 24, 4, 8), torch.float16), torch.float16)


def test_experts_that_a_row_has_twice_add():
    own, _ = given(Shape(18, 24, 24, 4, 4, 3))
    assert own.indices is not None
    twice = replace(own, indices=own.indices[:, [0, 1, 0]].contiguous())
    gate = torch.zeros(18, 4).scatter_add_(1, twice.indices, own.weights)
    dense = replace(own, weights=gate, indices=None, hidden=own.a.new_empty(18, 4, 4))
    for launch, *rest in ((bulk.shrink, sizes(own), False), (filled.split_shrink, sizes(own), 2)):
        assert torch.equal(shrunk(twice, launch, *rest)[1], shrunk(dense, launch, *rest)[1])


@pytest.mark.parametrize("d", [33, 34])
def test_rows_that_do_not_begin_on_16_bytes_are_refused(d):
    own, weight = given(Shape(20, d, d, 4, 4))
    for run in (
        lambda: shrunk(own, bulk.shrink, sizes(own), False),
        lambda: shrunk(own, filled.split_shrink, sizes(own), 2, True),
        lambda: bulk.unmix(own.grad, own.b, own.weights, own.indices, own.hidden, sizes(own), False),
        lambda: bulk.gram(own.mixed, own.grad, own.b, sizes(own), False),
        lambda: extended.extended(own.x, weight, own.mixed, own.b, sizes(own), 32, True),
    ):
        with pytest.raises(BackendError, match=r"rows of \(\d+, 3[34]\) with strides .* do not begin on 16 bytes"):
            run()
    check(shrunk(own, filled.split_shrink, sizes(own), 2), partial(contests.shrunk, own, own.a))
    unmixing = (own.grad, own.b, own.weights, own.indices, own.hidden)
    check(once.unmix_gram(*unmixing, sizes(own), 16), partial(contests.unmixed_and_grammed, own))


def test_chunks_that_are_not_whole_blocks_are_refused():
    own, _ = given(SHAPES["one row"])
    with pytest.raises(ValueError, match="chunks of 24 rows are not whole blocks of 16"):
        once.unmix_gram(own.grad, own.b, own.weights, own.indices, own.hidden, sizes(own), 24)


def test_siblings_of_other_sizes_are_refused():
    own, _ = given(SHAPES["one row"])
    for factors in ([own.a], [own.a, own.a[:1]]):
        with pytest.raises(ValueError, match="expected two or three of one size"):
            siblings.sibling_shrink(own.x, factors, own.weights, own.indices, own.hidden, own.mixed, sizes(own))
