"""Kernel timings on a CPU, one thread: moa against plain versions of its peers, the dispatcher's regret, few rows.

Ratios of process CPU time within one run, interleaved; the least of several rounds. Where the CPU multiplies bf16
only in software ("native_bf16": false), bf16 ratios say more about that than about the algorithms.

What holds on every machine, busy or not, is in `GATES`: ratios of medians of interleaved rounds at about 60 % of what a
quiet machine reaches. The result says of each whether it held, and the benchmark ends with an error where one did not.
No test looks at a clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.compat import has_native_matmul
from moa.kernels import choose_engine, low_rank_mixture, mixture_linear

from .common import interleaved, write
from .kernel_baselines import PEERS, batched_mm, plain_concat

COMMAND = "python -m experiments.bench.kernels"
# E, r: with k = 1, 2, 4 the 18 shapes on which the dispatcher is judged.
REGRET_SHAPES = ((8, 8), (8, 16), (16, 16), (8, 64), (64, 16), (128, 8))
# What one machine is asked to reach: peer / moa at T = 2048, d = 1024, 8 experts of rank 8, k = 2.
TARGETS = {
    "bf16": {
        "lean python loop": 4.5,
        "MoLA as coded": 10.0,
        "X-LoRA loop": 6.0,
        "Arrow einsum": 14.0,
        "HF grouped_mm": 5.5,
    },
    "fp32": {"MoLA as coded": 3.0, "X-LoRA loop": 7.0, "Arrow einsum": 2.8, "HF grouped_mm": 2.3},
}
# table, peer -> the least that its median time over moa's is; for the last two the most: moa's over its base's, and the
# dispatcher's choice over the best engine.
GATES = {
    ("lora_path_fp32_r8", "lean python loop"): 1.5,
    ("lora_path_fp32_r8", "MoLA as coded"): 1.8,
    ("lora_path_fp32_r8", "X-LoRA loop"): 3.0,
    ("lora_path_fp32_r8", "Arrow einsum"): 1.6,
    ("lora_path_fp32_r8", "HF grouped_mm"): 1.4,
    ("lora_path_bf16_r8", "lean python loop"): 2.5,
    ("many_experts_fp32", "lean python loop"): 2.0,
}
MOST_OVER_BASE = 1.6
MOST_REGRET = 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """Operands of one mixture, all of which need a gradient, and the gradient that arrives."""

    x: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor
    indices: Tensor
    grad: Tensor


def make_inputs(
    n_rows: int = 2048,
    d: int = 1024,
    n_experts: int = 8,
    rank: int = 8,
    k: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Return random operands: rows (T, d), factors (E, r, d), fp32 weights (T, K), distinct experts (T, K)."""
    kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
    chosen = torch.rand(n_rows, n_experts, device=device).topk(k, -1)
    return Inputs(
        torch.randn(n_rows, d, **kwargs).requires_grad_(),
        (torch.randn(n_experts, rank, d, **kwargs) / d**0.5).requires_grad_(),
        (torch.randn(n_experts, rank, d, **kwargs) / rank**0.5).requires_grad_(),
        chosen.values.softmax(-1).requires_grad_(),
        chosen.indices,
        torch.randn(n_rows, d, **kwargs),
    )


def train_step(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    """Return a callable that runs forward and backward with every gradient."""
    leaves = inputs.x, inputs.a, inputs.b, inputs.weights

    def step() -> Any:
        return torch.autograd.grad(function(*leaves, inputs.indices), leaves, inputs.grad)

    return step


def lora_path(dtype: str, rounds: int, rank: int = 8, n_rows: int = 2048) -> dict[str, Any]:
    """Return seconds and peer / moa of the adapters alone, forward and backward."""
    inputs = make_inputs(n_rows=n_rows, rank=rank, dtype=DTYPES[dtype])
    functions = {"moa": low_rank_mixture, "plain concat (autograd)": plain_concat, **PEERS}
    times = interleaved({name: train_step(f, inputs) for name, f in functions.items()}, rounds, warmup=1)
    ratios = {name: times[name]["min_s"] / times["moa"]["min_s"] for name in times}
    result: dict[str, Any] = {"seconds": times, "peer_over_moa": ratios}
    if rank == 8:
        result["target_at_least"] = TARGETS[dtype]
    return result


def whole_layer(dtype: str, rounds: int) -> dict[str, Any]:
    """Return the time of a mixed linear over that of its frozen base, forward and backward (target ≤ 1.35)."""
    inputs = make_inputs(dtype=DTYPES[dtype])
    weight = torch.randn(1024, 1024, dtype=DTYPES[dtype]) / 32

    def base() -> Any:
        return torch.autograd.grad(F.linear(inputs.x, weight), inputs.x, inputs.grad)

    def mixed(x: Tensor, *rest: Tensor) -> Tensor:
        return mixture_linear(x, weight, None, *rest)

    times = interleaved({"base": base, "moa": train_step(mixed, inputs)}, rounds, warmup=1)
    return {"seconds": times, "moa_over_base": times["moa"]["min_s"] / times["base"]["min_s"]}


def many_experts(rounds: int) -> dict[str, Any]:
    """Return loop / moa with 128 experts of rank 8, k = 2, fp32 (target ≥ 5)."""
    inputs = make_inputs(n_experts=128)
    peer = PEERS["lean python loop"]
    times = interleaved(
        {"moa": train_step(low_rank_mixture, inputs), "lean python loop": train_step(peer, inputs)}, rounds, warmup=1
    )
    return {"seconds": times, "loop_over_moa": times["lean python loop"]["min_s"] / times["moa"]["min_s"]}


def regret(rounds: int) -> dict[str, Any]:
    """Return, over 18 shapes in fp32, the chosen engine's time over the best one's (target ≤ 1.15 at worst)."""
    shapes = []
    for n_experts, rank in REGRET_SHAPES:
        for k in (1, 2, 4):
            inputs = make_inputs(n_experts=n_experts, rank=rank, k=k)
            steps = {}
            for engine in ("concat", "sorted"):

                def mixed(*operands: Tensor, engine: str = engine) -> Tensor:
                    return low_rank_mixture(*operands, engine=engine)

                steps[engine] = train_step(mixed, inputs)
            times = {name: found["min_s"] for name, found in interleaved(steps, rounds, warmup=1).items()}
            chosen = choose_engine(2048, 1024, 1024, n_experts, rank, k, torch.float32, "cpu")
            shapes.append(
                {
                    "n_experts": n_experts,
                    "rank": rank,
                    "k": k,
                    "chosen": chosen,
                    "seconds": times,
                    "regret": times[chosen] / min(times.values()),
                }
            )
    return {"shapes": shapes, "worst": max(shape["regret"] for shape in shapes)}


def decode(dtype: str, rounds: int, calls: int = 20) -> dict[str, Any]:
    """Return seconds of a whole layer's forward on 1, 16 and 64 rows, without gradients, for moa and its peers."""
    found: dict[str, Any] = {}
    for n_rows in (1, 16, 64):
        inputs = make_inputs(n_rows=n_rows, dtype=DTYPES[dtype])
        weight = torch.randn(1024, 1024, dtype=DTYPES[dtype]) / 32
        operands = (*(v.detach() for v in (inputs.x, inputs.a, inputs.b, inputs.weights)), inputs.indices)

        def repeat(function: Callable[[], Tensor]) -> Callable[[], None]:
            def step() -> None:
                with torch.no_grad():
                    for _ in range(calls):
                        function()

            return step

        peers = {**PEERS, "HF batched_mm": batched_mm, "plain concat (autograd)": plain_concat}
        steps = {
            "base": repeat(lambda x=operands[0], w=weight: F.linear(x, w)),
            "moa": repeat(lambda o=operands, w=weight: mixture_linear(o[0], w, None, *o[1:])),
            **{name: repeat(lambda f=f, o=operands, w=weight: F.linear(o[0], w) + f(*o)) for name, f in peers.items()},
        }
        times = interleaved(steps, rounds, warmup=1)
        found[str(n_rows)] = {name: value["min_s"] / calls for name, value in times.items()}
    return found


def gates(result: dict[str, Any]) -> dict[str, Any]:
    """Return of each ratio that should hold on every machine what it is, its limit, and whether it holds."""

    def ratio(table: str, over: str, under: str) -> float:
        seconds = result[table]["seconds"]
        return float(seconds[over]["median_s"] / seconds[under]["median_s"])

    found: dict[str, Any] = {}
    for (table, peer), least in GATES.items():
        value = ratio(table, peer, "moa")
        found[f"{table}: {peer} / moa"] = {"ratio": value, "at_least": least, "holds": value >= least}
    for name, value, most in (
        ("whole_layer_fp32: moa / base", ratio("whole_layer_fp32", "moa", "base"), MOST_OVER_BASE),
        ("regret_fp32: worst", result["regret_fp32"]["worst"], MOST_REGRET),
    ):
        found[name] = {"ratio": value, "at_most": most, "holds": value <= most}
    return found


def run(rounds: int) -> dict[str, Any]:
    """Return every table."""
    native = has_native_matmul(torch.bfloat16)
    emulated_rounds = rounds if native else max(2, rounds // 3)  # they take seconds
    return {
        "shape": "T 2048, d 1024, 8 experts of rank 8, k 2, unless said otherwise",
        "native_bf16": native,
        "lora_path_fp32_r8": lora_path("fp32", rounds),
        "lora_path_fp32_r16": lora_path("fp32", rounds, rank=16),
        "lora_path_bf16_r8": lora_path("bf16", emulated_rounds),
        "whole_layer_fp32": whole_layer("fp32", rounds),
        "whole_layer_bf16": whole_layer("bf16", emulated_rounds),
        "many_experts_fp32": many_experts(rounds),
        "regret_fp32": regret(rounds),
        "decode_fp32_seconds": decode("fp32", rounds),
        "decode_bf16_seconds": decode("bf16", rounds, calls=20 if native else 3),
    }


def main() -> None:
    """Write experiments/results/kernels_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = run(rounds)
    result["gates"] = gates(result)
    print(write("kernels_cpu", result, f"{COMMAND} --rounds {rounds}"))
    failed = [f"{name} {row['ratio']:.2f}" for name, row in result["gates"].items() if not row["holds"]]
    if failed:
        sys.exit("gates that do not hold: " + "; ".join(failed))


if __name__ == "__main__":
    main()
