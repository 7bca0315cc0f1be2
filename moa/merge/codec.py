"""Adapters in one or a few bits a number: a fixed code book for standardised weights, and packing.

Binary adapters: "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
(Jie et al. 2023, arXiv 2307.16867).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, NumericsError

BIT_WIDTHS = (1, 2, 4, 8)


def _medians(levels: Tensor) -> Tensor:
    """Return the median of a standard normal number in each level's bin; bins end at the midpoints (2^bits,)."""
    edges = torch.special.ndtr((levels[1:] + levels[:-1]) / 2)
    mass = torch.cat([edges.new_zeros(1), edges, edges.new_ones(1)])
    return torch.special.ndtri((mass[1:] + mass[:-1]) / 2)


def _density(x: Tensor) -> Tensor:
    """Return the standard normal density at x (n,)."""
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


@cache
def _levels(bits: int) -> tuple[float, ...]:
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    # Lloyd's iteration by itself creeps (256 levels still move by 1e-4 after 2,000 rounds); Newton's finishes it.
    for _ in range(100):
        levels = _medians(levels)
    for _ in range(20):
        middle = _medians(levels)
        # d median_j / d level: each edge moves by half a level, and the median by density(edge) / 2 density(median).
        edges = _density((levels[1:] + levels[:-1]) / 2) / 4
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_zeros(1)])
        slope = torch.diag(edges[1:] + edges[:-1]) + torch.diag(edges[1:-1], 1) + torch.diag(edges[1:-1], -1)
        step = torch.linalg.solve(
            torch.eye(count, dtype=torch.float64) - slope / _density(middle)[:, None], middle - levels
        )
        levels = levels + step
        if float(step.abs().max()) < 1e-14:
            break
    levels = (levels - levels.flip(0)) / 2  # symmetric to the last bit
    return tuple(levels.tolist())


def code_book(bits: int) -> Tensor:
    """Return the 2^bits levels that stand for a standard normal number.

    Fixed point of: bins split at the midpoints of neighbouring levels, each level the median of its bin. One bit
    gives ±Φ⁻¹(3/4) = ±0.67449, two bits ±0.37775 and ±1.26572.

    Args:
        bits: 1, 2, 4 or 8.

    Returns:
        (2^bits,) float64, ascending, symmetric about 0.

    Raises:
        ConfigError: another number of bits.

    Source: Jie et al. 2023, arXiv 2307.16867.
    """
    if bits not in BIT_WIDTHS:
        raise ConfigError(f"codec: bits is {bits}, expected one of {BIT_WIDTHS} (they must fill whole bytes).")
    return torch.tensor(_levels(bits), dtype=torch.float64)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return small whole numbers packed into bytes, the first in the lowest bits.

    Args:
        codes: any shape, n entries, uint8 in 0 … 2^bits - 1.
        bits: 1, 2, 4 or 8.

    Returns:
        (⌈n · bits / 8⌉,) uint8; the last byte is filled up with zeros.

    Raises:
        ConfigError: another number of bits.
    """
    if bits not in BIT_WIDTHS:
        raise ConfigError(f"codec: bits is {bits}, expected one of {BIT_WIDTHS}.")
    per = 8 // bits
    flat = torch.nn.functional.pad(codes.reshape(-1), (0, -codes.numel() % per)).view(-1, per)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (flat << shifts).sum(dim=1, dtype=torch.int64).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int, bits: int) -> Tensor:
    """Return the n numbers that `pack_bits` packed.

    Args:
        packed: (⌈n · bits / 8⌉,) uint8.
        n: how many there were.
        bits: 1, 2, 4 or 8.

    Returns:
        (n,) uint8.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:n]


def coded_bytes(n: int, bits: int) -> int:
    """Return the bytes of n coded numbers: ⌈n · bits / 8⌉ + 8 for the float32 mean and deviation; shape () each."""
    return -(-n * bits // 8) + 8


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor in `bits` bits a number.

    Args:
        packed: (⌈n · bits / 8⌉,) uint8.
        mean: () float32.
        deviation: () float32.
        shape: of the tensor.
        bits: 1, 2, 4 or 8.
    """

    packed: Tensor
    mean: Tensor
    deviation: Tensor
    shape: torch.Size
    bits: int

    def nbytes(self) -> int:
        """Return the bytes stored: those of `coded_bytes`."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.mean, self.deviation))

    def decode(self) -> Tensor:
        """Return mean + deviation · level, float32, of the original shape."""
        book = code_book(self.bits).to(self.packed.device, torch.float32)
        codes = unpack_bits(self.packed, self.shape.numel(), self.bits).long()
        return (self.mean + self.deviation * book[codes]).view(self.shape)


def encode(weight: Tensor, bits: int = 1) -> Coded:
    """Return a tensor in a few bits a number: the nearest level of (w - mean) / deviation.

    Args:
        weight: any shape, n entries, floating.
        bits: 1, 2, 4 or 8.

    Returns:
        `Coded`, `coded_bytes(n, bits)` bytes; a constant tensor decodes to itself.

    Raises:
        ConfigError: another number of bits, or an empty tensor.
        NumericsError: the tensor has NaN or infinity.

    Source: Jie et al. 2023, arXiv 2307.16867.
    Differs: their packer drops the numbers of a last byte that is not full; here it is padded.
    """
    book = code_book(bits).to(weight.device, torch.float32)
    if weight.numel() == 0:
        raise ConfigError("codec: an empty tensor has no mean; leave it out.")
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise NumericsError("codec: the tensor has NaN or infinity, so no mean and deviation.")
    mean = w.mean()
    if bool(w.min() == w.max()):  # rounding would give a constant tensor a deviation, and one number has none
        mean, deviation = w.reshape(-1)[0].clone(), torch.zeros_like(mean)
    else:
        deviation = w.std()
    standard = (w - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    codes = torch.bucketize(standard, (book[1:] + book[:-1]) / 2).to(torch.uint8)
    return Coded(pack_bits(codes, bits), mean, deviation, weight.shape, bits)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        return encode(weight, bits).decode().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def quantize(weight: Tensor, bits: int = 1) -> Tensor:
    """Return what a tensor decodes to after coding, with the gradient passed straight through: for training.

    Args:
        weight: any shape, floating.
        bits: 1, 2, 4 or 8.

    Returns:
        decode(encode(w)), the same bits, in w's type; its gradient towards w is the identity.

    Raises:
        ConfigError: another number of bits, or an empty tensor.
        NumericsError: the tensor has NaN or infinity.

    Source: Jie et al. 2023, arXiv 2307.16867.
    Differs: they pass the gradient to the standardised weight and differentiate mean and deviation as well; here it
        goes straight to w.
    """
    return _StraightThrough.apply(weight, bits)  # type: ignore[no-any-return]
