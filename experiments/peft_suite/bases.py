"""Small random models for those that PEFT's tests fetch from the Hub: the same architectures, no network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

DECODER = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 255,
    "pad_token_id": 0,
}
GATED = {**DECODER, "intermediate_size": 24, "num_key_value_heads": 2}
GPT = {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0}
ENCODER = {**DECODER, "intermediate_size": 24, "type_vocab_size": 2}
SPREAD = {"initializer_range": 0.2}  # the tests look for a change of the outputs, which tiny weights would hide

# what a Hub id ends with -> (class, what its configuration is made of)
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 250},
    ),
    "tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {**GPT, "eos_token_id": 255}),
    "tiny-random-gpt2": ("GPT2LMHeadModel", {**GPT, "eos_token_id": 255}),
    "tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4, "eos_token_id": 255}),
    "tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GATED),
    "tiny-random-MistralForCausalLM": ("MistralForCausalLM", GATED),
    "tiny-dummy-qwen2": ("Qwen2ForCausalLM", GATED),
    "tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**GATED, "head_dim": 4, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {
            **{"vocab_size": 256, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
            **{"pad_token_id": 0, "eos_token_id": 255, "decoder_start_token_id": 0, "initializer_factor": 0.5},
        },
    ),
    "tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            **{"vocab_size": 256, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.2},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24},
            **{"decoder_ffn_dim": 24, "max_position_embeddings": 128, "pad_token_id": 250, "bos_token_id": 0},
            **{"eos_token_id": 255, "decoder_start_token_id": 0, "forced_eos_token_id": None},
        },
    ),
    "tiny-random-BertModel": ("BertModel", ENCODER),
    "tiny-random-RobertaModel": ("RobertaModel", {**ENCODER, "pad_token_id": 1}),
    "tiny-random-DebertaModel": ("DebertaModel", {**ENCODER, "type_vocab_size": 0}),
    "tiny-random-DebertaV2Model": ("DebertaV2Model", {**ENCODER, "type_vocab_size": 0}),
    "tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", ENCODER),
    "tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        {**ENCODER, "pad_token_id": 1},
    ),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {**GATED, "num_labels": 1}),
}


class Bases:
    """Folders of small models, made when a test first asks for one.

    Args:
        home: an empty folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def folder(self, hub_id: str) -> Path:
        """Return the folder that stands for a Hub id; without one of its kind, the test does not apply."""
        name = hub_id.rpartition("/")[2]
        if name not in BASES:
            pytest.skip(f"absent: no local model stands for {hub_id}")
        folder = self.home / name
        if not folder.exists():
            class_name, options = BASES[name]
            cls = getattr(transformers, class_name)
            options = options if {"init_std", "initializer_factor"} & options.keys() else {**options, **SPREAD}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                cls(cls.config_class(**options)).save_pretrained(folder)
        return folder

    def stand_in(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return a class's `from_pretrained` that reads Hub ids from the folders."""

        def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(name, str) or Path(name).exists():
                return load(cls, name, *args, **kwargs)
            model = load(cls, str(self.folder(name)), *args, **kwargs)
            model.config._name_or_path = model.name_or_path = name
            return model

        return from_pretrained


def no_network() -> None:
    """Let transformers read Hub ids from local models from now on."""
    home = tempfile.TemporaryDirectory(prefix="peft_suite_")
    bases = Bases(Path(home.name))
    bases.kept = home  # type: ignore[attr-defined]  # the folder lives as long as what reads from it
    autos = [auto for auto in vars(modeling_auto).values() if isinstance(auto, type)]  # each has a copy of its own
    for owner in (PreTrainedModel, *(auto for auto in autos if "from_pretrained" in vars(auto))):
        load = owner.from_pretrained.__func__
        owner.from_pretrained = classmethod(bases.stand_in(load))  # type: ignore[method-assign]
