"""Deltas: factors with their scale, laziness, NaN by name.  pytest tests/test_delta.py"""

from __future__ import annotations

import pytest
import torch

from moa.delta import Delta, Dense, LowRank, Sparse, low_rank
from moa.errors import ConfigError, NumericsError, ShapeError
from moa.formats.named_deltas import check_finite
from moa.merge import Deltas, deltas
from moa.merge.compose import inner
from tests.merge.tools import assert_close, factors


def test_low_rank_folds_its_scale() -> None:
    a, b = factors().down, factors().up
    delta = low_rank(a, b, 0.7)
    assert_close(delta.dense(), 0.7 * b @ a)
    assert delta.shape == (7, 5)
    assert delta.rank == 3
    assert delta.down is a, "the down factor is not copied"


def test_half_types_are_computed_in_float32() -> None:
    a, b = factors().down.bfloat16(), factors().up.bfloat16()
    delta = low_rank(a, b, 1 / 3)
    assert delta.dtype == torch.float32
    assert torch.equal(delta.up, b.float() * (1 / 3))


@pytest.mark.parametrize("seed", range(3))
def test_inner_equals_the_dense_sum(seed: int) -> None:
    a, b = factors(2, seed=seed), factors(4, seed=seed + 9)
    expected = float((a.dense() * b.dense()).sum())
    assert inner(a, b) == pytest.approx(expected, rel=1e-12)
    assert inner(a, Dense(b.dense())) == pytest.approx(expected, rel=1e-12)


def test_zeros_have_rank_nothing() -> None:
    zero = factors().zeros()
    assert isinstance(zero, LowRank)
    assert zero.rank == 0
    assert torch.equal(zero.dense(), torch.zeros(7, 5, dtype=torch.float64))
    assert Dense(torch.ones(4)).zeros().shape == (4,)


def test_a_plain_mapping_is_read_lazily_and_never_written() -> None:
    reads: list[str] = []

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().__getitem__(name)

    weight = torch.ones(2, 2)
    lazy = deltas(Watched(a=weight, b=torch.zeros(3)), source="here", base="toy")
    assert list(lazy) == ["a", "b"]
    assert not reads
    assert torch.equal(lazy["a"].dense(), weight)
    assert reads == ["a"]
    assert "here" in repr(lazy)
    assert "c" not in lazy
    with pytest.raises(KeyError):
        lazy["c"]


def test_factor_tuples_are_accepted() -> None:
    f = factors()
    lazy = deltas({"w": (f.down, f.up), "v": (f.down, f.up, 2.0)})
    assert_close(lazy["v"].dense(), 2 * lazy["w"].dense())
    assert deltas(lazy) is lazy


def test_what_is_no_delta_is_refused() -> None:
    f = factors()
    with pytest.raises(ShapeError, match="swapped or transposed"):
        low_rank(f.up, f.down)
    with pytest.raises(ShapeError, match="must be matrices"):
        low_rank(f.down[None], f.up)
    with pytest.raises(ConfigError, match="scale"):
        low_rank(f.down, f.up, float("nan"))
    with pytest.raises(ConfigError, match="'w' is a str"):
        deltas({"w": "text"})["w"]  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="mapping name -> delta"):
        deltas([f])  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="floating"):
        deltas({"w": torch.ones(2, dtype=torch.int64)})["w"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["down", "up", "weight"])
def test_nan_names_the_tensor_and_its_source(bad: float, part: str) -> None:
    f = factors()
    target = {"down": f.down, "up": f.up, "weight": torch.zeros(2, 2)}[part]
    target.view(-1)[0] = bad
    delta = Dense(target) if part == "weight" else f
    with pytest.raises(NumericsError, match=rf"'layers.3.w' from adapter 1 .*1 of {target.numel()} in {part}"):
        check_finite(delta, "layers.3.w", "adapter 1")


def test_repr_and_len() -> None:
    lazy = Deltas(["a"], lambda name: Dense(torch.zeros(1)), "s")
    assert len(lazy) == 1
    assert lazy.base is None


# ------------------------------------------------------------------------------------------------ the forms


def forms(o: int = 7, i: int = 5) -> dict[str, Delta]:
    places = torch.randperm(o * i)[:9]
    return {
        "low-rank": LowRank(torch.randn(2, i).double(), torch.randn(o, 2).double()),
        "sparse": Sparse(places, torch.randn(9).double(), torch.Size((o, i))),
        "dense": Dense(torch.randn(o, i).double()),
    }


@pytest.mark.parametrize("one", ["low-rank", "sparse", "dense"])
@pytest.mark.parametrize("other", ["low-rank", "sparse", "dense"])
def test_sums_and_scales_keep_their_form(one: str, other: str) -> None:
    a, b = forms()[one], forms()[other]
    both = a + b.scaled(-2.5)
    assert_close(both.dense(), a.dense() - 2.5 * b.dense(), 1e-12)
    if one == other:
        assert type(both) is type(a)
    if one == other == "sparse":
        assert isinstance(both, Sparse) and both.places.unique().numel() == both.places.numel() <= 18
    matrix = torch.randn(5, 3).double()
    assert_close(a.before(matrix).dense(), a.dense() @ matrix, 1e-12)
    with pytest.raises(ShapeError, match="have no sum"):
        a + Dense(torch.zeros(2, 2).double())


@pytest.mark.parametrize("kind", ["low-rank", "sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_written_into_a_weight_and_taken_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """Subtracting again would not restore the bits; stored values do. The sum is rounded once."""
    change = forms()[kind]
    weight = torch.nn.Parameter(torch.randn(7, 5).to(dtype), requires_grad=False)
    before = weight.clone()
    undo = change.write_into(weight)
    assert torch.equal(weight, (before.double() + change.dense()).to(dtype))
    undo.restore()
    assert torch.equal(weight, before)
    if kind == "sparse":
        assert undo.values.numel() == 9, "only what was overwritten is kept"
    with pytest.raises(ShapeError, match="does not fit a weight"):
        change.write_into(torch.zeros(3, 3))


def test_switching_between_changes_restores_each_time() -> None:
    weight = torch.randn(7, 5)
    before = weight.clone()
    for _ in range(3):
        for change in forms().values():
            undo = change.write_into(weight)
            assert not torch.equal(weight, before)
            undo.restore()
            assert torch.equal(weight, before)
