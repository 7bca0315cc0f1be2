"""Slots of a block, opened and closed by a bank. Run: pytest tests/experts/test_open_close.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moa.experts import ExpertBank
from tests import laws
from tests.laws import assert_close

T, K, D_IN, D_OUT, E, R = 6, 2, 5, 7, 4, 3  # i and o of a family may be multiples of these
BANKS = {case: laws.make_bank(*case, D_IN, D_OUT, E, R) for case in laws.BANK_CASES}
# slots are rows by themselves: experts that look at the rows around have none there
OUTPUT_BANKS = [case for case, bank in BANKS.items() if bank.mixes == "outputs" and bank.rowwise]


def by_definition(bank: ExpertBank, x: Tensor, indices: Tensor) -> Tensor:
    """Return E_{e_k}(x_k) of x (T, K, i), (T, K, o), row by row."""
    rows = []
    for slots, chosen in zip(x, indices.tolist(), strict=True):
        rows.append(torch.stack([bank.expert_forward(s, e) for s, e in zip(slots, chosen, strict=True)]))
    return torch.stack(rows)


def results(bank: ExpertBank, run: Any, *inputs: Tensor) -> list[Tensor]:
    bank.zero_grad()
    leaves = [value.clone().requires_grad_() for value in inputs]
    y = run(*leaves)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *laws.gradients(bank, *leaves)]


@laws.parametrize(OUTPUT_BANKS)
@pytest.mark.parametrize("engine", [None, "concat", "sorted"])
@pytest.mark.parametrize("shape", [(T,), (2, 3)], ids=str)
def test_values_and_gradients(name: str, variant: str, engine: str | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    if engine is not None and not laws.uses(name, "engine"):
        return
    bank = laws.make_bank(name, variant, D_IN, D_OUT, E, R, engine=engine)
    d_in, d_out = bank.d_in, bank.d_out
    indices = torch.rand(T, E).argsort(-1)[:, :K]
    x, onto = torch.randn(T, d_in, dtype=torch.float64), torch.randn(T, d_out, dtype=torch.float64)
    slots, weights = torch.randn(T, K, d_in, dtype=torch.float64), torch.randn(T, K, dtype=torch.float64)

    def opened(x: Tensor, onto: Tensor) -> Tensor:
        args = (x.view(*shape, -1), indices.view(*shape, -1), onto.view(*shape, -1))
        return bank.fused.open_slots(*args).view(T, K, d_out)

    def closed(slots: Tensor, weights: Tensor) -> Tensor:
        args = (slots.view(*shape, K, -1), weights.view(*shape, K), indices.view(*shape, K))
        return bank.fused.close_slots(*args).view(T, d_out)

    def open_truth(x: Tensor, onto: Tensor) -> Tensor:
        return onto.unsqueeze(1) + by_definition(bank, x.unsqueeze(1).expand(T, K, d_in), indices)

    def close_truth(slots: Tensor, weights: Tensor) -> Tensor:
        return (by_definition(bank, slots, indices) * weights.unsqueeze(-1)).sum(1)

    for run, truth, inputs in ((opened, open_truth, (x, onto)), (closed, close_truth, (slots, weights))):
        for got, expected in zip(results(bank, run, *inputs), results(bank, truth, *inputs), strict=True):
            assert_close(got, expected)


def test_an_expert_that_no_slot_chose_cannot_reach_it() -> None:
    bank = laws.make_bank("lora", "default", D_IN, D_OUT, E, R, engine="concat")
    x = torch.randn(3, D_IN, dtype=torch.float64)
    indices = torch.tensor([[0, 1], [1, 2], [2, 0]])
    onto = torch.zeros(3, D_OUT, dtype=torch.float64)
    before = bank.fused.open_slots(x, indices, onto)
    with torch.no_grad():
        bank.down[3] = 1e300
    big = torch.full_like(x, 1e10)
    assert bank.fused.open_slots(big, indices, onto).isfinite().all(), "expert 3 overflows and is chosen by none"
    assert_close(bank.fused.open_slots(x, indices, onto), before)
