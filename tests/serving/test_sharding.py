"""Mixtures on shards, ranks simulated: together they give the whole layer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

import moa
from moa.mixture import Site
from moa.recipes import make_recipe
from moa.serving.vllm.axis import Axis
from moa.serving.vllm.sharding import Part, ServedLayer
from moa.serving.vllm.stacked import MOST_ROWS
from moa.types import Context

RANKS, D_IN, D_OUT = 2, 12, 8


class Ranks:
    """Ranks as threads: a gather waits for all of them."""

    def __init__(self, n: int) -> None:
        self.barrier, self.slots = Barrier(n, timeout=20), [torch.empty(0)] * n

    def gather(self, rank: int):
        def gather(x):
            self.slots[rank] = x
            self.barrier.wait()
            found = torch.cat(self.slots, -1)
            self.barrier.wait()
            return found

        return gather

    def reduce(self, rank: int, y):
        self.slots[rank] = y
        self.barrier.wait()
        found = torch.stack(self.slots).sum(0)
        self.barrier.wait()
        return found


def mixture_of(router: str, base: nn.Linear) -> moa.Mixture:
    torch.manual_seed(3)  # every rank holds the same experts
    options = {"k": 4} if router == "flylora" else {}
    branches = make_recipe(router, **options).build(Site("layer", base, base.in_features, base.out_features))
    for branch in branches:
        for parameter in branch.parameters():
            nn.init.normal_(parameter, 0, 0.3)
    return moa.Mixture(base, branches, Context(), "layer").eval()


def on_all(ranks: int, run) -> list[torch.Tensor]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@pytest.mark.parametrize("rows", [(5,), (1, 5), (MOST_ROWS + 1,)], ids=str)
@pytest.mark.parametrize("router", ["topk", "dense", "switch", "sigmoid", "hydra", "flylora"])
@torch.no_grad()
def test_column_and_row_parallel_layers_equal_the_whole_one(router, rows):
    base, x = nn.Linear(D_IN, D_OUT), torch.randn(*rows, D_IN)
    expected = mixture_of(router, base)(x)
    ranks, size = Ranks(RANKS), D_OUT // RANKS
    layers = [mixture_of(router, base) for _ in range(RANKS)]

    def column(rank):
        axis = Axis(size, RANKS, rank, gather=ranks.gather(rank))
        weight, bias = base.weight[rank * size :][:size], base.bias[rank * size :][:size]
        run = lambda part: nn.functional.linear(part, weight, bias)  # noqa: E731
        return ServedLayer(run, Axis(D_IN), [Part(layers[rank], axis)])(x)

    torch.testing.assert_close(torch.cat(on_all(RANKS, column), -1), expected)
    cut = D_IN // RANKS

    def row(rank):
        axis = Axis(cut, RANKS, rank, gather=ranks.gather(rank))
        weight = base.weight[:, rank * cut :][:, :cut]
        run = lambda part: ranks.reduce(rank, part @ weight.T) + base.bias  # noqa: E731
        return ServedLayer(run, axis, [Part(layers[rank], Axis(D_OUT))])(x[..., rank * cut :][..., :cut])

    for found in on_all(RANKS, row):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_fused_layers_of_which_ranks_share_heads_equal_the_separate_ones():
    """Query cut over four ranks, key over two with two copies of each half, value without experts."""
    ranks, x = Ranks(4), torch.randn(5, D_IN)
    q, k, v = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, 4), nn.Linear(D_IN, 4)
    parts = [[mixture_of("topk", q), mixture_of("topk", k), None] for _ in range(4)]
    expected = parts[0][0](x), parts[0][1](x), v(x)

    def run_rank(rank):
        gather = ranks.gather(rank)
        cuts = [(q, 2, rank), (k, 2, rank // 2), (v, 2, rank // 2)]

        def run(x):
            shards = [nn.functional.linear(x, m.weight, m.bias)[:, n * c :][:, :c] for m, c, n in cuts]
            return torch.cat(shards, -1)

        axes = [Axis(2, 4, rank, copies, gather) for copies in (1, 2, 2)]
        return ServedLayer(run, Axis(D_IN), [Part(m, a) for m, a in zip(parts[rank], axes, strict=True)])(x)

    for rank, found in enumerate(on_all(4, run_rank)):
        for value, whole, n in zip(found.split(2, -1), expected, (rank, rank // 2, rank // 2), strict=True):
            torch.testing.assert_close(value, whole[:, 2 * n : 2 * n + 2])


def fused(*mixtures: moa.Mixture | None) -> ServedLayer:
    """Return a layer of three linears fused into one, on one rank."""
    bases = [nn.Linear(D_IN, D_OUT) if m is None else m.base for m in mixtures]  # a served mixture gets another base
    run = lambda x: torch.cat([base(x) for base in bases], -1)  # noqa: E731
    return ServedLayer(run, Axis(D_IN), [Part(m, Axis(D_OUT)) for m in mixtures])


@pytest.mark.parametrize("router", ["topk", "dense", "switch", "sigmoid"])
@torch.no_grad()
def test_alike_mixtures_run_as_one_and_take_weights_that_are_loaded_later(router):
    x = torch.randn(5, D_IN)
    mixtures = [mixture_of(router, nn.Linear(D_IN, D_OUT)) for _ in range(2)]
    for seed, mixture in enumerate(mixtures):
        torch.manual_seed(10 + seed)
        for tensor in [*mixture.branches.parameters(), *mixture.branches.buffers()]:
            tensor.copy_(torch.randn_like(tensor))
    before = [m(x) for m in mixtures]
    layer = fused(mixtures[0], None, mixtures[1])
    assert layer.stacked is not None
    torch.testing.assert_close([layer(x)[:, :D_OUT], layer(x)[:, -D_OUT:]], before)
    for seed, mixture in enumerate(mixtures):
        torch.manual_seed(seed)
        for tensor in [*mixture.branches.parameters(), *mixture.branches.buffers()]:
            tensor.copy_(torch.randn_like(tensor))
    q, _, v = layer(x).split(D_OUT, -1)
    wide = [layer(x.repeat(MOST_ROWS, 1))[:5, :D_OUT], layer(x.repeat(MOST_ROWS, 1))[:5, -D_OUT:]]  # each by itself
    torch.testing.assert_close([q, v], wide)
    assert (q - v).abs().max() > 0.1


@torch.no_grad()
def test_mixtures_that_decide_in_other_ways_run_each_by_itself():
    mixtures = [mixture_of(router, nn.Linear(D_IN, D_OUT)) for router in ("topk", "dense")]
    x = torch.randn(5, D_IN)
    expected = [m(x) for m in mixtures]
    layer = fused(mixtures[0], None, mixtures[1])
    assert layer.stacked is None
    q, _, v = layer(x).split(D_OUT, -1)
    torch.testing.assert_close([q, v], expected)
