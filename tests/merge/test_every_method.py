"""Laws over every row of the table: any floating type, any shape, nothing refused without the tensor's name.

pytest tests/merge/test_every_method.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moa.delta import Sparse
from moa.errors import ConfigError, MoaError, NumericsError, ShapeError
from moa.merge import METHODS, Dense, LowRank, gram, merge

from .tools import assert_close

N = 3
JOIN_FACTORS = ("stack", "average_factors")
# What these give for one tensor depends on the others: a threshold, scales or coefficients of the whole model.
WHOLE_MODEL = ("ties", "emr", "adamerging")
# Every row, and every definition of those that have several.
ROWS = [(name, {}) for name in METHODS] + [
    (name, {"definition": choice})
    for name, row in METHODS.items()
    if "definition" in row.options
    for choice in row.options["definition"].choices
]
SUMS = [row for row in ROWS if row[0] not in JOIN_FACTORS]  # those that take dense changes
FORMS = ("tensor", "Dense", "Sparse", "factors", "LowRank")


def names(rows: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    return ["-".join((name, *options.values())) for name, options in rows]


def squares(merged: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(t**2).sum() for t in merged.values()]).sum()


def needed(method: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    """Return what a row cannot do without, its statistics in a type of their own."""
    g = torch.Generator().manual_seed(5)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    match method:
        case "regmean":
            inputs = [{n: torch.randn(40, s[1], generator=g).to(dtype) for n, s in matrices.items()} for _ in range(N)]
            return {"grams": [{n: gram(x) for n, x in each.items()} for each in inputs]}
        case "fisher":
            draws = [{n: torch.rand(s, generator=g).to(dtype) for n, s in shapes.items()} for _ in range(N)]
            return {"fishers": draws}
        case "adamerging":
            return {"loss": squares, "steps": 2}
        case "emr":
            return {"task": 1}
    return {"density": 0.5} if "density" in METHODS[method].options else {}


def run(method: str, adapters: list[dict[str, Any]], options: Mapping[str, Any]) -> Mapping[str, Any]:
    return merge(adapters[:2] if method == "slerp" else adapters, method=method, **options)


# --- any floating type ------------------------------------------------------------------------------------------

SHAPES = {"wide": (8, 12), "tall": (11, 7), "bias": (9,)}
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adapters_of(dtype: torch.dtype, form: str) -> list[dict[str, Any]]:
    """Return adapters as they are stored: tensors, factors, or deltas that were made from either."""
    g = torch.Generator().manual_seed(3)
    out: list[dict[str, Any]] = []
    for _ in range(N):
        adapter: dict[str, Any] = {}
        for name, shape in SHAPES.items():
            if form in ("factors", "LowRank"):
                if len(shape) < 2:
                    continue
                down = torch.randn(2, shape[1], generator=g).to(dtype)
                up = torch.randn(shape[0], 2, generator=g).to(dtype)
                adapter[name] = (down, up) if form == "factors" else LowRank(down, up)
            else:
                weight = torch.randn(shape, generator=g).to(dtype)
                if form == "Sparse":
                    places = torch.randperm(weight.numel(), generator=g)[: max(1, weight.numel() // 2)]
                    adapter[name] = Sparse(places, weight.flatten()[places], weight.shape)
                    continue
                adapter[name] = weight if form == "tensor" else Dense(weight)
        out.append(adapter)
    return out


def in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple):
        return tuple(part.double() for part in value)
    if isinstance(value, LowRank):
        return LowRank(value.down.double(), value.up.double())
    return Dense(value.dense().double())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("method", "options"), ROWS, ids=names(ROWS))
def test_every_type_gives_what_float64_gives(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {**needed(method, SHAPES, dtype), **options}
    for form in FORMS[3:] if method in JOIN_FACTORS else FORMS:
        adapters = adapters_of(dtype, form)
        exact = [{name: in_float64(value) for name, value in adapter.items()} for adapter in adapters]
        got, truth = run(method, adapters, options), run(method, exact, options)
        for name in adapters[0]:
            assert got[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert float(truth[name].dense().abs().max()) > 0
            # The work type of the half types is float32; decompositions cost it a few of its 24 bits. In
            # float64 both are one computation, but a solver rounds by how its memory is aligned.
            assert_close(got[name].dense(), truth[name].dense(), 1e-14 if dtype == torch.float64 else 1e-5)


def test_regmean_solves_the_least_squares_of_float32_and_bfloat16() -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(60, 7, generator=g) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(5, 7, generator=g).to(dtype) for _ in range(2)]
        outputs = torch.cat([x.double() @ w.double().T for x, w in zip(inputs, weights, strict=True)])
        expected = torch.linalg.lstsq(torch.cat(inputs).double(), outputs).solution.T
        grams = [{"w": gram(x)} for x in inputs]
        got = merge([{"w": w} for w in weights], method="regmean", grams=grams, shrink=1.0)["w"].dense()
        assert_close(got, expected, 1e-6)


# --- any shape --------------------------------------------------------------------------------------------------

ODD: tuple[tuple[int, ...], ...] = (
    *(
        (),
        (1,),
        (4,),
        (1, 1),
        (1, 6),
        (6, 1),
        (2, 12),
    ),  # numbers, vectors, matrices narrower than 3
    *((3, 4, 5), (2, 3, 2, 2), (1, 1, 1)),  # convolutions
    *((0,), (0, 4), (4, 0), (3, 0, 2)),  # nothing
)


def odd_tensors(shape: tuple[int, ...], kind: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    first = torch.randn(shape, generator=g)
    if kind == "opposite":
        return [first, -2 * first, first]
    if kind == "zero":
        return [torch.zeros(shape)] * N
    return [first] + [torch.randn(shape, generator=g) for _ in range(N - 1)]


@pytest.mark.parametrize("kind", ["random", "opposite", "zero"])
@pytest.mark.parametrize(("method", "options"), SUMS, ids=names(SUMS))
def test_no_shape_stops_a_merge(method: str, options: dict[str, Any], kind: str) -> None:
    usual = adapters_of(torch.float32, "tensor")
    odd = {f"odd{shape}": odd_tensors(shape, kind) for shape in ODD}
    both = [{**adapter, **{name: tensors[t] for name, tensors in odd.items()}} for t, adapter in enumerate(usual)]
    shapes = SHAPES | {f"odd{shape}": shape for shape in ODD}
    options = {**needed(method, shapes, torch.float32), **options}
    got, alone = run(method, both, options), run(method, usual, options)
    for name, shape in shapes.items():
        assert got[name].shape == shape
        assert got[name].finite(), name
        if kind == "zero" and name in odd:
            assert not bool(got[name].dense().any()), name
        if method not in WHOLE_MODEL and name in SHAPES:
            assert torch.equal(got[name].dense(), alone[name].dense()), name


@pytest.mark.parametrize("method", JOIN_FACTORS)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_what_has_no_factors_is_refused_by_name(method: str, shape: tuple[int, ...]) -> None:
    adapters = [{"odd": value} for value in odd_tensors(shape, "random")]
    with pytest.raises(ConfigError, match="'odd' is dense"):
        run(method, adapters, {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 12)], ids=str)
def test_no_shape_of_factors_stops_a_merge(method: str, shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(2)
    o, i = shape
    adapters = [{"odd": (torch.randn(3, i, generator=g), torch.randn(o, 3, generator=g))} for _ in range(N)]
    got = run(method, adapters, needed(method, {"odd": shape}, torch.float32))["odd"]
    assert got.shape == shape
    assert got.finite()
    assert isinstance(got, LowRank) == METHODS[method].keeps_factors


def test_tsv_averages_a_matrix_without_room_for_every_task() -> None:
    g = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 12, generator=g) for _ in range(3)]
    got = merge([{"head": head} for head in heads], [1.0, 1.0, 2.0], "tsv")["head"].dense()
    assert_close(got, (heads[0] + heads[1] + 2 * heads[2]) / 4, 1e-6)
    two = merge([{"head": head} for head in heads[:2]], method="tsv")["head"].dense()  # two tasks have room
    assert float((two - (heads[0] + heads[1]) / 2).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("method", "options", "error", "match"),
    [
        ("tsv", {"rank": 5}, ConfigError, "3 tasks of rank 5 do not fit"),
        ("tsv", {"weights": [1.0, -1.0, 0.0]}, ConfigError, "sum to 0"),
        ("regmean", {"grams": [{"odd": torch.zeros(4, 4)}] * 3}, NumericsError, "not positive definite"),
        ("regmean", {"grams": [{"odd": torch.zeros(3, 3)}] * 3}, ShapeError, r"expected \(4, 4\)"),
        ("fisher", {"fishers": [{"odd": torch.ones(3)}] * 3}, ShapeError, "a diagonal is"),
        ("slerp", {"base": {}}, ConfigError, "holds no weight"),
        ("slerp", {"base": {"odd": torch.ones(3)}}, ShapeError, "base is"),
    ],
    ids=lambda value: None if isinstance(value, dict) else getattr(value, "__name__", str(value)[:20]),
)
def test_a_refusal_names_the_tensor(method: str, options: dict[str, Any], error: type[MoaError], match: str) -> None:
    shape = (4,) if "weights" in options else (6, 4)
    adapters = [{"odd": value} for value in odd_tensors(shape, "random")]
    with pytest.raises(error, match=rf"(?s)'odd'.*{match}|{match}.*'odd'"):
        run(method, adapters, options)


@pytest.mark.parametrize("method", METHODS)
def test_integers_are_refused_by_name(method: str) -> None:
    adapters = [{"odd": torch.ones(4, 4, dtype=torch.long)} for _ in range(N)]
    with pytest.raises(ShapeError, match=r"'odd'.*floating"):
        run(method, adapters, needed(method, {"odd": (4, 4)}, torch.float32))
