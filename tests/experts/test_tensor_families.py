"""Kronecker sums and tensor networks against numpy's own contractions. Run: pytest tests/experts"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moa
from moa.errors import ConfigError
from moa.experts.families.soka import kronecker_terms
from moa.experts.frozen import generator
from moa.experts.modes import mode_sizes
from moa.spectrum import rank_at_elbow
from moa.types import Routing
from tests import laws, models
from tests.laws import assert_close


def bank_on(weight: torch.Tensor, name: str, rank: int = 2, **keywords: Any) -> Any:
    """Return a bank of two experts in fp64 on a layer with a weight (o, i), at random values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    family, options = laws.make_family(name, keywords), {"rank": rank, "scaling": 1.5}
    site = moa.Site("q", layer, weight.shape[1], weight.shape[0])
    return laws.randomised(family.build(site, 2, family.shared([site], **options), **options).double())


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


# --------------------------------------------------------------------------------- rows or the whole change


def multiplications(bank: Any, n_rows: int, *, one_routing: bool) -> int:
    """Return what PyTorch counts in a step of training on x (n, i) that one expert has all rows of."""
    x = torch.randn(n_rows, bank.d_in, requires_grad=True)
    n = 1 if one_routing else n_rows
    routing = Routing(torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int64), bank.n_experts)
    with FlopCounterMode(display=False) as counter:
        bank.fused.add_linear(x, routing, torch.randn(bank.d_out, bank.d_in), None).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("shape", [(48, 48), (96, 48)])
@pytest.mark.parametrize("name", ["soka", "lokr", "loha", "tera"])
def test_a_training_step_goes_the_way_that_multiplies_least(name: str, shape: tuple[int, int]) -> None:
    bank = bank_on(torch.randn(shape), name, 4).float()
    known = (bank.few, bank.few_alone)
    ways = set()
    for n_rows in (2, 32, 256):
        for one_routing in (True, False):
            counts = []
            for few in (known, (0, 0), (math.inf, math.inf)):  # as it is, always the change, never
                bank.few, bank.few_alone = few
                counts.append(multiplications(bank, n_rows, one_routing=one_routing))
            assert counts[0] <= 1.1 * min(counts[1:]), (n_rows, one_routing, counts)
            ways.add(counts[1] < counts[2])
    assert ways == {True, False} or name == "lokr"  # small factors of odd shapes never need the change


# ------------------------------------------------------------------------------------------------ SoKA


def rearranged(weight: np.ndarray, outer: tuple[int, int], inner: tuple[int, int]) -> np.ndarray:
    """Return a row for each block of a matrix, by slices."""
    (o1, o2), (i1, i2) = outer, inner
    blocks = [weight[a * o2 : (a + 1) * o2, b * i2 : (b + 1) * i2] for a in range(o1) for b in range(i1)]
    return np.stack([block.ravel() for block in blocks])


@pytest.mark.parametrize("shape", [(12, 8), (6, 18)])
def test_soka_starts_at_the_best_kronecker_sums_and_moves_from_there(shape: tuple[int, int]) -> None:
    """numpy's kron, and the spectrum of the blocks laid out by slices: what is cut off has the tail's energy."""
    torch.manual_seed(0)
    weight, rank = torch.randn(shape, dtype=torch.float64), 3
    bank = bank_on(weight, "soka", rank)
    outer, inner = (tuple(side) for side in zip(bank.left_start.shape[1:], bank.right_start.shape[1:], strict=True))
    spectrum = np.linalg.svd(rearranged(numbers(weight), outer, inner), compute_uv=False)
    terms = list(zip(numbers(bank.left_start), numbers(bank.right_start), strict=True))
    own = sum(np.kron(a, b) for a, b in terms)
    assert math.isclose(np.linalg.norm(numbers(weight) - own) ** 2, (spectrum[rank:] ** 2).sum(), rel_tol=1e-10)
    for e in range(2):
        left, right = numbers(bank.left[e]), numbers(bank.right[e])
        moved = sum(np.kron(a + da, b + db) for (a, b), da, db in zip(terms, left, right, strict=True))
        assert_close(bank.delta(e).dense(), torch.tensor(1.5 * (moved - own)), 1e-10)


def test_sokas_rank_rule() -> None:
    """The least number of products that holds the energy, at most those before the bend, at most the rank."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(16, 3, dtype=torch.float64)).Q.T.view(3, 4, 4) for _ in range(2))
    scales = (4.0, 2.0, 1.0)  # of orthonormal terms: shares 16/21, 20/21 and 1
    weight = sum(s * torch.kron(a, b) for s, a, b in zip(scales, left, right, strict=True))
    assert_close(kronecker_terms(weight, (4, 4), (4, 4))[1][:3], torch.tensor(scales, dtype=torch.float64), 1e-10)
    for share, rank in ((0.7, 1), (0.8, 2), (0.95, 2), (0.97, 3), (1.0, 3)):
        assert bank_on(weight, "soka", 8, energy=share).rank == rank
        assert bank_on(weight, "soka", 2, energy=share).rank == min(rank, 2)
    assert bank_on(weight, "soka", 8).rank == 8
    assert bank_on(weight, "soka", 8, elbow=True).rank == 3
    assert bank_on(weight, "soka", 8, elbow=True, energy=0.8).rank == 2
    assert rank_at_elbow(torch.tensor([9.0, 8.5, 1.0, 0.9, 0.8])) == 2
    assert [rank_at_elbow(torch.linspace(3, 1, q)) for q in (1, 2, 3)] == [1, 2, 1]
    assert bank_on(torch.zeros(4, 4), "soka", 2, energy=0.5).rank == 1


# ------------------------------------------------------------------------------------------------ MPS


@pytest.mark.parametrize("modes", [1, 2, 3, (2, 3)])
def test_an_mps_is_products_of_its_matrices_entry_by_entry(modes: Any) -> None:
    torch.manual_seed(0)
    bank = bank_on(torch.randn(12, 18, dtype=torch.float64), "mps", 4, modes=modes)
    ups = [numbers(getattr(bank, f"up_{n}")[1]) for n in range(len(bank.outer))]
    downs = [numbers(getattr(bank, f"down_{n}")[1]) for n in range(len(bank.inner))]
    change = np.zeros((*bank.outer, *bank.inner))
    for place in np.ndindex(*change.shape):
        matrices = [core[:, at] for core, at in zip([*ups, *downs], place, strict=True)]
        change[place] = 1.5 * np.linalg.multi_dot(matrices).item()
    assert_close(bank.delta(1).dense(), torch.tensor(change.reshape(12, 18)), 1e-10)


def test_bonds_are_no_larger_than_they_can_be_of_use_and_hold_any_change_then() -> None:
    """numpy's successive decompositions of any change are a state with the bonds of this bank."""
    torch.manual_seed(0)
    bank = bank_on(torch.randn(12, 12, dtype=torch.float64), "mps", 12, modes=(3,))
    assert [tuple(getattr(bank, name).shape[1:]) for name in bank.per_expert] == [
        (1, 3, 3),
        (3, 4, 12),
        (12, 3, 4),
        (4, 4, 1),
    ]
    wanted, rest, bond = np.random.default_rng(0).normal(size=(12, 12)), None, 1
    rest = wanted.reshape(1, -1)
    for name, size in zip(bank.per_expert, (3, 4, 3, 4), strict=True):
        core = getattr(bank, name)[0]
        if name == bank.per_expert[-1]:
            core.data.copy_(torch.tensor(rest.reshape(bond, size, 1)) / 1.5)
            break
        u, s, vt = np.linalg.svd(rest.reshape(bond * size, -1), full_matrices=False)
        kept = core.shape[2]
        core.data.copy_(torch.tensor(u[:, :kept].reshape(bond, size, kept)))
        rest, bond = s[:kept, None] * vt[:kept], kept
    assert_close(bank.delta(0).dense(), torch.tensor(wanted), 1e-10)


def test_one_mode_is_a_lora() -> None:
    bank = bank_on(torch.randn(6, 8, dtype=torch.float64), "mps", 3, modes=1)
    down, up = bank.factors()
    assert torch.equal(down, bank.down_0.squeeze(-1)) and torch.equal(up, bank.up_0.squeeze(1).mT)
    bank.reset_parameters()
    assert not bank.up_0.any() and 0.5 < bank.down_0.detach().std().item() * 24**0.5 < 1.5  # as ±1/√i is spread


# ------------------------------------------------------------------------------------------------ TeRA


def test_tera_is_the_whole_network_contracted_and_of_high_rank() -> None:
    """numpy's einsum over core, factors and diagonals, drawn again from the seed."""
    torch.manual_seed(0)
    o, i, r = 12, 20, 2
    bank = bank_on(torch.randn(o, i, dtype=torch.float64), "tera", r, seed=5)
    draw = generator(5)
    core = torch.randn(r * r, r * r, generator=draw).view(r, r, r, r)
    sizes = (*bank.outer, *bank.inner)
    factors = [torch.randn(d, r, generator=draw) / math.sqrt(r) for d in sizes]
    assert sizes == (3, 4, 4, 5)
    for e in range(2):
        vectors = [numbers(getattr(bank, name)[e]) for name in ("out_0", "out_1", "in_0", "in_1")]
        scaled = [v[:, None] * numbers(f.double()) for v, f in zip(vectors, factors, strict=True)]
        network = np.einsum("jklm,aj,bk,cl,dm->abcd", numbers(core.double()), *scaled).reshape(o, i)
        change = bank.delta(e).dense()
        assert_close(change, torch.tensor(1.5 / math.sqrt(i) * network), 1e-6)  # bases are drawn in fp32
        assert_close(change, bank.change(bank.tensors(e)).detach(), 1e-10)
        assert int(torch.linalg.matrix_rank(change)) == r * r > r
    assert sum(p.numel() for p in bank.parameters()) == 2 * (3 + 4 + 4 + 5)


def test_teras_factors_are_shared_by_layers_of_other_sizes() -> None:
    """A smaller layer has the leading rows of each factor; one of equal size has the very tensor."""
    sites = [moa.Site(name, nn.Linear(i, o), i, o) for name, i, o in (("a", 16, 9), ("b", 16, 9), ("c", 4, 4))]
    family = laws.make_family("tera", {})
    shared = family.shared(sites, rank=2)
    a, b, c = (family.build(site, 1, shared, rank=2).double() for site in sites)
    assert a.bases is b.bases is c.bases and set(dict(shared.named_buffers())) == {"up_9", "up_4", "down_16", "down_4"}
    alone = family.shared(sites[:1], rank=2)
    assert torch.equal(alone.up_9, shared.up_9)
    rows = shared.up_9.view(3, 3, 4)[:2, :2].reshape(4, 4)
    assert torch.equal(rows, shared.up_4)
    assert not any("bases" in key for key in a.state_dict())


# ------------------------------------------------------------------------------------------------ bad input


def test_modes_are_as_equal_as_can_be() -> None:
    assert [mode_sizes(size, 2, "q") for size in (24, 36, 7, 1)] == [(4, 6), (6, 6), (1, 7), (1, 1)]
    assert mode_sizes(48, 3, "q") == (3, 4, 4) and mode_sizes(48, 1, "q") == (48,)
    assert mode_sizes(48, (4, 2), "q") == (4, 2, 6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"expert": "soka", "factor": 7}, r"q_proj: factor=7 does not divide 16: the nearest that do are 2, 4, 8"),
        ({"expert": "soka", "factor": 0}, r"factor must be -1 or at least 1, got 0"),
        ({"expert": "soka", "energy": 1.5}, r"energy must be a share of the squared norm in \[0, 1\].*got 1\.5"),
        ({"expert": "soka", "rank": 9}, r"k_proj: a weight \(8, 16\) in blocks of \(4, 4\) is a sum of 8 .*rank=9 is"),
        ({"expert": "mps", "modes": (3,)}, r"q_proj: modes\[0\]=3 does not divide 16: the nearest that do are 1, 2, 4"),
        (
            {"expert": "mps", "modes": (4, 3)},
            r"q_proj: modes\[1\]=3 does not divide 4: the nearest that do are 1, 2, 4",
        ),
        (
            {"expert": "tera", "modes": (5,)},
            r"q_proj: modes\[0\]=5 does not divide 16: the nearest that do are 2, 4, 8",
        ),
        ({"expert": "tera", "modes": 0}, r"modes must be at least 1, got 0"),
        ({"expert": "mps", "modes": ()}, r"modes must be a number, or sizes of at least 1 .*got \(\)"),
        ({"expert": "tera", "modes": 4, "rank": 9}, r"core of 8 modes of rank 9 .*at most rank=8 fits"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), "fixed", n_experts=2, **options)
