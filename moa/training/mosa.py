"""MoSA: an adapter split into sparse copies that are drawn at random while it trains, and are one adapter elsewhere.

Zhang et al. 2023, arXiv 2312.02923.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..experts.frozen import generator
from ..formats.sharded import is_sharded
from ..merge import partition_masks
from ..merge.split import AXES
from .divergence import gives_numbers
from .factor_pairs import factored_banks

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

MERGES = ("average", "joint")
MOST = 255  # copies, whose numbers are kept as bytes
Starts = Mapping[str, tuple[Tensor, Tensor]]


class MoSA:
    """Trains each low-rank expert as n copies of it, of which copy i may move only the entries that mask i deals it.

    The parameters are the merged adapter P at all times, of an adapter's size: in evaluation, in a checkpoint and after
    `close` there is nothing to merge. A forward in training runs on copies, drawn uniformly for down and for up, apart
    for each expert of each layer and each optimizer step:

    copy_i = P₀ + mask_i ⊙ c (P - P₀),  c = n for the average of the copies, 1 for their own entries joined

    so that an entry outside the mask has the bits it started with, whatever an optimizer does to P. With the average,
    the mean over draws is P: an expert is linear in up, and in down if that is not drawn with it.

    Args:
        model: with experts of factors (E, r, i), (E, r, o); the copies start as these are.
        n: copies.
        by: how a matrix's entries are dealt out: all "entries", or within each of its "rows" or "columns".
        shared_down: down is not split, and trains in every step.
        merge: what P is: "average" of the copies, or "joint".
        consistency: weight of the symmetric KL divergence between two forwards with other draws, both of which have
            the task's loss; 0 runs one forward.
        seed: of masks and draws.
        starts: layer -> P₀, down and up, of a run that goes on; None takes what the parameters are.

    Raises:
        ConfigError: a value out of range, experts without two trained factors of their own, factors that are sharded or
            of which a copy would get no entry, or a consistency of outputs that are numbers.

    Source: arXiv 2312.02923; its LoRA variant.
    Differs: biases are not there; a copy that is not drawn moves by momentum and weight decay, as P is one parameter;
        with the average a step of P moves the copy drawn n times as far; "joint" does not divide by n, as the released
        code does; all forwards of an optimizer step have its draws.
    """

    def __init__(
        self,
        model: MoAModel,
        n: int = 4,
        by: Literal["entries", "rows", "columns"] = "entries",
        shared_down: bool = False,
        merge: Literal["average", "joint"] = "average",
        consistency: float = 1.0,
        seed: int = 0,
        starts: Starts | None = None,
    ) -> None:
        check_mosa(n, by, merge, consistency)
        check_agrees(model, consistency)
        self.model, self.n, self.seed = model, n, seed
        self.factor = n if merge == "average" else 1
        self.banks = factored_banks(model, "MoSA splits")
        self._drawn: tuple[int, dict[tuple[str, int], Tensor]] = (-1, {})
        found = starts_of(model) if starts is None else starts
        self.splits: dict[str, tuple[_Split | None, _Split]] = {}
        for name in self.banks:
            down, up = found[name]
            first = None if shared_down else _Split(down, self._owners(f"{name} down", down, by, turned=False))
            self.splits[name] = first, _Split(up, self._owners(f"{name} up", up, by, turned=True))
        for name, bank in self.banks.items():
            bank.factors = functools.partial(self.factors, name)  # type: ignore[method-assign]
        model.consistency = consistency
        model.routers_changed()

    def close(self) -> None:
        """Let the experts be the adapters (E, r, i), (E, r, o) that they are outside of training."""
        for bank in self.banks.values():
            vars(bank).pop("factors", None)
        self.model.consistency = 0.0
        self.model.routers_changed()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a layer's down (E, r, i) and up (E, r, o): in training those of the copies drawn, else P."""
        bank = self.banks[name]
        if not bank.training or self.n == 1:
            return bank.down, bank.up
        copies = self.drawn(name)
        return self.copy_of(name, copies[0], copies[1])

    def copy_of(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o) of one copy of each expert.

        Args:
            name: of the layer.
            down: (E,) int64, the copy's number.
            up: (E,) int64.
        """
        bank, (first, second) = self.banks[name], self.splits[name]
        changed = bank.down if first is None else first.copy_of(bank.down, down, self.factor)
        return changed, second.copy_of(bank.up, up, self.factor)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def drawn(self, name: str) -> Tensor:
        """Return which copies act now, (2, E): of down and of up; a block that runs again gets what it got."""
        current = self.model.selections.current()
        step, forward = self.model.steps_done, 0 if current is None else current[0]
        if self._drawn[0] != step:
            self._drawn = step, {}
        kept = self._drawn[1]
        if (name, forward) not in kept:
            draw = generator(self.seed, "copies", name, str(step), str(forward))
            bank = self.banks[name]
            found = torch.randint(self.n, (2, bank.n_experts), generator=draw)
            kept[name, forward] = found.to(bank.up.device)
        return kept[name, forward]

    def _owners(self, name: str, start: Tensor, by: str, *, turned: bool) -> Tensor:
        """Return which copy each entry of E matrices (E, a, b) belongs to; up is dealt out as the matrix (o, r)."""
        shape = tuple(start.shape[:0:-1] if turned else start.shape[1:])
        entries = {"entries": shape[0] * shape[1], "rows": shape[1], "columns": shape[0]}[by]
        if entries < self.n:
            raise ConfigError(f"{name}: by={by!r} deals {entries} entries out to n={self.n} copies: choose fewer.")
        dealt = []
        for expert in range(start.shape[0]):
            seed = generator(self.seed, "masks", name, str(expert)).initial_seed()
            owner = partition_masks(shape, self.n, by=by, seed=seed).to(torch.uint8).argmax(0).to(torch.uint8)
            dealt.append(owner.T if turned else owner)
        return torch.stack(dealt).contiguous().to(start.device)


@dataclass(frozen=True, eq=False)
class _Split:
    """What is kept of a factor's copies: where they started (E, r, d), and whose an entry is (E, r, d), uint8."""

    start: Tensor
    owner: Tensor

    def copy_of(self, merged: Tensor, copies: Tensor, factor: int) -> Tensor:
        start, owner = self.start.to(merged), self.owner.to(merged.device)
        moved = merged if factor == 1 else start + factor * (merged - start)
        return torch.where(owner == copies.to(owner.device).view(-1, 1, 1), moved, start)


def starts_of(model: MoAModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer -> copies of down (E, r, i) and up (E, r, o) as they are.

    Raises:
        ConfigError: experts without two trained factors of their own, or sharded ones.
    """
    found = {}
    for name, bank in factored_banks(model, "MoSA splits").items():
        if is_sharded(bank.down):
            raise ConfigError("MoSA splits whole factors, and these are sharded: leave out fsdp and deepspeed.")
        found[name] = bank.down.detach().clone(), bank.up.detach().clone()
    return found


def check_mosa(n: int, by: str, merge: str, consistency: float) -> None:
    """Check what can be checked without a model; no tensors, so no shapes.

    Raises:
        ConfigError: see `MoSA`.
    """
    if not 1 <= n <= MOST:
        raise ConfigError(f"n must be from 1 to {MOST} copies, got {n}.")
    if by not in AXES:
        raise ConfigError(unknown_name("value of by", by, AXES, "MoSA"))
    if merge not in MERGES:
        raise ConfigError(unknown_name("merge", merge, MERGES, "MoSA"))
    if not 0 <= consistency < float("inf"):
        raise ConfigError(f"consistency must be a number, at least 0, got {consistency}.")


def check_agrees(model: MoAModel, consistency: float) -> None:
    """Refuse a consistency of outputs (B, C) whose softmax says nothing.

    Raises:
        ConfigError: the model gives numbers.
    """
    if consistency and gives_numbers(model):
        raise ConfigError("this model gives numbers, of which a softmax says nothing: set consistency=0.")
