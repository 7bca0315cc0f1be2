"""LISA: which layers' experts, or which experts, train is drawn anew every few steps.

Pan et al. 2024, arXiv 2403.17919.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..model.host import Host

Masked = tuple[nn.Parameter, int]  # a tensor whose first axis is the experts, and the number of them


class Lisa:
    """Lets only some of a model's experts train, others in each interval; routers and heads train always.

    It hangs on the optimizer's own steps, in Trainer's loop as in yours, until `close`. Every interval's choice follows
    from the seed and its number, and all are covered every ⌈n / n_active⌉ intervals.

    Args:
        model: whose experts are trained.
        optimizer: made before, over all of them.
        n_active: γ, how many train at a time.
        every: optimizer steps in an interval.
        over: "layers": the experts of γ blocks of layers (a name up to its first number) train; the others need no
            gradient, so that steps and memory are saved. "experts": the γ same experts of every layer train; the
            others' rows of gradients are zero, and their rows of weights and of moments are put back after each step:
            nothing is saved.
        state: of the optimizer for what stops training: "drop" it, by which memory is saved, or "keep" it.
        seed: of the choice.
        start_step: optimizer steps already done.

    Raises:
        ConfigError: nothing to choose from, n_active out of range, "drop" with experts, whose tensors share one count
            of steps, or experts whose trained tensors all of them share.
    Source: arXiv 2403.17919, algorithm 1.
    Differs: drawn without return, where the paper draws every interval by itself; the released callback keeps the
        optimizer's state.
    """

    def __init__(
        self,
        model: Host,
        optimizer: torch.optim.Optimizer,
        n_active: int = 2,
        every: int = 20,
        over: Literal["layers", "experts"] = "layers",
        state: Literal["drop", "keep"] = "keep",
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        check_lisa(n_active, every, over, state)
        self.optimizer, self.n_active, self.every, self.over, self.state = optimizer, n_active, every, over, state
        self.seed, self.steps = seed, start_step
        self.active: tuple[int, ...] = ()
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.groups: dict[str, list[nn.Parameter]] = {}
        self._masked: list[Masked] = []
        for name, branch in model.branches():
            trained = {n: p for n, p in branch.bank.named_parameters() if p.requires_grad}
            self.groups.setdefault(block_of(name), []).extend(trained.values())
            if over == "experts":
                shared = [n for n in trained if n not in branch.bank.per_expert]
                if shared or not trained:
                    raise ConfigError(
                        f"{name}: {type(branch.bank).__name__} trains {', '.join(shared) or 'nothing'}, which is not "
                        "one expert's: choose over='layers'."
                    )
                self._masked += [(p, branch.bank.n_experts) for p in trained.values()]
        self.groups = {block: parameters for block, parameters in self.groups.items() if parameters}
        sizes = {n for _, n in self._masked}
        if len(sizes) > 1:
            raise ConfigError(f"layers have {sorted(sizes)} experts: over='experts' needs as many in every layer.")
        self.total = sizes.pop() if sizes else len(self.groups)
        if n_active > self.total:
            raise ConfigError(f"n_active={n_active}: this model has {self.total} {over} that train.")
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._handles += [p.register_hook(self._rows_only) for p, _ in self._masked]
        self._choose()

    def close(self) -> None:
        """Let all of them train again, whatever shape, and hang on nothing any longer."""
        for handle in self._handles:
            handle.remove()
        for parameter in (p for parameters in self.groups.values() for p in parameters):
            parameter.requires_grad_(True)

    def _choose(self) -> None:
        per_round = -(-self.total // self.n_active)
        turn, place = divmod(self.steps // self.every, per_round)
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        order = torch.randperm(self.total, generator=rng).tolist()
        first = place * self.n_active
        self.active = tuple(sorted(order[(first + j) % self.total] for j in range(self.n_active)))
        if self.over == "experts":
            return
        for number, parameters in enumerate(self.groups.values()):
            for parameter in parameters:
                parameter.requires_grad_(number in self.active)
                if number not in self.active:
                    parameter.grad = None  # an optimizer with weight decay moves what has a zero for a gradient
                    if self.state == "drop":
                        self.optimizer.state.pop(parameter, None)

    def _frozen(self, device: torch.device) -> Tensor:
        return torch.tensor([e for e in range(self.total) if e not in self.active], dtype=torch.long, device=device)

    def _rows_only(self, grad: Tensor) -> Tensor:
        return grad.index_fill(0, self._frozen(grad.device), 0)

    def _before(self, *_: Any) -> None:
        """Keep what must not move: rows of weights (E, …) and of the optimizer's state for them."""
        self._kept = []
        for parameter, _n in self._masked:
            frozen = self._frozen(parameter.device)
            for tensor in (parameter.data, *self._moments(parameter)):
                self._kept.append((tensor, frozen, tensor[frozen].clone()))

    def _after(self, *_: Any) -> None:
        fresh = {id(tensor) for tensor, _, _ in self._kept}
        for tensor, frozen, rows in self._kept:
            tensor[frozen] = rows
        for parameter, _n in self._masked:
            for tensor in self._moments(parameter):
                if id(tensor) not in fresh:  # made by this step, before which there was nothing
                    tensor[self._frozen(tensor.device)] = 0
        self._kept = []
        self.steps += 1
        if self.steps % self.every == 0:
            self._choose()

    def _moments(self, parameter: nn.Parameter) -> list[Tensor]:
        found = []
        for name, value in self.optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if not value.ndim or value.shape[0] != parameter.shape[0]:
                raise ConfigError(
                    f"{type(self.optimizer).__name__} keeps {name} {tuple(value.shape)} of experts "
                    f"{tuple(parameter.shape)}, which is not one row an expert: choose over='layers'."
                )
            found.append(value)
        return found


def check_lisa(n_active: int, every: int, over: str, state: str) -> None:
    """Check what can be checked without a model; no tensors, so no shapes.

    Raises:
        ConfigError: see `Lisa`.
    """
    if n_active < 1 or every < 1:
        raise ConfigError(f"n_active and every must be at least 1, got {n_active} and {every}.")
    if over not in ("layers", "experts"):
        raise ConfigError(unknown_name("value of over", over, ("layers", "experts"), "LISA"))
    if state not in ("drop", "keep"):
        raise ConfigError(unknown_name("state", state, ("drop", "keep"), "LISA"))
    if over == "experts" and state == "drop":
        raise ConfigError("state='drop' with over='experts': experts of a layer share one count of steps; keep it.")


def block_of(name: str) -> str:
    """Return the part of a layer's dotted name that says its block: up to its first number, else all of it."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else name
