"""Five Amazon domains as histories, candidates and texts. Read at run time; nothing of the data is kept here."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DOMAINS = ("office", "industrial", "food", "kitchen", "toys")
N_CANDIDATES = 30
HISTORY = 3


@dataclass(frozen=True)
class Domain:
    """One domain: item texts, and each user's items in order, oldest first.

    Args:
        name: of the domain.
        texts: item id -> text.
        train: users to learn from, in a random order.
        valid: users to choose learning rates by.
        test: users to rank for. No user is in two of the three.
    """

    name: str
    texts: dict[str, str]
    train: list[list[str]]
    valid: list[list[str]]
    test: list[list[str]]


@dataclass(frozen=True)
class Case:
    """One ranking: what a user bought before, and candidates of which the one at `label` came next."""

    history: list[str]
    candidates: list[str]
    label: int


def load(folder: Path, name: str, n_test: int, n_valid: int) -> Domain:
    """Return a domain with n_test and n_valid users set apart, the same ones for every seed."""

    def rows(kind: str) -> list[dict[str, object]]:
        with gzip.open(folder / f"{name}.{kind}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in file]

    texts = {str(row["item"]): str(row["text"]) for row in rows("items")}
    users = [[str(i) for i in row["items"]] for row in rows("users")]  # type: ignore[attr-defined]
    random.Random(f"{name} split").shuffle(users)
    return Domain(name, texts, users[n_test + n_valid :], users[n_test : n_test + n_valid], users[:n_test])


def text_of(domain: Domain, case: Case) -> str:
    """Return a history as a text, the latest item first: what is too long loses its oldest items."""
    return "; ".join(domain.texts[item] for item in reversed(case.history))


def cases(domain: Domain, users: list[list[str]], seed: str, n_candidates: int = N_CANDIDATES) -> list[Case]:
    """Return one case per user: the last item among uniform negatives that the user never bought."""
    rng = random.Random(f"{domain.name} {seed}")
    items = sorted(domain.texts)
    out = []
    for bought in users:
        owned, negatives = set(bought), set()
        while len(negatives) < n_candidates - 1:
            item = rng.choice(items)
            if item not in owned:
                negatives.add(item)
        candidates = [bought[-1], *sorted(negatives)]
        rng.shuffle(candidates)
        out.append(Case(bought[:-1][-HISTORY:], candidates, candidates.index(bought[-1])))
    return out


def popularity(domain: Domain, tests: list[Case]) -> Tensor:
    """Return the scores (T, C) of ranking by how often all of the domain's training users bought an item."""
    counts: dict[str, int] = {}
    for bought in domain.train:
        for item in bought:
            counts[item] = counts.get(item, 0) + 1
    return torch.tensor([[float(counts.get(item, 0)) for item in case.candidates] for case in tests])


def metrics(scores: Tensor, tests: list[Case]) -> dict[str, float]:
    """Return Hit@1 and NDCG@10 of scores (T, C); a tie counts as its mean over the orders it could take."""
    labels = torch.tensor([case.label for case in tests])
    own = scores.gather(1, labels[:, None])
    above = (scores > own).sum(1)
    equal = (scores == own).sum(1)
    hit, ndcg = 0.0, 0.0
    for better, same in zip(above.tolist(), equal.tolist(), strict=True):
        places = range(better, better + same)
        hit += sum(place == 0 for place in places) / same
        ndcg += sum(1 / torch.log2(torch.tensor(place + 2.0)).item() for place in places if place < 10) / same
    return {"hit@1": hit / len(tests), "ndcg@10": ndcg / len(tests)}
