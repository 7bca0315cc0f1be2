"""Whole models of random weights, every linear adapted: a training step, its peak memory, decoded tokens per second."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ..bench.kernel_baselines import grouped_mm
from ..bench.model_systems import OURS, adapters, loop, systems, trained
from .book import Row
from .machine import Machine, Step, over
from .page import goal
from .shapes import PROMPT, SIZES, TOY, Size

BASE, LORA, GROUPED = "frozen base", "peft LoRA r64", "HF's grouped mixture 8x8 k=2"
VOCAB, TOKENS, CACHE = 32_000, 16, 512
BLOCKS = 4  # of the model that is compiled by block


def base_model(machine: Machine, size: Size) -> Any:
    """Return the decoder on the device, always the same."""
    config = LlamaConfig(
        vocab_size=machine.pick(VOCAB, 64),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(machine.low)
    try:
        with torch.device(machine.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def ids_of(machine: Machine, batch: int, length: int) -> Tensor:
    """Return token ids (batch, length)."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(5, machine.pick(VOCAB, 64), (batch, length), generator=rng).to(machine.device)


def made(machine: Machine, size: Size, name: str) -> Any:
    """Return a system's model on the device."""
    make = partial(base_model, machine, size)
    if name == GROUPED:
        return loop(make, grouped_mm)
    with tempfile.TemporaryDirectory() as into:
        model = systems(make, lambda: adapters(make, into))[name]()
    return model.to(machine.device)


def extra(machine: Machine, name: str, batch: int) -> dict[str, Tensor]:
    """Return what a system's forward needs beside ids."""
    return {"task_ids": torch.arange(batch, device=machine.device) % 4} if "Poly" in name else {}


def base_step(model: Any, ids: Tensor) -> Step:
    """Return the frozen base's forward and backward to its embedded input, which every adapter's step has to do."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
        embedded.grad = None

    return step


def training_step(model: Any, ids: Tensor, **also: Tensor) -> Step:
    """Return a whole step: forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False, **also).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokens_per_second(machine: Machine, model: Any, batch: int, **also: Tensor) -> float:
    """Return greedily generated tokens per second of wall time, with a cache, prefill included."""
    model.eval()
    ids, tokens = ids_of(machine, batch, PROMPT), machine.pick(TOKENS, 2)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                **also,
            )
        machine.cuda.synchronize()

    times = []
    for _ in range(machine.pick(2, 1)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return batch * tokens / min(times)


def system(machine: Machine, label: str, name: str) -> dict[str, Any]:
    """Return a system's training step and peak beside the frozen base's, and its decoding at batch 1 and 32."""
    machine.free()
    size = machine.pick(SIZES[label], TOY)
    ids = ids_of(machine, size.batch, size.length)
    model = made(machine, size, name)
    found: dict[str, Any] = {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    if name == BASE:
        found["times"] = machine.compare({BASE: base_step(model, ids)}, rounds=8)
    elif trained(name):
        base = base_model(machine, size).requires_grad_(False)
        steps = {BASE: base_step(base, ids), name: training_step(model, ids, **extra(machine, name, size.batch))}
        found["times"] = machine.compare(steps, rounds=8)
        found["step over the base's"] = over(found["times"], name, BASE)
        del base, steps
    for batch in (1, machine.pick(32, 2)):
        speed = tokens_per_second(machine, model, batch, **extra(machine, name, batch))
        found[f"tokens/s, batch {batch}"] = speed
    said = [f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, float)]
    return {**found, "notes": ", ".join(said)}


def decoded(machine: Machine, label: str, batch: int) -> dict[str, Any]:
    """Return ms of one decoded token as a captured graph of the whole model: base, moa, peft's LoRA."""
    machine.free()
    size = machine.pick(SIZES[label], TOY)
    steps: dict[str, Step] = {}
    for name in (BASE, OURS, LORA):
        steps[name] = token_graph(machine, made(machine, size, name).eval(), batch)
    times = machine.compare(steps, rounds=12)
    for value in times.values():
        if "median_ms" in value:
            value["tokens/s"] = batch * 1000 / value["median_ms"]
    return {"times": times, "goals": [goal("moa / frozen base, a token", over(times, OURS, BASE), at_most=1.3)]}


def token_graph(machine: Machine, model: Any, batch: int) -> Step:
    """Return what replays the decoding of one token, over a cache of fixed size."""
    ids = ids_of(machine, batch, PROMPT)
    # A replay writes one place further on: there is room for all of them.
    cache = StaticCache(config=model.config, max_cache_len=machine.pick(CACHE, 64))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    token = ids[:, -1:].clone()

    def forward() -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]

    return machine.capture(forward).replay


def by_block(machine: Machine, label: str) -> dict[str, Any]:
    """Return times of a training step with every block under torch's compiler: base, moa, peft's LoRA; and its graphs.

    All blocks share the code of one forward, and torch keeps 8 graphs of a code: with more than that the rest would run
    as they are. So there are few blocks, and as many graphs are allowed as there can be.
    """
    machine.free()
    size = replace(machine.pick(SIZES[label], TOY), layers=machine.pick(BLOCKS, 1))
    ids = ids_of(machine, size.batch, size.length)
    steps: dict[str, Step] = {}
    graphs: dict[str, int] = {}
    for name in (BASE, OURS, LORA):
        model = made(machine, size, name)
        step = base_step if name == BASE else training_step
        steps[f"{name}, eager"] = step(model, ids)
        compiled = made(machine, size, name)
        for block in _blocks(compiled):
            block.compile(backend=machine.backend, dynamic=False)
        steps[f"{name}, compiled by block"] = step(compiled, ids)
        before = _graphs()
        with torch._dynamo.config.patch(recompile_limit=8 * BLOCKS):
            steps[f"{name}, compiled by block"]()
        graphs[name] = _graphs() - before
    with torch._dynamo.config.patch(recompile_limit=8 * BLOCKS):
        times = machine.compare(steps, rounds=8, warmup=2)
    kind = "compiled by block"
    value = over(times, f"{OURS}, {kind}", f"{LORA}, {kind}")
    said = ", ".join(f"{name} makes {count}" for name, count in graphs.items())
    goals = [goal(f"moa / peft LoRA r64, {kind}", value, at_most=1.0)]
    return {"times": times, "graphs": graphs, "goals": goals, "notes": f"graphs of {size.layers} blocks: {said}"}


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _blocks(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def compared(found: Callable[[], dict[str, Any]], label: str) -> dict[str, Any]:
    """Return moa's step over each peer's, of the rows above."""
    rows = {name: row.get("found", {}) for name, row in found().items()}
    ours = rows.get(f"{label}, {OURS}", {})
    goals, said = [], []
    for name, most in ((BASE, 1.35), (LORA, 1.0), ("peft Poly 8x8", 1.0), ("peft X-LoRA 8x8", 0.5)):
        key = "step over the base's"
        theirs = 1.0 if name == BASE else rows.get(f"{label}, {name}", {}).get(key)
        value = None if theirs is None or ours.get(key) is None else ours[key] / theirs
        goals.append(goal(f"moa / {name}, step", value, at_most=most))
    for name, row in rows.items():
        if name.startswith(label) and "step over the base's" in row:
            said.append(f"{name}: step {row['step over the base' + chr(39) + 's']:.2f} x the base's")
    return {"goals": goals, "notes": said}


NAMES = (
    BASE,
    OURS,
    LORA,
    "peft Poly 8x8",
    GROUPED,
    "peft X-LoRA 8x8",
    "MoLA-style loop 8x8 k=2",
    "peft Arrow 8x8 k=2",
)


def rows(machine: Machine, found: Callable[[], dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows, in both sizes: base, moa and peft's LoRA, decoding as a graph; then the others; then compiled."""

    def systems(label: str, names: Sequence[str]) -> Iterator[Row]:
        for name in names:
            run = partial(system, machine, label, name)
            yield Row(f"{label}, {name}", run, 8, kind=f"system {name}", slow=name not in NAMES[:2])

    for label in SIZES:
        yield from systems(label, NAMES[:3])
        for batch in (1, 32):
            run = partial(decoded, machine, label, machine.pick(batch, 2))
            yield Row(f"{label}, graph of a token, batch {batch}", run, 6, kind="graph", slow=True)
    for label in SIZES:
        yield from systems(label, NAMES[3:])
        yield Row(f"{label}, compared", partial(compared, found, label), 0.1, kind="compared")
    for label in reversed(SIZES):
        yield Row(f"{label}, by block", partial(by_block, machine, label), 30, kind="by block", slow=True)
