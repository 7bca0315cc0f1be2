"""The stock Trainer, without a subclass, and a bare loop. Run: pytest tests/model/test_trainer.py"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import moa
from moa.errors import MoaWarning
from tests import laws, models
from tests.laws import assert_close


def rows(batch: dict[str, torch.Tensor], **extra: list) -> list[dict]:
    """Return a batch as a list of examples, as a data set gives them."""
    n = len(next(iter(batch.values())))
    return [{key: value[i] for key, value in {**batch, **extra}.items()} for i in range(n)]


# transformers 5.2x renamed the switch and warns about the old name
NEW_NAME = any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments))
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"


def arguments(folder: Path, **options) -> TrainingArguments:
    common = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**common, **options})


def build(name: str, kind: str = "llama", **options) -> moa.MoAModel:
    torch.manual_seed(2)
    return models.randomise(moa.build(models.MODELS[kind][0](), laws.small_recipe(name, "default", **options)), 0.1)


LM = rows(models.lm_batch(rows=8))
CLASSES = rows(models.class_batch(rows=8))


@pytest.mark.parametrize(("kind", "data"), [("llama", LM), ("bert", CLASSES)])
@pytest.mark.parametrize("name", ["topk", "remix", "sigmoid"])
def test_the_stock_trainer_trains_evaluates_and_saves(kind, data, name, tmp_path):
    model = build(name, kind, targets="all-linear")
    trainer = Trainer(model, arguments(tmp_path, max_steps=12), train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    with torch.no_grad():  # what it reports is the task's loss, over the same rows
        model.eval()
        batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
        assert_close(torch.tensor(after), model(**batch).loss.cpu(), 1e-3 if kind == "bert" else 5e-2)
    trainer.save_model(str(tmp_path / "out"))
    again = moa.load(tmp_path / "out", base=models.MODELS[kind][0]())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    predictions = trainer.predict(data).predictions
    assert predictions.shape[0] == 8


class NeedsTasks(models.Plain):
    """A base that fails where no task ids arrive."""

    def forward(self, x, task_ids=None, labels=None):
        assert task_ids is not None, "Trainer dropped the task_ids column"
        return super().forward(x, labels)


@pytest.mark.parametrize("kind", ["base that takes them", "router alone"])
def test_a_task_ids_column_reaches_the_model(kind, tmp_path):
    """Trainer drops the columns that the forward does not name."""
    seen = []
    if kind == "router alone":
        model, batch = build("topk", "bert"), models.class_batch(rows=8)
        model.observers.append(lambda traces: seen.append(model.context.task_ids))
    else:
        model, batch = moa.build(NeedsTasks(), "topk"), models.plain_batch(rows=8)
        model.observers.append(lambda traces: seen.append(model.context.task_ids))
    data = rows({**batch, "task_ids": torch.arange(8) % 3, "junk": torch.zeros(8)})
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=data).train()
    assert len(seen) == 2 and all(ids.shape == (4,) and ids.max() <= 2 for ids in seen)


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {CHECKPOINTING: True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}],
    ids=str,
)
def test_the_trainers_switches(options, tmp_path):
    model = build("remix")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, arguments(tmp_path, max_steps=2, **options), train_dataset=LM).train()
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_reentrant_checkpointing_becomes_the_mode_in_which_routers_learn(tmp_path):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    model = build("remix")
    before = [branch.router.weight.detach().clone() for _, branch in model.branches()]
    with pytest.warns(MoaWarning, match="'use_reentrant': False"):
        Trainer(model, arguments(tmp_path, max_steps=1, **options), train_dataset=LM).train()
    assert not any(torch.equal(b.router.weight, w) for (_, b), w in zip(model.branches(), before, strict=True))
    Trainer(build("sigmoid"), arguments(tmp_path, max_steps=1, **options), train_dataset=LM).train()


class Gradients(TrainerCallback):
    """Keep the gradients that the optimizer is about to use."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kept = model, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.kept.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad})


def test_accumulation_gives_the_same_gradients(tmp_path):
    """1 × 8 rows as 2 × 4: nothing in the loss is multiplied by the number of micro-batches."""
    ids = torch.randint(2, models.VOCAB, (8, 6), generator=torch.Generator().manual_seed(2))
    data = rows({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    results = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        model = build("dense", z_loss=0.5).double()
        watch = Gradients(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = Trainer(
            model, arguments(tmp_path, **options, max_grad_norm=0.0), train_dataset=data, callbacks=[watch]
        )
        trainer.train()
        results.append((watch.kept[0], trainer.state.log_history[0]["loss"]))
    for grads, loss in results[1:]:
        assert abs(loss - results[0][1]) < 1e-4
        for name, grad in grads.items():
            assert_close(grad, results[0][0][name], 1e-6, name)


def test_the_selection_bias_moves_once_per_trainer_step(tmp_path):
    model = build("sigmoid", bias_rate=0.01)
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    Trainer(model, arguments(tmp_path, **options), train_dataset=LM, eval_dataset=LM).train()
    for _, branch in model.branches():
        steps = (branch.router.selection_bias / 0.01).round()
        assert_close(branch.router.selection_bias, steps * 0.01, 1e-5)
        assert steps.abs().max() <= 3 and bool(steps.any())
        assert not bool(branch.router.counts.any())


# ------------------------------------------------------------------------------------------------ checkpoints, resume


@pytest.mark.parametrize("name", ["topk", "remix", "sigmoid"])
def test_resume_is_bit_exact(name, tmp_path, caplog):
    """Six steps in one run, and the same six with a stop after three: parameters, optimizer, router state, loss."""
    whole = build(name)
    first = Trainer(
        whole, arguments(tmp_path / "a", max_steps=6, save_strategy="steps", save_steps=3), train_dataset=LM
    )
    first.train()
    folder = tmp_path / "a" / "checkpoint-3"

    held = load_file(folder / "model.safetensors")
    assert held.keys() == whole.adapter_state_dict().keys()
    assert all(".branches." in key for key in held)
    size = sum(v.numel() * v.element_size() for v in held.values())
    assert (folder / "model.safetensors").stat().st_size < size + 20_000

    resumed = build(name)
    models.randomise(resumed, seed=77)
    second = Trainer(resumed, arguments(tmp_path / "a", max_steps=6), train_dataset=LM)
    with caplog.at_level(logging.WARNING):
        second.train(resume_from_checkpoint=str(folder))
    assert not [r.getMessage() for r in caplog.records if "key" in r.getMessage().lower()]
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r][-3:] for t in (first, second)]
    assert losses[0] == losses[1]
    states = [list(t.optimizer.state.values()) for t in (first, second)]
    assert len(states[0]) == len(states[1]) > 0
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_a_trainer_checkpoint_loads_as_a_model(tmp_path):
    model = build("topk")
    Trainer(model, arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=LM).train()
    again = moa.load(tmp_path / "checkpoint-1", base=models.llama())
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["model_type"] == "moa"


def test_load_best_model_at_end(tmp_path, caplog):
    model = build("topk")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"learning_rate": 0.5, "load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 3}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=LM, eval_dataset=LM)
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in model.adapter_state_dict().items())


# ------------------------------------------------------------------------------------------------ without Trainer


def test_a_bare_loop_of_ten_lines():
    data, losses = models.lm_batch(rows=8), []
    model = moa.build(models.llama(), router="remix", n_experts=8, k=2)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(20):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(model.last_losses["task"].item())
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3


WORKER = """
    import sys, torch, torch.distributed as dist
    sys.path.insert(0, {root!r})
    import moa
    from tests import laws, models
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(2)
    model = models.randomise(moa.build(models.llama(), "sigmoid", n_experts=4, k=2, rank=2, bias_rate=0.01)).train()
    for _, branch in model.branches():
        branch.router.loss_weights = {{"z": 0.5}}
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(2, 32, (8, 6), generator=torch.Generator().manual_seed(2))
    n_items = ids[:, 1:].numel()
    mine = ids[rank * 4 : rank * 4 + 4]
    loss = parallel(input_ids=mine, labels=mine, num_items_in_batch=n_items).loss * 2
    loss.backward()
    optimizer.step()
    if rank == 0:
        torch.save({{n: v for n, v in model.state_dict().items() if "branches" in n}}, {out!r})
    dist.destroy_process_group()
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    """DDP over gloo: same gradients and same selection bias as one process with all the rows."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out, root = str(tmp_path / "state.pt"), str(Path(__file__).parents[2])
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER.format(root=root, port=port, out=out)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, str(script), str(rank)], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    torch.manual_seed(2)
    model = models.randomise(moa.build(models.llama(), "sigmoid", n_experts=4, k=2, rank=2, bias_rate=0.01)).train()
    for _, branch in model.branches():
        branch.router.loss_weights = {"z": 0.5}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(2, 32, (8, 6), generator=torch.Generator().manual_seed(2))
    model(input_ids=ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss.backward()
    optimizer.step()
    for name, value in torch.load(out).items():
        assert_close(value, model.state_dict()[name], 1e-5, name)
