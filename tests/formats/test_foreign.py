"""Folders of MixLoRA and of peft's X-LoRA become recipes with the same outputs.

Run: pytest tests/formats/test_foreign.py
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from moa.errors import CheckpointError
from moa.formats.xlora_folder import OPTIONS as XLORA_OPTIONS
from tests import models
from tests.laws import assert_close
from tests.systems import adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

# ------------------------------------------------------------------------------------------------ MixLoRA

MLP, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "v_proj")
CONFIG: dict[str, Any] = {
    "peft_type": "MIXLORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "bias": "none",
    "r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.05,
    "target_modules": [*MLP, *ATTENTION],
    "routing_strategy": "mixlora",
    "num_experts": 4,
    "top_k": 2,
}


def mixlora_tensors(rank: int = 3, plain_rank: int = 3, mlp: tuple[str, ...] = MLP) -> dict[str, Tensor]:
    """Return random tensors under the names that TUDB-Labs' package reads."""
    g = torch.Generator().manual_seed(3)
    base = models.llama()
    out = {}
    for i, layer in enumerate(base.model.layers):
        out[f"mixlora.layers.{i}.mlp.moe_gate.weight"] = torch.randn(4, models.WIDTH, generator=g)
        names = [(f"self_attn.{n}", getattr(layer.self_attn, n), plain_rank) for n in ATTENTION]
        names += [(f"mlp.{n}.experts.{e}", getattr(layer.mlp, n), rank) for n in mlp for e in range(4)]
        for name, linear, r in names:
            key = f"mixlora.layers.{i}.{name}"
            out[f"{key}.lora_A.weight"] = torch.randn(r, linear.in_features, generator=g) * 0.3
            out[f"{key}.lora_B.weight"] = torch.randn(linear.out_features, r, generator=g) * 0.3
    return out


def mixlora_folder(path: Path, tensors: dict[str, Tensor], suffix: str = ".bin", **config: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    if suffix == ".bin":
        torch.save(tensors, path / "adapter_model.bin")
    else:
        save_file(tensors, path / "adapter_model.safetensors")
    return path


class ReferenceBlock(nn.Module):
    """The paper's block on a Llama feed-forward block, expert by expert, row by row."""

    def __init__(self, mlp: Any, tensors: dict[str, Tensor], layer: int, scale: float, k: int) -> None:
        super().__init__()
        self.mlp, self.tensors, self.layer, self.scale, self.k = mlp, tensors, layer, scale, k

    def linear(self, name: str, e: int, x: Tensor) -> Tensor:
        """Return one expert's linear of x (i,), (o,)."""
        key = f"mixlora.layers.{self.layer}.mlp.{name}.experts.{e}"
        y = getattr(self.mlp, name)(x)
        if f"{key}.lora_A.weight" not in self.tensors:
            return y
        a, b = self.tensors[f"{key}.lora_A.weight"], self.tensors[f"{key}.lora_B.weight"]
        return y + self.scale * (b.to(x) @ (a.to(x) @ x))

    def forward(self, x: Tensor) -> Tensor:
        """Return Σ w_e FFN_e(x) of x (B, S, d)."""
        gate = self.tensors[f"mixlora.layers.{self.layer}.mlp.moe_gate.weight"].to(x)
        out = []
        for row in x.reshape(-1, x.shape[-1]):
            w, chosen = (gate @ row).softmax(-1).topk(self.k)
            states = []
            for e in chosen.tolist():
                h = F.silu(self.linear("gate_proj", e, row)) * self.linear("up_proj", e, row)
                states.append(self.linear("down_proj", e, h))
            out.append(sum(a * s for a, s in zip(w / w.sum(), states, strict=True)))
        return torch.stack(out).view_as(x)


def reference(tensors: dict[str, Tensor], scale: float = 5 / 3, plain: float = 5 / 3, k: int = 2) -> Any:
    base = models.llama().double()
    for i, layer in enumerate(base.model.layers):
        for name in ATTENTION:
            a, b = (tensors[f"mixlora.layers.{i}.self_attn.{name}.lora_{f}.weight"].double() for f in "AB")
            getattr(layer.self_attn, name).weight.data += plain * b @ a
        layer.mlp = ReferenceBlock(layer.mlp, tensors, i, scale, k)
    return base


def logits(model: Any) -> Tensor:
    ids = models.token_batch(3, 6)["input_ids"].clamp(min=2)
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_mixlora_is_the_papers_block(tmp_path: Path, suffix: str) -> None:
    tensors = mixlora_tensors()
    ours = moa.load(mixlora_folder(tmp_path / "m", tensors, suffix), models.llama().double())
    expected = logits(reference(tensors))
    assert_close(logits(ours), expected, 1e-9)
    assert not torch.allclose(logits(ours), logits(models.llama().double()), atol=1e-2)
    (recipe, _), *_ = ours.recipes
    assert (recipe.name, recipe.n_experts, recipe.k, recipe.balance) == ("mixlora", 4, 2, 0.002)
    ours.save_pretrained(tmp_path / "ours")
    assert_close(logits(moa.load(tmp_path / "ours", models.llama().double())), expected, 1e-9)


def test_a_wrong_gate_is_seen(tmp_path: Path) -> None:
    tensors = mixlora_tensors()
    expected = logits(reference(tensors))
    key = "mixlora.layers.1.mlp.moe_gate.weight"
    ours = moa.load(mixlora_folder(tmp_path / "m", {**tensors, key: -tensors[key]}), models.llama().double())
    assert float((logits(ours) - expected).abs().max()) > 1e-3


def test_mixloras_options_are_honoured(tmp_path: Path) -> None:
    """Experts of another rank and scale than the attention's, rsLoRA, k = 1, no loss, jitter in training alone."""
    tensors = mixlora_tensors(rank=2, plain_rank=3)
    expert = {"r": 2, "lora_alpha": 7, "use_rslora": True}
    options = {"expert_lora": expert, "top_k": 1, "router_loss": False, "jitter_noise": 0.1}
    ours = moa.load(mixlora_folder(tmp_path / "m", tensors, **options), models.llama().double())
    assert_close(logits(ours), logits(reference(tensors, 7 / 2**0.5, 5 / 3, 1)), 1e-9)
    (recipe, _), *_ = ours.recipes
    assert (recipe.balance, recipe.jitter, recipe.dropout) == (0.0, 0.1, 0.05)


def test_a_linear_without_experts_gets_zero_ones(tmp_path: Path) -> None:
    tensors = mixlora_tensors(mlp=("up_proj", "down_proj"))
    ours = moa.load(mixlora_folder(tmp_path / "m", tensors), models.llama().double())
    assert_close(logits(ours), logits(reference(tensors)), 1e-9)


def test_names_from_before_the_packages_converter(tmp_path: Path) -> None:
    tensors = mixlora_tensors()
    old = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if "moe_gate" in key:
            key = f"mixlora.layers.{parts[2]}.gate.weight"
        elif "experts" in key:
            linear = {"gate_proj": "w1_proj", "down_proj": "w2_proj"}.get(parts[4], parts[4])
            key = f"mixlora.layers.{parts[2]}.experts.{parts[6]}.{linear}.{parts[7]}.weight"
        old[key] = tensor
    ours = moa.load(mixlora_folder(tmp_path / "m", old, routing_strategy="mixtral"), models.llama().double())
    assert_close(logits(ours), logits(reference(tensors)), 1e-9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"routing_strategy": "mixlora-dynamic"}, "routing_strategy 'mixlora-dynamic'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"num_experts": 3}, "expert 3 of"),
        ({"num_experts": 5}, r"gate of layer 0 is \(4, 16\), expected \(5, 16\)"),
        ({"r": 4}, "expected \\(4, 16\\)"),
        ({"top_k": 9}, "k"),
        ({"peft_type": "MOLA"}, "MOLA adapter"),
        ({"peft_type": "LORA"}, "experts="),
    ],
)
def test_what_mixlora_options_have_no_counterpart_is_named(tmp_path: Path, config: Any, message: str) -> None:
    base = models.llama()
    with pytest.raises(CheckpointError, match=message):
        moa.load(mixlora_folder(tmp_path / "m", mixlora_tensors(), **config), base)
    assert not any(isinstance(m, moa.Mixture) for m in base.modules())


def test_damaged_mixlora_files_are_named(tmp_path: Path) -> None:
    tensors = mixlora_tensors()
    lost = {k: t for k, t in tensors.items() if "layers.1.mlp.moe_gate" not in k}
    with pytest.raises(CheckpointError, match="layer 1, and no gate"):
        moa.load(mixlora_folder(tmp_path / "gate", lost), models.llama())
    half = {k: t for k, t in tensors.items() if k != "mixlora.layers.0.mlp.up_proj.experts.2.lora_B.weight"}
    with pytest.raises(CheckpointError, match="only factor A"):
        moa.load(mixlora_folder(tmp_path / "half", half), models.llama())
    with pytest.raises(CheckpointError, match="no tensor of the MixLoRA layout"):
        moa.load(mixlora_folder(tmp_path / "more", {**tensors, "x": torch.ones(1)}), models.llama())
    with pytest.raises(CheckpointError, match="does not have"):
        moa.load(mixlora_folder(tmp_path / "deep", tensors), models.llama(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="expected"):
        moa.load(mixlora_folder(tmp_path / "wide", tensors), models.llama(hidden_size=32))
    cut = mixlora_folder(tmp_path / "cut", tensors)
    (cut / "adapter_model.bin").write_bytes((cut / "adapter_model.bin").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        moa.load(cut, models.llama())
    (cut / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is missing"):
        moa.load(cut, models.llama())
    with pytest.raises(CheckpointError, match="names no base"):
        moa.load(tmp_path / "more")


class Harmful:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    folder = mixlora_folder(tmp_path / "m", {})
    torch.save({"x": Harmful()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        moa.load(folder, models.llama())
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read"):
        moa.load(folder, models.llama())


# ------------------------------------------------------------------------------------------------ X-LoRA


def pefts_xlora(tmp_path: Path, n: int = 3, **options: Any) -> tuple[Any, Path]:
    """Return peft's X-LoRA over n adapters, and the folder into which peft saved it."""
    folders = adapters.write(tmp_path, models.llama, n=n, ranks=(4, 4, 2)[:n])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = models.llama()
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
        base.config.use_cache = False
        named = {str(i): str(path) for i, path in enumerate(folders)}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=models.WIDTH, adapters=named, **options)
        model = peft.get_peft_model(base, config).eval()
        g = torch.Generator().manual_seed(0)
        for p in model.base_model.internal_xlora_classifier.parameters():
            p.data = torch.randn(p.shape, generator=g)
        model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax_topk": True},
        {"enable_softmax": False, "softmax_temperature": 0.5},
        {"softmax_temperature": 0.5, "global_scaling_weight": 1.7},
        {"layerwise_scalings": True},
        {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0},
        {"xlora_depth": 2, "xlora_size": 8},
        {"xlora_depth": 3, "xlora_size": 8},
    ],
    ids=str,
)
def test_xlora_is_pefts(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs, saved = pefts_xlora(tmp_path, **options)
    ours = moa.load(saved, dtype=torch.float32)
    expected = logits(theirs)
    assert_close(logits(ours), expected, 1e-5)
    assert float((logits(models.llama()) - expected).abs().max()) > 1e-2
    assert adapters.frozen(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert_close(logits(moa.load(tmp_path / "ours")), expected, 1e-5)


def test_one_adapter_is_read_from_where_peft_saved_it(tmp_path: Path) -> None:
    theirs, saved = pefts_xlora(tmp_path, n=1, enable_softmax=False)
    shutil.rmtree(tmp_path / "adapter0")
    assert_close(logits(moa.load(saved)), logits(theirs), 1e-5)


def test_adapters_put_beside_the_classifier_come_first(tmp_path: Path) -> None:
    theirs, saved = pefts_xlora(tmp_path, xlora_depth=2, xlora_size=8)
    expected = logits(theirs)
    for number in (1, 2):
        shutil.rmtree(saved / str(number))
        shutil.move(tmp_path / f"adapter{number}", saved / str(number))
    assert_close(logits(moa.load(saved)), expected, 1e-5)


def test_torn_xlora_folders_are_refused(tmp_path: Path) -> None:
    _, saved = pefts_xlora(tmp_path)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "use_trainable_adapters": True}))
    with pytest.raises(CheckpointError, match="what was trained is lost"):
        moa.load(saved)
    (saved / "adapter_config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "adapter1")
    with pytest.raises(CheckpointError, match="adapter 1 is not complete"):
        moa.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_pass_value": 0.5}, "scaling_pass_value=0.5"),
        ({"enable_softmax_topk": True}, "without top_k_lora"),
        ({"adapters": {"math": "x", "code": "y"}}, "expected '0', '1'"),
        ({"xlora_depth": 2}, r"layers \[0\], expected \[0, 3\]"),
        ({"layerwise_scalings": True}, "classifier"),
        ({"softmax_temperature": 0.0}, "temperature"),
        ({"top_k_lora": 7}, "does not become an xlora recipe"),
        ({"use_tomorrow": 0.5}, "use_tomorrow=0.5, an option that this version of moa does not know"),
    ],
)
def test_what_xlora_options_have_no_counterpart_is_named(tmp_path: Path, change: Any, message: str) -> None:
    _, saved = pefts_xlora(tmp_path)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        moa.load(saved)


def test_every_option_of_pefts_xlora_is_known() -> None:
    assert set(XLORA_OPTIONS) == {field.name for field in dataclasses.fields(peft.XLoraConfig)}


@pytest.mark.parametrize(("option", "value"), [("alora_invocation_tokens", [5]), ("init_lora_weights", "pissa")])
def test_an_adapter_is_read_by_the_same_list_as_everywhere(tmp_path: Path, option: str, value: Any) -> None:
    """PEFT moves the base once for each PiSSA adapter, under all of them: no mixture of experts on this base."""
    _, saved = pefts_xlora(tmp_path)
    file = tmp_path / "adapter1" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    with pytest.raises(CheckpointError, match=f"adapter1 sets {option}="):
        moa.load(saved)


def test_another_adapters_classifier_is_refused(tmp_path: Path) -> None:
    _, saved = pefts_xlora(tmp_path)
    file = saved / "adapter_model.safetensors"
    key = "base_model.internal_xlora_classifier.layers.0."
    save_file({**load_file(file), f"{key}weight": torch.ones(2, 16), f"{key}bias": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="layer 0 of the classifier"):
        moa.load(saved)
    save_file({"other": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="no tensor of an X-LoRA classifier"):
        moa.load(saved)
