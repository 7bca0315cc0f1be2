"""Merged checkpoints and PEFT folders load elsewhere and appear whole.  pytest tests/merge/test_write.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

import moa.merge.write as module
from moa.errors import CheckpointError, ConfigError, NumericsError, ShapeError
from moa.merge import (
    Checkpoint,
    Dense,
    merge,
    merge_lazily,
    read_difference,
    read_peft,
    stack,
    write_checkpoint,
    write_peft,
)

from .tools import assert_close, factors, lora_folder, model_folder, snapshot

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "b.weight": torch.randn(6, 9).bfloat16(),
    "norm.weight": torch.randn(9),
    "ids": torch.arange(5),
}


def changes() -> dict[str, Any]:
    return {"a.weight": factors(2, 7, 5), "b.weight": Dense(torch.randn(6, 9)), "norm.weight": torch.ones(9)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("limit", [10**9, 150])
def test_the_merged_checkpoint_is_the_sum_and_the_rest_bit_for_bit(tmp_path: Path, shards: int, limit: int) -> None:
    base = model_folder(tmp_path / "base", TENSORS, shards)
    before = snapshot(base)
    deltas = changes()
    del deltas["norm.weight"]
    written = write_checkpoint(base, deltas, tmp_path / "out", max_shard_bytes=limit)
    out = Checkpoint(tmp_path / "out")
    assert set(out) == set(TENSORS)
    # one rounding: the sum is taken in the wider type
    expected = {
        "a.weight": (TENSORS["a.weight"].double() + deltas["a.weight"].dense()).float(),
        "b.weight": (TENSORS["b.weight"].float() + deltas["b.weight"].dense()).bfloat16(),
        "norm.weight": TENSORS["norm.weight"],
        "ids": TENSORS["ids"],
    }
    for name in ("b.weight", "norm.weight", "ids"):
        assert torch.equal(out[name], expected[name]), name
        assert out[name].dtype == TENSORS[name].dtype
    assert_close(out["a.weight"], expected["a.weight"], 1e-7)
    assert sorted(p.name for p in out.shards) == sorted(written.files)
    assert len(written.files) == (1 if limit > 1000 else 3)
    assert written.nbytes == sum(p.stat().st_size for p in out.shards)
    assert snapshot(base) == before, "the base is untouched"
    copied = {p for p in snapshot(tmp_path / "out") if "safetensors" not in p}
    assert copied == {"config.json", "tokenizer.json", "extra/template.jinja"}, "hidden files and weights stay behind"


def test_an_empty_change_copies_every_bit(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS, 2)
    write_checkpoint(base, {}, tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    assert all(torch.equal(out[n], t) for n, t in TENSORS.items())
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_another_type_is_stored_and_written_into_the_config(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    write_checkpoint(base, changes(), tmp_path / "out", dtype=torch.bfloat16)
    out = Checkpoint(tmp_path / "out")
    assert {str(d) for d in out.dtypes.values()} == {"torch.bfloat16", "torch.int64"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_two_tuned_checkpoints_average_to_their_mean(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS, 2)
    tuned = []
    for t in range(2):
        state = {n: x + (t + 1) if x.is_floating_point() else x for n, x in TENSORS.items()}
        tuned.append(model_folder(tmp_path / f"tuned{t}", state, 1 + t))
    merged = merge_lazily([read_difference(t, base) for t in tuned], method="average")
    write_checkpoint(base, merged, tmp_path / "out", progress=False)
    out = Checkpoint(tmp_path / "out")
    assert_close(out["a.weight"], TENSORS["a.weight"] + 1.5, 1e-6)
    assert_close(out["norm.weight"], TENSORS["norm.weight"] + 1.5, 1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT calls it
def test_transformers_loads_the_result_with_the_merged_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "lora")
    write_checkpoint(tmp_path / "base", read_peft(tmp_path / "lora"), tmp_path / "out", max_shard_bytes=4000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    with torch.no_grad():
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, expected, 1e-5)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["second tensor", "second file", "before the swap"])
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_in_the_middle_leaves_no_half_checkpoint(
    tmp_path: Path, when: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    out = tmp_path / "out"
    if old:
        write_checkpoint(base, {}, out)
    before = snapshot(tmp_path)

    calls = 0
    patched = {"second tensor": "_changed", "second file": "write_safetensors", "before the swap": "_write_index"}[when]
    real = getattr(module, patched)

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if when == "before the swap" else 2):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, patched, killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(base, changes(), out, overwrite=old, max_shard_bytes=150)
    assert snapshot(tmp_path) == before


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    out = tmp_path / "out"
    write_peft({"m.weight": factors()}, out)
    before = snapshot(tmp_path)
    for call in (lambda: write_checkpoint(base, changes(), out), lambda: write_peft({"m.weight": factors()}, out)):
        with pytest.raises(CheckpointError, match="exists already"):
            call()
    assert snapshot(tmp_path) == before
    write_checkpoint(base, changes(), out, overwrite=True)
    assert set(Checkpoint(out)) == set(TENSORS)


def test_the_base_is_never_the_output(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    before = snapshot(base)
    for out in (base, base / "merged", base / ".." / "base"):
        with pytest.raises(ConfigError, match="same or one holds the other"):
            write_checkpoint(base, changes(), out, overwrite=True)
    assert snapshot(base) == before


def test_deltas_of_another_base_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    with pytest.raises(CheckpointError, match=r"holds no 'other.weight'"):
        write_checkpoint(base, {"other.weight": torch.ones(1)}, tmp_path / "out")
    with pytest.raises(ShapeError, match=r"'a.weight' is \(5, 7\), the base's weight \(7, 5\)"):
        write_checkpoint(base, {"a.weight": torch.ones(5, 7)}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="as integers"):
        write_checkpoint(base, {"ids": torch.ones(5)}, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    (base / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="quantised"):
        write_checkpoint(base, changes(), tmp_path / "out")


def test_a_truncated_base_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS, 2)
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        write_checkpoint(base, changes(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_delta_stops_the_writing(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    bad = torch.ones(7, 5)
    bad[1, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"'a.weight' .*1 of 35 in weight"):
        write_checkpoint(base, {"a.weight": bad}, tmp_path / "out")
    with pytest.raises(NumericsError, match=r"'a.weight'"):
        write_peft({"a.weight": bad}, tmp_path / "out", rank=2)
    with pytest.raises(NumericsError, match=r"rounded to torch.float16"):
        write_peft({"a.weight": factors().scaled(1e9)}, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", TENSORS)
    for kwargs, match in (({"max_shard_bytes": 0}, "max_shard_bytes"), ({"dtype": torch.int8}, "dtype")):
        with pytest.raises(ConfigError, match=match):
            write_checkpoint(base, {}, tmp_path / "out", **kwargs)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is not a folder"):
        write_checkpoint(base / "model.safetensors", {}, tmp_path / "out")
    for deltas, kwargs, match in (
        ({}, {}, "no deltas"),
        ({"m.weight": factors()}, {"dtype": torch.int8}, "dtype"),
        ({"m.bias": factors()}, {}, "no linear layer's weight"),
        ({"m.weight": Dense(factors().dense())}, {}, "pass rank="),
    ):
        with pytest.raises(ConfigError, match=match):
            write_peft(deltas, tmp_path / "out", **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="matrices only"):
        write_peft({"m.weight": torch.ones(3)}, tmp_path / "out")


# --- PEFT folders -----------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two linears whose names are suffixes of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6)
        self.inner = nn.ModuleDict({"q": nn.Linear(6, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["q"](self.q(x))


def test_peft_loads_unequal_ranks_with_the_same_outputs(tmp_path: Path) -> None:
    deltas = {"q.weight": factors(2, 6, 8), "inner.q.weight": factors(3, 8, 6)}
    written = write_peft(deltas, tmp_path / "out", base_model="toy/base", task_type=None)
    assert written.changed == 2
    assert not written.errors
    base = Toy()
    x = torch.randn(4, 8)
    with torch.no_grad():
        hidden = x @ (base.q.weight + deltas["q.weight"].dense().float()).T + base.q.bias
        inner = base.inner["q"]
        expected = hidden @ (inner.weight + deltas["inner.q.weight"].dense().float()).T + inner.bias
        model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
        assert_close(model(x), expected, 1e-5)
    back = read_peft(tmp_path / "out")
    assert back.base == "toy/base"
    for name, delta in deltas.items():
        assert torch.equal(back[name].down, delta.down.float())  # type: ignore[attr-defined]
        assert torch.equal(back[name].up, delta.up.float())  # type: ignore[attr-defined]


def test_the_card_names_the_base_and_what_it_is(tmp_path: Path) -> None:
    write_peft({"q.weight": factors(2, 6, 8)}, tmp_path / "out", base_model="toy/base", task_type="CAUSAL_LM")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "toy/base" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["base_model:adapter:toy/base", "lora"]
    assert "1 linear layers" in card.text and f"- PEFT {peft.__version__}" in card.text
    write_peft({"q.weight": factors(2, 6, 8)}, tmp_path / "unnamed")
    assert ModelCard.load(tmp_path / "unnamed" / "README.md").data.base_model is None


def test_merged_adapters_round_trip_through_peft(tmp_path: Path) -> None:
    """Two LoRA folders of unequal rank and alpha, stacked, written, and read by PEFT: the weighted sum of both."""
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(r, 8, generator=g), torch.randn(6, r, generator=g)) for r in (2, 3)]
    folders = [lora_folder(tmp_path / f"a{t}", {"lin": p}, lora_alpha=5 + t) for t, p in enumerate(pairs)]
    before = [snapshot(f) for f in folders]
    merged = merge([read_peft(f) for f in folders], [0.5, -1.0], "stack")
    write_peft(merged, tmp_path / "out", base_model="toy/base")
    model = peft.PeftModel.from_pretrained(nn.ModuleDict({"lin": nn.Linear(8, 6)}), tmp_path / "out")
    expected = 0.5 * 5 / 2 * pairs[0][1] @ pairs[0][0] - 6 / 3 * pairs[1][1] @ pairs[1][0]
    assert_close(model.base_model.model["lin"].get_delta_weight("default"), expected, 1e-6)
    assert [snapshot(f) for f in folders] == before, "the adapters are untouched"


def test_squeezing_on_the_way_out_reports_the_error(tmp_path: Path) -> None:
    deltas = {"q.weight": stack([factors(3, 6, 8), factors(3, 6, 8, seed=1)]), "inner.q.weight": factors(2, 8, 6)}
    written = write_peft(deltas, tmp_path / "out", rank=4, dtype=torch.float64)
    full = deltas["q.weight"].dense()
    got = read_peft(tmp_path / "out")["q.weight"]
    s = torch.linalg.svdvals(full)
    optimal = float(s[4:].norm() / s.norm())
    assert written.errors.keys() == {"q.weight"}, "what fits is not squeezed"
    assert written.errors["q.weight"] == pytest.approx(optimal, rel=1e-10)
    assert float((got.dense() - full).norm() / full.norm()) == pytest.approx(optimal, rel=1e-10)


def test_no_change_is_written_as_rank_one_of_zeros(tmp_path: Path) -> None:
    write_peft({"q.weight": factors(2, 6, 8).zeros(), "inner.q.weight": factors(2, 8, 6)}, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(Toy(), tmp_path / "out")
    assert float(model.base_model.model.q.get_delta_weight("default").abs().max()) == 0


def test_a_kill_while_writing_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_peft({"q.weight": factors(2, 6, 8)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_merge_to_dense_then_write_is_refused_or_squeezed(tmp_path: Path) -> None:
    merged = merge([{"q.weight": factors(2, 6, 8, seed=s)} for s in range(2)], method="ties", density=0.5)
    with pytest.raises(ConfigError, match="dense"):
        write_peft(merged, tmp_path / "out")
    written = write_peft(merged, tmp_path / "out", rank=6)
    assert written.errors["q.weight"] < 1e-6
