"""Every recipe on one decoder: trainable parameters, training step, saved activations, decoding, over the frozen base;
and the systems that peft has, against peft's own on the same layers. MixLoRA, which no library here has, is compared
with a plain one that works as its released code does, without its balance loss.

The decoder has random weights: time does not depend on their values. Step and decoding are ratios to the frozen base
in the same rounds. Saved activations are those of a whole forward beyond the frozen base's, over the bytes of the
inputs x of all adapted layers together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moa
from moa.recipes import RECIPES

from .common import interleaved, write
from .plain_mixlora import plain_mixlora

COMMAND = "python -m experiments.bench.systems"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_TASKS, N_EXPERTS, RANK = 4, 4, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "flylora": {"n_experts": 32, "rank": 32, "k": 8},
    "hydra": {"n_experts": 1, "k": 1},
    "fixed": {"n_experts": 1},
    "switch": {"k": 1},
    "xcross": {"train_experts": False},
    "xlora": {"k": 0, "train_experts": False},
    "arrow": {"k": 2, "train_experts": False},
}


def decoder(layers: int, width: int) -> LlamaForCausalLM:
    """Return a Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def recipe(name: str) -> moa.Recipe:
    """Return a recipe on every linear, at its own defaults for what is not named here."""
    fields = RECIPES[name].__dataclass_fields__
    common = {"n_experts": N_EXPERTS, "k": 2, "rank": RANK, "n_tasks": N_TASKS, "targets": "all-linear"}
    return moa.make_recipe(name, **{**{k: v for k, v in common.items() if k in fields}, **OPTIONS.get(name, {})})


def with_all_trained(model: nn.Module) -> nn.Module:
    """Give zero factors values, so that no shortcut for zeros flatters a time."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".branches." in name and not bool(parameter.any()):
                parameter.normal_(std=0.01)
    return model


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return a model's own loss."""
    loss: Tensor = model(**batch).loss
    return loss


def saved_bytes(model: nn.Module, batch: dict[str, Tensor], loss_of: Callable[..., Tensor] = loss_of) -> int:
    """Return the bytes of distinct storages saved for backward by a training forward, parameters left out."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, batch)
    assert loss.requires_grad
    return sum(found.values())


def stepper(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return forward and backward in training mode."""

    def step() -> None:
        model.train()
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def decoding(model: Any, prompt: Tensor, n_tokens: int, **extra: Any) -> Callable[[], None]:
    """Return greedy decoding of n_tokens with a cache."""

    def decode() -> None:
        model.eval()
        model.generate(prompt, max_new_tokens=n_tokens, do_sample=False, **extra)

    return decode


def table(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return recipe -> its row."""
    ids = torch.randint(3, 2000, (options.batch, options.length))
    tasks = torch.arange(options.batch) % N_TASKS
    base = decoder(options.layers, options.width).requires_grad_(False)

    def inputs(model: Any) -> dict[str, Tensor]:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        return {"inputs_embeds": embedded, "labels": ids}

    models: dict[str, tuple[Any, dict[str, Tensor]]] = {"frozen base": (base, inputs(base))}
    for name in RECIPES:
        model = with_all_trained(moa.build(decoder(options.layers, options.width), recipe(name)))
        batch = inputs(model)
        if "n_tasks" in RECIPES[name].__dataclass_fields__:
            batch["task_ids"] = tasks
        models[name] = (model, batch)
    x_bytes = {
        name: sum(b.bank.d_in for _, b in model.branches()) * ids.numel() * 4
        for name, (model, _) in models.items()
        if name != "frozen base"
    }
    saved = {name: saved_bytes(model, batch) for name, (model, batch) in models.items()}
    steps = interleaved({n: stepper(m, b) for n, (m, b) in models.items()}, options.rounds, warmup=1)
    causal = {
        n: m for n, (m, _) in models.items() if n == "frozen base" or all(b.router.causal for _, b in m.branches())
    }
    decodes = interleaved(
        {
            n: decoding(m, ids[:, :8], options.tokens, **({"task_ids": tasks} if "task_ids" in models[n][1] else {}))
            for n, m in causal.items()
        },
        options.rounds,
        warmup=1,
    )
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'recipe':14s} {'trainable':>10s} {'step/base':>10s} {'saved/x':>8s} {'decode/base':>12s}")
    for name, (model, _) in models.items():
        row = {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step_over_base": steps[name]["min_s"] / steps["frozen base"]["min_s"],
            "saved_over_x": (saved[name] - saved["frozen base"]) / x_bytes[name] if name in x_bytes else None,
            "decode_over_base": (
                decodes[name]["min_s"] / decodes["frozen base"]["min_s"] if name in decodes else "refused: not causal"
            ),
            "step": steps[name],
            "decode": decodes.get(name),
        }
        rows[name] = row
        kept = "-" if row["saved_over_x"] is None else f"{row['saved_over_x']:.2f}"
        slow = f"{row['decode_over_base']:.2f}" if name in decodes else "refused"
        print(f"{name:14s} {row['trainable']:10,} {row['step_over_base']:10.2f} {kept:>8s} {slow:>12s}", flush=True)
    return rows


def peers(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return system -> times of ours and the peer's on the same layers; Arrow, which does not train, forward alone."""
    ids = torch.randint(3, 2000, (options.batch, options.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tasks = torch.arange(options.batch) % N_TASKS

    def make() -> LlamaForCausalLM:
        model = decoder(options.layers, options.width)
        model.config.use_cache = False
        return model

    def forward(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.eval()
            with torch.no_grad():
                model(**batch)

        return run

    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for e in range(N_EXPERTS):
            config = peft.LoraConfig(r=RANK, target_modules=LINEARS, init_lora_weights=False)
            peft.get_peft_model(make(), config).save_pretrained(Path(folder) / str(e))
            paths.append(str(Path(folder) / str(e)))
        for heads in (1, 4):
            config = peft.PolyConfig(
                r=RANK,
                n_skills=N_EXPERTS,
                n_tasks=N_TASKS,
                n_splits=heads,
                target_modules=LINEARS,
                task_type="CAUSAL_LM",
            )
            theirs = peft.get_peft_model(make(), config)
            name, own = ("poly", {}) if heads == 1 else ("mhr", {"n_heads": heads})
            ours = moa.build(make(), name, n_experts=N_EXPERTS, rank=RANK, n_tasks=N_TASKS, targets=LINEARS, **own)
            both = {**batch, "task_ids": tasks}
            pairs[f"{name}: training step"] = (stepper(with_all_trained(ours), both), stepper(theirs, both))
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=options.width, adapters={str(i): p for i, p in enumerate(paths)}
        )
        theirs = peft.get_peft_model(make(), config)
        ours = moa.build(make(), "xlora", experts=paths)
        pairs["xlora: training step"] = (stepper(ours, batch), stepper(theirs, batch))
        pairs["xlora: forward"] = (forward(ours), forward(theirs))
        theirs = peft.create_arrow_model(make(), paths, peft.ArrowConfig(top_k=2))
        pairs["arrow: forward"] = (forward(moa.build(make(), "arrow", experts=paths, k=2)), forward(theirs))
        ours = moa.build(
            make(), "mixlora", n_experts=N_EXPERTS, k=2, rank=RANK, dropout=0.0, balance=0.0, targets="ffn"
        )
        theirs = plain_mixlora(make(), n_experts=N_EXPERTS, k=2, rank=RANK, scaling=2.0)
        pairs["mixlora: training step"] = (stepper(with_all_trained(ours), batch), stepper(theirs, batch))
        pairs["mixlora: forward"] = (forward(ours), forward(theirs))
    flat = {
        f"{name} {who}": run for name, pair in pairs.items() for who, run in zip(("moa", "peer"), pair, strict=True)
    }
    times = interleaved(flat, options.rounds, warmup=1)
    rows = {}
    for name in pairs:
        own, other = times[f"{name} moa"], times[f"{name} peer"]
        peer = "plain MixLoRA" if name.startswith("mixlora") else "peft"
        rows[name] = {"moa": own, "peer": other, "peer_is": peer, "peer_over_moa": other["min_s"] / own["min_s"]}
        print(
            f"{name:24s} moa {own['min_s'] * 1e3:7.1f} ms  {peer} {other['min_s'] * 1e3:7.1f} ms  "
            f"{rows[name]['peer_over_moa']:.2f} x",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure all of it and write experiments/results/systems.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 3), ("batch", 8), ("length", 64), ("tokens", 8), ("layers", 2), ("width", 192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started = time.time()
    result = {
        "shape": vars(options),
        "experts": N_EXPERTS,
        "rank": RANK,
        "recipes": table(options),
        "peers": peers(options),
    }
    print(f"{time.time() - started:.0f} s", write("systems", result, COMMAND))


if __name__ == "__main__":
    main()
