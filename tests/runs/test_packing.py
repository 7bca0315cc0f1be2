"""Several rows in one sequence: what each gives is what it gives alone. Run: pytest tests/runs/test_packing.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

import moa
from moa.cli.main import main
from moa.errors import ConfigError
from moa.model.decoding import looks_beyond_rows
from moa.runs.collate import Collator
from moa.runs.encode import IGNORED
from moa.runs.packing import bins, check_packing, packed
from tests import laws, models
from tests.recipes.recipe_laws import Subject
from tests.tiny_run import config_values, decoder_folder, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
LENGTHS = (5, 2, 7, 3, 4)
REFUSED = {"remix", "loramoe"}  # they compare whole rows, of which a packed batch is one
DRAWN = {"noisy_topk", "switch"}  # noise in training, another one in a batch of another shape


def data() -> Dataset:
    """Return rows of unlike lengths, in some of which a token carries no label."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, models.VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    labels = [[IGNORED if i == 1 and len(row) > 4 else t for i, t in enumerate(row)] for row in ids]
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels})


def test_bins_hold_every_row_once_and_are_full() -> None:
    lengths = [3, 8, 1, 5, 4, 2, 7, 2]
    made = bins(lengths, 8)
    assert sorted(row for own in made for row in own) == list(range(8))
    assert [sum(lengths[row] for row in own) for own in made] == [8, 8, 8, 8]
    assert bins([5, 5, 5], 8) == [[0], [1], [2]]


def test_a_batch_is_that_of_transformers() -> None:
    rows = data()
    for batch in (packed(rows, 100), packed(rows, 8)):
        order = [row for own in bins(LENGTHS, 100 if len(batch) == 1 else 8) for row in own]
        theirs = DataCollatorWithFlattening(return_tensors="pt")(
            [{k: rows[i][k] for k in ("input_ids", "labels")} for i in order]
        )
        ours = Collator(tokenizer())(list(batch))
        assert ours.pop("use_cache") is False
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the loss, its parts and the gradients of one training step."""
    torch.manual_seed(7)
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), dict(model.last_losses), grads


@laws.parametrize(laws.RECIPE_CASES)
def test_packed_rows_are_what_they_are_alone(name: str, variant: str) -> None:
    """Loss, balance losses and every gradient, in float64; a recipe that could not is refused."""
    model = Subject(laws.small_recipe(name, variant)).trained().double()
    if name in REFUSED or list(looks_beyond_rows(model)):
        with pytest.raises(ConfigError, match=r"packing: true lays rows side by side, and .*: set packing: false"):
            check_packing(model)
        return
    check_packing(model)
    rows = data()
    together, apart = Collator(tokenizer())(list(packed(rows, 12))), Collator(tokenizer())(list(rows))
    assert together["input_ids"].shape == (1, sum(LENGTHS)) and apart["input_ids"].shape == (5, 7)
    if name in DRAWN:
        model.eval()
        torch.testing.assert_close(model(**together).loss, model(**apart).loss, rtol=1e-6, atol=1e-9)
        return
    (loss, parts, grads), (loss_apart, parts_apart, grads_apart) = step(model, together), step(model, apart)
    torch.testing.assert_close(loss, loss_apart, rtol=1e-6, atol=1e-9)  # routers decide in float32
    assert parts.keys() == parts_apart.keys() and grads.keys() == grads_apart.keys()
    for part, value in parts.items():
        torch.testing.assert_close(value, parts_apart[part], rtol=1e-5, atol=1e-9, msg=part)
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, grads_apart[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_the_law_sees_rows_that_cross() -> None:
    model = models.randomise(moa.build(models.llama(), "topk", n_experts=4, k=2, rank=2)).double().eval()
    rows = data()
    together, apart = Collator(tokenizer())(list(packed(rows, 12))), Collator(tokenizer())(list(rows))
    want = model(**apart).loss
    torch.testing.assert_close(model(**together).loss, want, rtol=1e-6, atol=1e-9)
    for change in ({"use_cache": True}, {"position_ids": torch.arange(sum(LENGTHS))[None]}):
        assert abs(model(**{**together, **change}).loss - want) > 1e-4


class Crossing(LlamaForCausalLM):
    """A base that takes positions and keeps nothing apart by them."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=use_cache, **kwargs)


class Placeless(LlamaForCausalLM):
    """A base that takes no positions."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Crossing, r"in Crossing \(attn_implementation='sdpa'\) the second of two rows changes with the first"),
        (Placeless, r"needs a base that takes position_ids, and Placeless does not"),
    ],
)
def test_bases_whose_rows_see_each_other_are_refused(cls: type, message: str) -> None:
    model = moa.build(cls(models.llama().config), "topk", n_experts=4, k=2, rank=2)
    with pytest.raises(ConfigError, match=message):
        check_packing(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_of_a_cpu_keep_rows_apart(attention: str) -> None:
    check_packing(moa.build(models.llama(attn_implementation=attention), "topk", n_experts=4, k=2, rank=2))


def test_a_packed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config_values(tmp_path, decoder_folder(tmp_path / "base"), "generation")
    values |= {"packing": True, "max_length": 32}
    values["training"] |= {"num_train_epochs": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    said = capsys.readouterr().out
    assert "packed 64 training rows into " in said and "sequences, 9" in said
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert 1 <= state["max_steps"] < 15  # of 2 sequences each, where 64 rows would take 32
    for change, message in (
        (
            {"recipe": {**values["recipe"], "router": "remix"}},
            "SampledRouter compares what 2 selections do on each row",
        ),
        ({"recipe": {"router": "poly", "n_tasks": 2}}, "TableRouter looks at the task of a request"),
        ({"tasks": config_values(tmp_path, tmp_path)["tasks"]}, "packing is for text to write, and task 'first' has"),
    ):
        wrong = {**values, **change, "output": str(tmp_path / "other")}
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        assert main(["train", str(tmp_path / "wrong.yaml")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
