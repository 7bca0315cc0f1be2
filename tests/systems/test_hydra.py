"""Hydra against its paper's equations, and its exact fold. Run: pytest tests/systems/test_hydra.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import moa
from moa.errors import ConfigError, FoldError, ShapeError
from moa.mixture.mixture import Branch, Mixture
from moa.recipes import Site
from moa.routers import FixedRouter
from tests import models
from tests.laws import assert_close


def make(base: nn.Module, d_in: int = 10, d_out: int = 7, **options: object) -> Mixture:
    base = base.double().requires_grad_(False)
    recipe = moa.make_recipe("hydra", **{"rank": 2, "sequential_rank": 3, **options})
    mixture = Mixture(base, recipe.build(Site("layer", base, d_in, d_out)), moa.Context(), "layer").double()
    for parameter in mixture.branches.parameters():
        nn.init.normal_(parameter)
    return mixture.eval()


def paper(mixture: Mixture, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y = h + B_p (A_p x + a_p) + b_p + B_s (A_s h + a_s) + b_s with h = W0 x + b0, in numpy."""

    def branch(number: int, v: np.ndarray) -> np.ndarray:
        bank = mixture.branches[number].bank
        a, b = bank.down[0].detach().numpy(), bank.up[0].detach().numpy().T
        low = v @ a.T
        if hasattr(bank, "down_bias"):
            return (low + bank.down_bias[0].detach().numpy()) @ b.T + bank.up_bias[0].detach().numpy()
        return low @ b.T

    h = x.numpy() @ weight.numpy().T + (0 if bias is None else bias.numpy())
    return torch.tensor(h + branch(0, x.numpy()) + branch(1, h))


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("biases", [True, False], ids=["affine", "linear"])
def test_values_and_fold_are_the_papers(biases: bool, has_bias: bool) -> None:
    mixture = make(nn.Linear(10, 7, bias=has_bias), biases=biases)
    x = torch.randn(4, 5, 10, dtype=torch.float64)
    base = mixture.base
    expected = paper(mixture, x, base.weight, base.bias)
    assert_close(mixture(x), expected)
    folded = moa.fold(mixture)
    assert folded is base and (folded.bias is not None) == (has_bias or biases)
    assert_close(folded(x), expected)


@pytest.mark.parametrize("biases", [True, False])
def test_a_conv1d_base_folds(biases: bool) -> None:
    base = Conv1D(7, 10)
    nn.init.normal_(base.bias)
    mixture = make(base, biases=biases)
    x = torch.randn(4, 5, 10, dtype=torch.float64)
    expected = paper(mixture, x, base.weight.T, base.bias)
    assert_close(mixture(x), expected)
    assert_close(moa.fold(mixture)(x), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("targets", ["attention", "ffn"])
def test_whole_models_fold(kind: str, targets: str) -> None:
    make_model, make_batch = models.MODELS[kind]
    model = moa.build(make_model(), "hydra", rank=2, biases=True, targets=targets).double()
    models.randomise(model, scale=0.2)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in make_batch().items()}
    before = models.outputs_of(model, batch)
    assert_close(models.outputs_of(model.merge_and_unload(), batch), before, 1e-6)  # some norms are in fp32


def test_the_sequential_branch_sees_the_frozen_output() -> None:
    """Not the output that the parallel branch has changed."""
    mixture = make(nn.Linear(10, 7))
    x = torch.randn(3, 10, dtype=torch.float64)
    with torch.no_grad():
        sequential = mixture(x).clone()
        nn.init.zeros_(mixture.branches[0].bank.up)
        alone = mixture(x)
        nn.init.normal_(mixture.branches[0].bank.up)
        difference = mixture(x) - alone
        assert_close(difference, mixture.branches[0].bank.expert_forward(x, 0))
    assert not torch.allclose(sequential, alone)


def test_default_targets_write_to_the_residual_stream() -> None:
    names = {
        "llama": {"down_proj"},
        "gpt2": {"c_proj"},
        "bert": {"dense"},
    }
    for kind, endings in names.items():
        model = moa.build(models.MODELS[kind][0](), "hydra")
        assert {name.rsplit(".", 1)[-1] for name in model.mixtures()} == endings
        assert not any("intermediate" in name or "query" in name for name in model.mixtures())


@pytest.mark.parametrize("gate", ["branches", "experts"])
def test_gates(gate: str) -> None:
    experts = {"n_experts": 4, "k": 2} if gate == "experts" else {}
    mixture = make(nn.Linear(10, 7), gate=gate, **experts)
    x = torch.randn(3, 5, 10, dtype=torch.float64)
    h = mixture.base(x)
    expected = h
    for branch, source in zip(mixture.branches, (x, h), strict=True):
        logits = source @ branch.router.weight.T
        if gate == "branches":
            weights = torch.sigmoid(logits)
        else:
            top, chosen = logits.softmax(-1).topk(2)
            weights = torch.zeros_like(logits).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        outs = torch.stack([branch.bank.expert_forward(source, e) for e in range(branch.bank.n_experts)], -1)
        expected = expected + (outs * weights[..., None, :]).sum(-1)
    assert_close(mixture(x), expected)
    with pytest.raises(FoldError, match="LinearRouter depends on the input"):
        moa.fold(mixture)


class Pair(nn.Module):
    """A layer that returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return (x, None)."""
        return x, None


def test_bad_inputs() -> None:
    for options, text in (
        ({"n_experts": 2}, "n_experts=2 needs gate='experts'"),
        ({"gate": "both"}, "gate must be None, 'branches' or 'experts'"),
        ({"rank": 0}, "rank must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            moa.build(models.llama(), "hydra", **options)
    branch = Branch(FixedRouter(4, 1), moa.experts.LoRABank(4, 4, 1), "output")
    with pytest.raises(ShapeError, match="a Pair returns a tuple"):
        Mixture(Pair(), [branch], moa.Context(), "layer")(torch.randn(2, 4))
    with pytest.raises(ConfigError, match="tap must be 'input' or 'output'"):
        Branch(FixedRouter(4, 1), moa.experts.LoRABank(4, 4, 1), "middle")
    model = models.randomise(moa.build(models.bert(), "hydra", biases=True))
    with pytest.raises(FoldError, match="add a constant"):
        moa.export_expert(model, 0, "nowhere")
