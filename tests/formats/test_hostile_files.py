"""Files that are damaged, forged, or written where others can read. Run: pytest tests/formats/test_hostile_files.py"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moa
from moa.errors import CheckpointError, MoaWarning, NumericsError
from moa.formats.peft_export import export_task
from moa.formats.tensor_files import Checkpoint
from moa.merge import write_checkpoint
from tests import laws, models


@pytest.fixture
def mixture() -> Any:
    return models.randomise(moa.build(models.llama(), "topk", n_experts=3, rank=2))


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_no_file_has_a_bit_that_the_umask_takes_away(mixture: Any, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        mixture.save_pretrained(tmp_path / "saved")
        moa.export_expert(mixture, 0, tmp_path / "exported")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path != tmp_path]
    assert len(files) > 5
    assert all(not path.stat().st_mode & 0o777 & mask for path in files), {p.name: oct(p.stat().st_mode) for p in files}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@laws.parametrize([case for case in laws.RECIPE_CASES if case[0] in ("topk", "mixlora", "poly", "flylora", "xcross")])
def test_a_diverged_model_does_not_replace_a_good_checkpoint(
    name: str, variant: str, value: float, tmp_path: Path
) -> None:
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)))
    model.save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    key, tensor = next((k, t) for k, t in model.adapter_state_dict().items() if ".bank." in k)
    tensor.view(-1)[0] = value
    with pytest.raises(NumericsError, match=rf"{key} holds NaN or infinity, so nothing was written"):
        model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert good.keys() == again.keys() and all(torch.equal(again[k], t) for k, t in good.items())
    moa.load(tmp_path, base=models.llama())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_diverged_expert_does_not_reach_the_base(value: float) -> None:
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=2, rank=2))
    name, mixture = next(iter(model.mixtures().items()))
    before = mixture.base.weight.clone()
    with torch.no_grad():
        mixture.branches[0].bank.up[1, 0, 0] = value
    for fold in (model.merge_and_unload, lambda: model.folded().__enter__()):
        with pytest.raises(NumericsError, match=rf"{name}: 0.bank.up holds NaN"):
            fold()
        assert torch.equal(mixture.base.weight, before)


def test_a_diverged_head_is_not_folded_or_exported(tmp_path: Path) -> None:
    model = moa.build(models.bert(), "fixed", n_experts=2, rank=2)
    mixture = next(iter(model.mixtures().values()))
    before = mixture.base.weight.clone()
    with torch.no_grad():
        model.base.classifier.bias[1] = float("nan")
    export = (lambda: moa.export_expert(model, 0, tmp_path / "out"), lambda: export_task(model, 0, tmp_path / "out"))
    for hand_on in (model.merge_and_unload, lambda: model.folded().__enter__(), *export):
        with pytest.raises(NumericsError, match=r"classifier\.bias holds NaN"):
            hand_on()
        assert torch.equal(mixture.base.weight, before) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@laws.parametrize([case for case in laws.RECIPE_CASES if case[0] in ("topk", "hydralora", "poly", "mixlora", "remix")])
@pytest.mark.parametrize("as_lora", [False, True])
def test_a_diverged_expert_is_not_exported(
    name: str, variant: str, value: float, as_lora: bool, tmp_path: Path
) -> None:
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)))
    for good in (0, 1):
        moa.export_expert(model, good, tmp_path / str(good), as_lora=as_lora)
    before = load_file(tmp_path / "0" / "adapter_model.safetensors")
    layer, branch = list(model.branches())[-1]
    with torch.no_grad():
        next(p for n, p in branch.bank.named_parameters() if n.endswith("up"))[0].view(-1)[0] = value
    with pytest.raises(NumericsError, match=rf"{layer}.* holds NaN or infinity"):
        moa.export_expert(model, 0, tmp_path / "0", as_lora=as_lora)
    again = load_file(tmp_path / "0" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in before.items())


def test_whole_numbers_are_not_read_as_weights(mixture: Any, tmp_path: Path) -> None:
    """The bits of 0.3, read as an integer, are 1,050,253,722."""
    mixture.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("bank.up"))
    tensors[key] = tensors[key].view(torch.int32)
    save_file(tensors, file, metadata=header)
    with pytest.raises(CheckpointError, match=rf"1 of another type: {key}: torch.int32 in the file, torch.float32"):
        moa.load(tmp_path, base=models.llama())


@pytest.mark.parametrize("entry", ["../elsewhere/x.safetensors", "/abs/x.safetensors", "a/../../x.safetensors"])
def test_an_index_stays_inside_its_folder(entry: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": entry}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    assert torch.equal(Checkpoint(tmp_path)["w"], torch.ones(2))


def test_a_base_that_was_trained_too_is_recognised_as_it_is(mixture: Any, tmp_path: Path) -> None:
    mixture.base.requires_grad_(True)
    with torch.no_grad():
        for parameter in mixture.base.parameters():
            parameter.mul_(1.5)
    with pytest.warns(MoaWarning, match="parameters of the base are trained and are not in this checkpoint"):
        mixture.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="wrong base"):
        moa.load(tmp_path, base=models.llama())


def test_a_base_without_anything_to_recognise_it_by_is_said(tmp_path: Path) -> None:
    mixture = moa.build(models.llama(), "topk", n_experts=3, rank=2)
    description = mixture.describe()
    description["base"]["fingerprint"] = {}
    from moa.formats import checkpoint

    checkpoint.write(tmp_path, description, mixture.adapter_state_dict())
    with pytest.warns(MoaWarning, match="was not checked"):
        moa.load(tmp_path, base=models.llama())


def test_offloaded_layers_get_experts_where_they_run() -> None:
    from accelerate import cpu_offload

    plain = models.randomise(moa.build(models.llama(), "topk", n_experts=3, rank=2))
    expected = models.outputs_of(plain, models.lm_batch())
    base = cpu_offload(models.llama(), execution_device=torch.device("cpu"))
    model = models.randomise(moa.build(base, "topk", n_experts=3, rank=2))
    assert all(p.device.type == "cpu" for _, branch in model.branches() for p in branch.parameters())
    laws.assert_close(models.outputs_of(model, models.lm_batch()), expected, 1e-6)


def test_a_link_out_of_a_base_is_not_copied(tmp_path: Path) -> None:
    """Merging into somebody's base and sharing the result would share a file of one's own; the Hub's cache is links."""
    cache = tmp_path / "models--a--b"
    base = cache / "snapshots" / "1"
    models.llama().save_pretrained(base)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abc").write_text("{}")
    (base / "tokenizer_config.json").symlink_to(cache / "blobs" / "abc")
    changes = {"model.layers.0.self_attn.q_proj.weight": torch.ones(16, 16)}
    write_checkpoint(base, changes, tmp_path / "good")
    assert (tmp_path / "good" / "tokenizer_config.json").read_text() == "{}"
    (tmp_path / "key").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to"):
        write_checkpoint(base, changes, tmp_path / "out")
    assert not (tmp_path / "out").exists()
