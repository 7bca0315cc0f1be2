"""vLLM itself on a merged checkpoint and on a merged adapter: make test-vllm"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moa.merge import merge, read_peft, write_checkpoint, write_peft
from tests.vllm_engine import GENERATE, NEEDS_ENGINE, run_engine

pytestmark = [
    *NEEDS_ENGINE,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT calls it
]
PROMPTS = [[5, 9, 33, 2, 71], [100, 4, 4, 18, 61, 7, 90]]


def by_vllm(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    return run_engine(GENERATE, str(folder), None if adapter is None else str(adapter), PROMPTS)


def by_transformers(model: torch.nn.Module) -> list[list[int]]:
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        out.append(made[0, len(prompt) :].tolist())
    return out


def test_vllm_generates_from_what_was_merged_as_transformers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for n in range(2):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(r=3 + n, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(base, lora).save_pretrained(tmp_path / f"lora{n}")
    merged = merge([read_peft(tmp_path / f"lora{n}") for n in range(2)], method="stack")
    write_checkpoint(tmp_path / "base", merged, tmp_path / "out", max_shard_bytes=40_000)
    write_peft(merged, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    expected = by_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert expected != by_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), "nothing was merged"
    assert by_vllm(tmp_path / "out") == expected
    assert by_vllm(tmp_path / "base", tmp_path / "adapter") == expected
