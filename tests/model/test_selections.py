"""The M forwards of a step: one dropout, M selections. Run: pytest tests/model/test_selections.py"""

from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moa
from moa.model.selections import RandomState, Selections
from moa.objective import Trace
from moa.routers import SampledRouter
from moa.routers.sampled import plackett_luce
from moa.types import Context
from tests import models
from tests.laws import assert_close

KINDS = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "llama": ("attention_dropout",),
         "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "t5": ("dropout_rate",)}  # fmt: skip


def dropping(kind: str, samples: int = 3, **options: object) -> tuple[moa.MoAModel, dict[str, torch.Tensor]]:
    """Return a ReMix in training on a base that drops out, its experts zero as built, and a batch."""
    make, batch = models.MODELS[kind]
    config = make().config
    config.use_cache = False  # a block that runs twice must not write to it
    for name in KINDS[kind]:
        setattr(config, name, 0.2)
    base = type(make())(config)
    recipe = {"n_experts": 4, "k": 2, "rank": 2, "dropout": 0.2, "samples": samples, "targets": "all-linear"}
    torch.manual_seed(4)
    return moa.build(base, "remix", **{**recipe, **options}).train(), batch(length=6)


def routers(model: moa.MoAModel) -> list[nn.Parameter]:
    return [branch.router.weight for _, branch in model.branches()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_without_experts_the_routers_gradient_is_zero(kind: str, checkpointing: bool) -> None:
    """All experts are zero: every selection has the same loss, to the last bit, and nothing is left to compare.

    The masks of the next step are new ones, and the selections within a step are not one and the same.
    """
    model, batch = dropping(kind)
    if checkpointing:
        model.gradient_checkpointing_enable()
    steps: list[list[Trace]] = []
    model.observers.append(steps.append)
    losses = []
    for _ in range(3):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        assert not any(weight.grad.any() for weight in routers(model))
    assert len(set(losses)) == 3
    for traces in steps:
        chosen = [torch.cat([r.routing.indices.flatten() for r in trace]) for trace in traces]
        assert not torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[1], chosen[2])


def test_other_forwards_draw_dropout_anew() -> None:
    """What the test above relies on: with one state for each forward, the losses differ and the gradient is noise."""
    model, batch = dropping("bert")
    with torch.no_grad():
        rows = [model.base(**batch).loss.item() for _ in range(4)]
    assert len(set(rows)) == 4
    model.selections.of = lambda samples: [contextlib.nullcontext()] * samples
    model(**batch).loss.backward()
    assert all(bool(weight.grad.any()) for weight in routers(model))


def test_under_autocast_and_in_a_closure() -> None:
    model, batch = dropping("bert")
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    assert not any(weight.grad.any() for weight in routers(model))
    model.zero_grad()
    seen = []

    def loss() -> torch.Tensor:
        seen.append((torch.rand(()).item(), random.random(), np.random.random()))
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return F.cross_entropy(F.dropout(logits, 0.5), batch["labels"], reduction="none")

    model.routed_loss(loss).backward()
    assert not any(weight.grad.any() for weight in routers(model))
    model.routed_loss(loss)
    assert seen[0] == seen[1] == seen[2] != seen[3], "what a closure draws is the same in all M, new in the next step"


# ------------------------------------------------------------------------------------------------ independent choices


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_the_selections_of_a_step_are_independent(granularity: str) -> None:
    """Counts of every pair of choices against the product of their probabilities, in 30 000 rows."""
    n = 30_000
    selections = Selections()
    context = Context(draws=selections)
    router = SampledRouter(1, 3, 1, samples=2, granularity=granularity).double().train()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [0.0], [-0.5]]))
    x = torch.ones(n, 1, 1, dtype=torch.float64)
    chosen = []
    for selected in selections.of(2):
        with selected:
            F.dropout(x, 0.3)
            chosen.append(router(x, context).indices.flatten())
            chosen.append(F.dropout(torch.ones(64), 0.5))
    assert torch.equal(chosen[1], chosen[3]), "the stream is in the same place after each"
    counts = torch.bincount(3 * chosen[0] + chosen[2], minlength=9)
    q = plackett_luce(router.weight.detach().T.expand(3, -1), torch.arange(3)[:, None]).exp()
    expected = torch.outer(q, q).flatten() * n
    assert ((counts - expected) ** 2 / expected).sum().item() < 8 + 5 * 16**0.5  # chi squared with 8 degrees of freedom


def test_a_forward_by_itself_draws_one_noise() -> None:
    router = SampledRouter(4, 3, 1).train()
    x = torch.randn(5, 4)
    torch.manual_seed(0)
    alone = router(x, Context()).indices
    torch.manual_seed(0)
    noise = -torch.empty(5, 3).exponential_().log()
    assert torch.equal(alone, (x @ router.weight.T + noise).topk(1).indices)


# ------------------------------------------------------------------------------------------------ recomputed blocks


def gradients(model: moa.MoAModel, batch: dict[str, torch.Tensor], steps: int = 1) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of several steps' losses, run backward at once."""
    torch.manual_seed(7)
    model.zero_grad()
    torch.stack([model(**batch).loss for _ in range(steps)]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Wrapped(nn.Module):
    """A block that PyTorch's checkpointing runs twice, without the knowledge of the model around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> object:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("how", ["ours", "by hand"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_recomputed_block_makes_the_choice_of_its_own_forward(kind: str, how: str, steps: int) -> None:
    """All M forwards have run when backward runs their blocks again; the first block's input is the same in all M."""
    model, batch = dropping(kind)
    models.randomise(model).double()
    plain = gradients(model, batch, steps)
    twin = copy.deepcopy(model)
    if how == "ours":
        twin.gradient_checkpointing_enable()
    else:
        layers = twin.base.bert.encoder.layer if kind == "bert" else twin.base.model.layers
        for place in range(len(layers)):
            layers[place] = Wrapped(layers[place])
    got = {name.replace(".block.", "."): grad for name, grad in gradients(twin, batch, steps).items()}
    assert got.keys() == plain.keys()
    for name, grad in plain.items():
        assert_close(got[name], grad, 1e-9, name)
    (begun,) = model.selections._threads.values()
    assert len(begun.starts) == len(begun.which) == 6 * steps
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert not model.selections._threads, "an optimizer's step ends what can be run again"


def test_the_random_state_comes_back() -> None:
    state = RandomState()
    drawn = [(torch.rand(3).tolist(), torch.randn(3).tolist(), random.random(), np.random.random()) for _ in range(2)]
    state.restore()
    assert drawn[0] == (torch.rand(3).tolist(), torch.randn(3).tolist(), random.random(), np.random.random())
    assert drawn[0] != drawn[1]


def test_a_forward_that_fails_leaves_no_selection_behind() -> None:
    model, batch = dropping("bert")
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model(**{**batch, "labels": batch["labels"] + 100})
    assert model.selections.current() is None


@pytest.mark.filterwarnings("ignore")  # torch's own compiler warns
def test_compiled_blocks_share_dropout_too() -> None:
    model, batch = dropping("llama", targets="ffn")
    for layer in model.base.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="aot_eager")
    steps: list[list[Trace]] = []
    model.observers.append(steps.append)
    model(**batch).loss.backward()
    assert not any(weight.grad.any() for weight in routers(model))
    first, second, _ = ([r.routing.indices for r in trace] for trace in steps[0])
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
