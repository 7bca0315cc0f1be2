"""What a server takes from a client: its answer is looked at tensor by tensor, and refused by name."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..delta import all_finite
from ..errors import shown
from .aggregators import Aggregator
from .update import Update


@dataclass(frozen=True, eq=False)
class Reply:
    """What one client sends back; nothing in it is trusted.

    Args:
        tensors: trained ones, by name, of any shape.
        examples: how many it trained on: its weight.
        scalings: by the name of a bank with factors, their s.
        fingerprint: of what it did not train, as `fingerprint` gives it.
    """

    tensors: Mapping[str, Tensor]
    examples: float
    scalings: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class Screen:
    """The limits of what a server takes.

    Args:
        largest: absolute value of any entry, and of a scale.
        most_examples: that a client may claim, so that none outweighs all others at will.
    """

    largest: float = 1e4
    most_examples: float = 1e9

    def why_not(self, reply: Reply, server: Update, names: frozenset[str], row: Aggregator) -> str | None:
        """Return why a reply is refused, with the tensor's name, or None.

        Args:
            reply: a client's.
            server: the server's tensors, of the shapes that are expected.
            names: of what a client must send, and nothing else.
            row: says whether a client may have a rank of its own, at most the server's.
        """
        missing, foreign = sorted(names - reply.tensors.keys()), sorted(map(str, reply.tensors.keys() - names))
        if missing:
            return f"{missing[0]} is missing ({len(missing)} of {len(names)} tensors)"
        if foreign:
            return f"{shown(foreign[0])} is foreign: the server has none of that name ({len(foreign)} such)"
        banks = {f"{bank}.{side}": bank for bank in server.scalings for side in ("down", "up")}
        for name in sorted(names):
            reason = self._why_not_tensor(reply.tensors[name], server.tensors[name], row.ranks and name in banks)
            if reason is not None:
                return f"{name} {reason}"
        reason = self._why_not_numbers(reply, server)
        if reason is not None or not row.ranks:
            return reason
        for bank in server.scalings:
            ranks = [reply.tensors[n].shape[1] for n in (f"{bank}.down", f"{bank}.up") if n in names]
            if len(set(ranks)) > 1:
                return f"{bank} has factors of ranks {ranks}, which have no product"
        return None

    def _why_not_tensor(self, tensor: Tensor, known: Tensor, any_rank: bool) -> str | None:
        if not isinstance(tensor, Tensor):
            return f"is a {type(tensor).__name__}, expected a tensor"
        if tensor.layout != torch.strided or tensor.is_meta:
            return f"is a {tensor.layout} tensor on {tensor.device}, expected a dense one"
        if tensor.dtype != known.dtype:
            return f"has dtype {tensor.dtype}, expected {known.dtype}"
        fits = tensor.shape == known.shape
        if any_rank and tensor.ndim == 3:
            fits = tensor.shape[::2] == known.shape[::2] and 1 <= tensor.shape[1] <= known.shape[1]
        if not fits:
            least = f" or of a rank below {known.shape[1]}" if any_rank else ""
            return f"has shape {tuple(tensor.shape)}, expected {tuple(known.shape)}{least}"
        if tensor.is_floating_point():
            if not all_finite(tensor):
                return "holds NaN or infinity"
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > self.largest:
                return f"holds {largest:.3g}, and {self.largest:g} is the largest that is taken"
        return None

    def _why_not_numbers(self, reply: Reply, server: Update) -> str | None:
        weight = reply.examples
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            return f"examples must be a number, got {shown(repr(weight), 40)}"
        if not (math.isfinite(weight) and 0 < weight <= self.most_examples):
            return f"examples must be above 0 and at most {self.most_examples:g}, got {weight}"
        if reply.scalings.keys() != server.scalings.keys():
            other = sorted(map(str, reply.scalings.keys() ^ server.scalings.keys()))[0]
            return f"{shown(other)} has a scale on only one side"
        for bank, scaling in reply.scalings.items():
            if isinstance(scaling, bool) or not isinstance(scaling, numbers.Real):
                return f"{bank} has scale {shown(repr(scaling), 40)}, expected a number"
            if not (math.isfinite(scaling) and 0 < scaling <= self.largest):
                return f"{bank} has scale {scaling}, expected one above 0 and at most {self.largest:g}"
        if reply.fingerprint != fingerprint(server):
            return (
                f"fingerprint is {shown(reply.fingerprint, 12)!r}, expected {fingerprint(server)[:12]!r}: what it "
                "does not train (places, bases, frozen factors) is not the server's to the last bit; build both from "
                "one base, by one seed, or load the server's checkpoint (save_bases=True where a weight gives bases)"
            )
        return None


def fingerprint(update: Update) -> str:
    """Return a digest of every tensor, of any shape, that training leaves alone: those of experts, not the base's."""
    total = hashlib.sha256()
    for name, digest in sorted(update.constants.items()):
        total.update(f"{name}={digest};".encode())
    return total.hexdigest()
