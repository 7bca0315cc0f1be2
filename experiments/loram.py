"""A mixture trained on a pruned base and taken to the full one: `python -m experiments.loram`.

On SmolLM2-135M-Instruct (weights from 4 bits), which `moa demo --model smollm2 --prepare` fetches with the tweets: the
model says whether a tweet is positive or negative, by which of the two words comes first after the prompt. The same
mixture learns the same rows in the same steps on the full base and on one whose middle blocks lose a share of their
heads and channels, by gradients on some training batches; then the second goes to the full base. Neither learning rate
is tuned, and the pruned base gets no training of its own before, which the paper's has. About six minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import moa
from experiments.bench.common import write
from moa.runs import demo

NAME = "SmolLM2-135M-Instruct-dequantised"
RECIPE: dict[str, Any] = {"router": "topk", "n_experts": 4, "k": 2, "rank": 8, "targets": "all-linear"}
LABELS = ("negative", "positive")
TEMPLATE = "Tweet: {text}\nPositive or negative:"
RATE, BATCH, TOKENS = 1e-3, 8, 40  # learning rate, rows a batch, tokens a row at most
Batch = dict[str, Tensor]


def read(file: Path, n: int) -> list[dict[str, str]]:
    """Return the first n rows of a file, text and label each."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:n]]


def batches(rows: Sequence[dict[str, str]], tokenizer: Any) -> Iterator[Batch]:
    """Yield batches of prompts with their answer's first token, input_ids (B, S); only the answer has a label.

    A prompt that is too long loses the end of its tweet.
    """
    answers = {label: tokenizer.encode(f" {label}")[0] for label in LABELS}
    head, tail = (tokenizer.encode(part) for part in TEMPLATE.split("{text}"))
    room = TOKENS - len(head) - len(tail) - 1
    for start in range(0, len(rows), BATCH):
        made = [
            [*head, *tokenizer.encode(row["text"])[:room], *tail, answers[row["label"]]]
            for row in rows[start : start + BATCH]
        ]
        length = max(map(len, made))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in made])
        last = torch.tensor([len(row) - 1 for row in made]).unsqueeze(1)  # (B, 1)
        places = torch.arange(length)
        yield {
            "input_ids": ids,
            "attention_mask": (places <= last).long(),
            "labels": torch.where(places == last, ids, -100),
        }


@torch.no_grad()
def scored(model: nn.Module, rows: Sequence[dict[str, str]], tokenizer: Any) -> dict[str, float]:
    """Return accuracy and mean loss in nats of the two labels' words, one against the other."""
    words = torch.tensor([tokenizer.encode(f" {label}")[0] for label in LABELS])
    right, losses = 0, []
    for batch in batches(rows, tokenizer):
        labels = batch.pop("labels")
        at = labels.ne(-100).int().argmax(1)  # (B,)
        logits = model.eval()(**batch).logits[torch.arange(len(at)), at - 1][:, words]  # (B, 2)
        truth = (labels.gather(1, at[:, None]) == words).int().argmax(1)
        right += int((logits.argmax(1) == truth).sum())
        losses += nn.functional.cross_entropy(logits.float(), truth, reduction="none").tolist()
    return {"accuracy": right / len(rows), "loss": statistics.mean(losses)}


def fit(model: Any, rows: Sequence[dict[str, str]], tokenizer: Any) -> Any:
    """Train a mixture on each row once, in their order, and return it."""
    optimizer = torch.optim.AdamW(model.optimizer_groups(RATE))
    steps = -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for batch in batches(rows, tokenizer):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def study(base: Path, cache: Path, ratios: Sequence[float], trained: int, tested: int, seeds: int) -> dict[str, Any]:
    """Return what each arm scores on the test rows, and its seconds of training.

    Args:
        base: folder of the full base.
        cache: what `moa demo --prepare` filled.
        ratios: shares of heads and channels that go from the middle blocks.
        trained: training rows.
        tested: test rows.
        seeds: of the experts' start and of the order of rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (read(cache / "vader" / f"tweets.{part}.jsonl", n) for part, n in (("train", 2499), ("eval", tested)))
    arms: dict[str, list[dict[str, float]]] = {}

    def keep(arm: str, model: nn.Module, **more: float) -> None:
        arms.setdefault(arm, []).append({**scored(model, test, tokenizer), **more})
        print(arm, arms[arm][-1], flush=True)

    def full() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def learned(model: Any, seed: int) -> tuple[Any, float]:
        torch.manual_seed(seed)
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:trained].tolist()
        start = time.process_time()
        mixture = fit(moa.build(model, **RECIPE), [train[i] for i in chosen], tokenizer)
        return mixture, time.process_time() - start

    keep("full, untrained", whole := full())
    sizes = {"full": sum(p.numel() for p in whole.parameters())}
    for seed in range(seeds):
        mixture, seconds = learned(full(), seed)
        keep("trained on the full one", mixture, seconds=seconds)
    for ratio in ratios:
        calibration = batches(train[-4 * BATCH :], tokenizer)
        small: Any = moa.prune(whole, ratio, data=calibration, batches=4)
        sizes[f"pruned by {ratio:g}"] = sum(p.numel() for p in small.parameters())
        keep(f"pruned by {ratio:g}, untrained", small)
        for seed in range(seeds):
            mixture, seconds = learned(small, seed)
            keep(f"pruned by {ratio:g}, trained, as it is", mixture, seconds=seconds)
            keep(f"pruned by {ratio:g}, trained, on the full one", moa.recover(mixture, full()))
            small = mixture.unload()
    positive = sum(row["label"] == "positive" for row in test) / len(test)
    return {"arms": arms, "parameters": sizes, "majority": max(positive, 1 - positive)}


def main() -> None:
    """Write what the arms score to experiments/results/loram.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=demo.cache_folder() / NAME, help="folder of the full base")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5])
    parser.add_argument("--rows", type=int, default=160, help="training rows, each seen once (160)")
    parser.add_argument("--tested", type=int, default=160, help="test rows (160)")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = study(options.base, demo.cache_folder(), options.ratios, options.rows, options.tested, options.seeds)
    settings = {
        "base": NAME,
        "recipe": RECIPE,
        "learning_rate": RATE,
        "batch": BATCH,
        "tokens": TOKENS,
        "trained": options.rows,
        "tested": options.tested,
        "scores": "gradients on 32 training rows",
    }
    ratios = " ".join(f"{ratio:g}" for ratio in options.ratios)
    command = f"python -m experiments.loram --ratios {ratios} --rows {options.rows} --tested {options.tested}"
    write("loram", {"settings": settings, "seeds": options.seeds, **found}, f"{command} --seeds {options.seeds}")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
