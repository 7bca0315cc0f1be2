"""Bases whose layers hold codes: by the packages that quantise, and stand-ins for layers that need a GPU to be made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 16  # inputs under one scale


def llama() -> LlamaForCausalLM:
    """Return a decoder of two layers whose sizes every package can pack: bitsandbytes wants 64 inputs, 32 outputs."""
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape, **special)).eval()


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Give (parent, name, layer) of every plain linear layer (i -> o) of a decoder's blocks."""
    for path, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            yield model.model.get_submodule(parent), name, layer


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Return a decoder, (B, S) -> logits, with what `make` makes of the linear layers of its blocks."""
    for parent, name, layer in linears(model):
        setattr(parent, name, make(layer))
    return model


def packed(codes: Tensor, axis: int) -> Tensor:
    """Return codes of 4 bits packed by eights into int32 along an axis, the first one lowest."""
    parts = codes.unflatten(axis, (-1, 8)).movedim(axis + 1, 0).to(torch.int64)  # (8, …)
    word = sum(part << 4 * place for place, part in enumerate(parts))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpacked(words: Tensor, axis: int) -> Tensor:
    """Return what `packed` packed along an axis."""
    shifts = torch.arange(0, 32, 4)
    return (words.unsqueeze(axis + 1) >> shifts.view(-1, *[1] * (words.ndim - 1 - axis)) & 15).flatten(axis, axis + 1)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (i, o), zeros (i / 16, o) and scales (i / 16, o) of 4 bits of a weight (o, i)."""
    groups = weight.detach().T.unflatten(0, (-1, GROUP))  # (i / 16, 16, o)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round()
    codes = (groups / scales.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 15)
    return codes.flatten(0, 1).int(), zeros.int(), scales


class QuantLinear(nn.Module):
    """As GPTQ's packages have it: `infeatures`, codes packed along the inputs, groups by `g_idx`, no `weight`."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures, self.bits = dense.in_features, dense.out_features, 4
        codes, zeros, scales = rounded(dense.weight)
        self.register_buffer("qweight", packed(codes, 0))  # (i / 8, o)
        self.register_buffer("qzeros", packed(zeros, 1))  # (i / 16, o / 8)
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", torch.arange(dense.in_features) // GROUP)
        self.bias = None

    def dequantize_weight(self) -> Tensor:
        """Return the weight as this package has it, (i, o)."""
        zeros = unpacked(self.qzeros, 1)
        return (unpacked(self.qweight, 0) - zeros[self.g_idx]) * self.scales[self.g_idx]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T (*rows, o)."""
        return x @ self.dequantize_weight().to(x.dtype)


class WQLinear(nn.Module):
    """As AWQ's package has it: codes packed along the outputs in an order of their own, its own backward."""

    ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w_bit = dense.in_features, dense.out_features, 4
        codes, zeros, scales = rounded(dense.weight)
        self.register_buffer("qweight", packed(self._ordered(codes), 1))  # (i, o / 8)
        self.register_buffer("qzeros", packed(self._ordered(zeros), 1))
        self.register_buffer("scales", scales)
        self.bias = None

    def _ordered(self, codes: Tensor) -> Tensor:
        return codes.unflatten(1, (-1, 8))[:, :, list(self.ORDER)].flatten(1)

    def dequantize_weight(self) -> Tensor:
        """Return the weight as this package has it, (i, o)."""
        back = [self.ORDER.index(place) for place in range(8)]
        codes, zeros = (
            unpacked(w, 1).unflatten(1, (-1, 8))[:, :, back].flatten(1) for w in (self.qweight, self.qzeros)
        )
        return (codes - zeros.repeat_interleave(GROUP, 0)) * self.scales.repeat_interleave(GROUP, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T (*rows, o), without a gradient in evaluation."""
        weight = self.dequantize_weight().to(x.dtype)
        if self.training:
            return Product.apply(x, weight)
        with torch.no_grad():
            return Product.apply(x, weight)


class Product(torch.autograd.Function):
    """x W of x (B, S, i) and W (i, o), with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.saved_tensors[0].T, None


def bnb_8bit(model: nn.Module) -> nn.Module:
    """Quantise by bitsandbytes to int8."""
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    return replaced(model, make)


def bnb_4bit(model: nn.Module, kind: str = "nf4", **options: Any) -> nn.Module:
    """Quantise by bitsandbytes to 4 bits."""
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, False)
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type=kind)
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind, **options)
        return new.to("cpu")

    return replaced(model, make)


def torchao_int8(model: nn.Module) -> nn.Module:
    """Quantise by torchao to weight-only int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def torchao_int4(model: nn.Module) -> nn.Module:
    """Quantise by torchao to weight-only int4 in groups: its packed formats need a GPU, this one does not."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(model.model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return model


def quanto(model: nn.Module, kind: str = "qint8") -> nn.Module:
    """Quantise by optimum-quanto."""
    from optimum import quanto

    quanto.quantize(model.model, weights=getattr(quanto, kind))
    quanto.freeze(model.model)
    return model


def hqq(model: nn.Module) -> nn.Module:
    """Quantise by HQQ to 4 bits."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return replaced(model, lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))


# name -> (the package that it needs, how); the development set has optimum-quanto, `make test-quantised` the others
KINDS: dict[str, tuple[str | None, Callable[[nn.Module], nn.Module]]] = {
    "gptq": (None, lambda model: replaced(model, QuantLinear)),
    "awq": (None, lambda model: replaced(model, WQLinear)),
    "quanto-int8": ("optimum.quanto", quanto),
    "quanto-int4": ("optimum.quanto", lambda model: quanto(model, "qint4")),
    "bnb-8bit": ("bitsandbytes", bnb_8bit),
    "bnb-nf4": ("bitsandbytes", bnb_4bit),
    "bnb-fp4": ("bitsandbytes", lambda model: bnb_4bit(model, "fp4", compress_statistics=False)),
    "torchao-int8": ("torchao", torchao_int8),
    "torchao-int4": ("torchao", torchao_int4),
    "hqq": ("hqq", hqq),
}

SLOW = {"quanto-int4"}  # compiles its kernels first


def quantised(kind: str) -> nn.Module:
    """Return a quantised decoder, (B, S) -> logits, or skip the test where its package is absent."""
    package, how = KINDS[kind]
    if package is not None and not _installed(package):
        pytest.skip(f"{package} is not installed: make test-quantised brings it")
    return how(llama())


def _installed(package: str) -> bool:
    parts = package.split(".")
    return importlib.util.find_spec(parts[0]) is not None and importlib.util.find_spec(package) is not None
