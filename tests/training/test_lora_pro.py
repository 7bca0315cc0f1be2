"""LoRA-Pro's steps against what defines them: a projection, a minimum, and the dense gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ConfigError
from moa.training.lora_pro import LoRAPro, nearest_step
from tests import models

R, D_IN, D_OUT, SCALE = 3, 7, 9, 1.7
Pairs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def drawn(*experts: int) -> Pairs:
    """Return A (*, r, i), Bᵀ (*, r, o), the whole gradient (*, o, i), and gA, gBᵀ that it gives."""
    rng = torch.Generator().manual_seed(len(experts))
    a, b, whole = (
        torch.randn(*experts, *shape, generator=rng, dtype=torch.float64)
        for shape in ((R, D_IN), (R, D_OUT), (D_OUT, D_IN))
    )
    return a, b, whole, SCALE * b @ whole, SCALE * a @ whole.mT


def product_step(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor) -> Tensor:
    return SCALE * (b.mT @ step_a + step_b.mT @ a)


@pytest.mark.parametrize("experts", [(), (4,)])
def test_the_product_steps_along_the_gradient_s_projection(experts: tuple[int, ...]) -> None:
    a, b, whole, g_a, g_b = drawn(*experts)
    steps = nearest_step(a, b, g_a, g_b, SCALE)
    onto_b, onto_a = b.mT @ torch.linalg.pinv(b.mT), torch.linalg.pinv(a) @ a
    expected = onto_b @ whole + whole @ onto_a - onto_b @ whole @ onto_a
    found = product_step(a, b, *steps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    plain = product_step(a, b, g_a, g_b)
    assert (found - whole).norm() < (plain - whole).norm()
    assert ((found * whole).flatten(-2).sum(-1) >= 0).all()


def test_x_is_free_in_the_product_and_makes_the_steps_nearest_to_the_factors_gradients() -> None:
    a, b, _, g_a, g_b = drawn()
    step_a, step_b = nearest_step(a, b, g_a, g_b, SCALE)
    kept = product_step(a, b, step_a, step_b)
    x = torch.zeros(R, R, dtype=torch.float64, requires_grad=True)

    def moved(x: Tensor) -> tuple[Tensor, Tensor]:
        return step_a + x @ a, step_b - x.mT @ b

    other_a, other_b = moved(x)
    distance = (other_a - g_a).norm() ** 2 + (other_b - g_b).norm() ** 2
    (slope,) = torch.autograd.grad(distance, x)
    assert slope.norm() < 1e-9 * distance.item()  # and the distance is convex in X
    far = moved(torch.randn(R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(product_step(a, b, *far), kept, rtol=1e-10, atol=1e-10)
    assert (far[0] - g_a).norm() ** 2 + (far[1] - g_b).norm() ** 2 > distance


def test_where_the_up_factor_is_zero_it_alone_moves() -> None:
    a, b, whole, _, g_b = drawn()
    step_a, step_b = nearest_step(a, 0 * b, 0 * a, g_b, SCALE)
    assert not step_a.any()
    torch.testing.assert_close(step_b, torch.linalg.solve(a @ a.mT, g_b) / SCALE**2)
    assert (SCALE * step_b.mT @ a - whole).norm() < whole.norm()


def trained(mode: str, scaling: dict[str, object] | None = None) -> tuple[moa.MoAModel, LoRAPro]:
    model = moa.build(models.bert().double(), "topk", n_experts=3, k=2, rank=2, **(scaling or {})).double()
    return models.randomise(model).train(), LoRAPro(model, lr=0.05, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["sgd", "adam"])
def test_every_expert_of_a_mixture_steps_by_itself_and_the_rest_by_adamw(mode: str) -> None:
    """The first step of Adam is the sign of the product's gradient; scaling is the layer's own."""
    model, optimizer = trained(mode, {"alpha": 6.0})
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batch = models.class_batch()
    model(**batch).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    optimizer.step()
    pairs = 0
    for name, value in model.named_parameters():
        if not name.endswith("bank.down"):
            continue
        up, scaling = (
            name.replace("down", "up"),
            dict(model.branches())[name.split(".branches")[0].removeprefix("base.")].bank.scaling,
        )
        for e in range(3):
            a, b, g_a, g_b = before[name][e], before[up][e], grads[name][e], grads[up][e]
            step_a, step_b = nearest_step(a, b, g_a, g_b, scaling)
            if mode == "adam":
                whole = scaling * (b.T @ step_a + step_b.T @ a)
                sign = whole / (whole.abs() + 1e-8)
                step_a, step_b = nearest_step(a, b, scaling * b @ sign, scaling * (sign @ a.T).T, scaling)
            torch.testing.assert_close(value[e], a - 0.05 * step_a)
            torch.testing.assert_close(model.get_parameter(up)[e], b - 0.05 * step_b)
        pairs += 1
    assert pairs == len(optimizer.scales)
    rest = {n: p for n, p in model.named_parameters() if n in before and "bank" not in n}
    assert rest
    for name, value in rest.items():  # AdamW's first step is a sign, too
        g = grads[name]
        torch.testing.assert_close(value, before[name] - 0.05 * g / (g.abs() + 1e-8))


@pytest.mark.parametrize("mode", ["sgd", "adam"])
def test_a_run_that_goes_on_from_its_state_is_the_same(mode: str) -> None:
    def steps(model: moa.MoAModel, optimizer: LoRAPro, n: int) -> None:
        for _ in range(n):
            model(**models.class_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = trained(mode)
    steps(model, optimizer, 2)
    again, second = trained(mode)
    again.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(again, second, 2)
    for (name, value), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)


def test_what_has_no_factors_is_refused() -> None:
    model = moa.build(models.bert(), "topk", n_experts=3, k=2, expert="ia3")
    with pytest.raises(ConfigError, match="experts hold no two factors that are trained"):
        LoRAPro(model)
    with pytest.raises(ConfigError, match="mode must be 'sgd' or 'adam', got 'sdg'"):
        LoRAPro(moa.build(models.bert(), "topk", n_experts=3, k=2), mode="sdg")  # type: ignore[arg-type]
