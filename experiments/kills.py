"""Processes that save, checkpoint, merge, fold and export, killed at random moments: old or new, never half.

python -m experiments.kills --kills 500 --out experiments/results/kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import moa
from experiments.bench.common import environment
from moa.folding.save import save_folded
from moa.formats import checkpoint
from moa.merge import write_checkpoint, write_peft
from moa.training.checkpoints import newest_checkpoint

WAYS = ("save", "merge into the base", "merge adapters", "export", "fold", "checkpoint")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def base() -> LlamaForCausalLM:
    """Return a small decoder."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, pad_token_id=0, **SHAPE))


def writer(way: str, home: Path) -> tuple[Callable[[int], None], Callable[[], int]]:
    """Return what writes state number n below a folder, and what reads the number back from a whole state.

    Args:
        way: one of `WAYS`.
        home: an empty folder.
    """
    out = home / "out"
    if way in ("save", "export", "fold"):
        recipe = "fixed" if way == "fold" else "topk"
        model = moa.build(base(), recipe, n_experts=2, rank=2, **({} if way == "fold" else {"k": 1}))

        def fill(n: int) -> None:
            with torch.no_grad():
                for _, branch in model.branches():
                    for p in branch.parameters():
                        p.fill_(float(n))

        def save(n: int) -> None:
            fill(n)
            if way == "save":
                model.save_pretrained(out)
            elif way == "export":
                moa.export_expert(model, 0, out)
            else:
                save_folded(model, out, overwrite=True)

        def stored() -> int:
            if way == "save":
                description, tensors = checkpoint.read(checkpoint.locate(out))
                assert description["recipes"] and json.loads((out / "config.json").read_text())["model_type"] == "moa"
                return _one({int(t.min()) for t in tensors.values()} | {int(t.max()) for t in tensors.values()})
            if way == "export":
                deltas = moa.merge.read_peft(checkpoint.locate(out))
                # up · down of rank 2, all entries n: 2 n² times the scale
                return _one({round((float(d.dense().max()) / 2 / 2) ** 0.5) for d in deltas.values()})
            plain = dict(base().named_parameters())
            loaded = LlamaForCausalLM.from_pretrained(checkpoint.locate(out))
            changes = [(p - plain[name]).max() for name, p in loaded.named_parameters() if "_proj" in name]
            return _one({round((c.item() / 2 / 2) ** 0.5) for c in changes})

        return save, stored
    if way == "checkpoint":
        return _trainer(home)
    base().save_pretrained(home / "base")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]

    def merge(n: int) -> None:
        deltas: dict[str, tuple[Tensor, Tensor]] = {
            name: (torch.full((1, 64), float(n)), torch.ones(96, 1)) for name in names
        }
        if way == "merge adapters":
            write_peft(deltas, out, overwrite=True)
        else:
            write_checkpoint(home / "base", deltas, out, max_shard_bytes=60_000, overwrite=True)

    def merged() -> int:
        found = checkpoint.locate(out)
        if way == "merge adapters":
            return _one({round(float(d.dense().max())) for d in moa.merge.read_peft(found).values()})
        new, old = moa.merge.Checkpoint(found), moa.merge.Checkpoint(home / "base")
        assert list(sorted(new)) == list(sorted(old)) and (found / "config.json").is_file()
        return _one({round(float((new[name] - old[name]).max())) for name in names})

    return merge, merged


def _trainer(home: Path) -> tuple[Callable[[int], None], Callable[[], int]]:
    """Return what trains n steps with a checkpoint at each, and what finds the newest whole one."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 4

    def train(n: int) -> None:
        model = moa.build(base(), "topk", n_experts=2, k=1, rank=2)
        arguments = TrainingArguments(
            str(home / "out"), max_steps=n, save_steps=1, per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, use_cpu=True, logging_strategy="no", save_total_limit=3,
        )  # fmt: skip
        newest = newest_checkpoint(home / "out")
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=newest and str(newest))

    def stored() -> int:
        newest = newest_checkpoint(home / "out")
        if newest is None:
            return 0
        load_file(newest / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(newest / name, weights_only=True)
        return int(json.loads((newest / "trainer_state.json").read_text())["global_step"])

    return train, stored


def _one(values: set[int]) -> int:
    assert len(values) == 1, f"parts of several states: {values}"
    return values.pop()


def _child(write: Callable[[int], None], steps: range) -> int:
    """Return the process that writes these states, one after the other."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            for step in steps:
                write(step)
        finally:
            os._exit(0)
    return child


def kill(way: str, n: int, seed: int = 0) -> dict[str, float]:
    """Return how n kills of one way ended: survived, lost, how often the state had moved, and what was left over.

    Args:
        way: one of `WAYS`.
        n: kills.
        seed: of the moments.
    """
    draw = random.Random(f"{seed} {way}")
    tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that is killed with it would hold it for ever
    lost = moved = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write, read = writer(way, home)
        write(1)
        started = time.monotonic()
        os.waitpid(_child(write, range(2, 3)), 0)  # in a fork, whose first write is slower
        seconds = time.monotonic() - started
        last = read()
        assert last == 2, f"{way}: a fork wrote {last}, expected 2"
        for _ in range(n):
            child = _child(write, range(last + 1, last + 1000))
            time.sleep(draw.uniform(0.05, 2.5) * seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            try:
                now = read()
                assert now >= last, f"{now} after {last}"
            except (AssertionError, moa.MoaError, OSError, ValueError) as error:
                print(f"{way}: {error}", file=sys.stderr)
                lost += 1
                continue
            moved += now > last
            last = now
        write(last + 1)
        hidden = [p.name for p in home.rglob(".*") if p.name.endswith((".partial", ".replaced"))]
    return {"kills": n, "lost": lost, "moved": moved, "left over": len(hidden)}


def main() -> None:
    """Kill, print and keep the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kills", type=int, default=504, help="in all")
    words.add_argument("--out", type=Path)
    arguments = words.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    per_way = -(-arguments.kills // len(WAYS))
    counts = {}
    for way in WAYS:
        counts[way] = kill(way, per_way)
        print(way, counts[way], flush=True)
    result = {
        "command": f"python -m experiments.kills --kills {arguments.kills}",
        "environment": environment(),
        "ways": counts,
        "kills": sum(row["kills"] for row in counts.values()),
        "lost": sum(row["lost"] for row in counts.values()),
        "left over": sum(row["left over"] for row in counts.values()),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['kills']} kills, {result['lost']} lost, {result['left over']} left over")
    sys.exit(bool(result["lost"] or result["left over"]))


if __name__ == "__main__":
    main()
