"""The fused step against the chain of products it stands for. Run: pytest tests/kernels/test_headed_linear.py"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.experts import HeadedLoRABank
from moa.kernels import headed_linear
from moa.types import Routing
from tests.laws import assert_close

B, S, D_IN, D_OUT, E, R = 3, 5, 12, 8, 4, 2


def tensors(heads: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {
        "x": (B, S, D_IN),
        "weight": (D_OUT, D_IN),
        "bias": (D_OUT,),
        "down": (E, R, D_IN),
        "up": (E, R, D_OUT),
        "mix": (B, heads, E),
    }
    return {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}


def chain(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, mix: Tensor, s: float) -> Tensor:
    """Return the definition: mix head by head, then two products."""
    heads = mix.shape[1]
    own = [
        torch.einsum("bhe,erhd->brhd", mix, f.unflatten(-1, (heads, -1))).flatten(-2).to(x.dtype) for f in (down, up)
    ]
    return F.linear(x, weight, bias) + s * (x @ own[0].mT) @ own[1]


LEAVES = ("x", "down", "up", "mix")


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("trained", [LEAVES, ("mix",), ("down",), ("up", "x"), ("x",)], ids="-".join)
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(heads: int, trained: tuple[str, ...], has_bias: bool) -> None:
    results = []
    for run in (headed_linear, chain):
        given = tensors(heads)
        for name in trained:
            given[name].requires_grad_()
        if not has_bias:
            given["bias"] = None  # type: ignore[assignment]
        y = run(*given.values(), 0.7)
        y.square().sum().backward()
        results.append([y.detach(), *(given[name].grad for name in trained)])
        assert all(given[name].grad is None for name in LEAVES if name not in trained)
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


def test_gradcheck() -> None:
    given = tensors(2)
    leaves = [given[name].requires_grad_() for name in LEAVES]
    torch.autograd.gradcheck(
        lambda x, down, up, mix: headed_linear(x, given["weight"], given["bias"], down, up, mix, 0.7), leaves
    )


def test_sixteen_bits_keep_wide_factors_wide() -> None:
    """Its error is within twice that of the chain in the same dtype, the truth being fp64; gradients keep fp32."""
    exact = tensors(2)
    truth = chain(*exact.values(), 0.7)
    wide = ("down", "up", "mix")
    errors = []
    for run in (headed_linear, chain):
        given = {n: t.float() if n in wide else t.bfloat16() for n, t in exact.items()}
        given["down"].requires_grad_()
        y = run(*given.values(), 0.7)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert given["down"].grad is not None and given["down"].grad.dtype == torch.float32
        errors.append((y.double() - truth).abs().max())
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("case", ["dropout", "autocast", "tokens", "shared"])
def test_the_bank_takes_it_only_where_it_holds(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("moa.experts.headed.headed_linear", lambda *args: calls.append(1) or headed_linear(*args))
    bank = HeadedLoRABank(D_IN, D_OUT, E, rank=R, n_heads=2, dropout=0.5 if case == "dropout" else 0.0)
    nn.init.normal_(bank.up)
    rows = {"tokens": (B, S, 2), "shared": ()}.get(case, (B, 1, 2))
    routing = Routing(torch.randn(*rows, E), None, E)
    x, weight = torch.randn(B, S, D_IN), torch.randn(D_OUT, D_IN)
    with torch.autocast("cpu", enabled=case == "autocast"):
        bank.train().fused.add_linear(x, routing, weight, None)
    assert not calls
    bank.eval()
    plain = Routing(torch.randn(B, 1, 2, E), None, E)
    assert_close(bank.fused.add_linear(x, plain, weight, None), F.linear(x, weight) + bank(x, plain), 1e-5)
    assert calls == [1]
