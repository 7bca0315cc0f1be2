"""MixLoRA: experts that are whole feed-forward blocks. Run: pytest tests/systems/test_mixlora.py"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moa
from experiments.bench.plain_mixlora import plain_mixlora
from moa.errors import ConfigError, FoldError
from moa.experts import factored as lora_module
from moa.mixture.blocks import BlockEntry, BlockExit
from moa.mixture.sites import find_sites
from moa.recipes.mixlora import feed_forward_blocks
from tests import models
from tests.laws import assert_close


class SwiGLU(nn.Module):
    """A block as in Llama, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) · up(x)), (*rows, d)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def lora(mixture: Any, e: int, x: Tensor) -> Tensor:
    bank = mixture.branches[0].bank
    return mixture.base(x) + x @ bank.down[e].T @ bank.up[e] * bank.scaling


def paper(block: Any, x: Tensor, k: int) -> Tensor:
    """Return Σ_{e in top-k} w_e FFN_e(x), row by row, each expert its own whole block."""
    router = block.gate.branches[0].router
    out = []
    for row in x.reshape(-1, x.shape[-1]):
        p = torch.softmax(router.weight @ row, -1)
        values, chosen = p.topk(k)
        total = 0
        for w, e in zip(values / values.sum(), chosen.tolist(), strict=True):
            hidden = nn.functional.silu(lora(block.gate, e, row)) * lora(block.up, e, row)
            total = total + w * lora(block.down, e, hidden)
        out.append(total)
    return torch.stack(out).view(*x.shape)


def make(**options: Any) -> Any:
    model = moa.build(SwiGLU().double(), "mixlora", **{"n_experts": 5, "rank": 2, "k": 3, "dropout": 0.0, **options})
    return models.randomise(model)


def test_values_and_gradients_are_the_papers() -> None:
    model = make(balance=0.0)  # the loss is this test's own
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    upstream = torch.randn(2, 7, 6, dtype=torch.float64)
    results = []
    for run in (lambda v: model(v), lambda v: paper(model.base, v, 3)):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = run(leaf)
        (y * upstream).sum().backward()
        results.append([y.detach(), leaf.grad, *[p.grad.clone() for p in model.parameters() if p.requires_grad]])
    assert len(results[0]) == 2 + 1 + 6, "one gate, three pairs of factors"
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


def test_it_is_not_a_mixture_in_each_linear() -> None:
    """The block is not linear: mixing whole blocks differs from mixing in each layer."""
    model = make()
    x = torch.randn(4, 6, dtype=torch.float64)
    gate = model.base.gate.branches[0].router(x, moa.Context())
    weights = gate.dense()

    def mixed(mixture: Any, v: Tensor) -> Tensor:
        return sum(weights[..., e, None] * lora(mixture, e, v) for e in range(5))

    per_layer = mixed(model.base.down, nn.functional.silu(mixed(model.base.gate, x)) * mixed(model.base.up, x))
    assert not torch.allclose(model(x), per_layer, atol=1e-3)


def test_the_frozen_products_run_once_per_row() -> None:
    model = make()
    rows: list[int] = []
    for name in ("gate", "up", "down"):
        layer = getattr(model.base, name).base
        layer.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[:-1].numel()))
    model(torch.randn(2, 7, 6, dtype=torch.float64))
    assert rows == [14, 14, 14]


def test_gate_and_up_share_one_product_with_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    run = lora_module.grouped_linear

    def counted(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        widths.append(weight.shape[1])
        return run(x, weight, *rest, **options)

    monkeypatch.setattr(lora_module, "grouped_linear", counted)
    model = make()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model(x)
    assert widths == [4, 2], "one product of rank 2 + 2 for gate and up, one for down"
    assert not model.context.decisions, "nothing is kept alive"

    model.base.up.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))  # no longer the same tensor
    assert_close(model(x), expected)
    assert widths[2:] == [4, 4, 2], "nothing is shared between inputs that are not one tensor"


def test_unnormalised_weights_and_biases() -> None:
    """The bias of the last layer counts Σ w times, whatever Σ w is."""
    model = make()
    x = torch.randn(5, 6, dtype=torch.float64)
    router = model.base.gate.branches[0].router
    router.renormalize = False
    p = torch.softmax(x @ router.weight.T, -1)
    values, chosen = p.topk(3)
    expected = []
    for row, w, indices in zip(x, values, chosen, strict=True):
        parts = [
            lora(model.base.down, e, nn.functional.silu(lora(model.base.gate, e, row)) * lora(model.base.up, e, row))
            for e in indices.tolist()
        ]
        expected.append((w[:, None] * torch.stack(parts)).sum(0))
    assert_close(model(x), torch.stack(expected))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
def test_blocks_are_found_in_every_model(kind: str) -> None:
    make_model, make_batch = models.MODELS[kind]
    base = make_model()
    blocks = feed_forward_blocks(find_sites(base, "all-linear"))
    assert len(blocks) == (4 if kind == "t5" else 2)
    assert all(len(block) == (3 if kind == "llama" else 2) for block in blocks)
    model = models.randomise(moa.build(base, "mixlora", n_experts=4, rank=2))
    routers = [n for n, b in model.branches() if list(b.router.parameters())]
    assert len(routers) == len(blocks), "one gate per block"
    with model.tracing() as trace, torch.no_grad():
        model.eval()(**make_batch())
    assert sorted(r.name for r in trace if list(r.router.parameters())) == sorted(routers)


def test_one_pinned_expert_is_one_lora_everywhere() -> None:
    model = make()
    x = torch.randn(3, 6, dtype=torch.float64)
    base = model.base
    for e in range(5):
        with model.pin_expert(e):
            hidden = nn.functional.silu(lora(base.gate, e, x)) * lora(base.up, e, x)
            assert_close(model(x), lora(base.down, e, hidden))


def test_attention_keeps_plain_loras() -> None:
    model = moa.build(models.llama(), "mixlora", n_experts=4)
    sizes = {n.rsplit(".", 1)[-1]: b.bank.n_experts for n, b in model.branches()}
    assert sizes["q_proj"] == sizes["o_proj"] == 1 and sizes["up_proj"] == sizes["down_proj"] == 4
    only = moa.build(models.llama(), "mixlora", n_experts=4, targets="ffn")
    assert {n.rsplit(".", 1)[-1] for n in only.mixtures()} == {"gate_proj", "up_proj", "down_proj"}


def test_deep_copies_route_alone() -> None:
    model = make()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    models.randomise(twin, seed=8)
    assert torch.equal(model(x), before) and not torch.allclose(twin(x), before, atol=1e-3)


def test_the_plain_one_of_the_benchmark_is_the_same_system() -> None:
    """Values and every gradient of a whole model, its factors copied: the benchmark compares like with like."""
    sizes = {"n_experts": 4, "k": 2, "rank": 3}
    ours = models.randomise(moa.build(models.llama(), "mixlora", dropout=0.0, balance=0.0, targets="ffn", **sizes))
    theirs = plain_mixlora(models.llama(), scaling=2.0, **sizes)
    pairs: list[tuple[Tensor, Any, int | None, bool]] = []  # theirs, ours, expert, transposed
    for name, mixture in ours.mixtures().items():
        branch, (head, _, last) = mixture.branches[0], name.rpartition(".")
        block = theirs.get_submodule(head)
        if last == "gate_proj":
            pairs.append((block.gate, branch.router.weight, None, False))
        for e in range(4):
            down, up = block.get_submodule(f"{last}_{e}")
            pairs += [(down.weight, branch.bank.down, e, False), (up.weight, branch.bank.up, e, True)]

    def as_ours(value: Tensor, transposed: bool) -> Tensor:
        return value.T if transposed else value

    with torch.no_grad():
        for plain, own, expert, transposed in pairs:
            plain.copy_(as_ours(own if expert is None else own[expert], transposed))
    losses = []
    for model in (ours.double().train(), theirs.double().train()):
        loss = model(**models.lm_batch()).loss
        loss.backward()
        losses.append(loss)
    assert_close(losses[0], losses[1], 1e-6)
    for plain, own, expert, transposed in pairs:
        grad = own.grad if expert is None else own.grad[expert]
        assert bool(grad.any())
        assert_close(as_ours(plain.grad, transposed), grad, 1e-5)


def test_bad_inputs() -> None:
    with pytest.raises(ConfigError, match="no feed-forward block"):
        moa.build(models.llama(), "mixlora", targets="attention")
    with pytest.raises(ConfigError, match="no feed-forward block"):
        moa.build(models.llama(), "mixlora", targets=["up_proj"])
    for kept, left in (("up", "gate"), ("gate", "up")):
        with pytest.raises(ConfigError, match=rf"the targets leave out model\.layers\.0\.mlp\.{left}_proj: name all"):
            moa.build(models.llama(), "mixlora", targets=[f"{kept}_proj", "down_proj"])
    one = moa.build(models.llama(), "mixlora", targets=r".*layers\.1\.mlp.*")  # one block of two is whole
    assert one(**models.lm_batch()).loss.isfinite() and len(one.mixtures()) == 3
    model = make()
    with pytest.raises(FoldError, match="a block whose experts are whole blocks"):
        model.merge_and_unload()
    assert isinstance(model.base.gate, BlockEntry) and isinstance(model.base.down, BlockExit)
