"""Clients of different backbones that share one adapter; bits of what rests. Run: pytest tests/federated"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError, ShapeError
from moa.experts import ExpertBank
from moa.federated import Alternation, aggregate

COMMON = 8


class Client(nn.Module):
    """A backbone of its own width, with a batch norm, and a layer of the common width that carries the adapter."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, COMMON))
        self.common = nn.Linear(COMMON, COMMON)
        self.head = nn.Linear(COMMON, 3)

    def forward(self, x, labels):
        """Return the loss."""
        return nn.functional.cross_entropy(self.head(self.common(self.body(x))), labels)


def client(width):
    torch.manual_seed(width)
    base = Client(width)
    torch.manual_seed(0)  # the adapter begins alike
    options = {"expert": "bottleneck", "n_experts": 2, "rank": 2, "targets": ["common"], "place": "output"}
    model = moa.build(base, "topk", k=1, modules_to_save=["body", "head"], **options).train()
    bank = next(name for name, module in model.named_modules() if isinstance(module, ExpertBank))
    return Alternation(model, [bank, bank.replace("bank", "router")])


def step(alternation, which, seed):
    """Three steps of Adam with weight decay on what a phase trains."""
    torch.manual_seed(seed)
    with alternation.phase(which) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            x, labels = torch.randn(16, 6), torch.randint(3, (16,))
            alternation.model(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_one_optimizer_over_both_sides_moves_only_one():
    """Neither momentum nor weight decay nor a gradient that was left reaches what rests."""
    one = client(16)
    everything = [p for p in one.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(everything, lr=0.1, weight_decay=0.5)
    one.model(torch.randn(16, 6), torch.randint(3, (16,))).backward()
    optimizer.step()  # every parameter has momentum, and a gradient
    for which, rests in (("own", 1), ("shared", 0)):
        before = bits(one)
        with one.phase(which):
            one.model(torch.randn(16, 6), torch.randint(3, (16,))).backward()
            optimizer.step()
        after = bits(one)
        assert all(torch.equal(after[rests][n], t) for n, t in before[rests].items())
        assert any(not torch.equal(after[1 - rests][n], t) for n, t in before[1 - rests].items())


def bits(alternation):
    inside = tuple(f"{name}." for name in alternation.shared)
    state = copy.deepcopy(alternation.model.state_dict())
    return ({n: t for n, t in state.items() if not n.startswith(inside)},
            {n: t for n, t in state.items() if n.startswith(inside)})  # fmt: skip


@pytest.mark.parametrize(("which", "rests"), [("own", 1), ("shared", 0)])
def test_a_phase_leaves_the_other_side_s_bits(which, rests):
    """After the other phase has filled gradients; batch norm's statistics are bits, too."""
    one = client(16)
    step(one, "own", 1)
    step(one, "shared", 2)
    before = bits(one)
    step(one, which, 3)
    after = bits(one)
    assert len(before[0]) > 8 and len(before[1]) >= 4
    assert all(torch.equal(after[rests][n], t) for n, t in before[rests].items())
    assert any(not torch.equal(after[1 - rests][n], t) for n, t in before[1 - rests].items())
    trained = [n for n, p in one.model.named_parameters() if p.requires_grad]
    assert any(".bank." in n for n in trained) and any("head" in n for n in trained)  # both train again


def test_backbones_differ_and_the_adapter_is_the_weighted_mean():
    both = [client(16), client(24)]
    for n, one in enumerate(both):
        step(one, "own", n)
        step(one, "shared", n + 5)
    updates = [one.update(weight) for one, weight in zip(both, (1, 3), strict=True)]
    assert sum(u.sent_bytes() for u in updates) < sum(4 * p.numel() for p in both[0].parameters("own"))
    found = aggregate(updates)
    for one in both:
        own = bits(one)[0]
        one.load(found.tensors)
        assert all(torch.equal(bits(one)[0][n], t) for n, t in own.items())
        for name, tensor in one.update().tensors.items():
            assert torch.equal(tensor, found.tensors[name])


def test_the_mean_is_of_what_clients_sent():
    both = [client(16), client(24)]
    for n, one in enumerate(both):
        step(one, "shared", n)
    sent = [{n: t.clone() for n, t in one.update().tensors.items()} for one in both]
    found = aggregate([one.update(w) for one, w in zip(both, (1, 3), strict=True)])
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, 0.25 * sent[0][name] + 0.75 * sent[1][name])


def test_wrong_words_and_another_adapter_are_named():
    one = client(16)
    with pytest.raises(ConfigError, match=r"unknown module 'commno'"):
        Alternation(one.model, ["commno"])
    with pytest.raises(ConfigError, match="nothing in no module trains"):
        Alternation(one.model, [])
    with pytest.raises(ConfigError, match=r"unknown phase 'adapter'"), one.phase("adapter"):
        pass
    tensors = dict(one.update().tensors)
    name = next(iter(tensors))
    with pytest.raises(ShapeError, match="came"):
        one.load({**tensors, name: torch.zeros(1)})
    with pytest.raises(ConfigError, match="it is another adapter"):
        one.load({**tensors, "1.more": torch.zeros(1)})
