"""The candidate ranker and the experiment that uses it. Run: pytest tests/systems/test_cross_domain.py"""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import moa
from experiments.cross_domain.bench import Bench, Settings, batches, groups_of
from experiments.cross_domain.candidates import CandidateRanker
from experiments.cross_domain.data import Case, cases, load, metrics, popularity, text_of
from experiments.cross_domain.run import make, rates_of, run, some, summary
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
    domain = load(folder, "toys", 6, 4)
    assert (len(domain.train), len(domain.valid), len(domain.test)) == (14, 4, 6)
    assert load(folder, "toys", 6, 2).test == domain.test, "the same split every time"
    assert some(domain, "0", 5) == some(domain, "0", 9)[:5] != some(domain, "1", 5)
    for case, bought in zip(cases(domain, domain.test, "x"), domain.test, strict=True):
        assert len(set(case.candidates)) == 30 and case.candidates[case.label] == bought[-1]
        assert not (set(case.candidates) - {bought[-1]}) & set(bought) and bought[-1] not in case.history
    counts = popularity(domain, cases(domain, domain.test, "x"))
    assert counts.shape == (6, 30) and counts.max() <= 18


def settings_of(folder: Path, **options: Any) -> Settings:
    own = {"sizes": (4, 8), "seeds": (0, 1), "n_test": 6, "n_valid": 4, "passes": 8, "batch": 4, "tune_users": 4}
    return Settings("none", str(folder), **{**own, "source_passes": 14, "tune_passes": 4, **options})


def test_batches_hold_each_case_once_with_near_lengths(folder: Path) -> None:
    domain = load(folder, "toys", 2, 2)
    rows = cases(domain, domain.train, "x")
    made = batches(domain, rows, 4, random.Random(0))
    assert sorted(map(id, rows)) == sorted(id(case) for batch in made for case in batch)
    spans = [sorted(len(text_of(domain, case)) for case in batch) for batch in made]
    assert all(a[-1] <= b[0] or b[-1] <= a[0] for a in spans for b in spans if a is not b)
    assert text_of(domain, Case(["red1", "blue2"], [], 0)) == "blue thing 2; red thing 1"


def test_scores_come_in_the_order_of_the_tests(folder: Path, tmp_path: Path) -> None:
    bench = Bench(settings_of(folder), tmp_path, encoder(), tokens)
    domain = bench.domain("toys")
    tests = cases(domain, domain.test, "test")
    model = bench.ranker()
    one_by_one = torch.cat([bench.scores(model, domain, [case]) for case in tests])
    assert_close(bench.scores(model, domain, tests), one_by_one, 1e-4)


def test_every_method_trains_the_pooler_at_the_same_rate(folder: Path, tmp_path: Path) -> None:
    bench = Bench(settings_of(folder), tmp_path, encoder(), tokens)
    path = tmp_path / "adapter"
    moa.export_expert(moa.build(bench.ranker(), "fixed", n_experts=1, rank=2, targets=["query"]), 0, path)
    for method in Settings.methods:
        model = make(bench, method, [path, path])
        groups = groups_of(model, rates_of(method, None if method == "head" else 3.0, 7.0))
        by_rate = {group["lr"]: group["params"] for group in groups}
        assert sum(p.numel() for p in by_rate.pop(7.0)) == 16 * 16 + 16
        rest = [name for name, p in model.named_parameters() if any(p is q for q in by_rate.get(3.0, []))]
        ours = {"xcross": "streams.", "lora": "base.encoder."}
        assert all(name.startswith(ours[method]) for name in rest) and bool(rest) == (method != "head")


def test_the_experiment_runs_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = settings_of(folder)
    result = run(settings, tmp_path, said.append, Bench(settings, tmp_path, encoder(), tokens))
    kinds = [(r["method"], r["users"], r.get("seed")) for r in result["rows"]]
    assert len(kinds) == 2 + 3 + 1 + 3 * 2 * 2 and ("xcross", 8, 1) in kinds and ("lora", 4, 0) in kinds
    assert all(0 <= r["hit@1"] <= 1 and 0 <= r["ndcg@10"] <= 1 for r in result["rows"])
    assert len(said) == len(kinds) + 3 + 6 + 6 + 2, "sources, six pairs of rates per method, the head alone has two"
    table = summary(result)
    assert "zero-shot" in table and " ± " in table

    again: list[str] = []
    more = settings_of(folder, seeds=(0, 1, 2))
    extended = run(more, tmp_path, again.append, Bench(more, tmp_path, encoder(), tokens))
    assert len(again) == 3 * 2, "only the third seed is new"
    assert extended["rows"][: len(kinds)] == result["rows"]
    assert extended["tuning"] == result["tuning"]


def test_untrained_streams_are_the_mean_of_the_adapted_encoders(folder: Path, tmp_path: Path) -> None:
    """Zero crossings change nothing: the streams' mean is that of the encoders with one adapter each."""
    bench = Bench(settings_of(folder), tmp_path, encoder(), tokens)
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        adapted = moa.build(bench.ranker(), "fixed", n_experts=1, rank=2, targets=["query", "output.dense"])
        for mixture in adapted.mixtures().values():
            torch.nn.init.normal_(mixture.branches[0].bank.up)
        paths.append(moa.export_expert(adapted, 0, tmp_path / f"a{seed}"))
    ids = torch.randint(1, 40, (2, 6))
    alone = []
    for path in paths:
        one = moa.build(bench.ranker(), "fixed", experts=[path]).eval()
        alone.append(one.base.encoder(input_ids=ids).last_hidden_state)
    streams = make(bench, "xcross", paths).eval()
    got = streams.base.encoder(input_ids=ids).last_hidden_state
    assert_close(got, torch.stack(alone).mean(0), 1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_bad_inputs() -> None:
    with pytest.raises(ConfigError, match="pooling must be"):
        CandidateRanker(encoder(), pooling="max")  # type: ignore[arg-type]
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"candidates must be \(B, C, d\) = \(2, C, 16\), got \(3, 5, 16\)"):
        CandidateRanker(encoder())(ids, ids, torch.randn(3, 5, 16))
