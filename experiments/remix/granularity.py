"""Should ReMix decide per token or per sequence? Accuracy, and the noise of the router's gradient, on real tasks.

all-MiniLM-L6-v2 with 8 experts of rank 8, k = 2, on the four sentiment domains of the demo. Each granularity is trained
with the same data, steps, draws and seeds, once with its router learning and once with the router's learning rate at
zero: the difference, seed by seed, is what reinforcement adds. Signal to noise is |mean|² / variance of one step's
router gradient, over repeated draws on one batch after training.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import AutoTokenizer

import moa
from experiments.bench.common import write
from moa.demo import cache_folder
from moa.heads import MultiTaskForSequenceClassification
from moa.tasks import Collator, EncodedTask, Task, encode_tasks

COMMAND = "python -m experiments.remix.granularity"
DOMAINS = ("tweets", "amazon", "movie", "nyt")


def load_tasks(model: str, data: Path, rows: int, seed: int) -> tuple[Any, list[EncodedTask]]:
    """Return the tokenizer and the four tasks, `rows` training rows each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = {
        name: Task(
            train=str(data / f"{name}.train.jsonl"),
            eval=str(data / f"{name}.eval.jsonl"),
            max_train_rows=rows,
            max_eval_rows=400,
        )
        for name in DOMAINS
    }
    return tokenizer, encode_tasks(tasks, tokenizer, 24, seed)


def build(model: str, tasks: list[EncodedTask], granularity: str, seed: int) -> moa.MoAModel:
    """Return a fresh mixture."""
    torch.manual_seed(seed)
    base = MultiTaskForSequenceClassification.from_encoder(model, {task.name: task.labels for task in tasks})
    return moa.build(base, "remix", n_experts=8, k=2, granularity=granularity)


def train(
    model: moa.MoAModel, tasks: list[EncodedTask], collate: Collator, epochs: int, router_lr: float, seed: int
) -> None:
    """Train with AdamW: experts and heads at 1e-3, routers at router_lr, linear decay."""
    torch.manual_seed(seed)
    loader = DataLoader(ConcatDataset([t.train for t in tasks]), 32, shuffle=True, collate_fn=collate)
    routers = [p for _, branch in model.branches() for p in branch.router.parameters()]
    held = {id(p) for p in routers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    groups = [{"params": others, "lr": 1e-3}, {"params": routers, "lr": router_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    model.train()
    for _ in range(epochs):
        for batch in loader:
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(others, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(model: moa.MoAModel, task: EncodedTask, collate: Collator) -> float:
    """Return the share of right answers on the task's evaluation rows."""
    model.eval()
    right = 0
    for batch in DataLoader(task.eval, 100, collate_fn=collate):
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(task.eval)


def signal_to_noise(model: moa.MoAModel, batch: dict[str, Tensor], draws: int) -> float:
    """Return |mean|² / total variance of the router gradient of one step on one batch."""
    model.train()
    routers = [p for _, branch in model.branches() for p in branch.router.parameters()]
    found = []
    for _ in range(draws):
        model(**batch).loss.backward()
        found.append(torch.cat([p.grad.flatten().clone() for p in routers if p.grad is not None]))
        model.zero_grad()
    grads = torch.stack(found)
    variance = grads.var(0).sum()
    bias = variance / draws  # |mean|² of finite draws carries this much noise
    return float((grads.mean(0).square().sum() - bias) / variance)


def one_run(options: argparse.Namespace, granularity: str, learns: bool, seed: int) -> dict[str, Any]:
    """Return one training's accuracy per task and the signal to noise of its router gradient afterwards."""
    folder = str(options.cache / "all-MiniLM-L6-v2")
    tokenizer, tasks = load_tasks(folder, options.cache / "vader", options.rows, seed)
    collate = Collator(tokenizer)
    model = build(folder, tasks, granularity, seed)
    train(model, tasks, collate, options.epochs, 1e-2 if learns else 0.0, seed)
    scores = {task.name: accuracy(model, task, collate) for task in tasks}
    mixed = [row for task in tasks for row in task.train.select(range(4))]
    return {
        "granularity": granularity,
        "router_learns": learns,
        "seed": seed,
        "accuracy": scores,
        "mean_accuracy": statistics.mean(scores.values()),
        "router_gradient_snr": signal_to_noise(model, collate(mixed), 24),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds: of each setting, and of differences between settings by seed."""
    scores = {(r["granularity"], r["router_learns"], r["seed"]): r["mean_accuracy"] for r in runs}
    values: dict[str, list[float]] = {}
    for (granularity, learns, seed), score in scores.items():
        values.setdefault(f"{granularity}, router {'learns' if learns else 'stays'}", []).append(score)
        if learns and (granularity, False, seed) in scores:
            gain = score - scores[granularity, False, seed]
            values.setdefault(f"{granularity}: learns - stays", []).append(gain)
        if granularity == "token" and ("sequence", learns, seed) in scores:
            gain = score - scores["sequence", learns, seed]
            values.setdefault(f"token - sequence, router {'learns' if learns else 'stays'}", []).append(gain)
    return {
        name: {"mean": statistics.mean(v), "std": statistics.stdev(v) if len(v) > 1 else None, "seeds": len(v)}
        for name, v in values.items()
    }


def main() -> None:
    """Run all of them and write experiments/results/remix_granularity.json after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="what `moa demo --prepare` filled")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for granularity in ("token", "sequence"):
            for learns in (True, False):
                runs.append(one_run(options, granularity, learns, seed))
                print(runs[-1], flush=True)
                setting = {"rows_per_task": options.rows, "epochs": options.epochs}
                write("remix_granularity", {"setting": setting, "summary": summary(runs), "runs": runs}, COMMAND)
    for name, value in summary(runs).items():
        print(f"{name:40s} {value}")


if __name__ == "__main__":
    main()
