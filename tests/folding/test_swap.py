"""A static mixture as a plain model, for a while or on disk. Run: pytest tests/folding/test_swap.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import moa
from moa.errors import CheckpointError, ConfigError, FoldError
from moa.folding.save import save_folded
from tests import models
from tests.laws import assert_close
from tests.tiny_run import decoder_folder, tokenizer


def build(kind: str = "llama", router: str = "fixed", base=None, **options) -> moa.MoAModel:
    base = models.MODELS[kind][0]() if base is None else base
    return models.randomise(moa.build(base, router, **{"rank": 2, **options})).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", list(models.MODELS))
def test_the_base_comes_back_bit_for_bit(kind):
    model, batch = build(kind, n_experts=2), models.MODELS[kind][1]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    expected = models.outputs_of(model, batch)
    with model.folded() as base:
        assert_close(models.outputs_of(model, batch), expected, 1e-5)
        assert base is model.base
        changed = [n for n, p in model.named_parameters() if p is not parameters[n]]
        assert changed == [f"base.{name}.base.weight" for name in model.mixtures()]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert torch.equal(models.outputs_of(model, batch), expected)


def test_a_bias_that_folding_made_is_gone_again():
    model = build(router="hydra", biases=True, targets=["down_proj"])
    layer = next(iter(model.mixtures().values())).base
    with model.folded():
        assert layer.bias is not None
    assert layer.bias is None


def test_an_error_inside_gives_the_base_back():
    model = build()
    weights = [m.base.weight for m in model.mixtures().values()]
    with pytest.raises(KeyError), model.folded():
        raise KeyError
    assert all(m.base.weight is w for m, w in zip(model.mixtures().values(), weights, strict=True))
    with pytest.raises(FoldError, match="depends on the input"), build(router="topk").folded():
        pass


def test_what_needs_the_frozen_base_waits(tmp_path):
    model = build()
    with model.folded():
        with pytest.raises(ConfigError, match="inside `folded`"), model.pin_expert(0):
            pass
        with pytest.raises(ConfigError, match="saving needs the frozen base"):
            model.save_pretrained(tmp_path)
        for twice in (model.merge_and_unload, model.folded):
            with pytest.raises(ConfigError, match="needs the frozen base"):
                twice()
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", list(models.MODELS))
def test_disabled_inside_it_is_the_base_as_it_came(kind, tmp_path):
    model, batch = build(kind, n_experts=2), models.MODELS[kind][1]()
    plain = models.outputs_of(models.MODELS[kind][0](), batch)
    with model.folded():
        folded = models.outputs_of(model, batch)
        for _ in range(2):
            with model.disable_adapter():
                assert torch.equal(models.outputs_of(model, batch), plain)
                model.save_pretrained(tmp_path)  # the base is the frozen one again
            assert torch.equal(models.outputs_of(model, batch), folded) and not torch.equal(folded, plain)
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert torch.equal(models.outputs_of(model, batch), folded)
        with pytest.raises(ConfigError, match="saving needs the frozen base"):
            model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, batch), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_the_folded_checkpoint(tmp_path, sharded, dtype):
    folder = decoder_folder(tmp_path / "base")
    (folder / "LICENSE").write_text("free")
    before = contents(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = build(base=base, n_experts=2, targets=["q_proj", "down_proj"])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    out = save_folded(model, tmp_path / "out", max_shard_size="5KB" if sharded else "5GB")
    again = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[3, 4, 5, 6]])
    with model.folded(), torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.dtype == dtype
    assert AutoTokenizer.from_pretrained(out)("good film")["input_ids"] == tokenizer()("good film")["input_ids"]
    assert (out / "LICENSE").read_text() == "free"
    assert len(list(out.glob("*.safetensors"))) > 1 if sharded else (out / "model.safetensors").is_file()
    assert again.lm_head.weight.equal(base.lm_head.weight)
    assert contents(folder) == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert len(model.mixtures()) == 4


def test_a_conv1d_model(tmp_path):
    model = build("gpt2", n_experts=2)
    again = GPT2LMHeadModel.from_pretrained(save_folded(model, tmp_path / "out"))
    assert_close(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()), 1e-5)


def test_one_task_of_several(tmp_path):
    model = build(router="poly", n_experts=3, n_tasks=2)
    for task in (0, 1):
        out = save_folded(model, tmp_path / str(task), task_id=task)
        batch = models.lm_batch()
        expected = models.outputs_of(model, {**batch, "task_ids": torch.full((4,), task)})
        assert_close(models.outputs_of(AutoModelForCausalLM.from_pretrained(out), batch), expected, 1e-5)
        with model.folded(task):
            assert_close(models.outputs_of(model, batch), expected, 1e-5)


def test_the_folded_model_is_a_base_like_any_other(tmp_path):
    out = save_folded(build(n_experts=2), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    second = build(base=AutoModelForCausalLM.from_pretrained(out), router="topk", n_experts=2, k=1)
    assert len(second.mixtures()) == 14


def test_refusals_write_nothing(tmp_path):
    folder = decoder_folder(tmp_path / "base")
    model = build(base=AutoModelForCausalLM.from_pretrained(folder))
    before = contents(tmp_path)
    with pytest.raises(FoldError, match=r"depends on the input"):
        save_folded(build(router="topk"), tmp_path / "out")
    with pytest.raises(ConfigError, match="no transformers model"):
        save_folded(build("plain"), tmp_path / "out")
    with pytest.raises(ConfigError, match="the same or one holds the other"):
        save_folded(model, folder, overwrite=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        save_folded(model, tmp_path / "there")
    assert contents(tmp_path) == before and not list((tmp_path / "there").iterdir())


def test_a_kill_while_writing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    model = build(base=AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path / "base")))

    def killed(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", killed)
    with pytest.raises(OSError, match="No space left"):
        save_folded(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
