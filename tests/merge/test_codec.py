"""The few-bit codec: round trip bit for bit, sizes by formula, levels.  pytest tests/merge/test_codec.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import ConfigError, NumericsError
from moa.merge import code_book, coded_bytes, encode, quantize
from moa.merge.codec import pack_bits, unpack_bits

BITS = (1, 2, 4, 8)


def test_the_published_levels() -> None:
    assert code_book(1).tolist() == pytest.approx([-0.67449, 0.67449], abs=5e-6)
    assert code_book(2).tolist() == pytest.approx([-1.26572, -0.37775, 0.37775, 1.26572], abs=5e-6)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_medians_of_their_bins(bits: int) -> None:
    book = code_book(bits)
    assert torch.equal(book, -book.flip(0))
    edges = torch.special.ndtr((book[1:] + book[:-1]) / 2)
    mass = torch.cat([torch.zeros(1), edges, torch.ones(1)])
    medians = torch.special.ndtri((mass[1:] + mass[:-1]) / 2)
    assert float((medians - book).abs().max()) < 1e-12


@given(st.sampled_from(BITS), st.integers(0, 40), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_packing_round_trip_for_any_length(bits: int, n: int, random: object) -> None:
    codes = torch.tensor([random.randrange(2**bits) for _ in range(n)], dtype=torch.uint8)  # type: ignore[attr-defined]
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-n * bits // 8)
    assert torch.equal(unpack_bits(packed, n, bits), codes)


@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_decoding_is_the_nearest_level_bit_for_bit(bits: int, n: int, seed: int) -> None:
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    coded = encode(w, bits)
    assert coded.nbytes() == coded_bytes(n, bits)
    decoded = coded.decode()
    assert torch.equal(decoded, quantize(w, bits))
    if n > 1:
        book = code_book(bits).float()
        mean, deviation = w.mean(), w.std()
        level = ((w - mean) / deviation)[:, None].sub(book).abs().argmin(1)
        assert torch.equal(decoded, mean + deviation * book[level])


def test_the_published_size() -> None:
    """AdaptFormer-32: two (768, 32) matrices, 6,160 bytes instead of 196,608."""
    assert 2 * coded_bytes(768 * 32, 1) == 6160
    assert 2 * encode(torch.randn(768, 32)).nbytes() == 6160


def test_more_bits_err_less() -> None:
    w = torch.randn(50, 40)
    errors = [float((encode(w, b).decode() - w).norm()) for b in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_decoding_again_and_constant_tensors() -> None:
    constant = torch.full((3, 3), 0.1)
    assert torch.equal(encode(constant).decode(), constant)
    assert torch.equal(encode(torch.tensor([2.5])).decode(), torch.tensor([2.5]))
    w = torch.randn(6, 7)
    assert encode(w).decode().shape == w.shape


def test_the_gradient_passes_straight_through() -> None:
    w = torch.randn(5, 4, requires_grad=True)
    upstream = torch.randn(5, 4)
    (quantize(w, 1) * upstream).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, upstream)


def test_refusals() -> None:
    for bits in (0, 3, 16):
        with pytest.raises(ConfigError, match=f"bits is {bits}"):
            encode(torch.ones(2), bits)
        with pytest.raises(ConfigError, match=f"bits is {bits}"):
            pack_bits(torch.ones(2, dtype=torch.uint8), bits)
    with pytest.raises(ConfigError, match="empty"):
        encode(torch.ones(0))
    with pytest.raises(NumericsError, match="NaN"):
        encode(torch.tensor([1.0, float("nan")]))
