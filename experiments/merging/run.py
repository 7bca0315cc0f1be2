"""Tune each kind on a seed of its own, then train, merge and score on the others. What is done is not done again."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moa.model.heads import MultiTaskForSequenceClassification

from .adapters import KINDS, Adapter, take, train
from .data import TaskRows, accuracy, below, load, upper
from .merges import changed, merged, merges_of, scaled

TUNING_SEED = 1000
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Args:
        tasks: names.
        seeds: one run each: other rows, starts, orders.
        layers: last layers of the encoder that get adapters, on all their linears.
        train_rows: per task.
        validation_rows: per task.
        test_rows: per task.
        length: tokens per row at most.
        epochs: passes over the training rows.
        size: rows per batch.
        rates: learning rates tried for each kind.
        scales: λ tried for each kind and merge that has one.
        head_rate: learning rate of the heads beside an adapter.
        probe_rate: of a head alone.
    """

    tasks: tuple[str, ...] = ("sarcasm", "tweets", "amazon", "movie")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    layers: int = 2
    train_rows: int = 600
    validation_rows: int = 150
    test_rows: int = 300
    length: int = 24
    epochs: int = 2
    size: int = 16
    rates: tuple[float, ...] = (7e-4, 2e-3, 6e-3, 1.8e-2)
    scales: tuple[float, ...] = (0.3, 0.6, 1.0, 1.5)
    head_rate: float = 2e-3
    probe_rate: float = 1e-2


class Bench:
    """The rows of one seed, and the base's upper layers with fresh heads.

    Args:
        settings: of the run.
        model: folder of the encoder.
        cache: folder of the tasks.
        seed: of the rows, starts and orders.
    """

    def __init__(self, settings: Settings, model: str, cache: Path, seed: int) -> None:
        self.settings, self.seed = settings, seed
        sizes = (settings.train_rows, settings.validation_rows, settings.test_rows)
        tasks = load(model, cache, settings.tasks, sizes, settings.length, seed)
        torch.manual_seed(seed)
        base = MultiTaskForSequenceClassification.from_encoder(model, {task.name: task.labels for task in tasks})
        self.tasks: list[TaskRows] = below(base, settings.layers, tasks)
        self.base = upper(base, settings.layers)

    def train(self, kind: str | None, task: int, rate: float) -> Any:
        """Return the model trained on one task: an adapter of a kind with its head, or the head alone."""
        s = self.settings
        return train(
            self.base,
            kind,
            task,
            self.tasks[task].train,
            rate=rate,
            head_rate=s.probe_rate if kind is None else s.head_rate,
            epochs=s.epochs,
            size=s.size,
            seed=self.seed,
        )

    def score(self, adapters: Sequence[Adapter], merge: str, scale: float, part: str) -> dict[str, float]:
        """Return each task's accuracy on a part of its rows under a merge of the adapters."""
        with changed(self.base, merged(adapters, merge, scale, self.seed), adapters) as model:
            return {task.name: accuracy(model, getattr(task, part)) for task in self.tasks}


def tune(bench: Bench, kind: str) -> Row:
    """Return the learning rate of a kind and the λ of its merges: best mean accuracy on the validation rows."""
    tried, kept = {}, {}
    for rate in bench.settings.rates:
        models = [bench.train(kind, task, rate) for task in range(len(bench.tasks))]
        tried[rate] = _mean([accuracy(m, t.validation) for m, t in zip(models, bench.tasks, strict=True)])
        kept[rate] = [take(m, task) for task, m in enumerate(models)]
    rate = max(tried, key=lambda r: tried[r])
    scales: dict[str, dict[str, float]] = {
        merge: {
            str(scale): _mean(bench.score(kept[rate], merge, scale, "validation").values())
            for scale in bench.settings.scales
        }
        for merge in merges_of(kind)
        if scaled(merge)
    }
    best = {merge: float(max(own, key=lambda s: own[s])) for merge, own in scales.items()}
    return {"rate": rate, "rates_tried": {str(r): a for r, a in tried.items()}, "scale": best, "scales_tried": scales}


def compare(bench: Bench, kind: str, tuned: Row) -> Row:
    """Return each task's test accuracy with its own adapter alone, and under every merge of the tasks' adapters."""
    before, adapters = {}, []
    for number, task in enumerate(bench.tasks):
        model = bench.train(kind, number, tuned["rate"])
        before[task.name] = accuracy(model, task.test)
        adapters.append(take(model, number))
    row: Row = {"before": before}
    if kind.startswith("flylora"):  # what dropping the top-k costs by itself
        row["before_dense"] = {}
        for task, adapter in zip(bench.tasks, adapters, strict=True):
            same_heads = [adapter] * len(bench.tasks)
            with changed(bench.base, merged([adapter], "average"), same_heads) as model:
                row["before_dense"][task.name] = accuracy(model, task.test)
    row["after"] = {
        merge: bench.score(adapters, merge, tuned["scale"].get(merge, 1.0), "test") for merge in merges_of(kind)
    }
    return row


class Log:
    """Rows of finished work in a file, one JSON object a line: what is there is not made again.

    Args:
        path: the file; made when the first row is written.
        settings: stored with each row; rows of other settings are not read. Seeds may differ.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        values = dataclasses.asdict(settings) | {"seeds": None}
        self.settings = json.loads(json.dumps(values))

    def rows(self) -> list[Row]:
        """Return the rows made with these settings."""
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [row["row"] for row in found if row["settings"] == self.settings]

    def once(self, key: Mapping[str, Any], make: Callable[[], Row], say: Callable[[str], None]) -> Row:
        """Return the row of a key: from the file, or made, timed and written to it."""
        for row in self.rows():
            if all(row.get(name) == value for name, value in key.items()):
                return row
        started = time.process_time()
        made = {**key, **make()}
        made["cpu_s"] = round(time.process_time() - started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"settings": self.settings, "row": made}) + "\n")
        say(json.dumps(made))
        return made


def run(settings: Settings, model: str, cache: Path, log: Log, say: Callable[[str], None] = print) -> list[Row]:
    """Do all of it, or what is left of it, and return the rows: tuned per kind, compared per seed and kind."""
    benches: dict[int, Bench] = {}

    def bench(seed: int) -> Bench:
        if seed not in benches:
            benches.clear()  # the rows of one seed at a time
            benches[seed] = Bench(settings, model, cache, seed)
        return benches[seed]

    def probe(seed: int) -> Row:
        own = bench(seed)
        return {"head_alone": {t.name: accuracy(own.train(None, i, 0.0), t.test) for i, t in enumerate(own.tasks)}}

    tuned = {
        kind: log.once({"phase": "tune", "kind": kind}, lambda k=kind: tune(bench(TUNING_SEED), k), say)  # type: ignore
        for kind in KINDS
    }
    rows = list(tuned.values())
    for seed in settings.seeds:
        rows.append(log.once({"phase": "probe", "seed": seed}, lambda s=seed: probe(s), say))  # type: ignore[misc]
        for kind in KINDS:
            key = {"phase": "compare", "seed": seed, "kind": kind}
            rows.append(log.once(key, lambda s=seed, k=kind: compare(bench(s), k, tuned[k]), say))  # type: ignore[misc]
    return rows


def _mean(values: Any) -> float:
    return statistics.mean(values)
