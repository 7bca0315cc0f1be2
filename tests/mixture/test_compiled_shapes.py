"""Shapes named by einops are one graph under torch.compile. Run: pytest tests/mixture/test_compiled_shapes.py"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moa.experts import HeadedLoRABank
from moa.layers import patches
from moa.mixture.streams import Crossing
from moa.types import Routing
from tests.laws import assert_close, randomised


def headed() -> Callable[[Tensor], Tensor]:
    bank = randomised(HeadedLoRABank(8, 4, 3, n_heads=2, rank=2))
    weights = torch.randn(2, 5, 2, 3).softmax(-1)
    return lambda x: bank(x, Routing(weights, None, 3))


def crossed() -> Callable[[Tensor], Tensor]:
    return randomised(Crossing(2, 8))


def patched() -> Callable[[Tensor], Tensor]:
    conv = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1, dilation=(2, 1))
    return lambda x: patches(conv, x.reshape(1, 2, 5, 8))


@pytest.mark.parametrize("make", [headed, crossed, patched])
def test_one_graph_and_the_same_values(make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    torch._dynamo.reset()
    run, x = make(), torch.randn(2, 5, 8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), run(x), 1e-6)


def test_patches_are_what_unfold_gives() -> None:
    conv = nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
    x = torch.randn(2, 3, 7, 9)
    expected = nn.functional.unfold(x, (2, 3), dilation=(2, 1), padding=(1, 0), stride=(1, 2)).mT
    assert torch.equal(patches(conv, x), expected)
