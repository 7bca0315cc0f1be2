"""Weight changes of a few entries: sums over them are the products. Run: pytest tests/kernels/test_few_entries.py"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moa.experts import make_family
from moa.experts.families.shira import ShiRABank
from moa.kernels.few_entries import Order, entry_gradients, entry_product, order_entries
from moa.layers import Site
from moa.types import Routing
from tests.laws import assert_close

I, O, N = 20, 14, 30  # noqa: E741


def entries(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Order]:
    """Return places (n,) in no order, values (n,) and their order."""
    torch.manual_seed(0)
    places = torch.randperm(I * O)[:N]
    order = order_entries(places.unsqueeze(0), O, I)
    return places, torch.randn(N, dtype=dtype), Order(*(t[0] for t in order))


def dense(places: Tensor, values: Tensor) -> Tensor:
    weight = torch.zeros(O * I, dtype=values.dtype)
    weight[places] = values
    return weight.view(O, I)


@pytest.mark.parametrize("rows", [(1,), (3, 5), (500,), (0,)], ids=str)
def test_products_and_gradients_are_those_of_the_dense_weight(rows: tuple[int, ...]) -> None:
    places, values, order = entries()
    x, above = torch.randn(*rows, I, dtype=torch.float64), torch.randn(*rows, O, dtype=torch.float64)
    weight = dense(places, values)
    outer = above.flatten(0, -2).mT @ x.flatten(0, -2)
    assert_close(entry_product(x, values, order), x @ weight.mT)
    to_x, to_values = entry_gradients(x, above, values, order, True)
    assert to_x is not None
    assert_close(to_x, above @ weight)
    assert_close(to_values, outer.flatten()[places])
    assert entry_gradients(x, above, values, order, False)[0] is None


def test_half_precision_is_summed_in_single() -> None:
    places, values, order = entries(torch.float32)
    x, above = torch.randn(300, I).bfloat16(), torch.randn(300, O).bfloat16()
    exact = x.double() @ dense(places, values).double().mT
    plain = x @ dense(places, values).bfloat16().mT
    got = entry_product(x, values, order)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
    to_values = entry_gradients(x, above, values, order, False)[1]
    assert_close(to_values.double(), (above.double().mT @ x.double()).flatten()[places], 1e-6)


def shira(n_experts: int, **keywords: object) -> ShiRABank:
    site = Site("layer", nn.Linear(I, O), I, O)
    options = {"rank": 2, "scaling": 1.0, "dropout": 0.0, "engine": None}
    bank = make_family("shira", {"density": 0.1, **keywords}).build(site, n_experts, None, **options)
    assert isinstance(bank, ShiRABank)
    with torch.no_grad():
        bank.values.normal_()
    return bank.double()


def truth(bank: ShiRABank, x: Tensor, weights: Tensor) -> Tensor:
    """Return the definition, of weights that are the same on all rows, (E,)."""
    size = (bank.n_experts, O * I)
    changes = torch.zeros(size, dtype=x.dtype).scatter(1, bank.places, bank.values).view(-1, O, I)
    return x @ torch.einsum("e,eoi->oi", weights, changes).mT


@pytest.mark.parametrize("n_rows", [4, 100], ids=["by entry", "one weight"])
def test_places_that_are_chosen_anew_are_sorted_anew(n_rows: int) -> None:
    """Written in place, set, loaded or copied: the order is that of the places that are there."""
    bank, x, weights = shira(3), torch.randn(n_rows, I, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def check(bank: ShiRABank) -> None:
        x.requires_grad_()
        leaves = (x, weights.requires_grad_(), bank.values)
        runs = [bank(x, Routing(weights, None, 3)), truth(bank, x, weights)]
        found = [[y, *torch.autograd.grad(y.square().sum(), leaves)] for y in runs]
        for got, expected in zip(*found, strict=True):
            assert_close(got, expected)

    check(bank)
    bank.places.copy_(bank.places.flip(1).roll(1, 0))
    check(bank)
    bank.places = torch.stack([torch.randperm(I * O)[: bank.values.shape[1]] for _ in range(3)])
    check(bank)
    check(copy.deepcopy(bank))
    given = shira(3, mask="given")
    check(given)
    given.load_state_dict(dict(bank.state_dict(), places=bank.places))
    check(given)
    with torch.inference_mode():
        bank.places = bank.places.clone()
        assert_close(bank(x, Routing(weights, None, 3)), truth(bank, x, weights))


def test_rows_form_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are routed go through the entries, forward and backward: no expert's ΔW (o, i) is formed."""
    bank, x = shira(4), torch.randn(9, I, dtype=torch.float64, requires_grad=True)
    weights, indices = torch.rand(9, 2, dtype=torch.float64), torch.rand(9, 4).argsort(-1)[:, :2]
    monkeypatch.setattr(ShiRABank, "change", lambda *_: pytest.fail("a change was formed"))
    bank(x, Routing(weights, indices, 4)).sum().backward()
    assert x.grad is not None
    assert bank.values.grad is not None
