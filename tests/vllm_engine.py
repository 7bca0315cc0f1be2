"""vLLM for tests: it pins packages that moa does not, so it lives in an environment of its own, `make env-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".envs" / "vllm" / "bin" / "python"
NEEDS_ENGINE = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no vLLM here: make env-vllm"),
]


def needs_engine(test: Any) -> Any:
    """Mark one test of a file."""
    for mark in NEEDS_ENGINE:
        test = mark(test)
    return test


# greedy tokens of one adapter, or of the folder as it is, for all prompts at once
GENERATE = """
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, adapter, prompts = arguments
options = {"enable_lora": True, "max_lora_rank": 16} if adapter else {}
model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
            gpu_memory_utilization=0.1, **options)
sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
lora = LoRARequest("merged", 1, adapter) if adapter else None
out = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, lora_request=lora)
answer([list(o.outputs[0].token_ids) for o in out])
"""
_HEAD = """
import json, sys
arguments = json.loads(sys.argv[1])
def answer(value):
    print("RESULT" + json.dumps(value), flush=True)
"""


def engine_environment() -> dict[str, str]:
    """Return the process environment for the engine: one process, and little memory for its cache."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_engine(script: str, *arguments: Any, timeout: float = 400, **variables: str) -> Any:
    """Return what a script answers that runs in the engine's environment: it sees `arguments` and calls `answer`."""
    command = [str(PYTHON), "-c", _HEAD + script, json.dumps(arguments)]
    environment = engine_environment() | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(found.removeprefix("RESULT"))
