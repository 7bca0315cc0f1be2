"""Adapters of several tasks merged, and a model that runs under the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.merge import LowRank, fly_stack, merge

from .adapters import Adapter

Change = Tensor | Callable[[Tensor], Tensor]
MERGES: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "ties": {"method": "ties", "density": 0.2},
    "dare": {"method": "dare", "density": 0.5},
    "knots": {"method": "knots"},
}
OWN = {"average_own_top_k": "average", "task_arithmetic_own_top_k": "task_arithmetic"}
TOP_K = 8


def merges_of(kind: str) -> list[str]:
    """Return the names of the merges of a kind of adapters: FlyLoRA's may keep each task's own top-k as well."""
    return [*MERGES, *(OWN if kind.startswith("flylora") else ())]


def scaled(name: str) -> bool:
    """Return whether a merge has a coefficient λ to choose."""
    return not name.startswith("average")


@dataclass(frozen=True, eq=False)
class Routed:
    """Split-LoRA after a merge: each expert merged over the tasks, the gates averaged; y = w_e D_e x, e the best.

    Args:
        gate: (E, i).
        experts: (E, o, i).
    """

    gate: Tensor
    experts: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the change of the output (*rows, o) for x (*rows, i)."""
        weights, best = F.linear(x, self.gate).sigmoid().max(-1)
        y = x.new_zeros(*x.shape[:-1], self.experts.shape[1])
        for e, expert in enumerate(self.experts):
            y[best == e] = F.linear(x[best == e], expert) * weights[best == e].unsqueeze(-1)
        return y


def merged(adapters: Sequence[Adapter], name: str, scale: float = 1.0, seed: int = 0) -> dict[str, Change]:
    """Return what a merge adds to every layer: a weight change (o, i), or a function of x where a routing stays.

    FlyLoRA's products lose their top-k, but for the merges that keep it. Split-LoRA is merged expert by expert.

    Args:
        adapters: one per task, of one kind.
        name: in `MERGES` or `OWN`.
        scale: λ; not read by averages.
        seed: of DARE's masks.
    """
    layers = adapters[0].layers
    if name in OWN:
        weight = scale if scaled(name) else 1 / len(adapters)
        return {
            layer: fly_stack(
                [_delta(a.layers[layer], 0) for a in adapters],
                TOP_K,
                [weight] * len(adapters),
                biases=[a.layers[layer]["bias"] for a in adapters],
            )
            for layer in layers
        }
    options = dict(MERGES[name])
    if scaled(name):
        options["scale"] = scale
    if options["method"] == "dare":
        options["seed"] = seed
    sets = [
        {f"{layer}/{e}": _delta(own, e) for layer, own in a.layers.items() for e in range(len(own["down"]))}
        for a in adapters
    ]
    dense = {key: delta.dense() for key, delta in merge(sets, **options).items()}
    out: dict[str, Change] = {}
    for layer, own in layers.items():
        experts = [dense[f"{layer}/{e}"] for e in range(len(own["down"]))]
        if "gate" in own:
            gates = torch.stack([a.layers[layer]["gate"] for a in adapters])
            out[layer] = Routed(gates.mean(0), torch.stack(experts))
        else:
            out[layer] = experts[0]
    return out


def _delta(own: Mapping[str, Tensor], e: int) -> LowRank:
    return LowRank(own["down"][e], own["up"][e].T.contiguous())


@contextlib.contextmanager
def changed(model: Any, changes: Mapping[str, Change], adapters: Sequence[Adapter]) -> Iterator[nn.Module]:
    """Run a base under merged changes, with every task's own head; afterwards it is what it was.

    Args:
        model: the base, heads included.
        changes: of `merged`.
        adapters: one per task, in the order of the heads: their heads are used.
    """
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    hooks = []
    model.heads.weight.data = torch.stack([adapter.weight for adapter in adapters])
    model.heads.bias.data = torch.stack([adapter.bias for adapter in adapters])
    for name, change in changes.items():
        layer = model.get_submodule(name)
        if isinstance(change, Tensor):
            layer.weight.data = layer.weight.data + change
        else:
            hooks.append(layer.register_forward_hook(lambda _, x, y, add=change: y + add(x[0])))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, value in kept:
            parameter.data = value
