"""Should ReMix decide per token or per sequence? Accuracy, and the noise of the router's gradient, on real tasks.

all-MiniLM-L6-v2 with 8 experts of rank 8, k = 2, on the four sentiment domains of the demo, in two settings: "alike",
the domains as they are, each with its head, and "opposed", where all share one head and two of them (movie, nyt) have
their labels turned round: which expert is right then depends on the domain, and the text alone tells it. Each
granularity is trained with the same data, steps, draws and seeds, once with its router learning and once with the
router's learning rate at zero: the difference, seed by seed, is what reinforcement adds. Signal to noise is
|mean|² / variance of one step's router gradient, over repeated draws on one batch after training.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
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
from moa.model.heads import MultiTaskForSequenceClassification
from moa.runs.collate import Collator
from moa.runs.demo import cache_folder
from moa.runs.encode import EncodedTask, encode_tasks
from moa.runs.tasks import Task

COMMAND = "python -m experiments.remix.granularity"
DOMAINS = ("tweets", "amazon", "movie", "nyt")
TURNED = ("movie", "nyt")


def load_tasks(model: str, data: Path, rows: int, setting: str, seed: int) -> tuple[Any, list[EncodedTask]]:
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
    encoded = encode_tasks(tasks, tokenizer, 24, seed)
    return tokenizer, encoded if setting == "alike" else [opposed(task) for task in encoded]


def opposed(task: EncodedTask) -> EncodedTask:
    """Return the task for one head that all share, its labels turned round where the domain is one of TURNED."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        return {"labels": 1 - row["labels"] if task.name in TURNED else row["labels"], "task_ids": 0}

    return dataclasses.replace(task, train=task.train.map(change), eval=task.eval.map(change))


def build(model: str, tasks: list[EncodedTask], setting: str, granularity: str, seed: int) -> moa.MoAModel:
    """Return a fresh mixture."""
    torch.manual_seed(seed)
    heads = {task.name: task.labels for task in (tasks if setting == "alike" else tasks[:1])}
    base = MultiTaskForSequenceClassification.from_encoder(model, heads)
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


def one_run(options: argparse.Namespace, setting: str, granularity: str, learns: bool, seed: int) -> dict[str, Any]:
    """Return one training's accuracy per task and the signal to noise of its router gradient afterwards."""
    folder = str(options.cache / "all-MiniLM-L6-v2")
    tokenizer, tasks = load_tasks(folder, options.cache / "vader", options.rows, setting, seed)
    collate = Collator(tokenizer)
    model = build(folder, tasks, setting, granularity, seed)
    train(model, tasks, collate, options.epochs, options.router_lr if learns else 0.0, seed)
    scores = {task.name: accuracy(model, task, collate) for task in tasks}
    mixed = [row for task in tasks for row in task.train.select(range(4))]
    return {
        "setting": setting,
        "granularity": granularity,
        "router_learns": learns,
        "seed": seed,
        "accuracy": scores,
        "mean_accuracy": statistics.mean(scores.values()),
        "router_gradient_snr": signal_to_noise(model, collate(mixed), 64),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds: of each kind of run, and of differences between kinds by seed."""
    found: dict[str, list[float]] = {}
    for setting, seed in dict.fromkeys((run["setting"], run["seed"]) for run in runs):
        here = [run for run in runs if (run["setting"], run["seed"]) == (setting, seed)]
        score = {(run["granularity"], run["router_learns"]): run["mean_accuracy"] for run in here}
        for run in here:
            kind = f"{setting}: {run['granularity']}, router {'learns' if run['router_learns'] else 'stays'}"
            found.setdefault(kind, []).append(run["mean_accuracy"])
            found.setdefault(f"{kind}: signal to noise", []).append(run["router_gradient_snr"])
        for one, other, label in (
            (("token", True), ("token", False), "token: learns - stays"),
            (("sequence", True), ("sequence", False), "sequence: learns - stays"),
            (("sequence", True), ("token", True), "sequence - token, routers learn"),
        ):
            if one in score and other in score:
                found.setdefault(f"{setting}: {label}", []).append(score[one] - score[other])
    return {
        name: {"mean": statistics.mean(v), "std": statistics.stdev(v) if len(v) > 1 else None, "seeds": len(v)}
        for name, v in found.items()
    }


def main() -> None:
    """Run what the result file does not hold yet and write experiments/results/remix_granularity.json after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="what `moa demo --prepare` filled")
    parser.add_argument("--work", type=Path, default=Path("runs/granularity"), help="finished runs, to go on from")
    parser.add_argument("--settings", nargs="+", choices=("alike", "opposed"), default=["opposed"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=400, help="training rows of each domain")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--router-lr", type=float, default=1e-2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    size = {"rows_per_task": options.rows, "epochs": options.epochs, "router_lr": options.router_lr}
    options.work.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    kinds = itertools.product(range(options.seeds), options.settings, ("token", "sequence"), (True, False))
    for seed, setting, granularity, learns in kinds:
        name = "-".join(map(str, (setting, granularity, learns, seed, *size.values())))
        done = options.work / f"{name}.json"
        if not done.exists():
            run = one_run(options, setting, granularity, learns, seed)
            print(run, flush=True)
            done.write_text(json.dumps(run))
        runs.append(json.loads(done.read_text()))
        write("remix_granularity", {"size": size, "summary": summary(runs), "runs": runs}, COMMAND)
    for name, value in summary(runs).items():
        print(f"{name:50s} {value}")


if __name__ == "__main__":
    main()
