"""The demo's comparison: LoRA, a LoRA that is told the task in words, and three mixtures, in two settings.

In one setting the tasks go together, each with a head of its own. In the other two tasks give the same texts different
labels under one head: where they differ, only who knows the task can be right. Every arm has the same layers, rows,
steps, adapter parameters (but for the routers) and the same grid of learning rates:
`python -m experiments.demo_tuning` picked the rates below on rows that are not scored here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from ..model.build import build
from ..model.heads import MultiTaskForSequenceClassification
from ..model.moa_model import MoAModel
from ..monitor.statistics import LayerLoad, RoutingStatistics
from .collate import Collator
from .encode import EncodedTask, encode_rows
from .evaluation_trace import EvaluationTrace
from .run_model import load_tokenizer
from .table_files import Rows
from .task_rows import read_tasks
from .tasks import Task

BASE = "all-MiniLM-L6-v2"
BLOCKS = 3  # of MiniLM's six, the first ones: half the time
MAX_LENGTH = 24
EPOCHS, BATCH, WARM_UP = 3, 16, 0.1
SCORED = 150  # evaluation rows a task
CHUNK = 50
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Setting:
    """Tasks that one model learns together.

    Args:
        name: short.
        about: what is special about the tasks.
        tasks: task -> where its rows are in the demo's cache, and the column of their labels.
        rows: training rows of each task.
        one_head: all tasks share one output, else each has its own.
    """

    name: str
    about: str
    tasks: Mapping[str, tuple[str, str]]
    rows: int
    one_head: bool = False


SETTINGS = (
    Setting(
        "A",
        "tasks that go together: three tasks, a head each",
        {
            "tweets": ("vader/tweets", "label"),
            "amazon": ("vader/amazon", "label"),
            "sarcasm": ("sarcasm/sarcasm", "label"),
        },
        100,
    ),
    Setting(
        "B",
        "tasks that contradict each other: two readers call the same tweets good or not, one output for both",
        {"lenient": ("readers/tweets", "lenient"), "strict": ("readers/tweets", "strict")},
        150,
        one_head=True,
    ),
)


@dataclass(frozen=True)
class Arm:
    """One way to adapt the model.

    Args:
        name: as shown.
        recipe: router and keywords.
        told: the task's name stands before each text.
        by_task: the router wants the number of tasks.
    """

    name: str
    recipe: Mapping[str, Any]
    told: bool = False
    by_task: bool = False


LORA = {"router": "fixed", "n_experts": 1, "rank": 64, "alpha": 128}
EXPERTS = {"n_experts": 8, "rank": 8}
ARMS = (
    Arm("LoRA", LORA),
    Arm("LoRA, told", LORA, told=True),
    Arm("poly", {"router": "poly", **EXPERTS, "alpha": 16}, by_task=True),
    Arm("topk", {"router": "topk", **EXPERTS, "k": 2}),
    Arm("remix", {"router": "remix", **EXPERTS, "k": 2, "targets": "all-linear"}),
)
# setting -> arm -> learning rate, as experiments/results/demo_tuning.json has it
RATES: dict[str, dict[str, float]] = {
    "A": {"LoRA": 1e-3, "LoRA, told": 3e-3, "poly": 3e-3, "topk": 3e-3, "remix": 3e-3},
    "B": {"LoRA": 1e-3, "LoRA, told": 1e-3, "poly": 3e-3, "topk": 3e-3, "remix": 1e-2},
}


@dataclass(frozen=True)
class Outcome:
    """What one training of one arm came to.

    Args:
        right: task -> (n,) 1 where the model's answer is right, 0 elsewhere.
        routing: layer -> how its experts were used, by task.
        seconds: of training.
        parameters: of adapters and routers.
    """

    right: dict[str, np.ndarray]
    routing: Mapping[str, LayerLoad]
    seconds: float
    parameters: int


class Comparison:
    """Trains and scores arms on the tasks of the demo's cache.

    Args:
        cache: folder that `moa.runs.demo.prepare` filled.
        held_out: score training rows that were not trained on, instead of the evaluation rows: for picking rates.
    """

    def __init__(self, cache: Path, held_out: bool = False) -> None:
        self.cache, self.held_out = cache, held_out
        self.tokenizer = load_tokenizer(str(cache / BASE))
        self.collator = Collator(self.tokenizer)

    def tasks(self, setting: Setting, told: bool, seed: int) -> list[EncodedTask]:
        """Return a setting's tasks as token ids.

        Args:
            setting: which one.
            told: the task's name stands before each text.
            seed: of the draw of training rows; the rows that are scored are the same for all seeds, unless held_out.
        """
        taken = setting.rows + (SCORED if self.held_out else 0)
        sources = {name: self._source(*where, taken) for name, where in setting.tasks.items()}
        drawn = read_tasks(sources, seed)
        fixed = read_tasks(sources, 0)
        rows = []
        for mine, same in zip(drawn, fixed, strict=True):
            train = mine.train.select(range(setting.rows))
            scored = mine.train.select(range(setting.rows, taken)) if self.held_out else same.eval
            if told:
                train, scored = (_told(part, mine.name) for part in (train, scored))
            rows.append(dataclasses.replace(mine, train=train, eval=scored))
        return [_sorted(task) for task in encode_rows(rows, self.tokenizer, MAX_LENGTH)]

    def _source(self, stem: str, label: str, rows: int) -> Task:
        train, scored = (str(self.cache / f"{stem}.{side}.jsonl") for side in ("train", "eval"))
        return Task(train=train, eval=scored, label=label, max_train_rows=rows, max_eval_rows=SCORED)

    def outcome(self, setting: Setting, arm: Arm, learning_rate: float, seed: int) -> Outcome:
        """Return what one training of one arm comes to.

        Args:
            setting: whose tasks are learned together.
            arm: what is trained.
            learning_rate: at the end of the warm-up, of all but routers that have their own.
            seed: of rows, order and weights.
        """
        tasks = self.tasks(setting, arm.told, seed)
        torch.manual_seed(seed)
        labels = {task.name: task.labels for task in tasks}
        base = MultiTaskForSequenceClassification.from_encoder(
            str(self.cache / BASE), labels, one_head=setting.one_head, num_hidden_layers=BLOCKS
        )
        sizes = {"n_tasks": len(tasks)} if arm.by_task else {}
        model = build(base, **{**arm.recipe, **sizes})
        started = time.monotonic()
        fit(model, model.optimizer_groups(learning_rate), tasks, self.collator)
        seconds = time.monotonic() - started
        statistics = RoutingStatistics(n_tasks=len(tasks))
        right = self._score(model, tasks, statistics)
        parameters = sum(p.numel() for _, branch in model.branches() for p in branch.parameters())
        return Outcome(right, statistics.summary(), seconds, parameters)

    @torch.no_grad()
    def _score(
        self, model: MoAModel, tasks: Sequence[EncodedTask], statistics: RoutingStatistics
    ) -> dict[str, np.ndarray]:
        model.eval()
        model.context.trace = EvaluationTrace(model, statistics)
        try:
            return {task.name: np.concatenate(list(self._right(model, task))) for task in tasks}
        finally:
            model.context.trace = None

    def _right(self, model: MoAModel, task: EncodedTask) -> Iterator[np.ndarray]:
        for batch in DataLoader(task.eval, CHUNK, collate_fn=self.collator):
            yield (model(**batch).logits.argmax(-1) == batch["labels"]).double().numpy()


def fit(model: nn.Module, groups: list[dict[str, Any]], tasks: Sequence[EncodedTask], collator: Collator) -> int:
    """Train a model in place on its tasks together and return the optimizer steps that it took.

    AdamW with a linear warm-up and decay; gradients are clipped to a norm of 1.

    Args:
        model: whose loss () is that of a batch.
        groups: of AdamW's parameters.
        tasks: with their training rows.
        collator: makes batches (B, S) of rows.
    """
    rows: Any = ConcatDataset([task.train for task in tasks])
    loader: Any = DataLoader(rows, BATCH, shuffle=True, collate_fn=collator)
    total = EPOCHS * len(loader)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARM_UP * total)) * (1 - step / total)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for _ in range(EPOCHS):
        for batch in loader:
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return total


def _told(rows: Rows, task: str) -> Rows:
    """Return rows with the task's name before each text."""
    texts = [f"{task}: {text}" for text in rows.columns["text"]]
    return dataclasses.replace(rows, columns={**rows.columns, "text": texts})


def _sorted(task: EncodedTask) -> EncodedTask:
    """Return the task with its evaluation rows by their place in the file's draw, the shortest first: less padding."""
    lengths = [len(ids) for ids in task.eval["input_ids"][:]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return dataclasses.replace(task, eval=task.eval.select(order))


def distance_between_tasks(routing: Mapping[str, LayerLoad]) -> float:
    """Return how differently tasks are routed, from 0 to 1: ½ Σ_e |load_e - load'_e|, meaned over pairs and layers."""
    found = []
    for layer in routing.values():
        loads = list(layer.by_task.values())
        found += [0.5 * float((one - other).abs().sum()) for one, other in pairwise(loads)]
    return float(np.mean(found)) if found else 0.0
