"""LoRA-Squeeze in training: the error is the tail of the spectrum, and a run in stages ends in a plain checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

import moa
from moa.errors import ConfigError
from moa.runs.config import parse
from moa.runs.train import train
from moa.training.squeeze_callback import SqueezeCallback
from moa.training.squeezing import current_rank, squeeze_experts
from tests import models
from tests.laws import assert_close
from tests.tiny_run import config_values, encoder_folder

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
ROWS = [{"input_ids": torch.arange(2, 8) + n % 3, "labels": torch.tensor(n % 3)} for n in range(8)]


def built(router: str = "topk", **options: Any) -> moa.MoAModel:
    made = {"n_experts": 3, "rank": 8, "targets": ["query", "value"], **options}
    return models.randomise(moa.build(models.bert().double(), router, **made), scale=0.3)


def changes(model: moa.MoAModel) -> dict[tuple[str, int], Tensor]:
    banks = {name: branch.bank for name, branch in model.branches()}
    return {(n, e): bank.delta(e).dense() for n, bank in banks.items() for e in range(bank.n_experts)}


def routers(model: moa.MoAModel) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.adapter_state_dict().items() if ".router." in n}


@pytest.mark.parametrize("options", [{}, {"alpha": 0.1}, {"router": "remix", "k": 2}, {"router": "dense"}])
def test_what_is_lost_is_the_tail_of_the_spectrum(options: dict[str, Any]) -> None:
    """The dense weights' own singular values are the oracle, expert by expert."""
    model = built(**options)
    before, kept, scale = changes(model), routers(model), model.recipes[0][0].scaling()
    errors = squeeze_experts(model, 3)
    for (name, e), dense in before.items():
        u, s, vt = torch.linalg.svd(dense)
        tail = float(s[3:].square().sum().sqrt())
        assert tail > 0.1 * dense.norm() and errors[name][e] == pytest.approx(tail, rel=1e-10)
        assert_close(changes(model)[name, e], u[:, :3] * s[:3] @ vt[:3], 1e-10)
    recipe = model.recipes[0][0]
    assert (current_rank(model), recipe.scaling()) == (3, pytest.approx(scale, rel=1e-12))
    for _, branch in model.branches():
        assert (branch.bank.down.shape[:2], branch.bank.rank) == ((3, 3), 3)
        assert branch.bank.scaling == recipe.scaling()
        # Σ is shared by both factors, s aside
        assert_close(branch.bank.down @ branch.bank.down.mT, branch.bank.up @ branch.bank.up.mT, 1e-10)
    assert all(torch.equal(value, kept[name]) for name, value in routers(model).items())


def test_a_rank_that_holds_all_loses_nothing() -> None:
    model = built()
    before, down = changes(model), {n: b.bank.down.clone() for n, b in model.branches()}
    for rank in (8, 9):
        assert all(not any(errors) for errors in squeeze_experts(model, rank).values())
        assert all(torch.equal(branch.bank.down, down[n]) for n, branch in model.branches())
    with torch.no_grad():
        for _, branch in model.branches():
            branch.bank.up[:, 4:] = 0  # of rank 4
    before = changes(model)
    squeeze_experts(model, 4)
    for key, change in changes(model).items():
        assert_close(change, before[key], 1e-10)


def test_energy_takes_the_smallest_rank_that_keeps_it_in_every_expert() -> None:
    model = built()
    with torch.no_grad():
        for name, branch in model.branches():
            branch.bank.up[:, 2:] *= 0.1 if "layer.1" in name else 1  # neither layers nor experts are alike
            branch.bank.up[0, 2:] *= 0.1
    ranks = []
    for change in changes(model).values():
        s = torch.linalg.svdvals(change).square()
        ranks.append(next(k for k in range(1, 9) if s[:k].sum() >= 0.9 * s.sum()))
    assert len(set(ranks)) > 1 and max(ranks) < 8
    squeeze_experts(model, energy=0.9)
    assert current_rank(model) == max(ranks)


def test_all_branches_of_a_layer_are_squeezed(tmp_path: Path) -> None:
    """A base's own fused experts have two, of up and of down."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, **sizes)
    base = MixtralForCausalLM(config)
    model = moa.build(copy.deepcopy(base), "topk", n_experts=2, k=1, rank=6, targets="moe-experts")
    models.randomise(model)
    errors = squeeze_experts(model, 4)
    assert len(errors) == 2 and all(all(one) for one in errors.values())
    assert {branch.bank.down.shape[1] for _, branch in model.branches()} == {4}
    model.save_pretrained(tmp_path)
    again, x = moa.load(tmp_path, base=base).eval(), torch.arange(12).view(2, 6)
    assert torch.equal(again(x).logits, model.eval()(x).logits)


def test_experts_that_are_zero_can_still_be_trained() -> None:
    model = moa.build(models.bert(), "topk", n_experts=3, k=2, rank=8, targets=["query"])
    down = {n: b.bank.down.clone() for n, b in model.branches()}
    squeeze_experts(model, 2)
    for name, branch in model.branches():
        assert torch.equal(branch.bank.down, down[name][:, :2]) and not branch.bank.up.any()


def test_an_optimizer_goes_on_with_what_was_not_squeezed() -> None:
    """The factors step as by a fresh Adam: by the learning rate, whatever the gradient's size."""
    model = built().train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = models.class_batch()
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters() if ".router." in n}
    squeeze_experts(model, 3, optimizer=optimizer)
    for name, parameter in model.named_parameters():
        assert ".bank." not in name or parameter not in optimizer.state
        assert ".router." not in name or torch.equal(optimizer.state[parameter]["exp_avg"], state[name])
    model(**batch).loss.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".bank." in n}
    optimizer.step()
    for name, value in before.items():
        step, grad = (model.get_parameter(name) - value).detach(), model.get_parameter(name).grad
        assert grad is not None
        assert_close(step, -1e-3 * grad / (grad.abs() + 1e-8), 1e-9)


def trained(folder: Path, resume: str | None = None, steps: int = 6, **options: Any) -> moa.MoAModel:
    torch.manual_seed(0)
    model = moa.build(models.bert(), "topk", n_experts=3, k=2, rank=8, targets=["query", "value"])
    args = TrainingArguments(
        str(folder), max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01,
        save_steps=1, lr_scheduler_type="constant", per_device_train_batch_size=4, **options,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[SqueezeCallback(ranks=[4, 2], every=2)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_with_trainer_checkpoints_hold_the_rank_of_their_step_and_a_run_goes_on_from_each(tmp_path: Path) -> None:
    model = trained(tmp_path / "whole")
    for step, rank in ((1, 8), (2, 4), (3, 4), (4, 2), (6, 2)):
        assert current_rank(moa.load(tmp_path / "whole" / f"checkpoint-{step}", base=models.bert())) == rank
    model.save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out", base=models.bert())
    assert again.recipes[0][0] == model.recipes[0][0]
    own = model.adapter_state_dict()
    assert {n: v.shape[1] for n, v in own.items() if n.endswith("bank.down")}.popitem()[1] == 2
    for step in (1, 2, 3, 5):
        further = trained(tmp_path / "further", str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, value in further.adapter_state_dict().items():
            assert torch.equal(value, own[name]), (step, name)
    assert all(torch.equal(value, own[name]) for name, value in again.adapter_state_dict().items())


def test_training_that_ends_early_or_with_an_earlier_model_ends_at_the_last_rank(tmp_path: Path) -> None:
    assert current_rank(trained(tmp_path / "short", steps=3)) == 2
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    model = trained(tmp_path / "best", **best)  # the worst loss is the first: rank 8
    assert current_rank(model) == 2
    first = moa.load(tmp_path / "best" / "checkpoint-1", base=models.bert())
    squeeze_experts(first, 2)
    for name, value in first.adapter_state_dict().items():
        assert_close(model.adapter_state_dict()[name], value, 1e-6)


def test_a_run_by_the_key_goes_on_where_it_stopped(tmp_path: Path) -> None:
    made = config_values(tmp_path, encoder_folder(tmp_path / "base"))
    made["training"] |= {"max_steps": 3, "num_train_epochs": 1, "save_steps": 3, "lr_scheduler_type": "constant"}
    made["recipe"] |= {"rank": 6, "targets": ["query"]}
    made |= {"strategy": {"name": "squeeze", "ranks": [4, 2], "every": 2}, "score_before": False}
    train(parse(made))
    again = {**made, "training": {**made["training"], "max_steps": 5}}
    further = train(parse(again), resume=True).results
    straight = train(parse({**again, "output": str(tmp_path / "straight")})).results
    assert further["scores"] == straight["scores"] and further["recipe"] == straight["recipe"]
    assert further["recipe"]["rank"] == 2
    shapes = {n: v.shape[1] for n, v in load_file(tmp_path / "run" / "model" / "model.safetensors").items()}
    assert {size for name, size in shapes.items() if name.endswith("bank.down")} == {2}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expert": "vera"}, r"query: VeRABank experts hold no two factors .* LoRA-Squeeze shortens such pairs"),
        ({"expert": "dylora"}, "choose expert='lora'"),
        ({"rank": [4, 8, 8]}, "choose expert='lora'"),
        ({"train_experts": False}, "that are trained"),
        ({"rank": 4}, r"have rank 4, and ranks=\[4, 2\] are to come after it: build with a rank above 4"),
    ],
)
def test_what_cannot_be_squeezed_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    model = moa.build(models.bert(), "topk", **{"n_experts": 3, "rank": 8, "targets": ["query"], **options})
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    with pytest.raises(ConfigError, match=says):
        Trainer(model, args, train_dataset=ROWS, callbacks=[SqueezeCallback([4, 2], every=1)]).train()


@pytest.mark.parametrize("ranks", [[], [4, 4], [2, 4], [4, 0], "84", [True], [4.0]])
def test_ranks_that_do_not_fall_are_refused(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="must fall from stage to stage"):
        SqueezeCallback(ranks, every=1)
    with pytest.raises(ConfigError, match="every must be at least 1"):
        SqueezeCallback([4], every=0)
    for options in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}):
        with pytest.raises(ConfigError, match=r"rank|energy"):
            squeeze_experts(built(), **options)  # type: ignore[arg-type]
