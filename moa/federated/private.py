"""Training that tells little of any one example: clipped gradients of examples, noise, and what that spends."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError, ConfigError
from ..model.moa_model import MoAModel


@dataclass(frozen=True)
class Spent:
    """What a training has spent.

    Args:
        epsilon: of (ε, δ)-differential privacy, for adding or removing one example.
        delta: δ.
        steps: that were taken.
        sample_rate: probability of an example to be in a step.
        losses: mean loss of each step's examples; these are not private.
    """

    epsilon: float
    delta: float
    steps: int
    sample_rate: float
    losses: tuple[float, ...]


def train_privately(
    model: MoAModel,
    examples: Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    noise_multiplier: float,
    max_norm: float,
    delta: float = 1e-5,
    seed: int | None = None,
) -> Spent:
    """Train by DP-SGD, and return what it spent; meant for cores, (E, r, r), whose change is linear in the noise.

    Each step draws every example with probability q = batch_size / N, clips each one's gradient to `max_norm`, adds
    normal noise of deviation noise_multiplier · max_norm to their sum, and divides by batch_size. Gradients of examples
    are taken one example at a time: exact under any router, as slow as that. Buffers, as a router's statistics of its
    load, would tell of the data without noise: they are put back after each step.

    Args:
        model: in the mode in which it is to train.
        examples: keywords of the model for one example each, (1, S) and the like, with labels.
        optimizer: over what trains; opacus's takes its place while this runs.
        steps: of training.
        batch_size: that is expected of a step.
        noise_multiplier: σ, relative to max_norm.
        max_norm: C, of an example's gradient.
        delta: δ, below 1 / N.
        seed: of draws and noise; None: from the system. A known seed is not private.

    Raises:
        BackendError: opacus is not installed.
        ConfigError: a number out of range, no examples, an optimizer over other parameters than those that train.

    Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1; Fed-SB, arXiv 2502.15436, §4.
    """
    if importlib.util.find_spec("opacus") is None:
        raise BackendError("private training needs opacus, which is not installed: pip install opacus.")
    from opacus.accountants import RDPAccountant
    from opacus.optimizers import DPOptimizer

    _check(model, examples, optimizer, steps, batch_size, noise_multiplier, max_norm, delta)
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    private = DPOptimizer(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_norm,
        expected_batch_size=batch_size,
        generator=rng,
    )
    accountant, rate = RDPAccountant(), batch_size / len(examples)
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    losses = []
    for _ in range(steps):
        private.zero_grad(set_to_none=True)
        drawn = (torch.rand(len(examples), generator=rng) < rate).nonzero().flatten().tolist()
        losses.append(_per_example(model, [examples[n] for n in drawn], private.params))
        private.step()
        for buffer, values in kept:
            buffer.copy_(values)
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=rate)
    private.zero_grad(set_to_none=True)
    return Spent(float(accountant.get_epsilon(delta)), delta, steps, rate, tuple(losses))


def _per_example(model: MoAModel, examples: Sequence[Mapping[str, Tensor]], parameters: list[nn.Parameter]) -> float:
    """Leave each example's gradient in `grad_sample`, (B, …), and return their mean loss."""
    rows: list[list[Tensor]] = [[] for _ in parameters]
    total = 0.0
    for example in examples:
        loss: Any = model(**example).loss
        total += float(loss.detach())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for row, parameter, gradient in zip(rows, parameters, found, strict=True):
            row.append(torch.zeros_like(parameter) if gradient is None else gradient)
    for row, parameter in zip(rows, parameters, strict=True):
        one: Any = parameter
        one.grad_sample = torch.stack(row) if row else parameter.new_zeros(0, *parameter.shape)
    return total / max(1, len(examples))


def _check(
    model: MoAModel,
    examples: Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int,
    noise_multiplier: float,
    max_norm: float,
    delta: float,
) -> None:
    if not len(examples):
        raise ConfigError("there are no examples to train on.")
    for name, value, most in (("steps", steps, 10**9), ("batch_size", batch_size, len(examples))):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"{name} must be a whole number from 1 to {most}, got {value!r}.")
    for name, number, above in (
        ("noise_multiplier", noise_multiplier, float("inf")),
        ("max_norm", max_norm, float("inf")),
        ("delta", delta, 1 / len(examples)),
    ):
        if not 0 < number < above:
            raise ConfigError(f"{name} must be above 0 and below {above:g}, got {number!r}.")
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if given != trained.keys():
        wrong = next(
            (name for key, name in trained.items() if key not in given), "one that is frozen or another model's"
        )
        raise ConfigError(f"the optimizer must hold what trains, and nothing else: {wrong} is on only one side.")
