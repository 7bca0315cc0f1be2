"""The merging experiment merges and scores what it trains. Run: pytest tests/systems/test_merging_experiment.py"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from experiments.merging import data
from experiments.merging.adapters import KINDS, Adapter, take, train
from experiments.merging.data import TaskRows, accuracy, below, collate, upper
from experiments.merging.merges import MERGES, OWN, changed, merged, merges_of
from experiments.merging.run import Log, Settings, compare, tune
from experiments.merging.summary import figure, mean_of, summarise, table
from moa.model.heads import MultiTaskForSequenceClassification
from tests.laws import assert_close


def base() -> MultiTaskForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = {"a": ["no", "yes"], "b": ["no", "yes"]}
    return MultiTaskForSequenceClassification.around(BertModel(config), labels)


def token_rows(task: int, n: int) -> list[dict[str, Any]]:
    draw = random.Random(task)
    rows = []
    for _ in range(n):
        ids = [draw.randrange(2, 40) for _ in range(draw.randrange(3, 9))]
        rows.append({"input_ids": ids, "labels": int(ids[0] > 20), "task_ids": task})
    return rows


def tasks(model: Any) -> list[TaskRows]:
    raw = [
        TaskRows(n, ["no", "yes"], token_rows(i, 24), token_rows(i + 2, 8), token_rows(i, 8))
        for i, n in enumerate("ab")
    ]
    for task in raw:
        for row in (*task.train, *task.validation, *task.test):
            row["task_ids"] = "ab".index(task.name)
    return below(model, 2, raw)


def trained(kind: str, task: int, model: Any, rows: Any) -> Any:
    return train(model, kind, task, rows, rate=0.02, head_rate=0.01, epochs=2, size=8, seed=3)


def logits(model: Any, rows: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**collate(rows)).logits
    return out


def test_states_below_and_layers_above_are_the_model() -> None:
    whole = base().eval()
    rows = token_rows(0, 12)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], batch_first=True)
    with torch.no_grad():
        mask = (padded > 0).long()
        expected = whole(padded, attention_mask=mask, task_ids=torch.zeros(12, dtype=torch.long)).logits
    (task,) = below(whole, 2, [TaskRows("a", ["no", "yes"], rows, [], [])])
    assert_close(logits(upper(whole, 2).eval(), task.train), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_merged_is_that_adapter(kind: str) -> None:
    """Every average of one is the trained model; FlyLoRA without its top-k is not."""
    whole = base()
    first, _ = tasks(whole)
    top = upper(whole, 2)
    model = trained(kind, 0, top, first.train)
    adapter = take(model, 0)
    expected = logits(model, first.test)
    before = {name: p.clone() for name, p in top.named_parameters()}
    name = "average_own_top_k" if kind.startswith("flylora") else "average"
    top.eval()
    with changed(top, merged([adapter], name), [adapter, adapter]) as merge:
        assert_close(logits(merge, first.test), expected, 1e-5)
    assert all(torch.equal(p, before[n]) for n, p in top.named_parameters()), "it is not what it was"
    assert float((logits(top, first.test) - expected).abs().max()) > 1e-3
    if kind.startswith("flylora"):
        with changed(top, merged([adapter], "average"), [adapter, adapter]) as merge:
            assert float((logits(merge, first.test) - expected).abs().max()) > 1e-3


def pair(kind: str) -> tuple[Any, list[TaskRows], list[Adapter]]:
    whole = base()
    rows, top = tasks(whole), upper(whole, 2)
    return top, rows, [take(trained(kind, t, top, task.train), t) for t, task in enumerate(rows)]


@pytest.mark.parametrize("kind", KINDS)
def test_only_flyloras_projections_may_differ_at_the_start(kind: str) -> None:
    """Shared means one projection for all tasks; the LoRAs of all tasks start from one draw, as the scripts do."""
    _, _, (one, two) = pair(kind)
    layer = next(iter(one.layers))
    same = torch.equal(one.layers[layer]["down"], two.layers[layer]["down"])
    assert same == (kind == "flylora_shared")  # the LoRAs' are trained


def test_every_merge_of_every_kind_runs_and_keeps_each_tasks_head() -> None:
    for kind in KINDS:
        top, rows, adapters = pair(kind)
        assert merges_of(kind) == [*MERGES, *(OWN if kind.startswith("flylora") else ())]
        for name in merges_of(kind):
            with changed(top, merged(adapters, name, 0.7), adapters) as model:
                for number, task in enumerate(rows):
                    assert torch.equal(model.heads.weight[number], adapters[number].weight)
                    assert 0 <= accuracy(model, task.test) <= 1


def test_split_lora_is_merged_expert_by_expert() -> None:
    top, _, (one, two) = pair("split_lora")
    layer = next(iter(one.layers))
    routed: Any = merged([one, two], "task_arithmetic", 0.5)[layer]
    first, second = (a.layers[layer] for a in (one, two))
    expected = 0.5 * (first["up"][2].T @ first["down"][2] + second["up"][2].T @ second["down"][2])
    assert_close(routed.experts[2], expected, 1e-5)
    x = torch.randn(5, routed.gate.shape[1])
    weights, best = (x @ routed.gate.T).sigmoid().max(-1)
    rows = [w * routed.experts[e] @ row for row, w, e in zip(x, weights, best, strict=True)]
    assert_close(routed(x), torch.stack(rows), 1e-5)
    assert top is not None


class Bench:
    """A bench over the tiny model, as tune and compare use it."""

    def __init__(self) -> None:
        whole = base()
        self.settings = Settings(rates=(1e-3, 2e-2), scales=(0.3, 1.0), seeds=(0,))
        self.tasks, self.base, self.seed = tasks(whole), upper(whole, 2), 3

    def train(self, kind: str, task: int, rate: float) -> Any:
        rows = self.tasks[task].train
        return train(self.base, kind, task, rows, rate=rate, head_rate=0.01, epochs=2, size=8, seed=3)

    def score(self, adapters: Any, merge: str, scale: float, part: str) -> dict[str, float]:
        with changed(self.base, merged(adapters, merge, scale), adapters) as model:
            return {task.name: accuracy(model, getattr(task, part)) for task in self.tasks}


def test_what_is_tuned_is_the_best_on_the_validation_rows() -> None:
    bench: Any = Bench()
    row = tune(bench, "flylora_independent")
    assert row["rates_tried"][str(row["rate"])] == max(row["rates_tried"].values())
    for merge, scale in row["scale"].items():
        assert row["scales_tried"][merge][str(scale)] == max(row["scales_tried"][merge].values())
    done = compare(bench, "flylora_independent", row)
    assert set(done) == {"before", "before_dense", "after"}
    assert set(done["after"]) == set(merges_of("flylora_independent"))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    settings = Settings()
    log = Log(tmp_path / "rows.jsonl", settings)
    made = log.once({"phase": "x", "seed": 1}, lambda: {"value": 2}, lambda text: None)
    assert made["value"] == 2 and made["cpu_s"] >= 0
    again = Log(tmp_path / "rows.jsonl", dataclasses.replace(settings, seeds=(7,)))
    assert again.once({"phase": "x", "seed": 1}, lambda: pytest.fail("made again"), print) == made
    other = Log(tmp_path / "rows.jsonl", dataclasses.replace(settings, epochs=9))
    assert other.rows() == []


def test_the_summary_is_taken_seed_by_seed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"phase": "probe", "seed": 0, "head_alone": {"a": 0.6, "b": 0.6}}]
    for kind, lost in (("lora_r8", 0.1), ("flylora_shared", 0.04)):
        for seed in (0, 1, 2):
            before = {"a": 0.8 + 0.01 * seed, "b": 0.9}
            after = {task: value - lost - 0.01 * seed for task, value in before.items()}
            rows.append(
                {
                    "phase": "compare",
                    "kind": kind,
                    "seed": seed,
                    "before": before,
                    "after": dict.fromkeys(merges_of(kind), after),
                }
            )
    out = summarise(rows)
    own = out["flylora_shared"]["merges"]["ties"]
    assert_close(torch.tensor(own["loss"]["mean"]), torch.tensor(0.05), 1e-6)
    assert_close(torch.tensor(own["loss_minus_lora_r8s"]["mean"]), torch.tensor(-0.06), 1e-6)
    assert own["loss_minus_lora_r8s"]["std"] < 1e-9 and own["loss_minus_lora_r8s"]["n"] == 3
    assert_close(torch.tensor(own["loss"]["std"]), torch.tensor(0.01), 1e-6)
    assert mean_of({"a": 0.5, "b": 1.0}) == 0.75
    assert "-6.0" in table(out)
    assert figure(out, tmp_path / "x.png").stat().st_size > 5000
    assert set(data.FILES) >= set(Settings().tasks)
