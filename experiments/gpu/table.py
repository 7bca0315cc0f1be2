"""What one layer costs, forward and backward, beside its frozen base, peft and its peers: T 8192, d 4096, bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moa
from moa.kernels import Gate, choose_engine, gated_linear, low_rank_mixture, mixture_linear
from moa.kernels.triton import launches, routed

from ..bench.kernel_baselines import PEERS, plain_concat, scatter_copies
from ..bench.kernels import Inputs, make_inputs, train_step
from ..bench.memory import Net, adapted, saved_bytes
from .book import Row
from .machine import Machine, Step, over
from .page import goal
from .scatter import scatter
from .shapes import ROWS, D

LOOP = "lean python loop"
MIXERS: dict[str, Callable[..., Tensor]] = {
    "plain concat": plain_concat,
    "ScatterMoE-type": scatter,
    "rows sorted, k copies (plain torch)": scatter_copies,
    **PEERS,
}


def inputs(machine: Machine, n_experts: int = 8, rank: int = 8, rows: int = ROWS) -> Inputs:
    """Return random operands of one layer."""
    n, d = machine.pick((rows, D), (17, 64))
    n_experts, rank = machine.pick((n_experts, rank), (8, 8))
    return make_inputs(n, d, n_experts, rank, dtype=machine.low, device=machine.device)


def base_weight(machine: Machine, d: int) -> Tensor:
    """Return a frozen weight (d, d)."""
    return torch.randn(d, d, dtype=machine.low, device=machine.device) / d**0.5


def ceilings(machine: Machine) -> dict[str, Any]:
    """Return what a copy and a large product reach on this device."""
    n = machine.pick(8192, 64)
    one, other = (torch.randn(n, n, dtype=machine.low, device=machine.device) for _ in range(2))
    long = torch.randn(machine.pick(2**30, 2**10), dtype=machine.low, device=machine.device)
    into, out = torch.empty_like(long), torch.empty_like(one)
    times = machine.compare(
        {"copy of 2 GiB": lambda: into.copy_(long), "8192³ product": lambda: torch.mm(one, other, out=out)}
    )
    per_ms(times["copy of 2 GiB"], "GB/s", 2 * long.nbytes / 1e6)
    per_ms(times["8192³ product"], "TFLOP/s", 2 * n**3 / 1e9)
    return {"times": times}


def per_ms(found: dict[str, Any], name: str, amount: float) -> None:
    """Add how much is done in a ms, where the step did not fail."""
    if "median_ms" in found:
        found[name] = amount / found["median_ms"]


def whole_layer(machine: Machine) -> dict[str, Any]:
    """Return times of a layer with its frozen base, its router in it or given, beside peft's LoRA of rank 64."""
    given = inputs(machine)
    d = given.x.shape[1]
    weight = base_weight(machine, d)
    gate = (torch.randn(8, d, device=machine.device) / d**0.5).requires_grad_()
    leaves = [given.x, gate, given.a, given.b]

    def base() -> Any:
        return torch.autograd.grad(F.linear(given.x, weight), given.x, given.grad)

    def gated() -> Any:
        y = gated_linear(given.x, weight, None, Gate(gate, 2), given.a, given.b)[0]
        return torch.autograd.grad(y, leaves, given.grad)

    def apart() -> Any:
        kept, chosen = F.linear(given.x.float(), gate).topk(2, -1)
        y = mixture_linear(given.x, weight, None, given.a, given.b, kept.softmax(-1), chosen)
        return torch.autograd.grad(y, leaves, given.grad)

    def plain(x: Tensor, *rest: Tensor) -> Tensor:
        return F.linear(x, weight) + plain_concat(x, *rest)

    def mixed(x: Tensor, *rest: Tensor) -> Tensor:
        return mixture_linear(x, weight, None, *rest)

    lora = peft_lora(weight, 64)
    own = [given.x, *(p for p in lora.parameters() if p.requires_grad)]
    times = machine.compare(
        {
            "frozen base": base,
            "moa with its router": gated,
            "moa, routing given": train_step(mixed, given),
            "moa, its router apart": apart,
            "peft LoRA r64": lambda: torch.autograd.grad(lora(given.x), own, given.grad),
            "plain concat": train_step(plain, given),
        }
    )
    ours = "moa with its router"
    return {
        "times": times,
        "goals": [
            goal("moa / frozen base", over(times, ours, "frozen base"), at_most=1.25),
            goal("moa / peft LoRA r64", over(times, ours, "peft LoRA r64"), at_most=1.0),
            goal("moa, routing given / frozen base", over(times, "moa, routing given", "frozen base"), at_most=1.25),
        ],
    }


def peft_lora(weight: Tensor, rank: int) -> Any:
    """Return a linear with the given weight (o, i) under peft's LoRA, in its dtype."""
    import peft

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    layer = Layer().to(weight)
    layer.linear.weight.data.copy_(weight)
    return peft.get_peft_model(layer, peft.LoraConfig(r=rank, target_modules=["linear"])).to(weight.dtype)  # type: ignore[arg-type]


def adapters(machine: Machine) -> dict[str, Any]:
    """Return times of the adapters alone, and peer / moa."""
    given = inputs(machine)
    functions = {"moa": low_rank_mixture, **MIXERS}
    times = machine.compare({name: train_step(function, given) for name, function in functions.items()})
    least = {"plain concat": 1.3, "HF grouped_mm": 4.0, "ScatterMoE-type": 3.0, LOOP: 10.0}
    goals = [goal(f"{name} / moa", over(times, name, "moa"), at_least=value) for name, value in least.items()]
    return {"times": times, "goals": goals}


def compiled(machine: Machine) -> dict[str, Any]:
    """Return times beside plain concat under torch's compiler, which takes long enough to have a row of its own."""
    given = inputs(machine)
    weight = base_weight(machine, given.x.shape[1])

    def plain(x: Tensor, *rest: Tensor) -> Tensor:
        return F.linear(x, weight) + plain_concat(x, *rest)

    def mixed(x: Tensor, *rest: Tensor) -> Tensor:
        return mixture_linear(x, weight, None, *rest)

    name, ours = "torch.compile of plain concat", "moa"
    times = machine.compare(
        {
            ours: train_step(low_rank_mixture, given),
            name: train_step(machine.compile(plain_concat), given),
            f"{ours}, with its base": train_step(mixed, given),
            f"{name}, with its base": train_step(machine.compile(plain), given),
        }
    )
    return {"times": times, "goals": [goal(f"{name} / {ours}", over(times, name, ours), at_least=1.2)]}


def many_columns(machine: Machine) -> dict[str, Any]:
    """Return times with 64 experts of rank 16, 1024 columns."""
    given = inputs(machine, 64, 16)
    n, d = given.x.shape
    chosen = choose_engine(n, d, d, 64, 16, 2, torch.bfloat16, "cuda")
    steps: dict[str, Step] = {
        name: train_step(partial(low_rank_mixture, engine=name), given) for name in ("triton_concat", "triton_grouped")
    }
    for name in ("HF grouped_mm", "ScatterMoE-type", LOOP):
        steps[name] = train_step(MIXERS[name], given)
    times = machine.compare(steps)
    ours = chosen if chosen in times else "triton_grouped"
    return {
        "times": times,
        "chosen": chosen,
        "goals": [
            goal("HF grouped_mm / moa", over(times, "HF grouped_mm", ours), at_least=1.4),
            goal("ScatterMoE-type / moa", over(times, "ScatterMoE-type", ours), at_least=1.4),
        ],
    }


def kernels(machine: Machine) -> dict[str, Any]:
    """Return each launch of the layer alone, and what it reaches of a copy's bandwidth or a product's rate."""
    given = inputs(machine)
    x, a, b, weights, grad = (v.detach() for v in (given.x, given.a, given.b, given.weights, given.grad))
    indices, (n, d) = given.indices, given.x.shape
    hidden = torch.randn(n, 2, 8, device=machine.device).to(machine.low)
    mixed = torch.randn(n, 64, device=machine.device).to(machine.low)
    weight, y, copy = base_weight(machine, d), torch.randn_like(x), torch.empty_like(x)
    gate = torch.randn(8, d, device=machine.device)
    steps: dict[str, Step] = {
        "copy of x": lambda: copy.copy_(x),
        "shrink": lambda: launches.shrink(x, a, weights, indices, hidden, mixed),
        "shrink with its router, and expand": lambda: routed.routed(x, gate, a, b, 2, 1.0, None, None),
        "expand": lambda: launches.expand(mixed, b, None),
        "unmix": lambda: launches.unmix(grad, b, weights, indices, hidden, True, True, True),
        "gram": lambda: launches.gram(mixed, grad, b),
        "base onto y": lambda: y.addmm_(x, weight.T),
        "base into nothing": lambda: torch.mm(x, weight.T, out=y),
        "router apart": lambda: F.linear(x.float(), gate).topk(2, -1)[0].softmax(-1),
    }
    times = machine.compare(steps)
    moved = {"copy of x": 2, "shrink": 1, "expand": 1, "unmix": 1, "gram": 1, "shrink with its router, and expand": 2}
    for name, passes in moved.items():
        per_ms(times[name], "GB/s", passes * x.nbytes / 1e6)
    for name in ("base onto y", "base into nothing"):
        per_ms(times[name], "TFLOP/s", 2 * n * d * d / 1e9)
    speeds = {name: times[name]["GB/s"] for name in moved if "GB/s" in times[name]}
    reached = {name: speed / speeds["copy of x"] for name, speed in speeds.items()} if "copy of x" in speeds else {}
    return {
        "times": times,
        "bandwidth over a copy's": reached,
        "goals": [goal("shrink's bandwidth / a copy's", reached.get("shrink"), at_least=0.75)],
    }


def memory(machine: Machine) -> dict[str, Any]:
    """Return what one adapted linear keeps for backward beyond its input, in multiples of it."""
    n, d = machine.pick((ROWS, D), (40, 64))
    x = torch.randn(n, d, dtype=machine.low, device=machine.device, requires_grad=True)
    # Layers of one branch, as memory.py counts them.
    made = {
        "moa topk 8x8 k=2": lambda: moa.build(Net(d).to(x), "topk", 8, 2, targets=["linear"]),
        "peft LoRA r64": lambda: peft_lora(base_weight(machine, d), 64),
    }
    kept = {name: saved_bytes(adapted(make().to(machine.device).train()), x) / x.nbytes for name, make in made.items()}
    return {
        "kept over x": kept,
        "goals": [goal("bytes kept beyond x / x", kept["moa topk 8x8 k=2"], at_most=0.03)],
        "notes": ", ".join(f"{name} keeps {value:.3f} x" for name, value in kept.items()),
    }


def rows(machine: Machine, _: Any) -> Iterator[Row]:
    """Yield the rows."""
    made = (ceilings, whole_layer, kernels, adapters, many_columns, memory, compiled)
    for make, seconds in zip(made, (4, 8, 5, 15, 12, 3, 15), strict=True):
        yield Row(make.__name__.replace("_", " "), partial(make, machine), seconds)
