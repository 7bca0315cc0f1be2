"""The candidate ranker and the experiment that uses it. Run: pytest tests/systems/test_cross_domain.py"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import moa
from experiments.cross_domain.data import Case, cases, load, metrics, popularity
from experiments.cross_domain.run import Bench, Settings, run, summary
from moa.candidates import CandidateRanker
from moa.errors import ConfigError, ShapeError
from tests.laws import assert_close


def encoder() -> BertModel:
    torch.manual_seed(1)
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(config).eval()


def test_the_ranker_is_its_formula() -> None:
    ranker = CandidateRanker(encoder(), temperature=3.0).eval()
    torch.nn.init.normal_(ranker.pooler.weight)
    ids = torch.randint(1, 40, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    candidates = F.normalize(torch.randn(2, 5, 16), dim=-1)
    labels = torch.tensor([3, 0])
    out = ranker(ids, mask, candidates, labels)
    hidden = ranker.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    loss = 0.0
    for b in range(2):
        p = hidden[b, : mask[b].sum()].mean(0)
        u = p + F.gelu(p @ ranker.pooler.weight.T + ranker.pooler.bias)
        scores = 3.0 * candidates[b] @ u / u.norm()
        assert_close(out["logits"][b], scores, 1e-5)
        loss += -(scores.exp() / scores.exp().sum()).log()[labels[b]] / 2
    assert_close(out["loss"], torch.as_tensor(loss), 1e-5)


def test_a_fresh_ranker_ranks_as_its_encoder_does() -> None:
    ranker = CandidateRanker(encoder(), pooling="cls")
    ids = torch.randint(1, 40, (2, 6))
    own = ranker.encoder(input_ids=ids).last_hidden_state[:, 0]
    assert_close(ranker.encode(ids, torch.ones_like(ids)), F.normalize(own, dim=-1), 1e-5)


def test_streams_end_before_the_head() -> None:
    """The ranker's own head and pooling see one stream; crossings, weights and head train."""
    recipe = moa.make_recipe("xcross", n_experts=3, rank=2, targets=["query", "value"], train_experts=False)
    model = moa.build(CandidateRanker(encoder()), recipe, modules_to_save=["pooler"])
    ids = torch.randint(1, 40, (4, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "candidates": torch.randn(4, 5, 16)}
    out = model.train()(**inputs, labels=torch.zeros(4, dtype=torch.long))
    assert out["logits"].shape == (4, 5)
    out["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        "base.pooler.weight",
        "base.pooler.bias",
        "streams.weights",
        "streams.crossings.0.weight",
        "streams.crossings.1.weight",
    }


def test_metrics() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    tests = [Case([], ["a", "b", "c"], label) for label in (0, 2, 1)]
    got = metrics(scores, tests)
    assert got["hit@1"] == pytest.approx((1 + 0 + 0.5) / 3)  # a tie of two is half a hit
    tie = (1 + 1 / math.log2(3)) / 2
    assert got["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4) + tie) / 3)
    far = metrics(torch.arange(30.0)[None], [Case([], ["x"] * 30, 15)])
    assert far == {"hit@1": 0, "ndcg@10": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Domains in which a user stays with one colour."""
    for name in ("office", "industrial", "food", "toys"):
        items = [{"item": f"{c}{i}", "text": f"{c} thing {i}"} for c in ("red", "blue", "green") for i in range(20)]
        users = []
        for u in range(24):
            colour = ("red", "blue", "green")[u % 3]
            users.append({"user": str(u), "items": [f"{colour}{(u + 3 * j) % 20}" for j in range(5)]})
        for kind, rows in (("items", items), ("users", users)):
            with gzip.open(tmp_path / f"{name}.{kind}.jsonl.gz", "wt") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def tokens(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
    words = {w: i + 1 for i, w in enumerate(("red", "blue", "green", "thing"))}
    rows = [[words.get(w, 5 + len(w)) for w in text.replace(";", "").split()][:12] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_users_are_split_and_negatives_are_not_owned(folder: Path) -> None:
    domain = load(folder, "toys", 6)
    assert (len(domain.train), len(domain.test)) == (18, 6)
    assert load(folder, "toys", 6).test == domain.test, "the same split every time"
    for case, bought in zip(cases(domain, domain.test, "x"), domain.test, strict=True):
        assert len(set(case.candidates)) == 30 and case.candidates[case.label] == bought[-1]
        assert not (set(case.candidates) - {bought[-1]}) & set(bought) and bought[-1] not in case.history
    counts = popularity(domain, cases(domain, domain.test, "x"))
    assert counts.shape == (6, 30) and counts.max() <= 18


def test_the_experiment_runs(folder: Path) -> None:
    settings = Settings("none", str(folder), sizes=(4, 8), seeds=(0, 1), source_users=8, n_test=6, passes=8, batch=4)
    result = run(settings, lambda _: None, Bench(settings, encoder(), tokens))
    kinds = [(r["method"], r["users"], r["seed"]) for r in result["rows"]]
    assert len(kinds) == 3 + 2 * 2 * 2 and ("xcross", 8, 1) in kinds and ("lora", 4, 0) in kinds
    assert all(0 <= r["hit@1"] <= 1 and 0 <= r["ndcg@10"] <= 1 for r in result["rows"])
    table = summary(result)
    assert "zero-shot" in table and " ± " in table


def test_bad_inputs() -> None:
    with pytest.raises(ConfigError, match="pooling must be"):
        CandidateRanker(encoder(), pooling="max")  # type: ignore[arg-type]
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"candidates must be \(B, C, d\) = \(2, C, 16\), got \(3, 5, 16\)"):
        CandidateRanker(encoder())(ids, ids, torch.randn(3, 5, 16))
