"""The three functions called TIES: PEFT's own code, and a loop over entries for the others.

pytest tests/merge/test_consensus.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from moa.errors import ConfigError
from moa.merge.consensus import agreeing_sum, weighted_sum
from moa.merge.sparsify import keep_largest

from .tools import assert_close, matrices

WEIGHTS = [0.7, -0.2, 1.3, 0.4]


def sparse(n: int = 4) -> list[Tensor]:
    return [keep_largest(m, 0.5) for m in matrices(n, 6, 8)]


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def by_loop(deltas: Sequence[Tensor], weights: Sequence[float], definition: str, normalize: bool) -> Tensor:
    out = torch.zeros_like(deltas[0])
    flat = [d.reshape(-1).tolist() for d in deltas]
    for p in range(out.numel()):
        values = [f[p] for f in flat]
        if definition == "paper":
            elected = sign(sum(values))
            chosen = [v for v in values if elected and sign(v) == elected]
            out.view(-1)[p] = weights[0] * sum(chosen) / max(len(chosen), 1)
        else:
            terms = [w * v for w, v in zip(weights, values, strict=True)]
            elected = 1 if sum(terms) >= 0 else -1
            total = sum(t for t in terms if sign(t) == elected)
            share = sum(w for w, t in zip(weights, terms, strict=True) if sign(t) == elected)
            out.view(-1)[p] = total / share if normalize and abs(share) >= 1e-8 else total
    return out


def test_the_papers_definition_entry_by_entry() -> None:
    deltas = sparse()
    deltas[0][0, 0], deltas[1][0, 0], deltas[2][0, 0], deltas[3][0, 0] = 1.0, -1.0, 2.0, -2.0  # an exact tie
    assert_close(agreeing_sum(lambda: deltas, [0.4] * 4, "paper"), by_loop(deltas, [0.4] * 4, "paper", True))
    assert agreeing_sum(lambda: deltas, [0.4] * 4, "paper")[0, 0] == 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.7, 0.2, 1.3, 0.4], WEIGHTS], ids=["ones", "positive", "mixed"])
def test_mergekits_definition_entry_by_entry(weights: list[float], normalize: bool) -> None:
    deltas = sparse()
    got = agreeing_sum(lambda: deltas, weights, "mergekit", normalize=normalize)
    assert_close(got, by_loop(deltas, weights, "mergekit", normalize))


@pytest.mark.parametrize(("vote", "theirs"), [("total", "total"), ("count", "frequency")])
@pytest.mark.parametrize("weights", [[1.0] * 4, WEIGHTS], ids=["ones", "mixed"])
def test_pefts_definition_is_pefts(vote: str, theirs: str, weights: list[float]) -> None:
    raw = matrices(4, 6, 8)
    expected = merge_utils.ties(raw, torch.tensor(weights, dtype=torch.float64), 0.5, theirs)
    got = agreeing_sum(lambda: [keep_largest(m, 0.5) for m in raw], weights, "peft", vote=vote)
    assert_close(got, expected, 1e-14)


def test_the_three_definitions_differ() -> None:
    deltas = sparse()
    weights = [0.7, 0.2, 1.3, 0.4]
    peft, mergekit = (agreeing_sum(lambda: deltas, weights, d) for d in ("peft", "mergekit"))
    assert float((peft - mergekit).norm() / peft.norm()) > 0.1
    # with equal weights: the paper's and peft's are one function away from ties, mergekit's lacks the common factor
    same = [0.5] * 4
    assert_close(agreeing_sum(lambda: deltas, same, "paper"), agreeing_sum(lambda: deltas, same, "peft"))
    assert_close(agreeing_sum(lambda: deltas, same, "mergekit"), 2 * agreeing_sum(lambda: deltas, same, "peft"))


def test_weighted_sum_equals_peft_and_needs_matching_weights() -> None:
    deltas = matrices(4)
    expected = merge_utils.task_arithmetic(deltas, torch.tensor(WEIGHTS, dtype=torch.float64))
    assert_close(weighted_sum(deltas, WEIGHTS), expected, 1e-14)
    for weights in (WEIGHTS[:3], [*WEIGHTS, 1.0], []):
        with pytest.raises(ConfigError, match=f"{len(weights)} weights for 4 deltas"):
            weighted_sum(deltas, weights)


def test_inputs_are_not_written() -> None:
    deltas = sparse()
    before = [d.clone() for d in deltas]
    weighted_sum(deltas, WEIGHTS)
    agreeing_sum(lambda: deltas, WEIGHTS, "peft")
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))


def test_refusals() -> None:
    deltas = sparse()
    with pytest.raises(ConfigError, match="no weight per task"):
        agreeing_sum(lambda: deltas, WEIGHTS, "paper")
    with pytest.raises(ConfigError, match="Did you mean 'mergekit'"):
        agreeing_sum(lambda: deltas, WEIGHTS, "mergkit")
    with pytest.raises(ConfigError, match="unknown vote"):
        agreeing_sum(lambda: deltas, WEIGHTS, "peft", vote="loud")
