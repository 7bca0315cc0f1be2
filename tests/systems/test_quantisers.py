"""Mixtures over what the quantising packages make of a base. Run: pytest tests/systems/test_quantisers.py"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, FoldError, UnadaptedWarning
from moa.experts import FAMILIES
from moa.layers import dequantised, features
from tests import models
from tests.experts.test_families import KEYWORDS
from tests.laws import assert_close

from . import packed

kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in packed.SLOW)) for kind in packed.KINDS]
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # HQQ compiles its own
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LAYERS = 14


def bank_options(name: str) -> dict[str, Any]:
    return {**KEYWORDS.get(name, {}), **({"rank": 4} if "rank" in FAMILIES[name].uses else {})}


def of_package(layer: nn.Module) -> Tensor:
    """Return the weight (o, i) as the layer's own package unpacks it."""
    weight: Any = getattr(layer, "weight", None)
    if hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight().T
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if type(layer).__name__ == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, weight.SCB)
    return layer.dequantize() if weight is None else weight.dequantize()


def dense_twin(base: nn.Module) -> nn.Module:
    """Return the same decoder with dense layers of the weights that a quantised one's package says."""
    twin = packed.llama()
    for name, layer in twin.model.named_modules():
        if type(layer) is nn.Linear:
            layer.weight.data = of_package(base.model.get_submodule(name)).float().clone()
    return twin


def values_of(base: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a base (any shape), those unpacked that know few operations."""
    tensors = {name: value for name, value in base.state_dict().items() if isinstance(value, Tensor)}
    return {
        name: value.dequantize() if type(value).__module__.startswith("torchao") else value
        for name, value in tensors.items()
    }


@kinds
def test_a_step_teaches_every_layer(kind: str) -> None:
    base = packed.quantised(kind)
    frozen = {name: value.clone() for name, value in values_of(base).items()}
    model = models.randomise(moa.build(base, "topk", n_experts=3, k=2, rank=2), scale=0.1)
    assert len(model.mixtures()) == LAYERS
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**models.lm_batch()).loss.backward()
    for name in before:
        grad = model.get_parameter(name).grad
        assert grad is not None and bool(grad.isfinite().all()) and bool(grad.any()), name
    optimizer.step()
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())
    after = values_of(model.unload())
    assert after.keys() == frozen.keys() and all(torch.equal(after[name], frozen[name]) for name in frozen)


@kinds
def test_its_weight_is_what_the_package_says(kind: str) -> None:
    """Before and after it ran, in training and in evaluation: bitsandbytes moves its scales, and its codes, then."""
    base = packed.quantised(kind)
    layers = [layer for layer in base.model.modules() if features(layer) is not None]
    expected = [of_package(layer).float() for layer in layers]
    assert len(layers) == LAYERS
    for mode in (None, True, False):
        if mode is not None:
            base.train(mode)
            with torch.set_grad_enabled(mode):
                base(**models.token_batch())
        for layer, weight in zip(layers, expected, strict=True):
            found = dequantised(layer)
            assert found is not None and found.shape == weight.shape
            moved = kind.startswith("bnb-") and kind != "bnb-8bit" and mode is False  # its forward is in bf16 then
            assert_close(found.float(), weight, 1e-2 if moved else 1e-6)


@pytest.mark.parametrize("kind", ["gptq", "bnb-nf4", "hqq"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_what_it_is_over_the_dense_weight(name: str, kind: str) -> None:
    """Also those that begin at the base's weight, or multiply it."""
    base = packed.quantised(kind)
    options = bank_options(name)
    outputs = []
    for one in (dense_twin(base), base):
        torch.manual_seed(0)
        model = moa.build(one, "fixed", n_experts=2, expert=name, **options)
        rng = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
        outputs.append(models.outputs_of(model.train(), models.lm_batch()))
    assert_close(outputs[1], outputs[0], 3e-2 if kind == "bnb-nf4" else 1e-4)  # it runs in bf16


@kinds
def test_it_generates_saves_and_does_not_fold(kind: str, tmp_path: Path) -> None:
    base = packed.quantised(kind)
    model = models.randomise(moa.build(base, "topk", n_experts=3, k=2, rank=2), scale=0.3).eval()
    prompt = models.token_batch(3, 6)["input_ids"].clamp(min=2)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, **options, return_dict_in_generate=True, output_logits=True)
    full = models.outputs_of(model, {"input_ids": cached.sequences})
    coarse = kind.startswith("bnb-")  # rows of codes, or bf16
    assert_close(torch.stack(cached.logits, 1).float(), full[:, 5:-1].float(), 3e-2 if coarse else 1e-4)
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=packed.quantised(kind)).eval()
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))
    static = moa.build(packed.quantised(kind), "fixed", n_experts=2)
    with pytest.raises(FoldError, match=r"holds no dense weight to fold into"):
        static.merge_and_unload()


# ---------------------------------------------------------------- as transformers loads them


def _config(kind: str) -> Any:
    if kind == "bnb-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bnb-nf4":
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.QuantoConfig(weights="int8")


@pytest.mark.parametrize(
    "kind", ["quanto-int8", "bnb-8bit", "bnb-nf4", "torchao-int8"]
)  # HQQ: not yet in transformers 5
def test_the_trainer_trains_what_transformers_quantised(kind: str, tmp_path: Path) -> None:
    packed.quantised(kind)  # skips where the package is absent
    packed.llama().save_pretrained(tmp_path / "base")
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "base", dtype=torch.float32, device_map="cpu"
    )
    base = load(quantization_config=_config(kind))
    assert base.is_quantized
    model = moa.build(base, "topk", n_experts=3, k=2, rank=2)
    assert len(model.mixtures()) == LAYERS
    rows = [{key: value[0] for key, value in models.lm_batch(seed=seed).items()} for seed in range(8)]
    options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), max_steps=3, **options)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    ups = [p for name, p in model.named_parameters() if name.endswith("bank.up")]
    assert ups and all(bool(p.any()) for p in ups)
    model.eval().save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out", base=load(quantization_config=_config(kind))).eval()
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))


# ---------------------------------------------------------------- what cannot be adapted, or read


class Nameless(nn.Module):
    """Packed codes in a layer that says no sizes."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.inner = (dense.weight.detach() * 100).round().to(torch.int8)
        self.register_buffer("codes", self.inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T (*rows, o)."""
        return x @ self.codes.to(x.dtype).T / 100


def test_layers_without_sizes_are_named_with_their_class() -> None:
    with pytest.raises(
        ConfigError, match=r"14 layers hold codes and do not show their sizes, of class tests\..*Nameless"
    ):
        moa.build(packed.replaced(packed.llama(), Nameless), "topk")

    def mixed(layer: nn.Linear) -> nn.Module:
        return Nameless(layer) if layer.out_features == 128 else layer

    with pytest.warns(UnadaptedWarning, match=r"10 Linear; 4 layers hold codes .*\(model\.layers\.0\.mlp\.gate_proj\)"):
        model = moa.build(packed.replaced(packed.llama(), mixed), "topk", n_experts=2)
    assert len(model.mixtures()) == 10
    base = packed.replaced(packed.llama(), Nameless)
    for layer in base.model.modules():
        if isinstance(layer, Nameless):
            layer.in_features, layer.out_features = layer.codes.shape[1], layer.codes.shape[0]
    assert len(moa.build(base, "topk", expert="comp_lora").mixtures()) == LAYERS  # as the message says


class Bent(nn.Linear):
    """A layer of known sizes that is not a linear map."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh(x W^T) (*rows, o)."""
        return super().forward(x).tanh()


class Absent(nn.Module):
    """A layer that runs on another kind of device."""

    in_features, out_features = 64, 64

    def forward(self, x: Tensor) -> Tensor:
        """Refuse."""
        raise RuntimeError("needs a kernel for CUDA")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: _codes(Bent(64, 64, bias=False)), r"q_proj is a Bent, whose weight cannot be read as one matrix"),
        (Absent, r"q_proj: reading the weight of a Absent failed \(needs a kernel for CUDA\): choose a family"),
    ],
)
def test_a_weight_that_cannot_be_read_is_refused_by_name(layer: Callable[[], nn.Module], words: str) -> None:
    base = packed.llama()
    base.model.layers[0].self_attn.q_proj = layer()
    with pytest.raises(ConfigError, match=words):
        moa.build(base, "topk", expert="comp_lora", targets=["q_proj"])


def _codes(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.to(x.dtype)).tanh()
    return layer


def test_floats_of_8_bits_are_codes() -> None:
    """Their scale lies beside them: the layer's outputs are its weight, and nothing folds into them."""
    layer = transformers.integrations.finegrained_fp8.FP8Linear(64, 32, block_size=(16, 16))
    assert layer.weight.dtype == torch.float8_e4m3fn
    dense = torch.randn(32, 64)
    scale = dense.abs().amax() / 448
    layer.weight.data = (dense / scale).to(torch.float8_e4m3fn)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.to(x.dtype) * scale)  # its kernels need a GPU
    assert_close(dequantised(layer), layer.weight.float() * scale, 1e-6)
    base = nn.ModuleDict({"q": layer})
    with pytest.raises(FoldError, match="a FP8Linear holds no dense weight"):
        moa.build(base, "fixed", n_experts=2, targets=["q"]).merge_and_unload()
