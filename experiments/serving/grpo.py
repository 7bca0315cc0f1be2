"""GRPO on a mixture whose rollouts come from vLLM: before each of them the engine gets the trainer's mixtures.

In an environment that has vLLM and TRL (`make env-vllm`); without vLLM the rollouts are the trainer's own:

.envs/vllm/bin/python -m experiments.serving.grpo --steps 40 --out experiments/results/grpo.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import moa
from moa.serving.vllm.vllm_folder import export_vllm
from moa.serving.vllm.weight_sync import save_mixtures, update_engine

from ..bench.common import environment

# The engine changes transformers' classes where it runs, so it gets a process of its own, and takes functions from us.
ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
WORDS, WANTED = 64, 32  # the reward is the share of words of an answer that are below WANTED

Answer = tuple[list[int], list[int], list[float]]  # token ids of prompt and answer, the answer's log-probabilities


def base_in(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """Return a tiny causal model of random weights and its tokenizer, saved in a folder; token n is the word "wn"."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    table = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer


def wanted_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of each answer's tokens that are wanted, (B,) from 0 to 1."""
    return [sum(token < WANTED for token in ids) / len(ids) for ids in completion_ids]


class EngineRollouts:
    """TRL's `rollout_func` on vLLM: new mixtures to the engine, then an answer to each prompt.

    Args:
        model: that is trained.
        folder: for the export and for the mixtures of each step.
        length: tokens of an answer at most.

    Attributes:
        differences: after each update, the largest difference between the engine's log-probabilities and the trainer's.
        moved: by each step, the largest change of the log-probabilities of the answers before it.
    """

    def __init__(self, model: moa.MoAModel, folder: Path, length: int) -> None:
        os.environ.update(ENGINE)
        from vllm import LLM, SamplingParams

        self.step = folder / "step"
        self.engine = LLM(
            str(export_vllm(model, folder / "served")),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            gpu_memory_utilization=0.1,
        )
        stop = [model.config.eos_token_id]
        self.sampling = SamplingParams(max_tokens=length, logprobs=0, detokenize=False, stop_token_ids=stop)
        self.differences: list[float] = []
        self.moved: list[float] = []
        self._last: list[Answer] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Return token ids of prompts and answers, and the answers' log-probabilities, one for each token."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._last:
            self.moved.append(apart(model, self._last))
        save_mixtures(model, self.step)
        update_engine(self.engine, self.step)
        asked = trainer.processing_class(prompts)["input_ids"]
        found = self.engine.generate([{"prompt_token_ids": ids} for ids in asked], self.sampling, use_tqdm=False)
        outputs = [one.outputs[0] for one in found]
        answers = [list(output.token_ids) for output in outputs]
        logs = [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
        self._last = list(zip(asked, answers, logs, strict=True))
        self.differences.append(apart(model, self._last))
        return {"prompt_ids": asked, "completion_ids": answers, "logprobs": logs}


@torch.no_grad()
def apart(model: moa.MoAModel, answers: list[Answer]) -> float:
    """Return the largest difference between a model's log-probabilities of answers' tokens and those given."""
    training, largest = model.training, 0.0
    model.eval()
    for prompt, answer, given in answers:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]  # (S, vocabulary)
        own = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)  # (S,)
        largest = max(largest, float((own - torch.tensor(given)).abs().max()))
    model.train(training)
    return largest


def train(folder: Path, steps: int, length: int = 12) -> dict[str, Any]:
    """Return who made the rollouts, the rewards (steps,), and what `EngineRollouts` has seen."""
    base, tokenizer = base_in(folder / "base")
    plain = {"balance": 0.0, "z_loss": 0.0}  # GRPO computes its loss outside of the model
    model = moa.build(base, router="topk", n_experts=4, k=2, rank=4, targets="all-linear", **plain)
    has_engine = importlib.util.find_spec("vllm") is not None
    trainer = GRPOTrainer(
        model,
        reward_funcs=wanted_words,
        args=GRPOConfig(
            str(folder / "run"),
            max_steps=steps,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=length,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"w{n} w{n + 7} w{n + 20}" for n in range(2, 34)]}),
        processing_class=tokenizer,
        rollout_func=EngineRollouts(model, folder, length) if has_engine else None,
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return {
        "rollouts": "vLLM" if has_engine else "the trainer's own: vLLM is not installed",
        "rewards": rewards,
        "differences": trainer.rollout_func.differences if has_engine else [],
        "moved": trainer.rollout_func.moved if has_engine else [],
    }


def main() -> None:
    """Train and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = train(Path(scratch), options.steps)
    print(f"rollouts: {result['rollouts']}")
    print(f"reward {result['rewards'][0]:.2f} at first, {result['rewards'][-1]:.2f} at last")
    if result["differences"]:
        print(f"log-probabilities of engine and trainer differ by {max(result['differences']):.1e} at most")
    if options.out is not None:
        command = f"python -m experiments.serving.grpo --steps {options.steps}"
        options.out.write_text(
            json.dumps({"command": command, "environment": environment(), **result}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
