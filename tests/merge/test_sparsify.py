"""Sparsifiers against brute force, PEFT and their own expectations.  pytest tests/merge/test_sparsify.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from moa.errors import ConfigError
from moa.merge.sparsify import (
    drop_by_rank,
    drop_random,
    generator_for,
    keep_above,
    keep_largest,
    keep_middle,
    keep_probabilities,
    kth_largest,
    top_mask,
)

from .tools import assert_close


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
@settings(max_examples=60, deadline=None)
def test_top_mask_keeps_exactly_k_of_the_largest(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    magnitude = torch.tensor(values, dtype=torch.float32)
    mask = top_mask(magnitude, k)
    assert int(mask.sum()) == k
    # brute force: a stable sort by falling magnitude, ties by position
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))
    assert sorted(order[:k]) == mask.nonzero().squeeze(1).tolist()
    if k:
        assert float(kth_largest(magnitude, k)) == sorted(values, reverse=True)[k - 1]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.37, 0.9])
def test_keep_largest_equals_peft(density: float) -> None:
    x = torch.randn(23, 11)
    assert torch.equal(keep_largest(x, density), merge_utils.prune(x, density, method="magnitude"))


@pytest.mark.parametrize("rescale", [True, False])
def test_drop_random_equals_peft_on_the_same_stream(rescale: bool) -> None:
    x = torch.randn(23, 11)
    torch.manual_seed(5)
    expected = merge_utils.random_pruning(x, 0.3, rescale=rescale)
    assert torch.equal(drop_random(x, 0.3, torch.Generator().manual_seed(5), rescale=rescale), expected)


def test_masks_are_repeatable_and_leave_the_global_generator_alone() -> None:
    x = torch.ones(400)
    before = torch.get_rng_state()
    one = drop_random(x, 0.5, generator_for(0, 1, "w"))
    assert torch.equal(one, drop_random(x, 0.5, generator_for(0, 1, "w")))
    for other in (generator_for(1, 1, "w"), generator_for(0, 2, "w"), generator_for(0, 1, "v")):
        assert not torch.equal(one, drop_random(x, 0.5, other))
    assert torch.equal(before, torch.get_rng_state())


def test_random_masks_keep_the_mean() -> None:
    x = torch.randn(4, 50, dtype=torch.float64)
    draws = torch.stack([drop_random(x, 0.3, generator_for(s, 0, "w")) for s in range(4000)])
    deviation = (x.abs() * (0.7 / 0.3) ** 0.5 / 4000**0.5).max()
    assert float((draws.mean(0) - x).abs().max()) < 5 * deviation
    draws = torch.stack([drop_by_rank(x, 0.3, 0.2, generator_for(s, 0, "w")) for s in range(4000)])
    deviation = (x.abs() * (0.8 / 0.2) ** 0.5 / 4000**0.5).max()
    assert float((draws.mean(0) - x).abs().max()) < 5 * deviation


def test_della_probabilities_by_hand() -> None:
    x = torch.tensor([[3.0, -1.0, 0.5, 2.0], [0.1, 0.2, -0.4, 0.3]], dtype=torch.float64)
    rank = torch.tensor([[0, 2, 3, 1], [3, 2, 0, 1]], dtype=torch.float64)
    drop = (0.6 - 0.2 / 2) + 0.2 * rank / 4
    assert_close(keep_probabilities(x, 0.4, 0.2, "paper"), 1 - drop)
    # mergekit's guide: from density - epsilon (smallest) to density + epsilon (largest)
    assert_close(keep_probabilities(x, 0.4, 0.2, "mergekit"), 0.6 - 0.4 * rank / 3)
    assert_close(keep_probabilities(x[0], 0.4, 0.2, "paper"), (1 - drop)[0])


def test_della_without_spread_is_dare() -> None:
    x = torch.randn(6, 9, dtype=torch.float64)
    for kind in ("paper", "mergekit"):
        della = drop_by_rank(x, 0.4, 0.0, generator_for(0, 0, "w"), definition=kind)
        assert_close(della, drop_random(x, 0.4, generator_for(0, 0, "w"), definition=kind))
    plain = drop_by_rank(x, 0.4, 0.1, generator_for(0, 0, "w"), rescale=False)
    assert bool(((plain == x) | (plain == 0)).all())


def same_magnitude(kept: Tensor, x: Tensor) -> Tensor:
    """mergekit's `rescale`, in plain numbers: the magnitudes that are left sum to what all of them summed to."""
    values = kept.reshape(-1).tolist()
    factor = sum(abs(v) for v in x.reshape(-1).tolist()) / sum(abs(v) for v in values)
    return torch.tensor([factor * v for v in values], dtype=x.dtype).view(x.shape)


def test_mergekits_rescaling_keeps_the_sum_of_magnitudes() -> None:
    x = torch.randn(6, 9, dtype=torch.float64)
    masked = drop_random(x, 0.4, generator_for(0, 0, "w"), rescale=False)
    dare = drop_random(x, 0.4, generator_for(0, 0, "w"), definition="mergekit")
    assert_close(dare, same_magnitude(masked, x), 1e-12)
    masked = drop_by_rank(x, 0.4, 0.1, generator_for(0, 0, "w"), definition="mergekit", rescale=False)
    della = drop_by_rank(x, 0.4, 0.1, generator_for(0, 0, "w"), definition="mergekit")
    assert_close(della, same_magnitude(masked, x), 1e-12)
    paper = drop_random(x, 0.4, generator_for(0, 0, "w"))
    assert float((dare - paper).abs().max()) > 1e-3
    for small in (torch.zeros(3), torch.full((3,), 1e-9)):  # nothing to scale by
        kept = drop_random(small, 0.5, generator_for(1, 0, "w"), definition="mergekit", rescale=False)
        assert torch.equal(drop_random(small, 0.5, generator_for(1, 0, "w"), definition="mergekit"), kept)


@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 6, 2, 3)])
def test_mergekits_rows_run_along_axis_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    low, high = 0.5 - 0.2, 0.5 + 0.2
    got = keep_probabilities(x, 0.5, 0.2, "mergekit")
    rows, kept = x.abs().movedim(1, -1).reshape(-1, shape[1]), got.movedim(1, -1).reshape(-1, shape[1])
    for row, probabilities in zip(rows.tolist(), kept.tolist(), strict=True):
        for value, probability in zip(row, probabilities, strict=True):
            smaller = sum(v < value for v in row)
            assert probability == pytest.approx(low + (high - low) * smaller / (shape[1] - 1))
    last = keep_probabilities(x, 0.5, 0.2, "paper")
    for row, probabilities in zip(x.abs().view(-1, shape[-1]), last.view(-1, shape[-1]), strict=True):
        assert row.argmax() == probabilities.argmax()


def test_della_where_a_row_has_no_spread() -> None:
    one = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    assert keep_probabilities(one, 0.4, 0.1, "mergekit").tolist() == [[0.4], [0.4]]
    assert keep_probabilities(torch.tensor(2.0), 0.4, 0.1, "mergekit").shape == ()
    x = torch.randn(4, 6)
    assert torch.equal(drop_by_rank(x, 1.0, 0.15, generator_for(0, 0, "w"), definition="mergekit"), x)


@pytest.mark.parametrize("definition", ["paper", "mergekit"])
def test_masks_do_not_depend_on_the_type(definition: str) -> None:
    x = torch.randn(40, 50)
    for call in (
        lambda t: drop_random(t, 0.37, generator_for(0, 1, "w"), definition=definition),
        lambda t: drop_by_rank(t, 0.37, 0.1, generator_for(0, 1, "w"), definition=definition),
    ):
        assert_close(call(x), call(x.double()), 1e-6)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.01), (0.8, 0.5), (1.0, 0.3), (0.3, 0.0)])
def test_breadcrumbs_by_sorting(density: float, gamma: float) -> None:
    x = torch.randn(10, 10)
    order = x.abs().reshape(-1).argsort(descending=True)
    kept = int(density * 100)
    top = min(int(gamma * 100), 100 - kept)  # the published edge case: density wins over gamma
    expected = torch.zeros(100)
    expected[order[top : top + kept]] = x.reshape(-1)[order[top : top + kept]]
    assert torch.equal(keep_middle(x, density, gamma).reshape(-1), expected)


def test_keep_above_keeps_equal_ones() -> None:
    x = torch.tensor([-2.0, 1.0, 2.0, 0.5])
    assert torch.equal(keep_above(x, 2.0), torch.tensor([-2.0, 0.0, 2.0, 0.0]))
    assert torch.equal(keep_above(x, float("inf")), torch.zeros(4))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_densities_outside_their_range(density: float) -> None:
    x, g = torch.ones(4), torch.Generator()
    for call in (
        lambda: keep_largest(x, density),
        lambda: drop_random(x, density, g),
        lambda: drop_by_rank(x, density, 0.0, g),
        lambda: keep_middle(x, density, 0.1),
    ):
        with pytest.raises(ConfigError, match="density"):
            call()
    with pytest.raises(ConfigError, match="gamma"):
        keep_middle(x, 0.5, 1.0)
    with pytest.raises(ConfigError, match="must stay in"):
        drop_by_rank(x, 0.95, 0.2, g)
