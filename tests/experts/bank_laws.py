"""What must hold for every expert bank: plain functions that raise AssertionError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.experts import ExpertBank
from moa.kernels import Gate
from moa.types import Routing
from tests.laws import TOLERANCE, assert_close, gradients


def random_routing(rows: tuple[int, ...], n_experts: int, k: int, dense: bool = False) -> Routing:
    """Return a random fp64 routing of the given rows; dense gives weights of any sign to all experts."""
    if dense:
        return Routing(torch.randn(*rows, n_experts, dtype=torch.float64), None, n_experts)
    indices = torch.rand(*rows, n_experts).argsort(-1)[..., :k]
    return Routing(torch.randn(*rows, k, dtype=torch.float64), indices, n_experts)


def one_hot(rows: tuple[int, ...], expert: int, n_experts: int) -> Routing:
    """Return the routing that gives one expert the weight 1 on every row."""
    return Routing(torch.ones(*rows, 1, dtype=torch.float64), torch.full((*rows, 1), expert), n_experts)


def base_weight(bank: ExpertBank, x: Tensor) -> Tensor:
    """Return a weight (o, i) for a bank's base: any, or its own layer's where its experts are made of that."""
    site = getattr(bank, "site", None)
    return torch.randn(bank.d_out, bank.d_in, dtype=x.dtype) if site is None else site.weight().detach()


def bank_selects(bank: ExpertBank, x: Tensor) -> None:
    """One-hot routing is that expert alone, with indices and without."""
    rows = x.shape[:-1]
    for expert in range(bank.n_experts):
        expected = bank.expert_forward(x, expert)
        routing = one_hot(rows, expert, bank.n_experts)
        assert_close(bank(x, routing), expected, what=f"expert {expert}")
        assert_close(bank(x, Routing(routing.dense(), None, bank.n_experts)), expected, what=f"expert {expert}, dense")


def bank_is_linear(bank: ExpertBank, x: Tensor) -> None:
    """Outputs are linear in the weights where the bank mixes outputs."""
    if bank.mixes != "outputs":
        return
    one, two = (random_routing(x.shape[:-1], bank.n_experts, 1, dense=True) for _ in range(2))
    both = Routing(2 * one.weights - 3 * two.weights, None, bank.n_experts)
    assert_close(bank(x, both), 2 * bank(x, one) - 3 * bank(x, two))


def bank_broadcasts(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A routing of rows (B, 1) or () is the same as the one expanded to x's rows (B, S)."""
    assert x.ndim == 3
    for rows in ((x.shape[0], 1), ()):
        short = random_routing(rows, bank.n_experts, k)
        assert short.indices is not None
        wide = Routing(
            short.weights.expand(*x.shape[:2], k).contiguous(),
            short.indices.expand(*x.shape[:2], k).contiguous(),
            bank.n_experts,
        )
        assert_close(bank(x, short), bank(x, wide), what=f"rows {rows}")


def expert_tensors(bank: ExpertBank) -> list[Tensor]:
    """Return the parameters and buffers that a bank declares as stacked over its experts, each (E, …)."""
    known = {**dict(bank.named_parameters()), **dict(bank.named_buffers())}
    assert bank.per_expert, "a bank has nothing of each expert's own"
    tensors = [known[name] for name in bank.per_expert if name in known]  # a buffer may be None
    assert tensors and all(tensor.shape[0] == bank.n_experts for tensor in tensors), "an axis that is not the experts'"
    return tensors


def bank_relabels(bank: ExpertBank, x: Tensor, k: int) -> None:
    """Numbering the experts otherwise, in the bank and in the routing, changes nothing.

    Experts of several kinds have no tensors stacked over all of them.
    """
    if bank.fixed_size is not None:
        return
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    assert routing.indices is not None
    before = bank(x, routing)
    order = torch.randperm(bank.n_experts)  # new expert j is old expert order[j]
    with torch.no_grad():
        for tensor in expert_tensors(bank):
            tensor.copy_(tensor[order].clone())
    renamed = Routing(routing.weights, order.argsort()[routing.indices], bank.n_experts)
    assert_close(bank(x, renamed), before)


def bank_ignores_slot_order(bank: ExpertBank, x: Tensor, k: int) -> None:
    """The order of the chosen experts within a row changes nothing."""
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    assert routing.indices is not None
    turned = Routing(routing.weights.flip(-1), routing.indices.flip(-1), bank.n_experts)
    assert_close(bank(x, turned), bank(x, routing))


def bank_is_local(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A row's output depends on that row alone, even when another row holds NaN.

    Where a bank says that it looks at the rows around, it depends on that example alone, and looks at them.
    """
    if not bank.rowwise:
        _keeps_examples_apart(bank, x, k)
        return
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] < 2:
        return
    routing = random_routing(flat.shape[:1], bank.n_experts, k)
    before = bank(flat, routing)
    changed = flat.clone()
    changed[-1] = float("nan")
    assert_close(bank(changed, routing)[:-1], before[:-1])


def _keeps_examples_apart(bank: ExpertBank, x: Tensor, k: int) -> None:
    if x.shape[0] < 2:
        return
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    before = bank(x, routing)
    for row, value in ((slice(None), float("nan")), (0, 9.0)):
        changed = x.clone()
        changed[-1, row] = value
        after = bank(changed, routing)
        assert_close(after[:-1], before[:-1], what="another example")
    if x.shape[1] > 1 and x.shape[-1] > 1:  # a norm over one feature forgets it
        assert bool((after[-1, 1:] != before[-1, 1:]).any()), "it is a function of each row and says that it is not"


def bank_delta_is_expert(bank: ExpertBank, x: Tensor) -> None:
    """`delta` is the expert as one weight change, where the family has one, as it is in evaluation."""
    if type(bank).delta is ExpertBank.delta:
        return
    bank.eval()
    for expert in range(bank.n_experts):
        change = bank.delta(expert).dense().to(x.dtype)  # (o, i)
        expected = bank.expert_forward(x, expert)
        if bank.carries_input:  # the expert is a vector, times x's product with the router's direction
            assert bank.directions is not None
            expected = expected * (x @ bank.directions[expert]).unsqueeze(-1)
        assert_close(x @ change.T, expected)


def bank_adds_no_constant(bank: ExpertBank, x: Tensor, k: int) -> None:
    """A bank that is a weight change maps zero to zero, in training with dropout, too: the mixture adds constants."""
    if type(bank).delta is ExpertBank.delta or bank.carries_input:
        return
    zero, dropout = torch.zeros_like(x), bank.dropout
    weight = torch.zeros(bank.d_out, bank.d_in, dtype=x.dtype)
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    for bank.dropout in (0.0, 0.5):
        assert not bool(bank.train()(zero, routing).any()), "forward adds a constant"
        assert not bool(bank.fused.add_linear(zero, routing, weight, None).any()), "add_linear adds a constant"
    bank.dropout = dropout
    assert not any(bool(bank.expert_forward(zero, e).any()) for e in range(bank.n_experts)), "an expert adds one"


def bank_fast_is_generic(bank: ExpertBank, x: Tensor, k: int, dense: bool, tolerance: float = TOLERANCE) -> None:
    """The family's own forward, and the one that adds the base, equal the definition with every gradient."""
    if bank.mixes != "outputs":
        return
    weight = base_weight(bank, x)
    bias = torch.randn(bank.d_out, dtype=x.dtype)
    routing = random_routing(x.shape[:-1], bank.n_experts, k, dense)
    upstream = torch.randn(*x.shape[:-1], bank.d_out, dtype=x.dtype)
    base = torch.nn.functional.linear(x, weight, bias)

    def results(run: Any) -> list[Tensor]:
        bank.zero_grad()
        leaf, w = x.clone().requires_grad_(), routing.weights.to(x.dtype, copy=True).requires_grad_()
        y = run(leaf, Routing(w, routing.indices, bank.n_experts))
        (y * upstream).sum().backward()
        return [y.detach(), *gradients(bank, leaf, w)]

    generic = results(lambda a, r: ExpertBank.forward(bank, a, r))
    fast = results(lambda a, r: bank(a, r))
    fused = results(lambda a, r: bank.fused.add_linear(a, r, weight, bias))
    fused[0] = fused[0] - base
    n_parameters = len(list(bank.parameters()))
    fused[1 + n_parameters] = fused[1 + n_parameters] - upstream @ weight  # x's gradient through the base
    for number, (definition, one, other) in enumerate(zip(generic, fast, fused, strict=True)):
        assert_close(one, definition, tolerance, f"fast result {number}")
        assert_close(other, definition, 10 * tolerance, f"fused result {number}")  # a difference of larger numbers


def bank_gated_is_apart(bank: ExpertBank, x: Tensor, k: int, tolerance: float = TOLERANCE) -> None:
    """A gate and its mixture in one call, with gradients and without, equal the routing and then `add_linear`."""
    weight, gate = base_weight(bank, x), torch.randn(bank.n_experts, bank.d_in, dtype=x.dtype)
    bias = torch.randn(bank.d_out, dtype=x.dtype)
    kept, indices = (x @ gate.T).topk(k, -1)
    expected = bank.fused.add_linear(x, Routing(kept.softmax(-1), indices, bank.n_experts), weight, bias)
    for graded in (True, False):
        with torch.set_grad_enabled(graded):
            found = bank.fused.add_gated(x, Gate(gate, k), weight, bias)
        if found is not None:
            assert_close(found[0], expected, tolerance, f"with gradients {graded}")


def bank_starts_as_declared(bank: ExpertBank, x: Tensor) -> None:
    """A fresh bank is exactly zero where it says so, and can learn; its experts differ unless they are declared equal.

    What is drawn is drawn anew by the next call; a family may also start at zero altogether.
    """
    bank.reset_parameters()
    everyone = Routing(torch.ones(bank.n_experts, dtype=x.dtype), None, bank.n_experts)
    bank.zero_grad()
    out = bank(x, everyone)
    if bank.zero_at_init:
        assert not bool(out.any()), "a fresh bank is not zero"
    (out * torch.randn_like(out)).sum().backward()
    assert any(bool(grad.any()) for grad in gradients(bank)), "a dead start: no parameter gets a gradient"
    bank.zero_grad()
    before = [p.detach().clone() for p in bank.parameters()]
    if bank.n_experts > 1 and bank.fixed_size is None:
        trained = {id(p) for p in bank.parameters()}
        stacked = [tensor for tensor in expert_tensors(bank) if id(tensor) in trained or not bank.carries_input]
        different = any(bool((tensor[0] != tensor[1]).any()) for tensor in stacked)
        assert different != bank.equal_at_init, (
            "equal experts get equal gradients: they are to differ, or say that they do not"
        )
    bank.reset_parameters()
    drawn = any(bool((a != b).any()) for a, b in zip(before, bank.parameters(), strict=True))
    constant = all(bool((p == p.flatten()[0]).all()) for p in before)
    assert drawn or constant, "drawing anew gives the same numbers"


def bank_state_round_trip(bank: ExpertBank, other: ExpertBank, x: Tensor, k: int) -> None:
    """Another bank of the same sizes with this one's state gives the same outputs bit for bit.

    Buffers that a state does not hold are made anew from what made them first; the random ones among them are equal
    where both banks were made from one seed.
    """
    routing = random_routing(x.shape[:-1], bank.n_experts, k)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other(x, routing), bank(x, routing)), "its state does not make a bank what it was"


def bank_drops_once(bank: ExpertBank, x: Tensor, k: int) -> None:
    """In training one mask is drawn and serves experts only; in evaluation none is.

    The mask is that of dropout 0.5 on x, or on the routing's weights where these carry x: from one seed the bank is
    its own definition on what was dropped, and so it is with its base in one step.
    """
    weight, gate = base_weight(bank, x), torch.randn(bank.n_experts, bank.d_in, dtype=x.dtype)
    kept, indices = (x @ gate.T).topk(k, -1)
    routing = Routing(kept.softmax(-1), indices, bank.n_experts)

    def seeded(run: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(7)
        return run()

    def definition(rows: Tensor, given: Routing) -> Tensor:
        return ExpertBank.forward(bank, rows, given) if bank.mixes == "outputs" else bank(rows, given)

    bank.eval()
    if bank.mixes == "outputs":
        assert_close(bank(x, routing), definition(x, routing), what="evaluation")
    bank.train()
    dropout, bank.dropout = bank.dropout, 0.0  # the experts of this training step, on what was dropped before
    if bank.carries_input:
        dense = seeded(lambda: F.dropout(routing.dense(), 0.5))
        expected = definition(x, Routing(dense, None, bank.n_experts))
    else:
        expected = definition(seeded(lambda: F.dropout(x, 0.5)), routing)
    base, bank.dropout = x @ weight.T, dropout
    assert_close(seeded(lambda: bank(x, routing)), expected, what="forward")
    assert_close(seeded(lambda: bank.fused.add_linear(x, routing, weight, None)), base + expected, what="with its base")
    found = seeded(lambda: bank.fused.add_gated(x, Gate(gate, k), weight, None))  # type: ignore[arg-type, return-value]
    if found is not None:
        assert_close(found[0], base + expected, what="with its gate")
