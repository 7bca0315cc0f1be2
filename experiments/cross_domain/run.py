"""Train and rank: LoRA per source domain, crossings for the target, LoRA on the target alone, no training."""

from __future__ import annotations

import copy
import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import moa
from moa.candidates import CandidateRanker

from .data import Case, Domain, cases, load, metrics, popularity


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Args:
        model: folder or hub id of an encoder.
        data: folder of the five domains.
        sources: domains whose adapters exist.
        target: domain to learn.
        sizes: numbers of target users to learn from.
        seeds: one run each: other users, negatives and order.
        source_users: users behind each source adapter.
        n_test: target users ranked for.
        rank: of every LoRA.
        length: tokens of a history.
        batch: users per step.
        passes: users seen in training, in all: max(1, passes // n_users) epochs, at most max_epochs.
        source_passes: the same for the source adapters.
        max_epochs: see passes.
        lr_lora: learning rate of LoRA.
        lr_streams: learning rate of the crossings and stream weights.
        lr_head: learning rate of the pooler.
    """

    model: str
    data: str
    sources: tuple[str, ...] = ("office", "industrial", "food")
    target: str = "toys"
    sizes: tuple[int, ...] = (50, 100, 500, 1000)
    seeds: tuple[int, ...] = (0, 1, 2)
    source_users: int = 1500
    n_test: int = 500
    rank: int = 8
    length: int = 64
    batch: int = 25
    passes: int = 2000
    source_passes: int = 6000
    max_epochs: int = 10
    lr_lora: float = 1e-3
    lr_streams: float = 1e-4
    lr_head: float = 1e-4


class Bench:
    """The encoder, the tokeniser and every item's vector from the frozen encoder."""

    def __init__(self, settings: Settings, encoder: nn.Module | None = None, tokenizer: Any = None) -> None:
        self.settings = settings
        self.encoder = encoder if encoder is not None else AutoModel.from_pretrained(settings.model)
        self.encoder.eval()
        self.tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(settings.model)
        self.vectors: dict[str, dict[str, Tensor]] = {}

    def domain(self, name: str) -> Domain:
        """Return a domain, its items encoded once."""
        domain = load(Path(self.settings.data), name, self.settings.n_test)
        if name not in self.vectors:
            ids = sorted(domain.texts, key=lambda item: len(domain.texts[item]))  # little padding
            ranker = CandidateRanker(self.encoder)
            rows = []
            with torch.no_grad():
                for start in range(0, len(ids), 128):
                    rows.append(ranker.encode(**self.tokens([domain.texts[i] for i in ids[start : start + 128]])))
            self.vectors[name] = dict(zip(ids, torch.cat(rows), strict=True))
        return domain

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, S)."""
        options = {"padding": True, "truncation": True, "max_length": self.settings.length, "return_tensors": "pt"}
        encoded = self.tokenizer(list(texts), **options)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def batch(self, domain: Domain, rows: Sequence[Case]) -> dict[str, Tensor]:
        """Return the ranker's inputs: histories latest first, candidates (B, C, d), the positive's place (B,)."""
        texts = ["; ".join(domain.texts[item] for item in reversed(case.history)) for case in rows]
        own = self.vectors[domain.name]
        candidates = torch.stack([torch.stack([own[item] for item in case.candidates]) for case in rows])
        return {**self.tokens(texts), "candidates": candidates, "labels": torch.tensor([c.label for c in rows])}

    def ranker(self) -> CandidateRanker:
        """Return a ranker over a fresh copy of the encoder."""
        return CandidateRanker(copy.deepcopy(self.encoder))

    def scores(self, model: nn.Module, domain: Domain, tests: Sequence[Case]) -> Tensor:
        """Return a model's scores (T, C)."""
        model.eval()
        out = []
        with torch.no_grad():
            for start in range(0, len(tests), 100):
                out.append(model(**self.batch(domain, tests[start : start + 100]))["logits"])
        return torch.cat(out)

    def train(self, model: Any, domain: Domain, users: list[list[str]], seed: str, passes: int) -> int:
        """Train on the users' last purchase, the negatives drawn anew each epoch; return the number of steps."""
        settings = self.settings
        epochs = min(settings.max_epochs, max(1, passes // len(users)))
        total = epochs * -(-len(users) // settings.batch)
        optimizer = torch.optim.AdamW(groups_of(model, settings), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.05, 1 - step / total))
        model.train()
        for epoch in range(epochs):
            rows = cases(domain, users, f"{seed} epoch {epoch}")
            random.Random(f"{seed} order {epoch}").shuffle(rows)
            for start in range(0, len(rows), settings.batch):
                model(**self.batch(domain, rows[start : start + settings.batch]))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return total


TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def lora(bench: Bench, head: bool) -> Any:
    """Return a ranker with one LoRA; head trains the pooler too."""
    options = {"n_experts": 1, "rank": bench.settings.rank, "targets": TARGETS}
    return moa.build(bench.ranker(), "fixed", **options, modules_to_save=["pooler"] if head else [])


def groups_of(model: Any, settings: Settings) -> list[dict[str, Any]]:
    """Return parameter groups: the pooler, the streams, the LoRAs."""
    rates = {"base.pooler.": settings.lr_head, "streams.": settings.lr_streams, "": settings.lr_lora}
    groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next(prefix for prefix in rates if name.startswith(prefix))].append(parameter)
    return [{"params": own, "lr": rates[prefix]} for prefix, own in groups.items() if own]


def source_adapters(bench: Bench, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Train one LoRA per source domain and return their PEFT folders."""
    paths = []
    for name in bench.settings.sources:
        domain = bench.domain(name)
        model = lora(bench, head=False)
        started = time.time()
        users = domain.train[: bench.settings.source_users]
        bench.train(model, domain, users, "source", bench.settings.source_passes)
        tests = cases(domain, domain.test, "test")
        before, after = (metrics(bench.scores(m, domain, tests), tests) for m in (bench.ranker(), model))
        say(f"source {name}: {before} -> {after} in {time.time() - started:.0f} s")
        paths.append(moa.export_expert(model, 0, folder / name))
    return paths


def run(settings: Settings, say: Callable[[str], None] = print, bench: Bench | None = None) -> dict[str, Any]:
    """Return every method's Hit@1 and NDCG@10 on the target, for each number of users and seed."""
    torch.manual_seed(0)
    bench = bench or Bench(settings)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = source_adapters(bench, Path(folder), say)
        target = bench.domain(settings.target)
        tests = cases(target, target.test, "test")

        def note(method: str, size: int, seed: int | None, scores: Tensor, parameters: int, seconds: float) -> None:
            row = {"method": method, "users": size, "seed": seed, **metrics(scores, tests)}
            rows.append({**row, "trainable": parameters, "seconds": round(seconds, 1)})
            say(str(rows[-1]))

        note("popularity", 0, None, popularity(target, tests), 0, 0)
        note("zero-shot", 0, None, bench.scores(bench.ranker(), target, tests), 0, 0)
        mean = moa.build(bench.ranker(), "xcross", experts=paths)
        note("mean of the sources' streams, no training", 0, None, bench.scores(mean, target, tests), 0, 0)
        for seed in settings.seeds:
            order = list(target.train)
            random.Random(f"{seed} users").shuffle(order)
            for size in settings.sizes:
                for method in ("xcross", "lora"):
                    torch.manual_seed(seed)
                    if method == "xcross":
                        model = moa.build(bench.ranker(), "xcross", experts=paths, modules_to_save=["pooler"])
                    else:
                        model = lora(bench, head=True)
                    started = time.time()
                    bench.train(model, target, order[:size], str(seed), settings.passes)
                    seconds = time.time() - started
                    parameters = model.get_nb_trainable_parameters()[0]
                    note(method, size, seed, bench.scores(model, target, tests), parameters, seconds)
    return {"settings": dataclasses.asdict(settings), "rows": rows}


def summary(result: dict[str, Any]) -> str:
    """Return a table: method and users against mean and standard deviation over seeds."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["method"], row["users"]), []).append(row)
    lines = [f"{'method':<42} {'users':>5} {'trainable':>9}  {'Hit@1':>13}  {'NDCG@10':>13}  seeds"]
    for (method, users), own in groups.items():
        cells = []
        for key in ("hit@1", "ndcg@10"):
            values = torch.tensor([row[key] for row in own], dtype=torch.float64)
            spread = f" ± {values.std():.3f}" if len(own) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        lines.append(f"{method:<42} {users:>5} {own[0]['trainable']:>9,}  {cells[0]:>13}  {cells[1]:>13}  {len(own)}")
    return "\n".join(lines)
