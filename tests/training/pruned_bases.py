"""A full Llama of three key-value heads with two query heads each, and what a pruned one says of it; all in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS, CHANNELS, WIDTH = 6, 3, 40, 24


def full(layers: int = 2, **options: Any) -> LlamaForCausalLM:
    """Return the full model, with biases and weights large enough that each layer matters."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": CHANNELS, "num_key_value_heads": KV_HEADS, **options}
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
        **sizes,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def features(small: LlamaForCausalLM, layer: str) -> tuple[int, list[int]] | None:
    """Return of a layer its pruned axis and the kept features, by the definition of grouped heads; None of a whole one.

    Query head h reads key-value head h // (heads / kv heads).
    """
    block, kind, name = layer.removeprefix("model.").rsplit(".", 2)
    row = small.config.moa_pruned.get(f"{block}.{kind}")
    if row is None:
        return None
    kept, axis = set(row["kept"]), int(name in ("o_proj", "down_proj"))
    if kind == "mlp":
        return axis, sorted(kept)
    size, per = WIDTH // HEADS, 1 if name in ("k_proj", "v_proj") else HEADS // KV_HEADS
    n_heads = KV_HEADS if per == 1 else HEADS
    return axis, [head * size + d for head in range(n_heads) if head // per in kept for d in range(size)]


@torch.no_grad()
def without_the_rest(small: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the full model with zeros in all rows, columns and biases that the pruned one has not."""
    model = full(len(small.model.layers))
    for layer, module in model.named_modules():
        found = features(small, layer) if layer.endswith("_proj") else None
        if found is not None:
            axis, kept = found
            mask: Tensor = torch.zeros(module.weight.shape[axis], dtype=torch.float64)
            mask[kept] = 1
            module.weight.mul_(mask if axis else mask[:, None])
            if not axis:
                module.bias.mul_(mask)
    return model
