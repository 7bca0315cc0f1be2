"""Mixtures in vLLM: the same tokens and log-probabilities as transformers. Run: make test-vllm"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moa
from moa.serving.vllm.vllm_folder import export_vllm
from tests.vllm_engine import NEEDS_ENGINE, run_engine

pytestmark = NEEDS_ENGINE
NEW = 10
PROMPTS = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 22, 9, 70, 31)]
# all at once in chunks of 48 tokens, again with a warm prefix cache, then one by one
SCRIPT = """
from vllm import LLM, SamplingParams

folders, prompts, new = arguments
def run(model, prompts):
    sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True, logprobs=0)
    out = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    sequences = [o.outputs[0] for o in out]
    return [[list(s.token_ids), [s.logprobs[n][t].logprob for n, t in enumerate(s.token_ids)]] for s in sequences]
found = []
for folder in folders:
    model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
                gpu_memory_utilization=0.1, max_num_batched_tokens=48, max_num_seqs=8, block_size=32)
    found.append([run(model, prompts), run(model, prompts), [run(model, [p])[0] for p in prompts]])
    del model
answer(found)
"""
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"n_experts": 4, "targets": "all-linear"},
    "mixlora": {"n_experts": 4},
    "hydra": {},
    "hydralora": {},
}


def base(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def trained(model: moa.MoAModel) -> moa.MoAModel:
    """Give experts and routers values that move the tokens."""
    generator = torch.Generator().manual_seed(5)
    for _, branch in model.branches():
        for parameter in branch.parameters():
            parameter.data.normal_(0, 0.15, generator=generator)
    return model.eval()


def by_transformers(model: Any) -> list[tuple[list[int], list[float]]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        logits = model(input_ids=made).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        new = made[0, len(prompt) :]
        found.append((new.tolist(), logits.gather(1, new[:, None]).squeeze(1).tolist()))
    return found


def test_the_engine_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    expected, folders = [], []
    plain = by_transformers(base(tmp_path / "base"))
    for router, options in RECIPES.items():
        model = trained(moa.build(base(tmp_path / "base"), router=router, **options))
        folders.append(str(export_vllm(model, tmp_path / router)))
        expected.append(by_transformers(model))
        assert [t for t, _ in expected[-1]] != [t for t, _ in plain], f"{router}: the mixture moves nothing"
    for router, truth, passes in zip(RECIPES, expected, run_engine(SCRIPT, folders, PROMPTS, NEW), strict=True):
        for kind, found in zip(("together", "with a warm cache", "one by one"), passes, strict=True):
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in truth], f"{router} {kind}"
            for (_, ours), (_, theirs) in zip(found, truth, strict=True):
                assert ours == pytest.approx(theirs, abs=2e-5), f"{router} {kind}"
