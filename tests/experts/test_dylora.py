"""Experts of elastic rank: in training, per model, per request, per row. Run: pytest tests/experts/test_dylora.py"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor

import moa
from moa.errors import ConfigError, ShapeError
from moa.model.elastic import at_rank, set_rank
from tests import models
from tests.laws import assert_close

R = 4


def built(router: str = "fixed", n_experts: int = 1, **options: Any) -> Any:
    own = {"rank": R, "alpha": 12.0, **options}
    return models.randomise(moa.build(models.llama(), router, n_experts=n_experts, expert="dylora", **own)).double()


def truncated(model: Any, b: int) -> Any:
    """Return peft's LoRA of rank b and the same alpha, with the leading components of the one expert."""
    config = peft.LoraConfig(r=b, lora_alpha=12, target_modules=[n.rpartition(".")[2] for n in model.mixtures()])
    theirs = peft.get_peft_model(models.llama(), config).double().eval()
    with torch.no_grad():
        for name, branch in model.branches():
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(branch.bank.down[0, :b])
            layer.lora_B["default"].weight.copy_(branch.bank.up[0, :b].T)
    return theirs


peft_asks = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@peft_asks
@pytest.mark.parametrize("b", range(1, R + 1))
def test_at_every_rank_it_is_a_lora_of_that_rank(b: int, tmp_path: Path) -> None:
    model, batch = built().eval(), models.lm_batch()
    expected = models.outputs_of(truncated(model, b), batch)
    with at_rank(model, b):
        assert_close(models.outputs_of(model, batch), expected)
    assert b == R or not torch.allclose(models.outputs_of(model, batch), expected, atol=1e-3)
    set_rank(model, b)
    assert_close(models.outputs_of(model, batch), expected)
    assert all(branch.bank.delta(0).rank == b for _, branch in model.branches())
    folder = moa.export_expert(model, 0, tmp_path / "out")
    assert_close(models.outputs_of(PeftModel.from_pretrained(models.llama(), folder).eval(), batch), expected, 1e-4)
    model.save_pretrained(tmp_path / "all")
    again = moa.load(tmp_path / "all", base=models.llama().double())
    assert_close(models.outputs_of(again, batch), models.outputs_of(truncated(model, R), batch), 1e-6)
    assert_close(models.outputs_of(model.merge_and_unload(), batch), expected)


@peft_asks
@pytest.mark.parametrize("update", ["nested", "last"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_trains_what_its_rank_says(update: str, checkpointed: bool) -> None:
    """At the drawn rank b the loss is that of a LoRA of rank b, and its gradients, all or the last component's."""
    model, batch, drawn = built(update=update), models.lm_batch(), []
    if checkpointed:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(8):
        elastic = model.shared_by_layers["0"]["experts"]
        b = elastic.drawn
        drawn.append(b)
        theirs = truncated(model, b)
        mine = [model.train()(**batch).loss for _ in range(2)]  # a micro-batch more sees the same rank
        want = theirs(**batch).loss
        assert_close(mine[1].detach(), want.detach())
        mine[0].backward()
        want.backward()
        for name, branch in model.branches():
            layer = theirs.base_model.model.get_submodule(name)
            grads = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad.T)
            for own, grad in zip((branch.bank.down, branch.bank.up), grads, strict=True):
                first = b - 1 if update == "last" else 0
                assert not bool(own.grad[0, b:].any()) and not bool(own.grad[0, :first].any())
                assert_close(own.grad[0, first:b], grad[first:b], 1e-9, name)
        optimizer.step()
        optimizer.zero_grad()
    assert set(drawn) == set(range(1, R + 1)), drawn
    assert [copy.deepcopy(model).shared_by_layers["0"]["experts"].drawn] == [
        model.shared_by_layers["0"]["experts"].drawn
    ]


def test_each_request_and_each_prompt_has_its_rank() -> None:
    model, batch = built("topk", 3, k=2).eval(), models.token_batch()
    ranks = [1, 4, 2, 3]
    with torch.no_grad(), at_rank(model, ranks):
        together = model(**batch).logits
        tokens = model.generate(batch["input_ids"][:, :4].clamp(min=2), max_new_tokens=3, num_beams=2)
        chosen = model(**batch, adapter_ids=[2, 0, None, 1]).logits
    for row, rank in enumerate(ranks):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        with torch.no_grad(), at_rank(model, rank):
            assert_close(together[row : row + 1], model(**one).logits)
            prompt = one["input_ids"][:, :4].clamp(min=2)
            assert torch.equal(tokens[row : row + 1], model.generate(prompt, max_new_tokens=3, num_beams=2))
            assert_close(chosen[row : row + 1], model(**one, adapter_ids=[[2, 0, None, 1][row]]).logits)
    with at_rank(model, [1, 2, 3]), pytest.raises(ShapeError, match="ranks has 3 entries, but the layer sees 4 rows"):
        model(**batch)


def test_a_gate_chooses_a_rank_for_each_row() -> None:
    """By the sum over rows and slots of LoRAs of the rank that the second gate's largest logit names."""
    model = built("topk", 3, k=2, ranks=(1, 2, 4)).eval()
    name, mixture = next(iter(model.mixtures().items()))
    (branch,) = mixture.branches
    bank, router = branch.bank, branch.router
    x = torch.randn(2, 7, mixture.base.in_features, dtype=torch.float64)
    levels = torch.tensor([1, 2, 4])[(x @ router.rank_weight.T).argmax(-1)]  # (2, 7)
    assert len(levels.unique()) > 1, "all rows have one rank"
    kept, experts = (x @ router.weight.T).topk(2, -1)
    expected = mixture.base(x)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        row, b = tuple(place), int(levels[tuple(place)])
        for weight, expert in zip(kept[row].softmax(-1), experts[row].tolist(), strict=True):
            hidden = bank.down[expert, :b] @ x[row]
            expected[row] += weight * (12.0 / b) * (hidden @ bank.up[expert, :b])
    assert_close(mixture(x), expected, 1e-8, name)
    batch = models.lm_batch()
    model.train()(**batch).loss.backward()
    gates = [branch.router.rank_weight.grad for _, branch in model.branches()]
    assert all(bool(grad.any()) for grad in gates)
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad and p is not None)


def test_the_gates_of_ranks_are_saved_and_generate(tmp_path: Path) -> None:
    model = built("topk", 3, k=2, ranks=(1, 4)).eval()
    batch = models.lm_batch()
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama().double())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    assert again.recipes[0][0].ranks == (1, 4)
    out = model.generate(
        batch["input_ids"][:1, :4].clamp(min=2), max_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        assert_close(torch.stack(out.logits, 1), model(input_ids=out.sequences).logits[:, 3:-1], 1e-6)


def losses_by_rank(expert: str, seed: int) -> list[float]:
    """Return the loss of a regression at every rank, after training by the family's own way."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(16, 16, bias=False)
    change = torch.randn(16, 4) @ torch.tensor([4.0, 2.0, 1.0, 0.5]).diag() @ torch.randn(4, 16)
    target: Tensor = layer.weight.detach() + change
    model = moa.build(torch.nn.Sequential(layer), "fixed", n_experts=1, expert=expert, rank=R, alpha=4.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    x = torch.randn(256, 16)
    for _ in range(200):
        optimizer.zero_grad()
        (model.train()(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    model.eval()
    (_, branch), *_ = model.branches()
    found = []
    with torch.no_grad():
        for b in range(1, R + 1):
            scale = 4.0 / b if expert == "dylora" else 1.0
            change = scale * branch.bank.up[0, :b].T @ branch.bank.down[0, :b]
            found.append((x @ (layer.weight + change - target).T).square().mean().item())
    return found


def test_trained_at_all_ranks_it_is_better_at_small_ones_than_a_lora_cut_down() -> None:
    elastic, plain = losses_by_rank("dylora", 0), losses_by_rank("lora", 0)
    assert elastic[0] < 0.9 * plain[0] and elastic[1] < 0.9 * plain[1], (elastic, plain)
    assert elastic[-1] < elastic[0], elastic


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"update": "first"}, "update must be 'nested' or 'last', got 'first'"),
        ({"ranks": (1, 9)}, r"ranks must be different whole numbers in 1 … 4, got \(1, 9\)"),
        ({"ranks": (2, 2)}, "ranks must be different"),
        ({"ranks": (0, 2)}, "ranks must be different"),
        ({"ranks": (1, 2), "expert": "lora"}, r"ranks=\(1, 2\) needs experts that act at any rank, expert='dylora'"),
        ({"ranks": (1, 2), "router": "dense"}, "unknown keyword 'ranks'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), **{"router": "topk", "n_experts": 3, "expert": "dylora", "rank": 4, **options})


def test_ranks_that_experts_do_not_have_are_named() -> None:
    model = built()
    for run in (lambda: set_rank(model, 5), lambda: at_rank(model, [1, 5]).__enter__()):
        with pytest.raises(ConfigError, match="rank 5 is outside 1 to 4"):
            run()
    with pytest.raises(ConfigError, match="rank 0 is outside"):
        set_rank(model, 0)
    with pytest.raises(ConfigError, match="ranks must be whole numbers"), at_rank(model, 1.5):  # type: ignore[arg-type]
        pass
    blocks = moa.build(models.llama(), "mixlora", n_experts=3, expert="dylora", rank=4, dropout=0.0)
    with pytest.raises(ConfigError, match=r"layers\.0.*cannot carry ranks: choose one.*set_rank"), at_rank(blocks, 2):
        pass
    set_rank(blocks, 2)
    blocks.train()(**models.lm_batch()).loss.backward()
    plain = moa.build(models.llama(), "topk", n_experts=3)
    with pytest.raises(ConfigError, match=r"family 'lora' have one rank: build with expert='dylora'"):
        set_rank(plain, 2)
