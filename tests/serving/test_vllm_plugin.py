"""Mixtures in vLLM: the same tokens and log-probabilities as transformers. Run: make test-vllm"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moa
from moa.formats.peft_export import export_task
from moa.serving.vllm.vllm_folder import export_vllm
from moa.serving.vllm.weight_sync import save_mixtures
from tests.vllm_engine import NEEDS_ENGINE, run_engine

pytestmark = NEEDS_ENGINE
NEW = 10
PROMPTS = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 22, 9, 70, 31)]
# all at once in chunks of 48 tokens, again with a warm prefix cache, then one by one
SCRIPT = """
import gc
from vllm import LLM, SamplingParams
from moa.serving.vllm import engine_layers

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
gc.collect()
answer([found, list(engine_layers._LAYERS)])
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
    answers, kept = run_engine(SCRIPT, folders, PROMPTS, NEW)
    assert kept == [], "engines that are gone leave layers behind"
    for router, truth, passes in zip(RECIPES, expected, answers, strict=True):
        for kind, found in zip(("together", "with a warm cache", "one by one"), passes, strict=True):
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in truth], f"{router} {kind}"
            for (_, ours), (_, theirs) in zip(found, truth, strict=True):
                assert ours == pytest.approx(theirs, abs=2e-5), f"{router} {kind}"


RANKS = """
from vllm import LLM, SamplingParams

folder, prompts, new = arguments
model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
            gpu_memory_utilization=0.1, max_num_batched_tokens=48, max_num_seqs=8, block_size=32,
            tensor_parallel_size=2, distributed_executor_backend="mp")
sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True, logprobs=0)
out = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
found = [o.outputs[0] for o in out]
answer([[list(s.token_ids), [s.logprobs[n][t].logprob for n, t in enumerate(s.token_ids)]] for s in found])
"""


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two CPUs")
def test_two_ranks_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    """Column and row parallel, fused q, k, v of one key head for both ranks, fused gate and up; two processes."""
    model = trained(moa.build(base(tmp_path / "base"), router="topk", n_experts=4, targets="all-linear"))
    folder = export_vllm(model, tmp_path / "out")
    how = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    found = run_engine(RANKS, str(folder), PROMPTS, NEW, timeout=600, **how)
    for (tokens, ours), (expected, theirs) in zip(found, by_transformers(model), strict=True):
        assert tokens == expected
        assert ours == pytest.approx(theirs, abs=2e-5)


COMPILED = """
from vllm import LLM, SamplingParams

folder, prompts, new = arguments
how = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": False, "max_model_len": 128,
       "gpu_memory_utilization": 0.1, "max_num_batched_tokens": 48, "max_num_seqs": 8, "block_size": 32}
model = LLM(folder, **how)
sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True, logprobs=0)
out = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
found = [o.outputs[0] for o in out]
try:
    LLM(folder, **how)
    said = ""
except Exception as error:
    said = str(error)
made = [[list(s.token_ids), [s.logprobs[n][t].logprob for n, t in enumerate(s.token_ids)]] for s in found]
answer([made, said])
"""


@pytest.mark.slow
def test_compiled_graphs_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    """And a second compiled engine in the process, whose layers have other names, is refused."""
    model = trained(moa.build(base(tmp_path / "base"), router="topk", n_experts=4, targets="all-linear"))
    folder = export_vllm(model, tmp_path / "out")
    found, said = run_engine(COMPILED, str(folder), PROMPTS, NEW, timeout=600, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    for (tokens, ours), (expected, theirs) in zip(found, by_transformers(model), strict=True):
        assert tokens == expected
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert "a second engine of mixtures in one process cannot be compiled" in said


SYNC = """
from vllm import LLM, SamplingParams
from moa.errors import CheckpointError
from moa.serving.vllm.weight_sync import update_engine

folder, changed, prompts, new = arguments
model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
            gpu_memory_utilization=0.1, max_num_seqs=8, block_size=32)
def run():
    sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
    return [list(o.outputs[0].token_ids) for o in model.generate([{"prompt_token_ids": p} for p in prompts], sampling)]
found = [run()]
for step in (changed, folder):
    update_engine(model, step)
    found.append(run())
try:
    model.apply_model(lambda inside: inside.load_weights([("moa.nothing", inside.lm_head.weight)]))
    said = ""
except CheckpointError as error:
    said = str(error)
answer([*found, said])
"""


def test_a_running_engine_takes_new_mixtures(tmp_path: Path) -> None:
    """With warm prefix caches; the tokens are those of the trainer before, after, and back again."""
    model = trained(moa.build(base(tmp_path / "base"), router="topk", n_experts=4))
    folder = export_vllm(model, tmp_path / "out")
    before = [tokens for tokens, _ in by_transformers(model)]
    for parameter in (p for _, branch in model.branches() for p in branch.parameters()):
        parameter.data.neg_()
    save_mixtures(model, tmp_path / "step")
    after = [tokens for tokens, _ in by_transformers(model)]
    assert before != after
    *found, said = run_engine(SYNC, str(folder), str(tmp_path / "step"), PROMPTS, NEW)
    assert found == [before, after, before]
    assert "missing" in said and "1 unexpected" in said


LORAS = """
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, adapters, prompts, new = arguments
model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
            gpu_memory_utilization=0.1, enable_lora=True, max_lora_rank=8, max_loras=len(adapters))
sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
asked = [{"prompt_token_ids": p} for p in prompts for _ in adapters]
loras = [LoRARequest(str(n), n + 1, adapter) for _ in prompts for n, adapter in enumerate(adapters)]
found = [list(o.outputs[0].token_ids) for o in model.generate(asked, sampling, lora_request=loras)]
answer([found[n :: len(adapters)] for n in range(len(adapters))])
"""


def test_a_model_by_task_is_one_lora_for_each_task(tmp_path: Path) -> None:
    """The engine's own LoRA, a task for each request of one batch."""
    model = trained(moa.build(base(tmp_path / "base"), router="poly", n_experts=3, n_tasks=2, rank=4))
    expected = []
    for task in range(2):
        export_task(model, task, tmp_path / str(task))
        made = []
        for prompt in PROMPTS:
            ids, ask = torch.tensor([prompt]), {"max_new_tokens": NEW, "do_sample": False}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=torch.tensor([task]), **ask)
            made.append(out[0, len(prompt) :].tolist())
        expected.append(made)
    assert expected[0] != expected[1]
    adapters = [str(tmp_path / str(task)) for task in range(2)]
    assert run_engine(LORAS, str(tmp_path / "base"), adapters, PROMPTS, NEW) == expected
