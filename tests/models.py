"""Tiny models with random weights, one of each kind that moa must work on, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB, WIDTH, CLASSES = 32, 16, 3


def llama(**options: Any) -> LlamaForCausalLM:
    """Return a decoder of two layers with grouped-query attention."""
    torch.manual_seed(1)
    options = {"num_hidden_layers": 2, "hidden_size": WIDTH, **options}
    config = LlamaConfig(
        vocab_size=VOCAB,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    """Return a decoder whose linear layers are transformers' Conv1D."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def bert(**options: Any) -> BertForSequenceClassification:
    """Return an encoder with a classification head, without dropout."""
    torch.manual_seed(1)
    options = {"num_labels": CLASSES, **options}
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return BertForSequenceClassification(config).eval()


def t5() -> T5ForConditionalGeneration:
    """Return an encoder-decoder."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def vit() -> ViTForImageClassification:
    """Return an image classifier."""
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).eval()


class Plain(nn.Module):
    """A module that is no transformers model: two linears, and a loss in a tuple when it gets labels."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 24)
        self.down = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Return logits (B, C), or (loss, logits) with labels (B,)."""
        logits = self.down(torch.relu(self.up(x)))
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def plain() -> Plain:
    """Return a plain module."""
    torch.manual_seed(1)
    return Plain().eval()


def transformer_encoder() -> nn.TransformerEncoder:
    """Return PyTorch's own encoder, whose inference fast path reads weights without calling their layers."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def token_batch(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return input ids and an attention mask (B, S), right-padded by one token more from row to row."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, length), generator=rng)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        padding = row % (length // 2)
        if padding:
            mask[row, -padding:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def lm_batch(rows: int = 4, length: int = 8, prompt: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch for a decoder whose first `prompt` positions carry no label."""
    batch = token_batch(rows, length, seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :prompt] = -100
    return {**batch, "labels": labels}


def class_batch(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch for an encoder with a classification head; the class can be read off the first token."""
    batch = token_batch(rows, length, seed)
    return {**batch, "labels": batch["input_ids"][:, 0] % CLASSES}


def seq2seq_batch(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch for an encoder-decoder whose answers are shorter than its inputs."""
    batch = token_batch(rows, length, seed)
    labels = batch["input_ids"][:, : length - 2].clone()
    labels[0, -2:] = -100
    return {**batch, "labels": labels.masked_fill(labels == 0, -100)}


def image_batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch of images (B, 1, 8, 8) for the image classifier."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 1, 8, 8, generator=rng),
        "labels": torch.randint(CLASSES, (rows,), generator=rng),
    }


def plain_batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return a batch for the plain module."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, WIDTH, generator=rng),
        "labels": torch.randint(CLASSES, (rows,), generator=rng),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "llama": (llama, lm_batch),
    "gpt2": (gpt2, lm_batch),
    "bert": (bert, class_batch),
    "t5": (t5, seq2seq_batch),
    "vit": (vit, image_batch),
    "plain": (plain, plain_batch),
}


def outputs_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a batch, without gradient and in eval mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    model.train(was)
    return out.logits if hasattr(out, "logits") else out[1] if isinstance(out, tuple) else out


@torch.no_grad()
def randomise(model: nn.Module, scale: float = 0.3, seed: int = 3) -> nn.Module:
    """Draw every trainable parameter anew, so that no expert is zero, and return the model."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)
    return model
