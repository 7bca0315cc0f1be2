"""What every method of the experiment shares: settings, encoder, batches, training, scores."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from experiments.cross_domain.candidates import CandidateRanker

from .data import Case, Domain, cases, load, text_of


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
        methods: of "xcross" (crossings over frozen source adapters), "lora" (one on the target alone) and "head"; the
            pooler is trained with each of them, and alone in the last.
        n_test: users of each domain ranked for in the end.
        n_valid: users of each domain by which learning rates are chosen.
        rank: of every LoRA.
        length: tokens of a history.
        item_length: tokens of an item.
        temperature: of the scores. About where the untrained encoder's own loss is least: at 20, its usual one, it is
            above that of equal scores, and training spends itself on lowering confidence instead of on the order.
        batch: users per step.
        candidates: in training, the positive among them; their vectors are frozen, so that many cost little.
        passes: users seen in training, in all: max(1, passes // n_users) epochs, at most max_epochs.
        max_epochs: see passes.
        source_users: users behind each source adapter.
        source_passes: as passes, for the source adapters.
        lr_source: learning rate of the source adapters.
        grid_lora: learning rates tried for LoRA.
        grid_streams: learning rates tried for the crossings and the streams' weights, as many as for LoRA.
        grid_head: learning rates tried for the pooler, the same with every method.
        tune_users: target users learnt from while choosing.
        tune_passes: as passes, while choosing.
    """

    model: str
    data: str
    sources: tuple[str, ...] = ("office", "industrial", "food")
    target: str = "toys"
    sizes: tuple[int, ...] = (50, 100, 500, 1000)
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("xcross", "lora", "head")
    n_test: int = 200
    n_valid: int = 200
    rank: int = 8
    length: int = 48
    item_length: int = 64
    temperature: float = 7.0
    batch: int = 25
    candidates: int = 200
    passes: int = 500
    max_epochs: int = 4
    source_users: int = 800
    source_passes: int = 800
    lr_source: float = 3e-4
    grid_lora: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    grid_streams: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    grid_head: tuple[float, ...] = (1e-4, 1e-3)
    tune_users: int = 200
    tune_passes: int = 200


class Bench:
    """The encoder without dropout, the tokeniser, and every item's vector from the frozen encoder.

    Args:
        settings: of the run.
        folder: keeps the items' vectors between runs.
        encoder, tokenizer: in place of those of settings.model.
    """

    def __init__(
        self, settings: Settings, folder: Path, encoder: nn.Module | None = None, tokenizer: Any = None
    ) -> None:
        self.settings, self.folder = settings, folder
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the runs are short
        self.encoder = encoder if encoder is not None else AutoModel.from_pretrained(settings.model, **none)
        self.encoder.eval()
        self.tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(settings.model)
        self.vectors: dict[str, tuple[Tensor, dict[str, int]]] = {}  # (N, d), and each item's row

    def domain(self, name: str) -> Domain:
        """Return a domain, its items encoded once."""
        domain = load(Path(self.settings.data), name, self.settings.n_test, self.settings.n_valid)
        if name not in self.vectors:
            ids = sorted(domain.texts, key=lambda item: (len(domain.texts[item]), item))  # little padding
            kept = self.folder / f"{name}.safetensors"
            if not kept.exists():
                ranker = CandidateRanker(self.encoder)
                rows = []
                with torch.no_grad():
                    for start in range(0, len(ids), 64):
                        texts = [domain.texts[i] for i in ids[start : start + 64]]
                        rows.append(ranker.encode(**self.tokens(texts, self.settings.item_length)))
                save_file({"vectors": torch.cat(rows)}, kept)
            self.vectors[name] = load_file(kept)["vectors"], {item: row for row, item in enumerate(ids)}
        return domain

    def tokens(self, texts: Sequence[str], length: int) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, S), S at most length."""
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        encoded = self.tokenizer(list(texts), **options)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def batch(self, domain: Domain, rows: Sequence[Case]) -> dict[str, Tensor]:
        """Return the ranker's inputs: histories, candidates (B, C, d), the positive's place (B,)."""
        vectors, row_of = self.vectors[domain.name]
        candidates = vectors[torch.tensor([[row_of[item] for item in case.candidates] for case in rows])]
        texts = self.tokens([text_of(domain, case) for case in rows], self.settings.length)
        return {**texts, "candidates": candidates, "labels": torch.tensor([c.label for c in rows])}

    def ranker(self) -> CandidateRanker:
        """Return a ranker over a fresh copy of the encoder."""
        return CandidateRanker(copy.deepcopy(self.encoder), temperature=self.settings.temperature)

    def scores(self, model: nn.Module, domain: Domain, tests: Sequence[Case]) -> Tensor:
        """Return a model's scores (T, C)."""
        model.eval()
        order = sorted(range(len(tests)), key=lambda i: len(text_of(domain, tests[i])))
        out = []
        with torch.no_grad():
            for start in range(0, len(order), 50):
                out.append(model(**self.batch(domain, [tests[i] for i in order[start : start + 50]]))["logits"])
        scores = torch.cat(out)
        return torch.empty_like(scores).index_copy_(0, torch.tensor(order), scores)

    def train(
        self, model: Any, domain: Domain, users: list[list[str]], seed: str, passes: int, rates: dict[str, float]
    ) -> None:
        """Train on the users' last purchase, the negatives drawn anew each epoch.

        Args:
            model: a ranker.
            domain: of the users.
            users: to learn from.
            seed: of negatives and order.
            passes: users seen, in all.
            rates: prefix of parameter names -> learning rate; the first that fits counts. Everything trained has one.
        """
        settings = self.settings
        epochs = min(settings.max_epochs, max(1, passes // len(users)))
        total = epochs * -(-len(users) // settings.batch)
        optimizer = torch.optim.AdamW(groups_of(model, rates), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.05, 1 - step / total))
        model.train()
        for epoch in range(epochs):
            n_candidates = min(settings.candidates, len(domain.texts) // 2)
            rows = cases(domain, users, f"{seed} epoch {epoch}", n_candidates)
            for batch in batches(domain, rows, settings.batch, random.Random(f"{seed} order {epoch}")):
                model(**self.batch(domain, batch))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


def batches(domain: Domain, rows: Sequence[Case], size: int, rng: random.Random) -> list[list[Case]]:
    """Return the rows in batches of similar length, in a random order: sorted within eight batches, then shuffled."""
    order = list(rows)
    rng.shuffle(order)
    out = []
    for start in range(0, len(order), 8 * size):
        near = sorted(order[start : start + 8 * size], key=lambda case: len(text_of(domain, case)))
        out += [near[i : i + size] for i in range(0, len(near), size)]
    rng.shuffle(out)
    return out


def groups_of(model: nn.Module, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return one parameter group for each prefix that some trained parameter begins with."""
    groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next(prefix for prefix in rates if name.startswith(prefix))].append(parameter)
    return [{"params": own, "lr": rates[prefix]} for prefix, own in groups.items() if own]
