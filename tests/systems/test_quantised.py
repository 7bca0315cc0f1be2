"""Mixtures over bases whose layers hold codes. Run: pytest tests/systems/test_quantised.py"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from moa.errors import ConfigError, FoldError
from moa.mixture.mixture import plain_weight
from tests import laws, models
from tests.laws import assert_close

from . import adapters

# PyTorch says so of its own quantised layers
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize_dynamic:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    # peft calls what transformers 5 has renamed
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


class Int8Linear(nn.Module):
    """A frozen linear of int8 codes with one scale per output: no `nn.Linear`, as in bitsandbytes, GPTQ and AWQ."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b (*rows, o), W read from its codes."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Hidden(Tensor):
    """Codes behind a tensor that calls itself floating and knows F.linear alone, as torchao's do."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, dense: Tensor) -> Hidden:
        self = Tensor._make_wrapper_subclass(cls, dense.shape, dtype=dense.dtype)
        self.scale = dense.abs().amax(1, keepdim=True) / 127
        self.codes = (dense / self.scale).round().to(torch.int8)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.codes.to(x.dtype) * weight.scale, *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} on hidden codes")

    def __deepcopy__(self, memo: Any) -> Hidden:
        return self


def as_modules(model: nn.Module) -> nn.Module:
    """Replace every linear of the blocks by an `Int8Linear`."""
    for path, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(parent), name, Int8Linear(module))
    return model


def as_tensors(model: nn.Module) -> nn.Module:
    """Keep every linear of the blocks, its weight hidden codes."""
    for module in model.model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Hidden(module.weight.detach()), requires_grad=False)
    return model


def dynamic(model: nn.Module) -> nn.Module:
    """Quantise by PyTorch's own dynamic int8 layers, which are for inference."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def codes_of(model: nn.Module) -> list[Int8Linear]:
    """Return the model's layers of codes."""
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


TRAINABLE = {"modules": as_modules, "tensors": as_tensors}
ALL = {**TRAINABLE, "dynamic": dynamic}


def test_the_base_is_quantised() -> None:
    dense = models.llama()
    for kind, quantise in ALL.items():
        base = quantise(models.llama())
        layer = base.model.layers[0].mlp.up_proj
        assert plain_weight(layer) is None, kind
        x = torch.randn(3, layer.in_features)
        exact = dense.model.layers[0].mlp.up_proj(x)
        assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.02, kind


@pytest.mark.parametrize("kind", list(TRAINABLE))
@laws.parametrize(laws.RECIPE_CASES)
def test_every_recipe_trains(name: str, variant: str, kind: str) -> None:
    """Values are those over a dense base of the same weights, and so are the gradients; folding says why not."""
    batch = models.lm_batch()
    if laws.needs_tasks(name):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    dense = models.llama()
    for layer, codes in zip(dense.model.modules(), as_modules(models.llama()).model.modules(), strict=True):
        if isinstance(codes, Int8Linear):
            layer.weight.data = codes.weight * codes.scale
    results, names = [], []
    for base in (TRAINABLE[kind](models.llama()), dense):
        torch.manual_seed(0)
        model = models.randomise(moa.build(base, laws.small_recipe(name, variant)))
        names.append(list(model.mixtures()))
        for _, branch in model.branches():
            branch.router.eval()
        model.train()
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, grads, model))
    (loss, grads, quantised), (expected, references, _) = results
    assert names[0] == names[1]
    assert_close(loss, expected, 1e-5)
    for key, reference in references.items():
        assert_close(grads[key], reference, 1e-3, key)
    with pytest.raises(FoldError, match=r"layers\.0.*(holds no dense weight to fold into|a layer of a block|depends)"):
        quantised.merge_and_unload()


@pytest.mark.parametrize("kind", list(ALL))
def test_a_static_mixture_is_refused_for_the_codes(kind: str) -> None:
    base = ALL[kind](models.llama())
    weights = [m.weight for m in codes_of(base)]
    model = moa.build(base, "fixed", n_experts=2)
    with pytest.raises(FoldError, match="holds no dense weight to fold into"):
        model.merge_and_unload()
    with pytest.raises(FoldError, match="holds no dense weight"), model.folded():
        pass
    assert all(w is m.weight for w, m in zip(weights, codes_of(base), strict=True))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters for the tiny Llama."""
    return adapters.write(tmp_path, models.llama)


def xlora(kind: str, folders: list[Path], **options: Any) -> Any:
    return models.randomise(moa.build(ALL[kind](models.llama()), "xlora", experts=folders, **options), scale=1.0).eval()


@pytest.mark.parametrize("kind", list(ALL))
def test_xlora_with_a_cache_is_xlora_without(kind: str, folders: list[Path]) -> None:
    model = xlora(kind, folders)
    prompt = models.token_batch(3, 6)["input_ids"].clamp(min=2)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    if kind == "dynamic":  # its activations' range is that of the rows at hand: one step differs from all at once
        assert model.generate(prompt, **options).shape == (3, 12)
        return
    cached = model.generate(prompt, **options, return_dict_in_generate=True, output_logits=True)
    full = models.outputs_of(model, {"input_ids": cached.sequences})
    assert_close(torch.stack(cached.logits, 1), full[:, 5:-1], 1e-5)
    with model.disable_adapter():
        assert not torch.allclose(models.outputs_of(model, {"input_ids": cached.sequences}), full, atol=1e-3)


@pytest.mark.parametrize("kind", list(TRAINABLE))
@pytest.mark.parametrize("reentrant", [False, True])
def test_xlora_learns_with_checkpointing(kind: str, folders: list[Path], reentrant: bool) -> None:
    plain = xlora(kind, folders, layerwise=True).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(**models.lm_batch()).loss.backward()
    trained = [n for n, p in plain.named_parameters() if p.requires_grad]
    assert trained and all(".router." in n for n in trained)
    for name in trained:
        grad = plain.get_parameter(name).grad
        assert grad is not None and bool(grad.any()), name
        assert_close(checkpointed.get_parameter(name).grad, grad, 1e-5, name)


@pytest.mark.parametrize("kind", list(ALL))
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = models.randomise(moa.build(ALL[kind](models.llama()), "topk", n_experts=3, rank=2)).eval()
    before = models.outputs_of(model, models.lm_batch())
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=ALL[kind](models.llama()))
    assert torch.equal(models.outputs_of(again, models.lm_batch()), before)


@pytest.mark.parametrize("router", ["topk", "mixlora"])
def test_a_base_without_gradients_is_refused_in_training_alone(router: str) -> None:
    """Its layers would cut what lies before them off from the loss without a word."""
    model = moa.build(dynamic(models.llama()), router, n_experts=3, rank=2)
    model.train()
    with pytest.raises(ConfigError, match=r"self_attn\..*no gradient goes through a torch\.ao\.nn\.quantized"):
        model(**models.lm_batch())
    model.eval()
    assert models.outputs_of(model, models.lm_batch()).isfinite().all()
