"""Deltas: factors with their scale, laziness, NaN by name.  pytest tests/test_delta.py"""

from __future__ import annotations

import pytest
import torch

from moa.delta import check_finite, inner
from moa.errors import ConfigError, NumericsError, ShapeError
from moa.merge import Deltas, Dense, LowRank, deltas, low_rank
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
