"""Train and rank: LoRA per source domain, crossings for the target, LoRA on the target alone, no training."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moa

from .bench import Bench, Settings
from .data import Case, Domain, cases, metrics, popularity

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def lora(bench: Bench, head: bool) -> Any:
    """Return a ranker with one LoRA; head trains the pooler too."""
    options = {"n_experts": 1, "rank": bench.settings.rank, "targets": TARGETS}
    return moa.build(bench.ranker(), "fixed", **options, modules_to_save=["pooler"] if head else [])


def make(bench: Bench, method: str, paths: list[Path]) -> nn.Module:
    """Return a method's untrained ranker; the pooler trains with all of them."""
    if method == "xcross":
        return moa.build(bench.ranker(), "xcross", experts=paths, modules_to_save=["pooler"])
    if method == "lora":
        return lora(bench, head=True)
    ranker = bench.ranker()
    ranker.encoder.requires_grad_(False)
    return ranker


def rates_of(method: str, rate: float | None, head: float) -> dict[str, float]:
    """Return prefix of parameter names -> learning rate."""
    own = {} if rate is None else {"streams." if method == "xcross" else "": rate}
    return {"base.pooler.": head, "pooler.": head, **own}


class Kept:
    """Rows that a run has made, one JSON line each, so that a run cut short goes on where it was."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def get(self, key: dict[str, Any], make_row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a key, made and written only if there is none."""
        for row in self.rows:
            if row.items() >= key.items():
                return row
        started = time.process_time()
        row = {**key, **make_row()}
        row["cpu_s"] = round(time.process_time() - started, 1)
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.say(json.dumps(row))
        return row


def source_adapters(bench: Bench, kept: Kept) -> list[Path]:
    """Train one LoRA per source domain, the pooler left at zero, and return their PEFT folders."""
    settings, paths = bench.settings, []
    for name in settings.sources:
        paths.append(bench.folder / f"adapter-{name}")

        def train(name: str = name, path: Path = paths[-1]) -> dict[str, Any]:
            torch.manual_seed(0)
            domain, model = bench.domain(name), lora(bench, head=False)
            users = domain.train[: settings.source_users]
            bench.train(model, domain, users, "source", settings.source_passes, {"": settings.lr_source})
            tests = cases(domain, domain.valid + domain.test, "valid")
            before, after = (metrics(bench.scores(m, domain, tests), tests) for m in (bench.ranker(), model))
            moa.export_expert(model, 0, path)
            return {"own domain, zero-shot": before, "own domain, adapted": after}

        kept.get({"source": name}, train)
    return paths


def grid(settings: Settings, method: str) -> list[tuple[float | None, float]]:
    """Return the pairs of learning rates tried for a method: its own and the head's."""
    own: tuple[float | None, ...] = {
        "xcross": settings.grid_streams,
        "lora": settings.grid_lora,
        "head": (None,),
    }[method]
    return [(rate, head) for rate in own for head in settings.grid_head]


def tune(bench: Bench, paths: list[Path], kept: Kept) -> dict[str, dict[str, Any]]:
    """Return each method's best learning rates by NDCG@10 of validation users of the target, at one size and seed."""
    settings = bench.settings
    best = {}
    for method in settings.methods:
        tried = []
        for rate, head in grid(settings, method):
            key = {"method": method, "lr": rate, "lr_head": head}

            def one(method: str = method, rate: float | None = rate, head: float = head) -> dict[str, Any]:
                target = bench.domain(settings.target)
                tests = cases(target, target.valid, "valid")
                users = some(target, "tune", settings.tune_users)
                model, _ = fit(bench, method, paths, users, "tune", settings.tune_passes, rates_of(method, rate, head))
                return metrics(bench.scores(model, target, tests), tests)

            tried.append(kept.get(key, one))
        best[method] = max(tried, key=lambda row: row["ndcg@10"])
    return best


def some(domain: Domain, seed: str, size: int) -> list[list[str]]:
    """Return a number of training users; of one seed, the smaller set lies in the larger."""
    order = list(domain.train)
    random.Random(f"{seed} users").shuffle(order)
    return order[:size]


def fit(
    bench: Bench,
    method: str,
    paths: list[Path],
    users: list[list[str]],
    seed: str,
    passes: int,
    rates: dict[str, float],
) -> tuple[nn.Module, int]:
    """Return a method's ranker trained on users of the target, and its number of trained parameters."""
    torch.manual_seed(0)
    model = make(bench, method, paths)
    bench.train(model, bench.domain(bench.settings.target), users, seed, passes, rates)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(
    settings: Settings, folder: Path, say: Callable[[str], None] = print, bench: Bench | None = None
) -> dict[str, Any]:
    """Return every method's Hit@1 and NDCG@10 on the target, for each number of users and seed.

    Args:
        settings: of the run.
        folder: keeps adapters, vectors and rows, apart for other settings; a run that was cut goes on from them.
        say: gets each row as a line.
        bench: in place of the one that settings describe, for tests.
    """
    same = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("sizes", "seeds", "methods")}
    folder = folder / hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    bench = bench or Bench(settings, folder)
    bench.folder = folder
    sources = Kept(folder / "sources.jsonl", say)
    paths = source_adapters(bench, sources)
    tuning = Kept(folder / "tuning.jsonl", say)
    best = tune(bench, paths, tuning)
    kept = Kept(folder / "rows.jsonl", say)
    rows = untrained(bench, paths, kept)
    for seed, size, method in itertools.product(settings.seeds, settings.sizes, settings.methods):

        def one(method: str = method, size: int = size, seed: int = seed) -> dict[str, Any]:
            users = some(bench.domain(settings.target), str(seed), size)
            rates = rates_of(method, best[method]["lr"], best[method]["lr_head"])
            model, trained = fit(bench, method, paths, users, str(seed), settings.passes, rates)
            return {"trainable": trained, **tested(bench, model)}

        rows.append(kept.get({"method": method, "users": size, "seed": seed}, one))
    return {
        "settings": dataclasses.asdict(settings),
        "sources": sources.rows,
        "tuning": {"chosen": best, "tried": tuning.rows},
        "rows": rows,
    }


def tested(bench: Bench, model: nn.Module) -> dict[str, float]:
    """Return Hit@1 and NDCG@10 on the target's test users."""
    target, tests = test_cases(bench)
    return metrics(bench.scores(model, target, tests), tests)


def test_cases(bench: Bench) -> tuple[Domain, list[Case]]:
    """Return the target and a case for each of its test users, the same ones for every method and seed."""
    target = bench.domain(bench.settings.target)
    return target, cases(target, target.test, "test")


def untrained(bench: Bench, paths: list[Path], kept: Kept) -> list[dict[str, Any]]:
    """Return the rows that nothing of the target is trained for."""

    def of(scores: Tensor) -> dict[str, Any]:
        return {"trainable": 0, **metrics(scores, test_cases(bench)[1])}

    rows = [kept.get({"method": "popularity", "users": 0}, lambda: of(popularity(*test_cases(bench))))]
    models: dict[str, Callable[[], nn.Module]] = {"zero-shot": bench.ranker}
    for name, path in zip(bench.settings.sources, paths, strict=True):
        models[f"adapter of {name}"] = lambda path=path: moa.build(bench.ranker(), "xcross", experts=[path])  # type: ignore[misc]
    models["xcross, untrained"] = lambda: moa.build(bench.ranker(), "xcross", experts=paths)
    for name, build in models.items():
        row = {"method": name, "users": 0}
        rows.append(kept.get(row, lambda build=build: of(bench.scores(build(), *test_cases(bench)))))  # type: ignore[misc]
    return rows


def summary(result: dict[str, Any]) -> str:
    """Return a table: method and users against mean and standard deviation over seeds."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["method"], row["users"]), []).append(row)
    lines = [f"{'method':<22} {'users':>5} {'trainable':>9}  {'Hit@1':>13}  {'NDCG@10':>13}  seeds"]
    for (method, users), own in groups.items():
        cells = []
        for key in ("hit@1", "ndcg@10"):
            values = torch.tensor([row[key] for row in own], dtype=torch.float64)
            spread = f" ± {values.std():.3f}" if len(own) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        lines.append(f"{method:<22} {users:>5} {own[0]['trainable']:>9,}  {cells[0]:>13}  {cells[1]:>13}  {len(own)}")
    return "\n".join(lines)
