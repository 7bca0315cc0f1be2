"""Experts made of the base's weight, which gives their frozen tensors again. Run: pytest tests/experts"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import moa
from moa.errors import ConfigError
from tests import laws, models
from tests.laws import assert_close

from . import bank_laws


def bank_on(weight: torch.Tensor, name: str, n_experts: int = 2, rank: int = 2, **keywords: Any) -> Any:
    """Return a fresh bank in fp64 on a layer with a weight (o, i)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    site = moa.Site("q", layer, weight.shape[1], weight.shape[0])
    return laws.make_family(name, keywords).build(site, n_experts, None, rank=rank, scaling=1.5).double()


@pytest.mark.parametrize("sides", ["both", "input", "output"])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_protected_directions_stay_as_they_are(sides: str, shape: tuple[int, int]) -> None:
    """By the definition: W0's own triplets, and for both sides those of the changed weight."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    bank = laws.randomised(bank_on(weight, "comp_lora", protected=3, sides=sides))
    change = bank.delta(1).dense()
    u, s, vh = torch.linalg.svd(weight)
    assert change.norm() > 1 and int(torch.linalg.matrix_rank(change)) == 2
    reads, writes = (change @ vh[:3].T).abs().max(), (u[:, :3].T @ change).abs().max()
    assert (float(reads) < 1e-12) == (sides != "output") and (float(writes) < 1e-12) == (sides != "input")
    if sides == "both":
        small = weight + 0.05 * change / change.norm()
        again = torch.linalg.svd(small)
        assert_close(again.S[:3], s[:3], 1e-12)
        assert_close((again.U[:, :3] * u[:, :3]).sum(0).abs(), torch.ones(3, dtype=torch.float64), 1e-12)
        eye_o, eye_i = torch.eye(shape[0], dtype=torch.float64), torch.eye(shape[1], dtype=torch.float64)
        formula = (eye_o - u[:, :3] @ u[:, :3].T) @ bank.up[1].T @ bank.down[1] @ (eye_i - vh[:3].T @ vh[:3])
        assert_close(change, 1.5 * formula, 1e-12)


def test_a_small_layer_protects_half_of_its_directions_and_a_vector_is_refused() -> None:
    assert bank_on(torch.randn(4, 9), "comp_lora", protected=16).right.shape == (2, 9)
    with pytest.raises(ConfigError, match=r"q: a weight \(1, 9\) has one singular direction and nothing beside it"):
        bank_on(torch.randn(1, 9), "comp_lora")


def test_protected_directions_stay_in_training_with_decay() -> None:
    model, batch = moa.build(models.llama(), "topk", n_experts=3, k=2, expert="comp_lora", rank=2), models.lm_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    name, branch = next(iter(model.branches()))
    change = branch.bank.delta(0).dense()
    vh = torch.linalg.svd(model.mixtures()[name].base.weight).Vh[: branch.bank.right.shape[0]]
    assert float(change.norm()) > 1e-3 and float((change @ vh.T).abs().max()) < 1e-7


# ------------------------------------------------------------------------------------------------ starts of LoRA


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_trains_as_pefts_does(start: str) -> None:
    """PEFT moves the base and trains the factors: outputs and factors after some steps are the oracle."""
    batch, rank = models.lm_batch(), 3
    config = LoraConfig(r=rank, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=start)
    theirs = get_peft_model(models.llama(), config).double()  # peft starts in fp32
    ours = moa.build(
        models.llama().double(), "fixed", n_experts=1, start=start, rank=rank, alpha=6.0, targets=r".*q_proj"
    ).double()
    assert torch.equal(models.outputs_of(ours, batch), models.outputs_of(models.llama().double(), batch))
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1e3
        )  # gradients of a tiny model are small
        for _ in range(3):
            model.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(models.outputs_of(ours, batch), models.outputs_of(theirs, batch), 1e-5)
    layers = {name: m for name, m in theirs.named_modules() if name.endswith("q_proj")}
    for name, branch in ours.branches():
        layer = next(m for key, m in layers.items() if key.endswith(name))
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        mine_a, mine_b = branch.bank.down[0] + branch.bank.down_start, (branch.bank.up[0] + branch.bank.up_start).T
        signs = (a * mine_a).sum(1).sign()  # of a component are free
        assert_close(mine_a * signs[:, None], a, 1e-5)
        assert_close(mine_b * signs, b, 1e-5)
        assert bool(branch.bank.up.abs().max() > 1e-2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_is_made_again_when_loading_folds_and_exports(start: str, tmp_path: Path) -> None:
    batch = models.lm_batch()
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=1, start=start, rank=2)).eval()
    expected = models.outputs_of(model, batch)
    model.save_pretrained(tmp_path / "moa")
    assert not any("start" in key for key in load_file(tmp_path / "moa" / "model.safetensors"))
    assert torch.equal(models.outputs_of(moa.load(tmp_path / "moa", base=models.llama()), batch), expected)
    folder = moa.export_expert(model, 0, tmp_path / "lora", as_lora=True)
    assert_close(models.outputs_of(PeftModel.from_pretrained(models.llama(), folder).eval(), batch), expected, 1e-5)
    assert_close(models.outputs_of(model.merge_and_unload(), batch), expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "pisa"}, r"start must be one of zero, pissa, olora, got 'pisa'"),
        ({"start": "pissa", "rank": 9}, r"k_proj: a weight \(8, 16\) has 8 components to start from: rank=9"),
        ({"start": "olora", "place": "output"}, r"start='olora' is for experts on a layer's input, not 'output'"),
    ],
)
def test_a_start_that_does_not_fit_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), "fixed", n_experts=2, **options)


# ------------------------------------------------------------------------------------------------ SALT and LoLDU


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (9, 9)])
def test_salt_is_the_papers_changed_spectrum(shape: tuple[int, int]) -> None:
    """W0 + ΔW = U [diag(a σ + b), 0; 0, diag(σ) + X Y] V^T, a counted from 1, in numpy's decomposition."""
    torch.manual_seed(0)
    weight, p = torch.randn(shape, dtype=torch.float64), 3
    bank = laws.randomised(bank_on(weight, "salt", n_scaled=p))
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    signs = np.sign((u * bank.left.numpy()).sum(0))  # of a component are free
    assert_close(torch.tensor(u * signs), bank.left, 1e-10)
    for expert in range(2):
        scale, shift, down, up = (getattr(bank, name)[expert].detach().numpy() for name in bank.per_expert)
        core = np.diag(s)
        core[:p, :p] = np.diag((1 + 1.5 * scale) * s[:p] + 1.5 * shift)  # 1.5 is this bank's scale
        core[p:, p:] += 1.5 * up.T @ down
        changed = (u * signs) @ core @ (signs[:, None] * vt)
        assert_close(weight + bank.delta(expert).dense(), torch.tensor(changed), 1e-10)


@pytest.mark.parametrize("rows", [1, 30])
def test_salt_mixes_few_rows_and_many(rows: int) -> None:
    """Both ways of forward are Σ w ΔW x, with the gradients of the definition."""
    torch.manual_seed(0)
    bank = laws.randomised(bank_on(torch.randn(12, 9, dtype=torch.float64), "salt", n_experts=3, n_scaled=3))
    bank_laws.bank_fast_is_generic(bank, torch.randn(rows, 9, dtype=torch.float64), 2, dense=False)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (9, 9)])
def test_loldu_is_the_papers_diagonal_between_scipys_triangles(shape: tuple[int, int]) -> None:
    """W_res + s P L_r diag(z) U_r, W_res the base without its own part, in scipy's decomposition."""
    torch.manual_seed(0)
    weight, rank = torch.randn(shape, dtype=torch.float64), 4
    bank = laws.randomised(bank_on(weight, "loldu", rank=rank))
    p, lower, upper = scipy.linalg.lu(weight.numpy())
    pivots = np.diag(upper)[:rank]
    left, right = (p @ lower)[:, :rank], upper[:rank] / pivots[:, None]
    rest = weight.numpy() - 1.5 * (left * pivots) @ right
    for expert in range(2):
        z = pivots + bank.diagonal[expert].detach().numpy()
        assert_close(weight + bank.delta(expert).dense(), torch.tensor(rest + 1.5 * (left * z) @ right), 1e-10)
    assert np.allclose(np.diag(right[:, :rank]), 1)


def test_a_pivot_that_is_zero_to_rounding_is_refused_by_name() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3) @ torch.randn(3, 9)  # of rank 3, as a pruned layer may be
    assert bank_on(weight, "loldu", rank=3).rank == 3
    with pytest.raises(ConfigError, match=r"q: pivot 3 of a weight \(8, 9\) is .*zero to rounding.*: at most rank=3"):
        bank_on(weight, "loldu", rank=4)
    with pytest.raises(ConfigError, match=r"q: pivot 0 of a weight \(8, 9\) is 0, .*leave the layer out of targets"):
        bank_on(torch.zeros(8, 9), "loldu", rank=1)


def test_salt_on_a_weight_of_one_singular_value_is_refused() -> None:
    assert bank_on(torch.randn(4, 9), "salt").n_scaled == 3
    with pytest.raises(ConfigError, match=r"q: a weight \(1, 9\) has one singular value and no rest for a low rank"):
        bank_on(torch.randn(1, 9), "salt")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("family", ["salt", "loldu"])
def test_an_expert_is_exported_as_a_lora(family: str, tmp_path: Path) -> None:
    batch = models.lm_batch()
    options = {"n_scaled": 3} if family == "salt" else {}
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=1, expert=family, rank=2, **options)).eval()
    expected = models.outputs_of(model, batch)
    folder = moa.export_expert(model, 0, tmp_path / "lora", as_lora=True)
    assert_close(models.outputs_of(PeftModel.from_pretrained(models.llama(), folder).eval(), batch), expected, 1e-5)
