"""The layer: base plus branches, whatever they are. Run: pytest tests/mixture/test_mixture.py"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import moa
from moa.errors import ConfigError
from moa.experts import LoRABank
from moa.mixture.mixture import Branch, Mixture, is_conv1d, plain_weight
from moa.objective.trace import Trace
from moa.routers import FixedRouter, LinearRouter
from moa.types import Context, Pinned
from tests import laws, models
from tests.laws import assert_close, randomised


def make(base: nn.Module, taps: tuple[str, ...] = ("input",), d_in: int = 5, d_out: int = 7) -> Mixture:
    """Return a mixture with one top-2-of-4 branch for each tap, in fp64, its base frozen."""
    branches = []
    for tap in taps:
        width = d_in if tap == "input" else d_out
        branches.append(Branch(LinearRouter(width, 4, 2), LoRABank(width, d_out, 4, rank=3), tap))
    base.requires_grad_(False)
    mixture = Mixture(base, branches, Context(), "layer").double()
    randomised(mixture.branches)
    return mixture


def by_definition(mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Return y0 + Σ over branches and experts, written out."""
    base_out = mixture.base(x)
    y = base_out
    for branch in mixture.branches:
        source = x if branch.tap == "input" else base_out
        weights = branch.router(source, Context()).dense()
        for e in range(4):
            y = y + weights[..., e : e + 1] * branch.bank.expert_forward(source, e)
    return y


BASES = {
    "linear": lambda: nn.Linear(5, 7),
    "no bias": lambda: nn.Linear(5, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 5),
    "sequential": lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7)),
}


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("taps", [("input",), ("output",), ("input", "output"), ("input", "input"), ()], ids=str)
def test_a_mixture_is_its_definition(base, taps):
    mixture = make(BASES[base](), taps)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    got, expected = mixture(x), by_definition(mixture, x)
    assert_close(got, expected)
    upstream = torch.randn_like(got)
    leaves = [x, *mixture.branches.parameters()]
    for one, other in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert_close(one, other)


def test_no_rows():
    mixture = make(nn.Linear(5, 7))
    x = torch.zeros(0, 3, 5, dtype=torch.float64, requires_grad=True)
    mixture(x).sum().backward()
    assert mixture(x).shape == (0, 3, 7)


def test_disabled_is_the_base_bit_for_bit():
    mixture = make(nn.Linear(5, 7), ("input", "output"))
    x = torch.randn(2, 5, dtype=torch.float64)
    mixture.context.enabled = False
    assert torch.equal(mixture(x), mixture.base(x))


def test_a_base_with_hooks_or_gradients_runs_its_own_forward():
    """The fast path reads the weight; a base that does more than multiply by it must not be skipped."""
    mixture = make(nn.Linear(5, 7))
    x = torch.randn(2, 5, dtype=torch.float64)
    before = mixture(x)
    assert plain_weight(mixture.base) is not None
    handle = mixture.base.register_forward_hook(lambda module, args, out: out + 100)
    assert_close(mixture(x), before + 100)
    handle.remove()
    assert torch.equal(mixture(x), before)
    mixture.base.requires_grad_(True)
    assert plain_weight(mixture.base) is None
    mixture(x).sum().backward()
    assert mixture.base.weight.grad is not None and mixture.base.bias.grad is not None
    mixture.base.requires_grad_(False)
    mixture.base.forward = lambda x: torch.zeros(2, 7, dtype=torch.float64)  # as quantisation and offload tools do
    assert_close(mixture(x), before - nn.functional.linear(x, mixture.base.weight, mixture.base.bias))


def test_a_subclass_of_linear_is_not_plain():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert plain_weight(Doubled(5, 7)) is None
    assert plain_weight(nn.Sequential()) is None
    assert is_conv1d(Conv1D(7, 5)) and not is_conv1d(nn.Linear(5, 7))


def test_unknown_tap():
    with pytest.raises(ConfigError, match="tap must be 'input' or 'output', got 'middle'"):
        Branch(FixedRouter(5, 1), LoRABank(5, 7, 1), "middle")


def test_pinning_uses_one_expert_and_checks_it():
    mixture = make(nn.Linear(5, 7))
    x = torch.randn(2, 5, dtype=torch.float64)
    mixture.context.pinned = Pinned.of([3])
    assert_close(mixture(x), mixture.base(x) + mixture.branches[0].bank.expert_forward(x, 3))
    mixture.context.pinned = Pinned.of([-1])
    assert torch.equal(mixture(x), mixture.base(x))
    mixture.context.pinned = Pinned.of([4])
    with pytest.raises(ConfigError, match="experts 0 to 3"):
        mixture(x)


def test_a_trace_records_what_was_used():
    mixture = make(nn.Linear(5, 7), ("input", "output"))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mixture.context.masks = (mask,)
    mixture.context.trace = trace = Trace()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    mixture(x)
    assert [record.name for record in trace] == ["layer", "layer"] and len(trace) == 2
    first, second = trace
    assert first.mask is mask and first.router is mixture.branches[0].router
    assert_close(first.routing.dense(), mixture.branches[0].router(x, Context()).dense())
    assert_close(second.routing.dense(), mixture.branches[1].router(mixture.base(x), Context()).dense())


def test_weight_and_bias_are_the_bases():
    mixture = make(nn.Linear(5, 7))
    assert mixture.weight is mixture.base.weight and mixture.bias is mixture.base.bias
    assert make(nn.Linear(5, 7, bias=False)).bias is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_one_fixed_expert_is_pefts_lora():
    """Same factors, same values, same gradients as peft's layers, in the whole model."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = get_peft_model(models.llama().double(), config)
    ours = moa.build(models.llama().double(), "fixed", n_experts=1, rank=4, alpha=6, targets=["q_proj", "down_proj"])
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    banks = {name: branch.bank for name, branch in ours.branches()}
    assert set(layers) == set(banks)
    with torch.no_grad():
        for name, bank in banks.items():
            bank.down[0].copy_(layers[name].lora_A["default"].weight)
            bank.up[0].copy_(layers[name].lora_B["default"].weight.T)
    batch = models.lm_batch()
    one, other = ours.train()(**batch), theirs.train()(**batch)
    assert_close(one.logits, other.logits)
    assert_close(one.loss, other.loss)
    one.loss.backward()
    other.loss.backward()
    for name, bank in banks.items():
        assert_close(bank.down.grad[0], layers[name].lora_A["default"].weight.grad)
        assert_close(bank.up.grad[0].T, layers[name].lora_B["default"].weight.grad)


@pytest.mark.parametrize("name", ["topk", "dense", "switch", "sigmoid", "fixed", "hydralora", "remix", "flylora"])
@pytest.mark.parametrize("place", ["input", "output"])
def test_a_model_may_add_to_a_layers_output_in_place(name: str, place: str) -> None:
    """As RoCBert does: the output is a tensor of its own, with the gradients of a sum that is not in place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    recipe = moa.make_recipe(name, **({"rank": 4, "k": 2} if name == "flylora" else {"n_experts": 3}), place=place)
    held = models.randomise(moa.build(model, dataclasses.replace(recipe, targets="all-linear"))).double()
    (layer,) = held.mixtures().values()
    results = []
    for in_place in (False, True):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 5, 6).requires_grad_()
        held.zero_grad()
        y = layer(x)
        if in_place:
            y += x
        else:
            y = y + x
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *laws.gradients(layer)])
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)
