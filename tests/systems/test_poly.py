"""Poly and MHR against peft's Poly, and the paper's modes z and mu. Run: pytest tests/systems/test_poly.py"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, ContextError, FoldError
from moa.experts import HeadedLoRABank, LoRABank
from moa.recipes import Site
from moa.routers import TableRouter
from tests import models
from tests.laws import assert_close

TASKS, SKILLS, RANK = 3, 4, 2


def peers(n_heads: int) -> tuple[Any, Any]:
    """Return peft's Poly on a linear layer and ours with the same weights, both fp64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 8)).double()
    config = peft.PolyConfig(
        r=RANK, n_tasks=TASKS, n_skills=SKILLS, n_splits=n_heads, target_modules=["0"], init_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double()
    layer = theirs.base_model.model[0]
    nn.init.normal_(layer.poly_router["default"].module_logits)
    options = {"rank": RANK, "n_experts": SKILLS, "n_tasks": TASKS, "targets": ["0"]}
    ours = moa.build(base, "mhr", n_heads=n_heads, **options) if n_heads > 1 else moa.build(base, "poly", **options)
    branch = ours.mixtures()["0"].branches[0]
    with torch.no_grad():  # theirs: (H, E, i/H, r) and (H, E, r, o/H); ours: (E, r, i) and (E, r, o)
        a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
        branch.bank.down.copy_(a.permute(1, 3, 0, 2).reshape(SKILLS, RANK, 12))
        branch.bank.up.copy_(b.permute(1, 2, 0, 3).reshape(SKILLS, RANK, 8))
        branch.router.table.copy_(layer.poly_router["default"].module_logits.view(TASKS, n_heads, SKILLS))
    return theirs, ours


class FrozenNoise(torch.distributions.Distribution):
    """In place of RelaxedBernoulli: the same formula, its uniform draw fixed."""

    def __init__(self, temperature: float, logits: Tensor) -> None:
        self.logits, self.temperature = logits, temperature

    def rsample(self, sample_shape: Any = None) -> Tensor:
        """Return sigmoid((Z + logit(u)) / T)."""
        u = fixed_uniform(self.logits.shape)
        return torch.sigmoid((self.logits + torch.log(u) - torch.log(1 - u)) / self.temperature)


def fixed_uniform(shape: Any) -> Tensor:
    """Return the same uniform numbers for the same number of elements."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_values_and_gradients_are_pefts(n_heads: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = peers(n_heads)
    theirs.train(training)
    ours.train(training)
    monkeypatch.setattr("peft.tuners.poly.router.RelaxedBernoulli", FrozenNoise)
    monkeypatch.setattr(torch, "rand_like", lambda logits: fixed_uniform(logits.shape))
    x, tasks = torch.randn(5, 3, 12, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 2])
    upstream = torch.randn(5, 3, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = theirs.base_model.model[0](inputs[0], task_ids=tasks)
    got = ours(inputs[1], task_ids=tasks)
    assert_close(got, expected)
    (expected * upstream).sum().backward()
    (got * upstream).sum().backward()
    layer, branch = theirs.base_model.model[0], ours.mixtures()["0"].branches[0]
    assert_close(inputs[1].grad, inputs[0].grad, what="x")
    a, b = layer.poly_lora_A["default"].grad, layer.poly_lora_B["default"].grad
    assert_close(branch.bank.down.grad, a.permute(1, 3, 0, 2).reshape(SKILLS, RANK, 12), what="down")
    assert_close(branch.bank.up.grad, b.permute(1, 2, 0, 3).reshape(SKILLS, RANK, 8), what="up")
    table = layer.poly_router["default"].module_logits.grad.view(TASKS, n_heads, SKILLS)
    assert_close(branch.router.table.grad, table, what="table")


def test_parameters_are_mixed_not_outputs() -> None:
    """(Σ w A)(Σ w B) has cross terms: it is not Σ w (A B)."""
    bank = HeadedLoRABank(6, 4, 3, rank=2, n_heads=2).double()
    nn.init.normal_(bank.up)
    x, w = torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(2, 1, 2, 3, dtype=torch.float64)
    expected = torch.zeros(2, 5, 4, dtype=torch.float64)
    for b in range(2):
        a_w = torch.cat([sum(w[b, 0, h, e] * bank.down[e, :, 3 * h : 3 * h + 3] for e in range(3)) for h in (0, 1)], 1)
        b_w = torch.cat([sum(w[b, 0, h, e] * bank.up[e, :, 2 * h : 2 * h + 2] for e in range(3)) for h in (0, 1)], 1)
        expected[b] = x[b] @ a_w.T @ b_w
    assert_close(bank(x, moa.Routing(w, None, 3)), expected)
    tokens = moa.Routing(w.expand(2, 5, 2, 3).contiguous(), None, 3)
    assert_close(bank(x, tokens), expected)  # the path for a routing per token
    mixed_outputs = sum(w[:, :, :1, e] * bank.expert_forward(x, e) for e in range(3))
    assert not torch.allclose(expected, mixed_outputs)


def test_noise_is_for_training_alone() -> None:
    router = TableRouter(6, 4, 3)
    context = moa.Context(task_ids=torch.tensor([0, 1]))
    x = torch.randn(2, 5, 6)
    drawn = router.train()(x, context).weights
    assert not torch.equal(drawn, router(x, context).weights)
    quiet = router.eval()(x, context).weights
    assert torch.equal(quiet, router(x, context).weights) and drawn.std() > 10 * quiet.std()
    plain = TableRouter(6, 4, 3, relaxed=False).train()
    assert torch.equal(plain(x, context).weights, plain(x, context).weights)


def trained(name: str = "mhr", **options: Any) -> Any:
    if name == "mhr":
        options.setdefault("n_heads", 2)
    model = moa.build(models.llama(), name, n_experts=SKILLS, rank=RANK, n_tasks=TASKS, **options)
    return models.randomise(model)


def train(model: Any, task: int, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.optimizer_groups(1e-2, weight_decay=0.1), weight_decay=0.1)
    batch = {**models.lm_batch(), "task_ids": torch.full((4,), task)}
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model: Any, part: str) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in model.adapter_state_dict().items() if part in n}


@pytest.mark.parametrize("name", ["poly", "mhr"])
def test_mode_z_moves_the_routing_alone(name: str) -> None:
    """The freeze is bit exact under weight decay, and skills do not even get a gradient."""
    model = trained(name)
    before = state(model, ".bank.")
    model.adapt(5, mode="z")
    table = state(model, ".router.")
    assert all(t.shape[0] == 1 and t.abs().max() <= 1e-3 for t in table.values()), "one fresh row"
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(n.endswith("router.table") for n in trainable)
    train(model, task=5)
    assert all(torch.equal(v, before[n]) for n, v in state(model, ".bank.").items())
    assert all(not torch.equal(v, table[n]) for n, v in state(model, ".router.").items())


def test_adapted_models_know_the_new_task_alone() -> None:
    model = trained()
    model.adapt(5)
    batch = models.lm_batch()
    model(**batch, task_ids=torch.full((4,), 5))
    with pytest.raises(ContextError, match=r"unknown task id 1: this model routes tasks 5 only"):
        model(**batch, task_ids=torch.ones(4, dtype=torch.long))


def test_mode_full_trains_both() -> None:
    model = trained()
    banks = state(model, ".bank.")
    model.adapt(0, mode="full")
    train(model, task=0)
    assert all(not torch.equal(v, banks[n]) for n, v in state(model, ".bank.").items())


def test_mode_mu_starts_at_the_mean_and_collapses_to_one_lora() -> None:
    batch = models.lm_batch()
    several, one = trained().double(), trained().double()
    several.adapt(7, mode="mu")
    one.adapt(7, mode="mu", collapse=True)
    assert all(isinstance(b.bank, LoRABank) and b.bank.n_experts == 1 for _, b in one.branches())
    assert all(isinstance(b.bank, HeadedLoRABank) for _, b in several.branches())
    assert_close(models.outputs_of(one, batch), models.outputs_of(several, batch), 1e-6)  # Llama's norms are in fp32
    fewer = one.get_nb_trainable_parameters()[0]
    assert fewer * SKILLS == several.get_nb_trainable_parameters()[0]
    for model in (several, one):
        before = state(model, ".bank.")
        train(model, task=7)
        assert all(not torch.equal(v, before[n]) for n, v in state(model, ".bank.").items())


@pytest.mark.parametrize(("mode", "collapse"), [("full", False), ("z", False), ("mu", False), ("mu", True)])
def test_adapted_models_come_back(mode: str, collapse: bool, tmp_path: Any) -> None:
    model = trained()
    model.adapt(5, mode=mode, collapse=collapse)
    train(model, task=5, steps=1)
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama())
    batch = {**models.lm_batch(), "task_ids": torch.full((4,), 5)}
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_table_has_its_own_learning_rate() -> None:
    model = trained()
    groups = model.optimizer_groups(1e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (0.1, 0.0)]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len([p for p in model.parameters() if p.requires_grad])
    assert {id(b.router.table) for _, b in model.branches()} == {id(p) for p in groups[1]["params"]}


def test_the_stock_trainer_takes_the_groups(tmp_path: Any) -> None:
    import transformers

    model = trained()
    before = state(model, "router.table")
    batch = {**models.lm_batch(), "task_ids": torch.tensor([0, 1, 2, 0])}
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True
    )
    optimizer = torch.optim.AdamW(model.optimizer_groups(1e-3))
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    moved = [(v - before[n]).abs().max().item() for n, v in state(model, "router.table").items()]
    assert min(moved) > 0.05, "the table moves by its own rate"


def test_folding_takes_the_task() -> None:
    model = trained().double().eval()
    batch = models.lm_batch()
    expected = models.outputs_of(model, {**batch, "task_ids": torch.full((4,), 2)})
    with pytest.raises(FoldError, match=r"depends on the task \(0 to 2\) and no task was named"):
        model.merge_and_unload()
    with pytest.raises(FoldError, match="task 3 is none of them"):
        model.merge_and_unload(task_id=3)
    assert_close(models.outputs_of(model.merge_and_unload(task_id=2), batch), expected)


def test_unknown_tasks() -> None:
    batch = models.lm_batch()
    strict, lenient = trained(), trained(unknown_tasks="uniform")
    for model, ids, text in (
        (strict, [0, 1, 2, 3], "unknown task id 3: this model routes tasks 0 to 2"),
        (strict, [0, -1, 2, 0], "unknown task id -1"),
        (strict, [0, 1, 2], "task_ids has 3 entries, but the layer sees 4 rows"),
    ):
        with pytest.raises((ContextError, moa.MoaError), match=text):
            model(**batch, task_ids=torch.tensor(ids))
    with pytest.raises(ContextError, match="needs task ids and none are set"):
        strict(**batch)
    strict(**batch, task_ids=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ContextError, match="none are set"):  # those of the batch before must not linger
        strict(**batch)
    with pytest.raises(ContextError, match="whole numbers"):
        strict(**batch, task_ids=torch.rand(4))
    away = models.outputs_of(lenient, {**batch, "task_ids": torch.tensor([9, 9, 9, 0])})
    uniform = models.outputs_of(lenient, batch)
    assert_close(away[:3], uniform[:3], 1e-5)
    assert not torch.allclose(away[3], uniform[3], atol=1e-4)


def test_bad_inputs() -> None:
    for name, options, text in (
        ("mhr", {"n_heads": 3, "n_tasks": 2}, r"q_proj: n_heads=3 must divide .* 16 -> 16"),
        ("poly", {"n_tasks": 0}, "n_tasks must be at least 1"),
        ("poly", {"mode": "zz"}, "mode must be one of 'full', 'z', 'mu', got 'zz'"),
        ("poly", {"unknown_tasks": "guess"}, "unknown must be 'error' or 'uniform'"),
        ("poly", {"n_head": 4}, "unknown keyword 'n_head'"),
    ):
        with pytest.raises(ConfigError, match=text):
            moa.build(models.llama(), name, **options)
    model = trained()
    with pytest.raises(ConfigError, match="collapse=True needs equal weights"):
        model.adapt(0, mode="z", collapse=True)
    with pytest.raises(ConfigError, match="mode must be one of"):
        model.adapt(0, mode="all")
    with pytest.raises(ConfigError, match="'topk' does not route by task"):
        moa.build(models.llama(), "topk").adapt(0)
    bank = moa.make_recipe("poly").bank(Site("x", nn.Identity(), 4, 4))
    assert bank.scaling == 1 / 8  # alpha = 1 as released


def test_a_table_of_another_size_does_not_load(tmp_path: Any) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    other = moa.build(models.llama(), "mhr", n_experts=SKILLS, rank=RANK, n_heads=2, n_tasks=TASKS + 1)
    from moa.formats import checkpoint

    with pytest.raises(moa.MoaError, match=r"table: \(3, 2, 4\) in the file, \(4, 2, 4\) in the model"):
        checkpoint.fill(other.adapter_state_dict(), checkpoint.read(tmp_path)[1], tmp_path)
