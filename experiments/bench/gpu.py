"""Kernel timings on one GPU in bf16: moa against a frozen base, peft's LoRA, and plain versions of its peers.

T = 8192, d = 4096, 8 experts of rank 8, k = 2 unless said otherwise. CUDA-event medians; ratios of one run. A few
minutes. Without a GPU it says so, writes nothing, and ends well.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa.kernels import Gate, choose_engine, engines, gated_linear, low_rank_mixture, mixture_linear

from .common import write
from .kernel_baselines import PEERS, plain_concat, scatter_copies
from .kernels import Inputs, make_inputs, train_step

COMMAND = "python -m experiments.bench.gpu"
ROWS, D = 8192, 4096
TARGETS = {
    "layer_over_base_at_most": 1.25,
    "layer_over_lora_of_rank_64_at_most": 1.0,
    "peer_over_moa_at_least": {
        "plain concat": 1.3,
        "torch.compile of plain concat": 1.2,
        "HF grouped_mm": 4.0,
        "rows sorted, k copies (plain torch)": 3.0,
        "lean python loop": 10.0,
    },
    "shrink_over_copy_bandwidth_at_least": 0.75,
    "grouped_mm_over_moa_at_1024_columns_at_least": 1.4,
    "decode_added_us_at_most": 5.0,
}


def milliseconds(step: Callable[[], Any], rounds: int = 20, warmup: int = 5) -> dict[str, float]:
    """Return the median and spread of a step's time on the device, in ms, each round on a cold L2 cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = []
    for round_ in range(warmup + rounds):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        if round_ >= warmup:
            times.append(start.elapsed_time(stop))
    return {"median_ms": statistics.median(times), "spread_ms": max(times) - min(times)}


def table(steps: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Return name -> time and peak memory beside what is held already; a step that cannot run carries its reason."""
    found: dict[str, Any] = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            times = milliseconds(step)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            found[name] = {"not measured": str(error).splitlines()[0]}
            continue
        found[name] = {**times, "peak_mib": (torch.cuda.max_memory_allocated() - held) / 2**20}
    return found


def over(found: dict[str, dict[str, float]], one: str, other: str) -> float | None:
    """Return the ratio of two medians, None where one was not measured."""
    both = [found[name].get("median_ms") for name in (one, other)]
    return None if None in both else both[0] / both[1]


def lora_path() -> dict[str, Any]:
    """Return times of the adapters alone, forward and backward, and peer / moa."""
    inputs = make_inputs(ROWS, D, dtype=torch.bfloat16, device="cuda")
    functions: dict[str, Callable[..., Tensor]] = {
        "moa": low_rank_mixture,
        "plain concat": plain_concat,
        "torch.compile of plain concat": torch.compile(plain_concat),
        "rows sorted, k copies (plain torch)": scatter_copies,
        **PEERS,
    }
    found = table({name: train_step(function, inputs) for name, function in functions.items()})
    return {"times": found, "peer_over_moa": {name: over(found, name, "moa") for name in found}}


def whole_layer() -> dict[str, Any]:
    """Return times of a layer with its frozen base, forward and backward, beside peft's single LoRA of rank 64."""
    inputs = make_inputs(ROWS, D, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(D, D, dtype=torch.bfloat16, device="cuda") / D**0.5

    def base() -> Any:
        return torch.autograd.grad(F.linear(inputs.x, weight), inputs.x, inputs.grad)

    def mixed(x: Tensor, *rest: Tensor) -> Tensor:
        return mixture_linear(x, weight, None, *rest)

    def plain(x: Tensor, *rest: Tensor) -> Tensor:
        return F.linear(x, weight) + plain_concat(x, *rest)

    gate = (torch.randn(8, D, device="cuda") / D**0.5).requires_grad_()
    trained = [inputs.x, gate, inputs.a, inputs.b]

    def with_router(fused: bool) -> Callable[[], Any]:
        def step() -> Any:
            if fused:
                y = gated_linear(inputs.x, weight, None, Gate(gate, 2), inputs.a, inputs.b)[0]
            else:
                kept, chosen = F.linear(inputs.x.float(), gate).topk(2, -1)
                y = mixture_linear(inputs.x, weight, None, inputs.a, inputs.b, kept.softmax(-1), chosen)
            return torch.autograd.grad(y, trained, inputs.grad)

        return step

    steps = {
        "base": base,
        "moa": train_step(mixed, inputs),
        "moa with its router": with_router(True),
        "moa with its router apart": with_router(False),
        "plain concat": train_step(plain, inputs),
    }
    lora = peft_lora(weight, 64)
    if lora is not None:
        leaves = [inputs.x, *(p for p in lora.parameters() if p.requires_grad)]
        steps["peft LoRA of rank 64"] = lambda: torch.autograd.grad(lora(inputs.x), leaves, inputs.grad)
    found = table(steps)
    return {"times": found, "moa_over": {name: over(found, "moa", name) for name in found}}


def peft_lora(weight: Tensor, rank: int) -> nn.Module | None:
    """Return a linear with the given weight (o, i) under peft's LoRA, or None where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    net = Net().to(weight)
    net.linear.weight.data.copy_(weight)
    return get_peft_model(net, LoraConfig(r=rank, target_modules=["linear"])).to(weight.dtype)


def bandwidth() -> dict[str, Any]:
    """Return bytes of x over the forward's shrink time, and what a copy of x reaches, in GB/s."""
    from moa.kernels.triton import launches

    inputs = make_inputs(ROWS, D, dtype=torch.bfloat16, device="cuda")
    x, a = inputs.x.detach(), inputs.a.detach()
    hidden, mixed = x.new_empty(ROWS, 2, 8), x.new_empty(ROWS, 64)
    weights = inputs.weights.detach()
    other = torch.empty_like(x)
    found = table(
        {
            "copy": lambda: other.copy_(x),
            "shrink": lambda: launches.shrink(x, a, weights, inputs.indices, hidden, mixed),
        }
    )
    speed = {
        "copy_gb_s": 2 * x.nbytes / found["copy"]["median_ms"] / 1e6,
        "shrink_gb_s": x.nbytes / found["shrink"]["median_ms"] / 1e6,
    }
    return {"times": found, **speed, "shrink_over_copy": speed["shrink_gb_s"] / speed["copy_gb_s"]}


def many_columns() -> dict[str, Any]:
    """Return times with 64 experts of rank 16 (1024 columns): both Triton engines and grouped_mm."""
    inputs = make_inputs(ROWS, D, n_experts=64, rank=16, dtype=torch.bfloat16, device="cuda")
    chosen = choose_engine(ROWS, D, D, 64, 16, 2, torch.bfloat16, "cuda")
    steps = {
        name: train_step(partial(low_rank_mixture, engine=name), inputs) for name in ("triton_concat", "triton_grouped")
    }
    found = table({**steps, "HF grouped_mm": train_step(PEERS["HF grouped_mm"], inputs)})
    return {"times": found, "chosen": chosen, "grouped_mm_over_moa": over(found, "HF grouped_mm", chosen)}


def decode() -> dict[str, Any]:
    """Return µs of a layer on 1, 16 and 64 rows as replayed CUDA graphs of 100 layers, and what moa adds."""
    found: dict[str, Any] = {}
    for n_rows in (1, 16, 64):
        inputs = make_inputs(n_rows, D, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(D, D, dtype=torch.bfloat16, device="cuda") / D**0.5
        base = replayed(lambda x=inputs.x, w=weight: F.linear(x, w))
        mixed = replayed(lambda i=inputs, w=weight: _mixed(i, w))
        found[str(n_rows)] = {"base_us": base, "moa_us": mixed, "added_us": mixed - base}
    return found


def _mixed(inputs: Inputs, weight: Tensor) -> Tensor:
    return mixture_linear(inputs.x, weight, None, inputs.a, inputs.b, inputs.weights, inputs.indices)


def replayed(function: Callable[[], Tensor], layers: int = 100) -> float:
    """Return µs for each call, of a CUDA graph that holds `layers` calls."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(layers):
                function()
    return milliseconds(graph.replay)["median_ms"] / layers * 1000


def main() -> None:
    """Write experiments/results/kernels_gpu.json, or say that nothing was measured."""
    if not torch.cuda.is_available():
        print("not measured: torch sees no CUDA device.")
        return
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    result = {
        "shape": f"T {ROWS}, d {D}, 8 experts of rank 8, k 2, bf16, unless said otherwise",
        "engines": engines(),
        "targets": TARGETS,
        "whole_layer": whole_layer(),
        "lora_path": lora_path(),
        "bandwidth": bandwidth(),
        "columns_1024": many_columns(),
        "decode": decode(),
    }
    print(write("kernels_gpu", result, COMMAND))


if __name__ == "__main__":
    main()
