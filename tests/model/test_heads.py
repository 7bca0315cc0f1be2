"""The multi-task classifier: heads, pooling, losses, bad task ids, its base.

Run: pytest tests/model/test_heads.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)

import moa
from moa.errors import CheckpointError, ConfigError, ContextError, ShapeError
from moa.model.heads import MultiTaskConfig, MultiTaskForSequenceClassification, load_base
from moa.model.task_heads import TaskHeads
from tests.tiny_run import VOCAB, encoder_folder

LABELS = {"two": ["a", "b"], "three": ["x", "y", "z"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encoder_folder(tmp_path / "encoder")


@pytest.fixture
def model(folder: Path) -> MultiTaskForSequenceClassification:
    return MultiTaskForSequenceClassification.from_encoder(folder, LABELS).eval()


def batch(n: int = 6, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[1::2, 4:] = 0
    return {
        "input_ids": torch.randint(3, len(VOCAB), (n, length), generator=generator),
        "attention_mask": mask,
        "task_ids": torch.arange(n) % 2,
        "labels": torch.arange(n) % 2,
    }


def test_heads_equal_one_linear_per_task() -> None:
    heads = TaskHeads(5, [2, 3]).double()
    torch.nn.init.normal_(heads.bias)
    h, ids = torch.randn(4, 5, dtype=torch.float64), torch.tensor([1, 0, 0, 1])
    out = heads(h, ids)
    for row, task in enumerate(ids.tolist()):
        n = [2, 3][task]
        expected = F.linear(h[row], heads.weight[task, :n], heads.bias[task, :n])
        torch.testing.assert_close(out[row, :n], expected, rtol=1e-12, atol=1e-12)
        assert torch.isneginf(out[row, n:]).all()


def test_absent_classes_leave_loss_and_gradients_finite() -> None:
    heads = TaskHeads(5, [2, 3])
    loss = F.cross_entropy(heads(torch.randn(4, 5), torch.tensor([0, 0, 1, 1])), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert heads.weight.grad is not None and torch.isfinite(heads.weight.grad).all()
    assert heads.weight.grad[0, 2].abs().sum() == 0


@pytest.mark.parametrize("counts", [[], [2, 0]])
def test_heads_need_an_output(counts: list[int]) -> None:
    with pytest.raises(ConfigError, match="at least 1 output"):
        TaskHeads(5, counts)


def test_classes_are_at_least_two_and_numbers_belong_to_a_task() -> None:
    with pytest.raises(ConfigError, match=r"at least 2 classes, got \{'one': \['a'\]\}"):
        MultiTaskConfig(labels={"one": ["a"], "two": ["a", "b"]})
    assert MultiTaskConfig(labels={"one": ["a"]}, regressions=["one"]).regressions == ["one"]
    with pytest.raises(ConfigError, match=r"unknown task 'on' in regressions. Did you mean 'one'"):
        MultiTaskConfig(labels={"one": ["a"]}, regressions=["on"])


@pytest.mark.parametrize("names", [["size"], ["size", "age", "cost"]])
def test_the_loss_of_numbers_is_that_of_transformers(folder: Path, names: list[str]) -> None:
    model = MultiTaskForSequenceClassification.from_encoder(
        folder, {"n": names}, regressions=["n"], dtype=torch.float64
    )
    rows = batch()
    rows["task_ids"], rows["labels"] = torch.zeros(6, dtype=torch.long), torch.randn(6, len(names)).double()
    out = model(**rows)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(names), problem_type="regression"
    )
    expected = theirs.loss_function(labels=rows["labels"], pooled_logits=out.logits, config=theirs.config)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    if len(names) == 1:
        flat = model(**{**rows, "labels": rows["labels"][:, 0]})
        torch.testing.assert_close(flat.loss, expected, rtol=1e-12, atol=0)


def test_classes_and_numbers_in_one_batch(folder: Path) -> None:
    """Each label counts once: the loss is the mean over them, in value and gradient."""
    labels = {"classes": ["a", "b", "c"], "numbers": ["x", "y"]}
    model = MultiTaskForSequenceClassification.from_encoder(folder, labels, regressions=["numbers"]).double()
    rows = batch()
    rows["labels"] = torch.tensor([[2, -100], [0.5, -1.5], [0, -100], [2.5, 0.25], [-100, -100], [-0.5, -100]])
    out = model(**rows)
    logits, want = out.logits, rows["labels"].double()
    entropy = F.cross_entropy(logits[[0, 2]], torch.tensor([2, 0]), reduction="sum")
    errors = [
        logits[1, 0] - want[1, 0],
        logits[1, 1] - want[1, 1],
        logits[3, 0] - want[3, 0],
        logits[3, 1] - want[3, 1],
    ]
    errors.append(logits[5, 0] - want[5, 0])
    expected = (entropy + torch.stack(errors).square().sum()) / 7
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    parameters = list(model.heads.parameters())
    got, wanted = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (out.loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(**rows, num_items_in_batch=14).loss, expected / 2)
    with pytest.raises(ContextError, match=r"label of task 'classes' is 0.5, and its head gives classes"):
        model(**{**rows, "labels": torch.full((6,), 0.5)})
    with pytest.raises(ShapeError, match=r"labels \(6, 4\) have more places than the 3 outputs"):
        model(**{**rows, "labels": torch.zeros(6, 4)})


def test_wrapping_keeps_the_pretrained_weights(folder: Path, model: MultiTaskForSequenceClassification) -> None:
    stored = AutoModel.from_pretrained(folder).state_dict()
    kept = model.encoder.state_dict()
    assert set(stored) - set(kept) == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_ignores_padding(folder: Path, pooling: str, side: str) -> None:
    model = MultiTaskForSequenceClassification.from_encoder(folder, LABELS, pooling)
    hidden = torch.randn(1, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0, 0]])
    real = hidden[:, 2:] if side == "left" else hidden[:, :3]
    expected = {"mean": real.mean(1), "cls": real[:, 0], "last": real[:, -1]}[pooling]
    torch.testing.assert_close(model.pool(hidden, mask), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.pool(real, None), expected, rtol=1e-12, atol=1e-12)


def test_loss_is_the_mean_cross_entropy(model: MultiTaskForSequenceClassification) -> None:
    rows = batch()
    out = model(**rows)
    expected = F.cross_entropy(out.logits, rows["labels"])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(**rows, num_items_in_batch=12).loss, expected / 2)


def test_padding_changes_nothing(model: MultiTaskForSequenceClassification) -> None:
    rows = batch(2)
    short = {name: value[1:2] if value.ndim == 1 else value[1:2, :4] for name, value in rows.items()}
    torch.testing.assert_close(model(**rows).logits[1:2], model(**short).logits, rtol=1e-5, atol=1e-6)


def test_task_ids_missing_or_out_of_range_name_the_range(model: MultiTaskForSequenceClassification) -> None:
    rows = batch()
    ids = rows.pop("task_ids")
    with pytest.raises(ContextError, match=r"no task ids: pass task_ids=\(B,\) with values 0 to 1 \(two, three\)"):
        model(**rows)
    for bad in (ids - 1, ids + 1):
        with pytest.raises(ContextError, match=r"task ids must be 0 to 1 .*got values from"):
            model(**rows, task_ids=bad)


def test_the_same_through_moa(model: MultiTaskForSequenceClassification) -> None:
    wrapped = moa.build(model, "topk", n_experts=4, rank=2)
    rows = batch()
    ids = rows.pop("task_ids")
    with pytest.raises(ContextError, match="0 to 1"):
        wrapped(**rows)
    with pytest.raises(ContextError, match="got values from 0 to 2"):
        wrapped(**rows, task_ids=ids * 2)


def test_one_head_for_all_tasks(folder: Path, tmp_path: Path) -> None:
    """Every task gets the logits of one head; routers still see which task it is, and a checkpoint keeps that."""
    labels = {"is it": ["no", "yes"], "is it not": ["no", "yes"]}
    base = MultiTaskForSequenceClassification.from_encoder(folder, labels, one_head=True)
    assert base.heads.weight.shape == (1, 2, base.heads.weight.shape[-1])
    rows = {name: value for name, value in batch().items() if name not in ("task_ids", "labels")}
    logits = base(**rows, task_ids=torch.zeros(len(rows["input_ids"]), dtype=torch.long)).logits
    ones = torch.ones(len(logits), dtype=torch.long)
    expected = F.linear(base.features(**rows), base.heads.weight[0], base.heads.bias[0])
    torch.testing.assert_close(logits, expected)
    assert torch.equal(base(**rows, task_ids=ones).logits, logits)
    with pytest.raises(ContextError, match=r"0 to 1 \(is it, is it not\)"):
        base(**rows, task_ids=2 * ones)
    model = moa.build(base, "poly", n_experts=4, rank=2, n_tasks=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    got = [model(**rows, task_ids=task * ones).logits for task in (0, 1)]
    assert not torch.allclose(got[0], got[1])
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path)
    assert torch.equal(again(**rows, task_ids=ones).logits, got[1])


def test_one_head_wants_the_same_labels() -> None:
    with pytest.raises(ConfigError, match=r"one_head: all tasks need the same labels .*a: no, yes; b: yes, no"):
        MultiTaskConfig(labels={"a": ["no", "yes"], "b": ["yes", "no"]}, one_head=True)


@pytest.mark.parametrize("router", ["remix", "topk"])
def test_moa_trains_heads_and_experts_but_not_the_encoder(
    model: MultiTaskForSequenceClassification, router: str
) -> None:
    wrapped = moa.build(model, router, n_experts=4, rank=2, targets="all-linear").train()
    assert wrapped.modules_to_save == ["heads"]
    wrapped(**batch()).loss.backward()
    if router == "remix":
        assert wrapped.objective.per_example_rule == "aligned"
    for name, parameter in wrapped.named_parameters():
        trained = ".branches." in name or ".heads." in name
        assert parameter.requires_grad == trained, name
        assert not trained or parameter.grad is not None, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_finds_its_base_again(folder: Path, tmp_path: Path, dtype: str) -> None:
    base = MultiTaskForSequenceClassification.from_encoder(folder, LABELS, "last", dtype=dtype)
    model = moa.build(base, "topk", n_experts=4, rank=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    again = moa.load(tmp_path / "saved")
    assert again.base.encoder.dtype == getattr(torch, dtype)  # type: ignore[union-attr]
    assert again.base.heads.weight.dtype == torch.float32  # type: ignore[union-attr]
    rows = batch()
    assert torch.equal(model(**rows).logits, again(**rows).logits)


def test_a_whole_model_saves_and_loads_as_transformers_does(
    model: MultiTaskForSequenceClassification, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "whole")
    again = MultiTaskForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(model(**batch()).logits, again(**batch()).logits)
    mixture = moa.build(again, "topk", n_experts=4, rank=2).eval()
    mixture.save_pretrained(tmp_path / "mixture")
    assert torch.equal(mixture(**batch()).logits, moa.load(tmp_path / "mixture")(**batch()).logits)


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_other_encoders(kind: str) -> None:
    encoder: Any
    if kind == "llama":
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        encoder = LlamaModel(LlamaConfig(vocab_size=len(VOCAB), hidden_size=16, intermediate_size=24, **sizes))
    else:
        encoder = DistilBertModel(DistilBertConfig(vocab_size=len(VOCAB), dim=16, hidden_dim=24, n_layers=1, n_heads=2))
    model = moa.build(MultiTaskForSequenceClassification.around(encoder, LABELS, "last"), "topk", n_experts=4, rank=2)
    assert torch.isfinite(model(**batch()).loss)


def test_encoder_decoders_are_refused() -> None:
    sizes = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5Model(T5Config(vocab_size=len(VOCAB), d_model=16, **sizes))
    with pytest.raises(ConfigError, match="T5Model is an encoder-decoder"):
        MultiTaskForSequenceClassification.around(t5, LABELS)


def test_unknown_pooling() -> None:
    with pytest.raises(ConfigError, match=r"unknown pooling 'men'.*Did you mean 'mean'"):
        MultiTaskConfig(pooling="men")


def test_quantised_origin_is_not_stored(folder: Path) -> None:
    encoder = AutoModel.from_pretrained(folder)
    encoder.config.quantization_config = {"quant_method": "gguf"}  # as after reading a GGUF file
    model = moa.build(MultiTaskForSequenceClassification.around(encoder, LABELS), "topk", n_experts=4, rank=2)
    assert "quantization_config" not in json.dumps(model.describe())


def test_bases_that_cannot_be_found(folder: Path, tmp_path: Path) -> None:
    row = {"class": "BertModel", "name_or_path": str(folder), "config": {"dtype": "float32"}}
    assert type(load_base(row, tmp_path, {})).__name__ == "BertModel"
    for change, message in (
        ({"name_or_path": ""}, "names no base to load"),
        ({"class": "OurOwnModel"}, "which transformers does not have"),
        ({"name_or_path": str(tmp_path / "gone")}, "cannot be loaded"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load_base({**row, **change}, tmp_path, {})
        assert "load(path, base=model)" in str(error.value)
