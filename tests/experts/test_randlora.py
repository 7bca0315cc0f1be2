"""RandLoRA's bases multiply once, or a change is formed. Run: pytest tests/experts/test_randlora.py"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moa.experts import make_family
from moa.experts.families.randlora import RandLoRABank
from moa.kernels.scaled_basis import scaled_basis
from moa.layers import Site
from moa.types import Routing
from tests.laws import assert_close

RANK = 3


def randlora(n_experts: int, d_in: int, d_out: int) -> RandLoRABank:
    torch.manual_seed(0)
    family, site = make_family("randlora", {}), Site("layer", nn.Linear(d_in, d_out), d_in, d_out)
    options = {"rank": RANK, "scaling": 1.3, "dropout": 0.0, "engine": None}
    bank = family.build(site, n_experts, family.shared([site], **options), **options)
    assert isinstance(bank, RandLoRABank)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank.double()


def truth(bank: RandLoRABank, x: Tensor, routing: Routing, base: Tensor) -> Tensor:
    """Return arXiv 2502.00987, eq. 4, entry by entry: Σ_j B_j diag(λ_j) A diag(γ_j), transposed where i > o."""
    down, up = bank.bases.down[:, 0, : bank.short], bank.bases.up[: bank.long, : bank.n_bases]
    mixed = up.reshape(bank.long, bank.rank, bank.n_bases)  # the columns are paired as in peft
    change = torch.einsum("lrn,ern,rs,ens->els", mixed, bank.inner, down, bank.outer) * bank.scaling
    change = change if bank.d_in <= bank.d_out else change.mT
    return x @ base.mT + torch.einsum("...i,eoi,...e->...o", x, change, routing.dense())


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 12), (9, 20), (20, 10)])
@pytest.mark.parametrize("n_rows", [5, 200])
@pytest.mark.parametrize(("n_experts", "routed"), [(1, False), (3, False), (4, True)])
def test_both_ways_are_the_definition(d_in: int, d_out: int, n_rows: int, n_experts: int, routed: bool) -> None:
    bank, rows = randlora(n_experts, d_in, d_out), (n_rows,) if routed else ()
    x = torch.randn(n_rows, d_in, dtype=torch.float64, requires_grad=True)
    base = torch.randn(d_out, d_in, dtype=torch.float64)
    k = 2 if routed else n_experts
    weights = torch.randn(*rows, k, dtype=torch.float64, requires_grad=True)
    routing = Routing(weights, torch.rand(*rows, n_experts).argsort(-1)[..., :k] if routed else None, n_experts)
    assert bank.is_one_weight(x, routing) == (not routed and n_rows == 200)
    leaves = (x, weights, *bank.parameters())
    runs = [bank.fused.add_linear(x, routing, base, None), truth(bank, x, routing, base)]
    above = torch.randn(n_rows, d_out, dtype=torch.float64)
    found = [[y, *torch.autograd.grad(y, leaves, above)] for y in runs]
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 24), (24, 12)])
@pytest.mark.parametrize("n_experts", [4, 16])
def test_the_bases_multiply_once_for_all_experts(d_in: int, d_out: int, n_experts: int) -> None:
    """The longer side costs T rows, the shorter one K T, whatever E is."""
    bank, rows, k = randlora(n_experts, d_in, d_out), 40, 2
    x, base = torch.randn(rows, d_in, dtype=torch.float64), torch.randn(d_out, d_in, dtype=torch.float64)
    routing = Routing(torch.rand(rows, k).double(), torch.rand(rows, n_experts).argsort(-1)[:, :k], n_experts)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bank.fused.add_linear(x, routing, base, None)
    inner = RANK * bank.n_bases
    own, shared = k * rows * inner * bank.short, rows * inner * bank.long
    assert counter.get_total_flops() == 2 * (rows * d_in * d_out + own + shared)


def test_a_scaled_basis_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    inner, outer = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 4), (4, 7)))
    basis, above = torch.randn(3, 1, 7, dtype=torch.float64), torch.randn(12, 7, dtype=torch.float64)
    runs = [scaled_basis(inner, basis, outer, 1.7), 1.7 * (inner[..., None] * basis * outer).flatten(0, 1)]
    found = [[y, *torch.autograd.grad(y, (inner, outer), above)] for y in runs]
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)
