"""FlyLoRA against its paper's equations, coded apart in numpy. Run: pytest tests/systems/test_flylora.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, FoldError
from moa.experts import VectorBank
from moa.mixture.mixture import Mixture
from moa.recipes import Site
from moa.routers import ProjectionRouter
from moa.routers.projection import layer_seed, sparse_projection
from tests import models
from tests.laws import assert_close

Array = np.ndarray


def paper(
    x: np.ndarray, w0: np.ndarray, a: np.ndarray, b: np.ndarray, d: np.ndarray, k: int, alpha: float
) -> np.ndarray:
    """Return f(x) = W0 x + alpha/r Σ_{i in top-k} b_i y_i of one row, y = A x, selection by |y| + d."""
    y = a @ x
    chosen = np.argsort(-(np.abs(y) + d))[:k]
    return w0 @ x + alpha / a.shape[0] * sum(b[:, i] * y[i] for i in chosen)


def make(seed: int = 3, **options: object) -> Mixture:
    base = nn.Linear(20, 14, bias=False).double().requires_grad_(False)
    recipe = moa.make_recipe("flylora", **{"rank": 8, "k": 3, "seed": seed, **options})
    mixture = Mixture(base, recipe.build(Site("layer", base, 20, 14)), moa.Context(), "layer").double()
    nn.init.normal_(mixture.branches[0].bank.up)
    return mixture


def test_values_are_the_papers() -> None:
    mixture = make()
    router, bank = mixture.branches[0].router, mixture.branches[0].bank
    router.selection_bias.copy_(torch.randn(8) * 0.3)
    x = torch.randn(50, 20, dtype=torch.float64)
    a, b, d = router.projection.numpy(), bank.up.detach().numpy().T, router.selection_bias.numpy()
    expected = torch.tensor(np.stack([paper(row, mixture.base.weight.numpy(), a, b, d, 3, 16.0) for row in x.numpy()]))
    assert_close(mixture(x), expected)  # alpha = 2 r by default
    d_matters = np.stack([paper(row, mixture.base.weight.numpy(), a, b, d * 0, 3, 16.0) for row in x.numpy()])
    assert not np.allclose(d_matters, expected.numpy())


def test_gradients_are_the_papers() -> None:
    mixture = make()
    router, bank = mixture.branches[0].router, mixture.branches[0].bank
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    up = torch.randn(6, 14, dtype=torch.float64)
    (mixture(x) * up).sum().backward()
    y = x.detach() @ router.projection.T
    mask = torch.zeros_like(y).scatter(-1, y.abs().topk(3).indices, 1.0)
    assert_close(bank.up.grad, 2.0 * (mask * y).T @ up)
    through_experts = 2.0 * (mask * (up @ bank.up.detach().T)) @ router.projection
    assert_close(x.grad, up @ mixture.base.weight + through_experts)


def test_the_projection_has_exactly_p_nonzeros_of_the_right_size() -> None:
    a = sparse_projection(64, 512, 128, seed=0)
    assert bool(((a != 0).sum(1) == 128).all())
    assert abs(a[a != 0].std().item() * 64 - 1) < 0.03  # N(0, 1/r²)
    places = (a != 0).float().mean(0)
    assert places.min() > 0.05 and places.max() < 0.5  # spread over all inputs, p/i = 0.25
    assert ProjectionRouter(512, 32, 8).nonzeros == 128


def test_the_projection_is_the_same_everywhere() -> None:
    """Checkpoints hold the seed alone: these values may never change."""
    assert torch.equal(sparse_projection(8, 20, 5, 7), sparse_projection(8, 20, 5, 7))
    assert not torch.equal(sparse_projection(8, 20, 5, 7), sparse_projection(8, 20, 5, 8))
    a = sparse_projection(2, 6, 2, seed=11)
    assert a.nonzero().tolist() == KNOWN_PLACES and torch.allclose(a[a != 0], torch.tensor(KNOWN_VALUES), atol=1e-7)


def test_each_layer_has_its_own_projection() -> None:
    assert layer_seed(0, "a") != layer_seed(0, "b") != layer_seed(1, "b")
    model = moa.build(models.llama(), "flylora", rank=4, k=2, seed=5)
    again = moa.build(models.llama(), "flylora", rank=4, k=2, seed=5)
    other = moa.build(models.llama(), "flylora", rank=4, k=2, seed=6)
    for (_, one), (_, two), (_, three) in zip(model.branches(), again.branches(), other.branches(), strict=True):
        assert torch.equal(one.router.projection, two.router.projection)
        assert not torch.equal(one.router.projection, three.router.projection)
    layers = [b.router.projection for n, b in model.branches() if n.endswith("q_proj")]
    assert not torch.equal(layers[0], layers[1])
    assert not any("projection" in name for name in model.adapter_state_dict()), "A is regenerated, not stored"


def test_raising_the_bias_never_unselects() -> None:
    """Selection is monotone in d, for negative projections too, where |y + d| is not."""
    router = ProjectionRouter(20, 8, 3).double()
    x = torch.randn(200, 20, dtype=torch.float64)
    for expert in range(8):
        router.selection_bias.zero_()
        before = router(x, moa.Context()).selected()[:, expert]
        router.selection_bias[expert] = 0.2
        after = router(x, moa.Context()).selected()[:, expert]
        assert bool((after | ~before).all()) and after.sum() > before.sum()


def released(rows: list[Array], a: Array, b: Array, k: int, alpha: float, u: float, signed: bool) -> list[Array]:
    """Return the outputs of one training forward after another, d moving after each, as the released code has it."""
    r, d, outputs = len(a), np.zeros(len(a)), []
    for x in rows:
        y = x @ a.T
        key = y + d if signed else np.abs(y + d)  # the fork of peft; flylora.py
        chosen = np.argpartition(-key, k - 1, axis=1)[:, :k]
        mask = np.zeros_like(y)
        np.put_along_axis(mask, chosen, 1.0, axis=1)
        outputs.append((y * mask) @ b.T * (alpha / r))
        count = mask.sum(0)
        d = d + u * np.sign(count.mean() - count)
    return [*outputs, d]


@pytest.mark.parametrize(("choice", "signed"), [("signed", True), ("shifted", False)])
def test_the_released_rules_step_by_step(choice: str, signed: bool) -> None:
    """One forward per optimizer step: choices, outputs and bias are those of the released code."""
    mixture = make(choice=choice, bias_rate=0.02)
    router, bank = mixture.branches[0].router, mixture.branches[0].bank
    batches = [torch.randn(30, 20, dtype=torch.float64) for _ in range(25)]
    a, b = router.projection.numpy(), bank.up.detach().numpy().T
    *expected, bias = released([x.numpy() for x in batches], a, b, 3, 16.0, 0.02, signed)
    for x, right in zip(batches, expected, strict=True):
        routing = router(x, moa.Context())
        assert_close(bank(x, routing), torch.from_numpy(right))
        router.observe(routing, None)
        router.step()
    assert_close(router.selection_bias, torch.from_numpy(bias), 1e-6)
    for rate, rule in ((0.0, signed), (0.02, not signed)):  # another rate and another rule are another answer
        *other, _ = released([x.numpy() for x in batches], a, b, 3, 16.0, rate, rule)
        assert not np.allclose(other[-1], expected[-1])


def test_the_rules_differ_by_what_the_bias_is_added_to() -> None:
    y = torch.tensor([[-0.5, 0.4, -0.3, 0.1]], dtype=torch.float64)
    chosen = {}
    for choice in ("magnitude", "signed", "shifted"):
        router = ProjectionRouter(4, 4, 1, nonzeros=1, choice=choice).double()
        router.projection.copy_(torch.eye(4))
        router.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.25, 0.35]))
        chosen[choice] = router(y, moa.Context()).indices.item()
    assert chosen == {"magnitude": 2, "signed": 3, "shifted": 0}  # 0.55, 0.45, 0.5 are the largest


def test_the_bias_evens_out_the_load_once_per_optimizer_step() -> None:
    model = moa.build(models.llama(), "flylora", rank=8, k=2, bias_rate=0.01)
    models.randomise(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batch = models.lm_batch(rows=8)
    routers = [b.router for _, b in model.branches()]

    def unevenness() -> float:
        with torch.no_grad(), model.eval().tracing() as trace:
            model(**batch)
        loads = torch.stack([r.routing.selected()[r.mask].float().mean(0) for r in trace])
        return loads.std(1).mean().item()

    before = unevenness()
    assert all(not r.selection_bias.any() for r in routers), "evaluation must not move the bias"
    model.train()
    model(**batch).loss.backward()
    model(**batch).loss.backward()  # an accumulated step
    assert all(not r.selection_bias.any() for r in routers), "only optimizer steps move the bias"
    optimizer.step()
    assert all(set(r.selection_bias.abs().unique().tolist()) <= STEPS for r in routers)
    assert any(r.selection_bias.any() for r in routers)
    for _ in range(20):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
    assert unevenness() < 0.8 * before


def test_only_b_is_trained_and_x_is_not_kept() -> None:
    """Activation memory: rank-sized tensors alone, since no weight that meets x is trained."""
    mixture = make(dropout=0.0)
    assert [name for name, p in mixture.named_parameters() if p.requires_grad] == ["branches.0.bank.up"]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(50, 20, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mixture(x)
    assert not any(t.shape == x.shape for t in saved), "a d-sized activation is kept"


def test_bad_inputs() -> None:
    for options, text in (
        ({"rank": 8, "n_experts": 4, "k": 2}, "rank is the number of experts"),
        ({"rank": 4}, "k=8 with n_experts=4"),
        ({"expert": "lora2"}, "unknown expert"),
        ({"choice": "sign"}, "unknown choice 'sign'.*signed"),
    ):
        with pytest.raises(ConfigError, match=text):
            moa.make_recipe("flylora", **options)
    for nonzeros in (0, 21):
        with pytest.raises(ConfigError, match=f"nonzeros must be in 1 … d_in(=20)?, got {nonzeros}"):
            make(nonzeros=nonzeros)
    with pytest.raises(FoldError, match="ProjectionRouter depends on the input"):
        moa.fold(make())
    assert (moa.make_recipe("flylora").rank, moa.make_recipe("flylora").k) == (32, 8)
    assert isinstance(make().branches[0].bank, VectorBank)


STEPS = {0.0, torch.tensor(0.01).item()}
KNOWN_PLACES = [[0, 0], [0, 1], [1, 0], [1, 5]]
KNOWN_VALUES = [-0.532801509, 0.210525364, -0.443119824, -0.237866744]
