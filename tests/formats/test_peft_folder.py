"""PEFT LoRA folders: read as PEFT reads them, or refused by name.  pytest tests/formats/test_peft_folder.py"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from moa.errors import CheckpointError, ConfigError
from moa.merge import merge, read_peft, write_checkpoint, write_peft
from tests import models
from tests.merge.tools import assert_close, lora_folder


class Toy(nn.Module):
    """Two blocks of two linears, unequal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(6, 8)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["v"](block["q"](x))
        return x


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_peft_computes(tmp_path: Path, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q", "v"],
        rank_pattern={"blocks.1.q": 2},
        alpha_pattern={"blocks.0.v": 5, "1.v": 7},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(Toy(), config)
    model.save_pretrained(tmp_path / "lora")
    lazy = read_peft(tmp_path / "lora")
    assert set(lazy) == {f"blocks.{b}.{m}.weight" for b in range(2) for m in "qv"}
    for name in lazy:
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        assert_close(lazy[name].dense(), layer.get_delta_weight("default"), 1e-6)
    assert lazy["blocks.1.q.weight"].rank == 2  # type: ignore[attr-defined]


def test_adapters_of_no_known_base_have_none(tmp_path: Path) -> None:
    pair = (torch.ones(2, 4), torch.ones(3, 2))
    assert read_peft(lora_folder(tmp_path / "a", {"m": pair})).base == "toy/base"
    assert read_peft(lora_folder(tmp_path / "b", {"m": pair}, base_model_name_or_path="")).base is None


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": "XLORA"}, "that its config lists under .adapters."),
        ({"peft_type": "MIXLORA"}, "feed-forward blocks behind a gate"),
        ({"r": 3}, "has rank 2, its config says 3"),
        ({"rank_pattern": {"m": 5}}, "has rank 2, its config says 5"),
        ({"r": "2"}, "r='2'"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"alpha_pattern": {"m": float("nan")}}, "alpha_pattern.'m'.=nan"),
        ({"rank_pattern": {"m": 1.5}}, "rank_pattern.'m'.=1.5"),
        ({"rank_pattern": [1]}, "rank_pattern=.1.: expected an object"),
        ({"r": 10**6}, "has rank 2, its config says 1000000"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, config: dict[str, object], match: str) -> None:
    folder = lora_folder(tmp_path / "a", {"m": (torch.ones(2, 4), torch.ones(3, 2))}, **config)
    with pytest.raises(CheckpointError, match=match):
        read_peft(folder)


@pytest.mark.parametrize(
    ("key", "tensor", "match"),
    [
        ("base_model.model.m.lora_magnitude_vector", torch.ones(3), "does not set use_dora"),
        ("base_model.model.m.lora_diag", torch.ones(2), "does not set kasa_config"),
        ("base_model.model.e.lora_embedding_A", torch.ones(2, 9), "embedding"),
        ("base_model.model.m.lora_B.bias", torch.ones(3), "does not set lora_bias"),
        ("base_model.model.head.weight", torch.ones(3, 3), "no LoRA factor"),
        ("base_model.model.n.lora_A.weight", torch.ones(2, 4), "only A of 'n' and no B"),
    ],
)
def test_tensors_that_would_be_lost_are_refused(tmp_path: Path, key: str, tensor: torch.Tensor, match: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = lora_folder(tmp_path / "a", {"m": (torch.ones(2, 4), torch.ones(3, 2))})
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), key: tensor}, file)
    with pytest.raises(CheckpointError, match=match):
        read_peft(folder)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        read_peft(tmp_path / "no")
    folder = lora_folder(tmp_path / "a", {"m": (torch.ones(2, 4), torch.ones(3, 2))})
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_peft(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin cannot be read"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="holds a list"):
        read_peft(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        read_peft(folder)


def test_a_bin_file_is_read_as_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = lora_folder(tmp_path / "a", {"m": (torch.ones(2, 4), torch.ones(3, 2))})
    expected = read_peft(folder)["m.weight"].dense()
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert torch.equal(read_peft(folder)["m.weight"].dense(), expected)


# ------------------------------------------------------------------------------------------------ Conv1D


def conv1d_adapters(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Return a GPT-2, whose layers store weights (i, o), and two adapters of it that peft saved."""
    base = tmp_path / "gpt2"
    models.gpt2().save_pretrained(base)
    folders = []
    for seed in range(2):
        targets = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square: there a wrong side raises nothing
        config = peft.LoraConfig(r=2 + seed, lora_alpha=5, target_modules=targets, fan_in_fan_out=True)
        model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / f"adapter{seed}")
        folders.append(tmp_path / f"adapter{seed}")
    return base, folders


def unloaded(base: Path, folder: Path) -> dict[str, Tensor]:
    """Return the weights that peft's merge_and_unload gives."""
    model = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), folder)
    state: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return state


# peft calls what transformers 5 has renamed
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_fan_in_fan_out_is_merged_as_peft_does(tmp_path: Path) -> None:
    base, folders = conv1d_adapters(tmp_path)
    plain = GPT2LMHeadModel.from_pretrained(base).state_dict()
    expected = {
        name: plain[name] + sum(0.5 * (own[name] - plain[name]) for own in (unloaded(base, f) for f in folders))
        for name in plain
    }
    merged = merge([read_peft(f) for f in folders], method="average")
    write_checkpoint(base, merged, tmp_path / "whole")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "whole").state_dict()
    for name in plain:
        assert_close(ours[name], expected[name], 1e-6)
    square = "transformer.h.0.attn.c_proj.weight"
    wrong = plain[square] + (expected[square] - plain[square]).T
    with pytest.raises(AssertionError):
        assert_close(ours[square], wrong, 1e-6)
    # as an adapter again
    write_peft(merged, tmp_path / "adapter", rank=5)
    again = unloaded(base, tmp_path / "adapter")
    for name in plain:
        assert_close(again[name], expected[name], 1e-5)


def test_adapters_of_two_layouts_are_not_merged(tmp_path: Path) -> None:
    pair = (torch.ones(2, 4), torch.ones(4, 2))
    one = lora_folder(tmp_path / "a", {"m": pair})
    other = lora_folder(tmp_path / "b", {"m": pair}, fan_in_fan_out=True)
    with pytest.raises(ConfigError, match="one of them is not for this base"):
        merge([read_peft(one), read_peft(other)], method="average")
