"""Hadamard matrices: squares H of ±1 with H H^T = n I, of powers of two and of the orders that layers have beside them.

Sylvester 1867; Paley 1933; Goethals and Seidel 1967.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..errors import ConfigError

LARGEST = 1024  # order of a block that is not a power of two
FACTOR = 6  # log2 of the largest factor that a power of two is cut into: see `kronecker_rows`
# Order k -> the number m whose powers act on the places 0 … k - 1, and representatives of the places of -1 of four
# sequences whose circulants A, B, C, D have A A^T + B B^T + C C^T + D D^T = 4 k I. Found by search over such sequences.
SEQUENCES: dict[int, tuple[int, tuple[tuple[int, ...], ...]]] = {
    39: (16, ((4, 6, 7, 12, 13, 14, 21), (3, 4, 7, 8, 14, 21), (6, 8, 13, 14, 19, 21, 26), (2, 7, 12, 13, 21, 26))),
    43: (7, ((1, 2, 9, 10), (1, 3, 9), (1, 5, 10), (4, 9, 10))),
}


def orders(n: int) -> tuple[int, ...]:
    """Return the orders b₁ … b_m of blocks whose Kronecker product is a Hadamard matrix of order n, their product.

    The first is the smallest that is constructed of those that leave a power of two, the others are powers of two.

    Raises:
        ConfigError: there is none; the nearest orders that have one are named.
    """
    found = _orders(n)
    if found is None:
        below = next((d for d in range(n - 1, 0, -1) if _orders(d)), None)
        above = next(d for d in range(n + 1, 2 * n + 2) if _orders(d))
        near = f"{above}" if below is None else f"{below} and {above}"
        raise ConfigError(
            f"no Hadamard matrix of order {n} is known here: 1, 2, and multiples of 4 that Sylvester's, Paley's or "
            f"Goethals and Seidel's construction gives have one; the nearest are {near}."
        )
    return found


@functools.lru_cache
def _orders(n: int) -> tuple[int, ...] | None:
    odd = n // (n & -n)
    if odd == 1:
        return _cut(n.bit_length() - 1)
    block = 4 * odd
    while n % block == 0 and block <= LARGEST:
        if _construction(block) is not None:
            return (block, *_cut((n // block).bit_length() - 1))
        block *= 2
    return None


def _cut(log2: int) -> tuple[int, ...]:
    """Return powers of two, as equal and as few as they can be, whose logarithms' sum is given; the larger come last.

    The last one is multiplied by rows as they lie, and each other by matrices as wide as what follows it.
    """
    parts = math.ceil(log2 / FACTOR)
    return tuple(2 ** ((log2 + place) // parts) for place in range(parts))


def hadamard(n: int) -> Tensor:
    """Return a Hadamard matrix (n, n) of ±1 in float32: one block of `orders`.

    Raises:
        ConfigError: none is constructed for this order.
    """
    if n & (n - 1) == 0:
        h = torch.ones(1, 1)
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h
    found = _construction(n)
    if found is None:
        raise ConfigError(f"no Hadamard matrix of order {n} is constructed by itself.")
    kind, q = found
    return {"paley-1": _paley_one, "paley-2": _paley_two, "goethals-seidel": _goethals_seidel}[kind](q)


def _construction(n: int) -> tuple[str, int] | None:
    """Return which construction gives order n, which is not a power of two, and from what number."""
    if n % 4:
        return None
    if _prime_root(n - 1) is not None:
        return "paley-1", n - 1
    if (n // 2 - 1) % 4 == 1 and _prime_root(n // 2 - 1) is not None:
        return "paley-2", n // 2 - 1
    return ("goethals-seidel", n // 4) if n // 4 in SEQUENCES else None


def _prime_root(q: int) -> tuple[int, int] | None:
    """Return the odd prime p and its exponent, 1 or 2, where q is p or p²."""
    for p, exponent in ((q, 1), (math.isqrt(q), 2)):
        if p**exponent == q and p > 2 and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, exponent
    return None


def _residues(q: int) -> Tensor:
    """Return χ(a - b) of all a, b of the field of q elements, (q, q): 1 for squares, -1 for the others, 0 for 0."""
    found = _prime_root(q)
    assert found is not None
    p, exponent = found
    of_p = torch.full((p,), -1.0)
    of_p[torch.arange(1, p) ** 2 % p] = 1.0
    of_p[0] = 0.0
    if exponent == 1:
        places = torch.arange(p)
        return of_p[(places.unsqueeze(1) - places) % p]
    other = int((of_p == -1).nonzero()[0])  # not a square in the field of p: its root makes the field of p²
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))  # a + b √other
    a, b = (pairs.unsqueeze(1) - pairs).unbind(-1)
    return of_p[(a**2 - other * b**2) % p]  # an element is a square where its norm is one


def _bordered(q: int, sign: float) -> Tensor:
    """Return the residues with a row of 1 and a column of ±1 around them, (q + 1, q + 1)."""
    out = torch.ones(q + 1, q + 1)
    out[0, 0] = 0
    out[1:, 0] = sign
    out[1:, 1:] = _residues(q)
    return out


def _paley_one(q: int) -> Tensor:
    """Return I + S (q + 1, q + 1), q ≡ 3 mod 4: S is skew."""
    return torch.eye(q + 1) + _bordered(q, -1.0)


def _paley_two(q: int) -> Tensor:
    """Return S ⊗ [1 1; 1 -1] + I ⊗ [1 -1; -1 -1] (2 q + 2, 2 q + 2), q ≡ 1 mod 4: S is symmetric."""
    one, two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(_bordered(q, 1.0), one) + torch.kron(torch.eye(q + 1), two)


def _goethals_seidel(k: int) -> Tensor:
    """Return the array (4 k, 4 k) of four circulants (k, k) and their reflections."""
    multiplier, representatives = SEQUENCES[k]
    places, circulants = torch.arange(k), []
    for negative in representatives:
        row = torch.ones(k)
        for start in negative:
            place = start
            while row[place] == 1:  # round its orbit
                row[place] = -1
                place = place * multiplier % k
        circulants.append(row[(places - places.unsqueeze(1)) % k])
    a, b, c, d = circulants
    back = torch.eye(k).flip(0)
    rows = [
        [a, b @ back, c @ back, d @ back],
        [-b @ back, a, d.T @ back, -c.T @ back],
        [-c @ back, -d.T @ back, a, b.T @ back],
        [-d @ back, c.T @ back, -b.T @ back, a],
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])
