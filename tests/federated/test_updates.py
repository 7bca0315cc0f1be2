"""Whole models of clients as one, each held to Σ p Δ over every family. Run: pytest tests/federated"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError, FoldError, ShapeError
from moa.experts import FAMILIES, ExpertBank
from moa.experts.mixed_bank import MixedBank
from moa.federated import AGGREGATORS, Factors, Update, aggregate, prepare, update_of
from tests import models
from tests.experts.test_families import keywords

EXACT = [name for name, row in AGGREGATORS.items() if row.exact]
SHARES = (0.25, 0.75)


def mixture(router="topk", seed=0, method=None, **options):
    """A model of a client: one base, one draw of what stays frozen, a training of its own."""
    torch.manual_seed(5)
    options = {"n_experts": 3, "rank": 2} | options
    model = moa.build(models.bert().double(), router, **options).double()
    return moved(model if method is None else prepare(model, method), seed)


def moved(model, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return model


def changes(model):
    """Every expert's change (o, i), by bank."""
    return {
        name: [bank.delta(e).dense() for e in range(bank.n_experts)]
        for name, bank in model.named_modules()
        if isinstance(bank, ExpertBank) and not isinstance(bank, MixedBank)
    }


def holds_the_mean(server, trained, residuals=None):
    """Whether each expert's change on the server is Σ p Δ of the clients', to 1e-10."""
    for name, found in changes(server).items():
        for e, change in enumerate(found):
            truth = sum(p * changes(m)[name][e] for p, m in zip(SHARES, trained, strict=True))
            got = change if not residuals else change + residuals[name]
            if not torch.allclose(got, truth, rtol=1e-10, atol=1e-10):
                return False
    return True


def served(trained, method, like):
    found = aggregate([update_of(m, p) for m, p in zip(trained, SHARES, strict=True)], method)
    assert not like.load_state_dict(found.tensors, strict=False).unexpected_keys
    return like, found


def client_of(family, seed=None, method=None):
    """A client with experts of a family; a seed stands for its training."""
    torch.manual_seed(5)
    options = {**keywords(family, n_experts=2), **({"n": 2} if family == "compacter" else {})}
    model = moa.build(models.llama().double(), **options).double()
    model = model if method is None else prepare(model, method)
    return model if seed is None else moved(model, seed)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_exact_method_is_exact_or_says_why_not(family):
    """Over every family: Σ p Δ at 1e-10, or a refusal by name, and never a mean that is not the mean."""
    bank = next(b for b in client_of(family).modules() if isinstance(b, ExpertBank))
    known = update_of(client_of(family))
    linear = not known.curved
    assert linear == (bank.averages or bool(known.scalings))
    if not linear:
        with pytest.raises(ConfigError, match=f"is exact, and the changes of {type(bank).__name__} experts are not"):
            prepare(client_of(family), "flora")
        with pytest.raises(ConfigError, match="'fedit', which takes the mean of tensors"):
            aggregate([known, known], "ffa")
        assert aggregate([known, known], "fedit").tensors
        return
    method = "ffa" if known.scalings else "fedsb"
    trained = [client_of(family, seed, method) for seed in (1, 2)]
    assert holds_the_mean(served(trained, method, client_of(family, 3, method))[0], trained)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_linear_in_its_tensors_says_so(family):
    """The declaration against the changes themselves, both ways."""
    made, mean = [client_of(family, seed) for seed in (1, 2)], client_of(family)
    for p, a, b in zip(mean.parameters(), *(m.parameters() for m in made), strict=True):
        p.data.copy_(SHARES[0] * a.data + SHARES[1] * b.data)
    bank = next(b for b in mean.modules() if isinstance(b, ExpertBank))
    try:
        assert holds_the_mean(mean, made) == bank.averages
    except FoldError:
        assert not bank.averages


@pytest.mark.parametrize("routers", ["average", "local"])
def test_a_mixture_is_aggregated_expert_by_expert(routers):
    trained = [mixture(seed=seed) for seed in (1, 2)]
    updates = [update_of(m, w) for m, w in zip(trained, (1, 3), strict=True)]
    found = aggregate(updates, "flora", routers=routers)
    assert not found.residuals
    states = [update.tensors for update in updates]
    pairs = list(updates[0].scalings)
    assert len(pairs) == len(list(trained[0].branches()))
    for bank in pairs:
        down, up = f"{bank}.down", f"{bank}.up"
        got = Factors(found.tensors[down], found.tensors[up], updates[0].scalings[bank]).dense()
        assert found.tensors[down].shape[:2] == (3, 4)
        for e in range(3):
            parts = [
                p * u.scalings[bank] * s[up][e].T @ s[down][e] for p, u, s in zip(SHARES, updates, states, strict=True)
            ]
            torch.testing.assert_close(got[e], sum(parts), rtol=1e-10, atol=1e-10)
    gates = [name for name in states[0] if ".router." in name]
    assert gates
    for name in gates:
        if routers == "local":
            assert name not in found.tensors
        else:
            torch.testing.assert_close(found.tensors[name], 0.25 * states[0][name] + 0.75 * states[1][name])


@pytest.mark.parametrize("method", ["flora", "flexlora", "zero_pad"])
def test_ranks_alphas_and_weights_of_their_own(method):
    """Each client by its own alpha / r; the server's model has a third scale."""
    trained = [mixture(seed=1, rank=2, alpha=7), mixture(seed=2, rank=3, alpha=5)]
    server = mixture(seed=3, rank=5 if method == "flora" else 3, alpha=11)
    updates = [update_of(m, p) for m, p in zip(trained, SHARES, strict=True)]
    found = aggregate(updates, method, scalings=update_of(server).scalings)
    assert not server.load_state_dict(found.tensors, strict=False).unexpected_keys
    assert holds_the_mean(server, trained) == AGGREGATORS[method].exact
    if method == "flexlora":
        name, (got, *_) = next(iter(changes(server).items()))
        truth = sum(p * changes(m)[name][0] for p, m in zip(SHARES, trained, strict=True))
        values = torch.linalg.svdvals(truth)
        torch.testing.assert_close((got - truth).norm(), values[3:].norm(), rtol=1e-10, atol=1e-10)


def test_one_expert_and_its_residual_are_the_mean():
    trained = [mixture("fixed", seed=seed, n_experts=1) for seed in (1, 2)]
    server, found = served(trained, "fedex", mixture("fixed", n_experts=1))
    assert holds_the_mean(server, trained, found.residuals) and not holds_the_mean(server, trained)


def test_cores_cost_their_square_whatever_the_layer_and_the_clients():
    options = {"router": "fixed", "n_experts": 1, "expert": "core", "rank": 4, "method": "fedsb"}
    trained = [mixture(seed=seed, **options) for seed in (1, 2)]
    layers = len(list(trained[0].branches()))
    server, found = served(trained, "fedsb", mixture(**options))
    assert holds_the_mean(server, trained)
    cores = [name for name in found.tensors if name.endswith("bank.core")]
    sent = update_of(trained[0])
    others = sum(t.numel() * 8 for n, t in sent.sent().items() if n not in cores)  # the head
    assert sent.sent_bytes() - others == layers * 4 * 4 * 8
    assert sum(found.tensors[name].numel() * 8 for name in cores) == layers * 4 * 4 * 8


def test_stored_bases_are_no_pair_of_factors():
    options = {"router": "fixed", "n_experts": 1, "expert": "core", "rank": 4, "save_bases": True}
    trained = [mixture(seed=seed, **options) for seed in (1, 2)]
    server, found = served(trained, "flora", mixture(**options))
    assert holds_the_mean(server, trained)
    assert not [name for name in found.tensors if name.endswith(("bank.down", "bank.up"))]


def test_a_frozen_side_is_not_sent():
    model = mixture(method="ffa")
    names = update_of(model).sent()
    assert any(n.endswith("bank.up") for n in names) and not any(n.endswith("bank.down") for n in names)


def test_half_precision_is_summed_in_fp32():
    rng = torch.Generator().manual_seed(0)
    states = [torch.randn(64, generator=rng).bfloat16() for _ in range(3)]
    found = aggregate([Update({"head": t}, 1.0, frozenset({"head"})) for t in states]).tensors["head"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack(states).double().mean(0).bfloat16())


def test_clients_that_do_not_fit_are_named():
    known = update_of(mixture())

    def other(**change):
        return Update(**{**{f: getattr(known, f) for f in Update.__dataclass_fields__}, **change})

    fewer = dict(list(known.tensors.items())[1:])
    for second, message in (
        (other(tensors=fewer), "client 1 has another model than client 0: only one of them has"),
        (other(trained=known.trained - {next(iter(known.trained))}), "only one of them trains"),
        (other(weight=0.0), "client 1: a weight must be positive and finite, got 0.0"),
        (other(weight=float("nan")), "client 1: a weight must be positive and finite, got nan"),
        (other(weight=float("inf")), "client 1: a weight must be positive and finite, got inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            aggregate([known, second])
    with pytest.raises(ConfigError, match="of 0 clients"):
        aggregate([])
    with pytest.raises(ConfigError, match=r"bank: fedex leaves a residual for each of 3 experts"):
        aggregate([known, update_of(mixture(seed=9))], "fedex")
    with pytest.raises(ConfigError, match="routers must be 'average' or 'local', got 'mine'"):
        aggregate([known], routers="mine")
    with pytest.raises(ShapeError, match=r"branches\.0\.bank: fedit takes the mean of factors"):
        aggregate([known, update_of(mixture(rank=3))])


def test_what_all_share_must_be_the_same():
    """Places and bases that no checkpoint holds, a frozen side, counts: another draw is another model."""

    def client(seed):
        return update_of(moa.build(models.bert(), "fixed", n_experts=1, expert="shira", density=0.1, seed=seed))

    with pytest.raises(ConfigError, match=r"client 1: .*places is frozen, and is not what client 0 has: .* one seed"):
        aggregate([client(0), client(1)])
    lora = {"router": "fixed", "n_experts": 1, "rank": 2}
    pair = []
    for seed in (0, 1):
        base = models.bert()
        torch.manual_seed(seed)
        pair.append(update_of(prepare(moa.build(base, **lora), "ffa")))
    with pytest.raises(ConfigError, match=r"client 1: .*bank.down is frozen"):
        aggregate(pair, "ffa")
    scaled = [update_of(client_of("core")), update_of(client_of("core"))]
    assert aggregate(scaled, "fedsb").tensors
    others = [update_of(mixture("fixed", n_experts=1, expert="core", alpha=alpha)) for alpha in (2, 4)]
    with pytest.raises(ConfigError, match=r"client 1: .*bank.scaling is frozen"):
        aggregate(others, "fedsb")
    counts = [Update({"n": torch.tensor([n])}, 1.0, frozenset({"n"})) for n in (1, 2)]
    with pytest.raises(ConfigError, match=r"n holds whole numbers \(torch.int64\) that differ"):
        aggregate(counts)


def test_what_a_method_cannot_train_is_said_before_training():
    with pytest.raises(ConfigError, match=r"bank: 'fedsb' trains cores .* build with expert='core'"):
        prepare(mixture(), "fedsb")
    with pytest.raises(ConfigError, match="unknown aggregator 'fedsbb'"):
        prepare(mixture(), "fedsbb")
    model = prepare(mixture(), "ffa")
    frozen = [n for n, p in model.named_parameters() if n.endswith("bank.down") and p.requires_grad]
    assert not frozen and isinstance(model, nn.Module)


def test_clients_that_load_the_server_s_checkpoint_have_its_bases_to_the_bit(tmp_path, monkeypatch):
    """On another machine a weight's singular vectors differ in the last bits; a checkpoint's do not."""
    from moa.experts.families import core
    from moa.federated.screening import fingerprint

    def built():
        torch.manual_seed(5)
        return moa.build(models.bert(), "fixed", n_experts=1, rank=2, expert="core", save_bases=True)

    server = built()
    server.save_pretrained(tmp_path)
    plain = core.singular

    def elsewhere(weight, rank):
        u, s, vt = plain(weight, rank)
        return torch.nextafter(u, torch.ones_like(u)), s, vt

    monkeypatch.setattr(core, "singular", elsewhere)
    assert fingerprint(update_of(built())) != fingerprint(update_of(server))
    torch.manual_seed(5)
    assert fingerprint(update_of(moa.load(tmp_path, models.bert()))) == fingerprint(update_of(server))
