"""A real task split over clients that do not look alike, or a generated one where the real one is not installed."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from moa.runs.demo import cache_folder

LABELS = ["serious", "sarcastic"]
LENGTH = 24
MADE_WORDS, MADE_LENGTH = 64, 12


@dataclass(frozen=True)
class Rows:
    """Encoded examples: ids and mask (N, S), labels (N,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def at(self, places: list[int]) -> Rows:
        """Return some of them."""
        return Rows(self.ids[places], self.mask[places], self.labels[places])

    def batch(self, places: Tensor) -> dict[str, Tensor]:
        """Return a batch (B, S) for a model."""
        longest = int(self.mask[places].sum(1).max())
        ids, mask = self.ids[places, :longest], self.mask[places, :longest]
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[places]}


def is_real() -> bool:
    """Whether `moa demo --prepare` has installed the model and the task."""
    return (cache_folder() / "all-MiniLM-L6-v2").is_dir() and (cache_folder() / "sarcasm").is_dir()


@cache
def rows(part: str, count: int) -> Rows:
    """Return the first examples of "train" or "eval": headlines, sarcastic or not, or generated ones."""
    if not is_real():
        return _made(part, count)
    lines = (cache_folder() / "sarcasm" / f"sarcasm.{part}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    read = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(cache_folder() / "all-MiniLM-L6-v2")
    found = tokenizer(
        [row["text"] for row in read], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    labels = torch.tensor([LABELS.index(row["label"]) for row in read])
    return Rows(found["input_ids"], found["attention_mask"], labels)


def base() -> nn.Module:
    """Return the frozen base with a fresh head: MiniLM, or a small BERT of random weights."""
    return copy.deepcopy(_loaded())


@cache
def _loaded() -> nn.Module:
    torch.manual_seed(0)
    if is_real():
        folder: Path = cache_folder() / "all-MiniLM-L6-v2"
        return BertForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), local_files_only=True)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=MADE_WORDS, num_attention_heads=4, num_labels=len(LABELS), **sizes)
    return BertForSequenceClassification(config)


def split(labels: list[int], clients: int, alpha: float, seed: int = 0) -> list[list[int]]:
    """Return each client's examples: of every label, shares that a Dirichlet distribution draws.

    Every client gets at least two.
    """
    draw = random.Random(seed)
    found: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        places = [n for n, one in enumerate(labels) if one == label]
        draw.shuffle(places)
        parts = [draw.gammavariate(alpha, 1) for _ in range(clients)]
        ends = [round(len(places) * sum(parts[: n + 1]) / sum(parts)) for n in range(clients)]
        for client, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            found[client] += places[start:end]
    for part in found:
        while len(part) < 2:
            part.append(max(found, key=len).pop())
    return found


def _made(part: str, count: int) -> Rows:
    rng = torch.Generator().manual_seed(0 if part == "train" else 1)
    ids = torch.randint(2, MADE_WORDS, (count, MADE_LENGTH), generator=rng)
    return Rows(ids, torch.ones_like(ids), (ids[:, 0] % 2 == ids[:, 1] % 2).long())
