"""MoSA's masks and Break-for-Make's halves.  pytest tests/merge/test_split.py"""

from __future__ import annotations

import pytest
import torch

from moa.errors import ConfigError, ShapeError
from moa.merge import LowRank, average_copies, join_masked, partition_masks, recompose

from .tools import assert_close, factors, matrices


@pytest.mark.parametrize("by", ["entries", "rows", "columns"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_masks_partition_the_entries(by: str, n: int) -> None:
    masks = partition_masks((8, 9), n, by=by)
    assert masks.shape == (n, 8, 9)
    assert torch.equal(masks.sum(0), torch.ones(8, 9, dtype=torch.int64))
    counts = {"entries": masks.sum((1, 2)), "rows": masks.sum(2), "columns": masks.sum(1)}[by]
    assert int(counts.max() - counts.min()) <= 1, "the parts are as equal as can be"
    assert torch.equal(masks, partition_masks((8, 9), n, by=by))
    assert n == 1 or not torch.equal(masks, partition_masks((8, 9), n, by=by, seed=1))


def test_joining_takes_every_entry_from_its_owner() -> None:
    copies, masks = matrices(3, 8, 9), partition_masks((8, 9), 3)
    joined = join_masked(copies, masks)
    for copy, mask in zip(copies, masks, strict=True):
        assert torch.equal(joined[mask], copy[mask])
    # split then merge gives the weight back
    weight = matrices(1, 8, 9)[0]
    assert torch.equal(join_masked([weight * m for m in masks], masks), weight)


def test_the_average_is_the_expected_copy() -> None:
    copies = matrices(4, 8, 9)
    assert_close(average_copies(copies), (copies[0] + copies[1] + copies[2] + copies[3]) / 4, 1e-14)


def test_mosa_refuses() -> None:
    copies, masks = matrices(3, 8, 9), partition_masks((8, 9), 3)
    overlapping = masks.clone()
    overlapping[0] = True
    with pytest.raises(ConfigError, match="overlap"):
        join_masked(copies, overlapping)
    with pytest.raises(ConfigError, match="overlap or leave"):
        join_masked(copies, torch.zeros_like(masks))
    with pytest.raises(ShapeError, match="expected"):
        join_masked(copies[:2], masks)
    with pytest.raises(ConfigError, match="Did you mean 'rows'"):
        partition_masks((8, 9), 2, by="row")
    with pytest.raises(ConfigError, match="n is 0"):
        partition_masks((8, 9), 0)
    with pytest.raises(ShapeError, match="matrix"):
        partition_masks((8,), 2)
    with pytest.raises(ConfigError, match="no copies"):
        average_copies([])
    with pytest.raises(ShapeError, match="shapes"):
        average_copies([torch.ones(2, 2), torch.ones(3, 2)])


def halves() -> tuple[LowRank, LowRank, torch.Tensor, torch.Tensor]:
    content, style = factors(4, 8, 6, seed=1), factors(4, 8, 6, seed=2)
    frozen_in, frozen_out = torch.arange(6) < 3, torch.arange(8) >= 4
    down = torch.where(frozen_in, content.down, style.down)
    up = torch.where(frozen_out[:, None], content.up, style.up)
    return content, LowRank(down, up), frozen_in, frozen_out


def test_recomposed_entries_are_their_donors_bit_for_bit() -> None:
    content, style, frozen_in, frozen_out = halves()
    before = style.up.clone()
    got = recompose(content, style, frozen_in=frozen_in, frozen_out=frozen_out)
    assert torch.equal(got.down[:, ~frozen_in], content.down[:, ~frozen_in])
    assert torch.equal(got.down[:, frozen_in], style.down[:, frozen_in])
    assert torch.equal(got.up, style.up)
    got.up.zero_()
    assert torch.equal(style.up, before), "inputs are not shared"


def test_another_basis_is_refused() -> None:
    content, style, frozen_in, frozen_out = halves()
    for factor, part in ((style.down[:, :1], "down"), (style.up[-1:], "up")):
        kept = factor.clone()
        factor.add_(1e-9)
        with pytest.raises(ConfigError, match=f"frozen half of {part} differs"):
            recompose(content, style, frozen_in=frozen_in, frozen_out=frozen_out)
        factor.copy_(kept)
    with pytest.raises(ShapeError, match="must be equal"):
        recompose(content, factors(3, 8, 6), frozen_in=frozen_in, frozen_out=frozen_out)
    with pytest.raises(ShapeError, match="frozen_in"):
        recompose(content, style, frozen_in=frozen_out, frozen_out=frozen_out)
