"""Columns of the weight as experts, beside the base and in it. Run: pytest tests/experts/test_paca.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, FoldError
from moa.model.hot_switch import hot_switch
from moa.training.in_place import in_place
from moa.types import Routing
from tests import laws, models
from tests.laws import assert_close


def built(router: str = "fixed", n_experts: int = 1, make: Any = models.llama, **options: Any) -> Any:
    return moa.build(make(), router, n_experts=n_experts, expert="paca", **{"rank": 3, "seed": 5, **options})


def test_an_expert_is_the_weight_with_other_columns_and_its_gradient_theirs() -> None:
    """The full weight's own gradient, by autograd, is the oracle."""
    model, batch = built(alpha=6.0).double(), models.lm_batch()
    models.randomise(model)
    plain = models.llama().double()
    columns = {}
    with torch.no_grad():
        for name, branch in model.branches():
            bank = branch.bank
            columns[name] = bank.columns[0]
            assert len(set(columns[name].tolist())) == 3 and bank.scaling == 2.0
            plain.get_submodule(name).weight[:, columns[name]] += 2.0 * bank.up[0].T
    assert len({tuple(c.tolist()) for c in columns.values()}) > 1, "layers have columns of their own"
    assert_close(models.outputs_of(model, batch), models.outputs_of(plain, batch))
    plain.requires_grad_(True)
    plain.train()(**batch).loss.backward()
    model.train()(**batch).loss.backward()
    for name, branch in model.branches():
        full = plain.get_submodule(name).weight.grad[:, columns[name]]  # (o, r)
        assert_close(branch.bank.up.grad[0], 2.0 * full.T, 1e-9, name)
    assert all(p.grad is None for n, p in model.named_parameters() if ".bank." not in n)


def kept(run: Any, skip: set[int]) -> list[int]:
    """Return the sizes of the floating tensors that a forward keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in skip:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(sizes.values())


@pytest.mark.parametrize(("router", "n_experts"), [("fixed", 1), ("topk", 4)])
def test_of_the_input_only_the_columns_are_kept(router: str, n_experts: int) -> None:
    rows, d = 50, 64
    layer = nn.Linear(d, d)
    bank = laws.make_family("paca").build(moa.Site("q", layer, d, d), n_experts, None, rank=3).float()
    layer.requires_grad_(False)
    x = torch.randn(rows, d, requires_grad=True)
    skip = {p.untyped_storage().data_ptr() for p in (bank.up, layer.weight)}
    if router == "fixed":
        routing = Routing(torch.ones(1), None, 1)
        found = kept(lambda: bank.fused.add_linear(x, routing, layer.weight, layer.bias), skip)
        assert max(found) == rows * 3, found  # r / i of x
    else:
        routing = Routing(torch.rand(rows, 2, requires_grad=True), torch.randint(4, (rows, 2)), 4)
        found = kept(lambda: bank.fused.add_linear(x, routing, layer.weight, layer.bias), skip)
        assert max(found) == rows * 2 * 3 and rows * d not in found, found  # K r / i of x


def test_a_switch_keeps_and_restores_its_columns_only() -> None:
    model, batch = models.randomise(built("topk", 3, k=1)).eval(), models.lm_batch()
    before = {name: t.clone() for name, t in model.base.state_dict().items()}
    with model.pin_expert(2):
        pinned = models.outputs_of(model, batch)
    with hot_switch(model) as switch:
        switch.to(1)
        switch.to(2)
        assert_close(models.outputs_of(model, batch), pinned, 1e-5)
        assert sum(undo.values.numel() for undo in switch._undo) == sum(
            3 * branch.bank.d_out for _, branch in model.branches()
        )
    assert all(torch.equal(t, before[name]) for name, t in model.base.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_its_experts_are_loras_for_peft(tmp_path: Path) -> None:
    model, batch = models.randomise(built("topk", 3, k=1)).eval(), models.lm_batch()
    with model.pin_expert(1):
        pinned = models.outputs_of(model, batch)
    folder = moa.export_expert(model, 1, tmp_path / "lora", as_lora=True)
    assert_close(models.outputs_of(PeftModel.from_pretrained(models.llama(), folder).eval(), batch), pinned, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_trains_as_beside_and_gives_the_base_back_bit_for_bit(dtype: torch.dtype) -> None:
    """Each step and each evaluation sees the columns as they are; what is outside of them never moves."""
    batch, runs = models.lm_batch(), []
    for inside in (False, True):
        model = built(make=lambda: models.llama().to(dtype), alpha=6.0)
        came = {name: t.clone() for name, t in model.base.state_dict().items() if ".branches." not in name}
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        losses = []

        def steps(base: Any, optimizer: Any = optimizer, losses: list[float] = losses) -> None:
            for _ in range(4):
                base.train()
                loss = base(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                base.eval()
                losses.append(base(**batch).loss.item())

        if inside:
            with in_place(model) as base:
                steps(base)
                for name, branch in model.branches():
                    weight, old = model.mixtures()[name].base.weight, came[f"{name}.base.weight"]
                    others = torch.ones(weight.shape[1], dtype=torch.bool)
                    others[branch.bank.columns[0]] = False
                    assert torch.equal(weight[:, others], old[:, others]) and not torch.equal(weight, old)
        else:
            steps(model)
        state = model.base.state_dict()
        assert all(torch.equal(state[name], value) for name, value in came.items()), "the base moved"
        assert not any("forward" in vars(m.base) for m in model.mixtures().values())
        runs.append((losses, torch.cat([p.detach().flatten() for p in parameters]), models.outputs_of(model, batch)))
    (beside, one, out), (within, two, again) = runs
    assert beside[-1] < beside[0] - 0.02
    tolerance = 1e-4 if dtype == torch.float32 else 0.3  # an optimizer's first steps are the signs of gradients
    assert_close(torch.tensor(within), torch.tensor(beside), 1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        assert_close(two, one, tolerance)
        assert_close(again, out, tolerance)


def test_in_place_keeps_only_the_columns_and_restores_after_an_error() -> None:
    model = models.randomise(built())
    plain = models.outputs_of(models.llama(), models.lm_batch())
    name, branch = next(iter(model.branches()))
    layer = model.mixtures()[name].base
    with pytest.raises(ValueError, match="stop"), in_place(model):
        x = torch.randn(50, layer.in_features, requires_grad=True)
        skip = {t.untyped_storage().data_ptr() for t in (layer.weight, branch.bank.up)}
        assert kept(lambda: layer(x), skip) == [50 * 3]
        raise ValueError("stop")
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, models.lm_batch()), plain)


def test_what_cannot_be_trained_in_place_is_named() -> None:
    for model, error, match in (
        (built("topk", 3, k=1), ConfigError, r"layers\.0\.self_attn\.q_proj: only one expert of the family 'paca'"),
        (built(dropout=0.1), ConfigError, "without dropout"),
        (moa.build(models.llama(), "fixed", n_experts=1), ConfigError, "only one expert of the family 'paca'"),
        (built(make=models.gpt2), ConfigError, "a Conv1D is not a plain linear layer"),
        (built("expert_choice", 1), ConfigError, "its expert's weight is not always 1"),
    ):
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(error, match=match), in_place(model):
            pass
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    tied = models.llama()
    tied.model.layers[1].self_attn.q_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(FoldError, match="its weight is also that of"), in_place(built(make=lambda: tied, layers=0)):
        pass


def test_inside_the_base_is_still_there() -> None:
    model, batch = models.randomise(built()).eval(), models.lm_batch()
    expected = models.outputs_of(model, batch)
    with in_place(model) as base:
        for _ in range(2):
            assert_close(models.outputs_of(base, batch), expected, 1e-5)
            with model.disable_adapter():
                assert torch.equal(models.outputs_of(model, batch), models.outputs_of(models.llama(), batch))
        with pytest.raises(ConfigError, match="training in place needs the frozen base"), in_place(model):
            pass
