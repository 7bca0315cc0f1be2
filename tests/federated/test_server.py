"""Rounds of a server whose clients misbehave, over every aggregator. Run: pytest tests/federated"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import moa
from moa.errors import ConfigError, ShapeError
from moa.experts import ExpertBank
from moa.federated import AGGREGATORS, Reply, Screen, Server, received, reply_of, update_of
from moa.federated.update import prepare
from tests import models

METHODS = list(AGGREGATORS)


def model(method="fedit", seed=None, rank=4, router="fixed", **options):
    """A client's or the server's model: one base, one draw; a seed stands for a training."""
    base = models.bert()
    torch.manual_seed(3)
    options = {"n_experts": 1, "rank": rank, "expert": "core" if method == "fedsb" else "lora"} | options
    made = prepare(moa.build(base, router, **options), method)
    return made if seed is None else trained(made, seed)


def trained(made, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    return made


def whole(made):
    """The change of each layer, and the base's weights: what the client's model computes."""
    return {name: m.base.weight.detach() + sum(b.bank.delta(0).dense() for b in m.branches)
            for name, m in made.mixtures().items()}  # fmt: skip


def replies_of(server, method, seeds=(1, 2, 3), ranks=(4, 4, 4)):
    out = {}
    for seed, rank in zip(seeds, ranks, strict=True):
        client = model(method, rank=rank)
        with received(client, server.download()):
            trained(client, seed)
            out[f"client {seed}"] = reply_of(client, 10 * seed, server.names)
    return out


def change(reply, name, value):
    return dataclasses.replace(reply, tensors={**reply.tensors, name: value})


def entry(tensor, value):
    out = tensor.clone()
    out.view(-1)[-1] = value
    return out


BAD = {
    "foreign": (lambda r, n: change(r, "base.evil", torch.zeros(1)), "base.evil is foreign"),
    "missing": (lambda r, n: dataclasses.replace(r, tensors={k: v for k, v in r.tensors.items() if k != n}),
                "{n} is missing"),
    "nan": (lambda r, n: change(r, n, entry(r.tensors[n], float("nan"))), "{n} holds NaN or infinity"),
    "infinity": (lambda r, n: change(r, n, entry(r.tensors[n], float("inf"))), "{n} holds NaN or infinity"),
    "huge": (lambda r, n: change(r, n, entry(r.tensors[n], -1e30)), "{n} holds 1e+30, and 10000 is the largest"),
    "wide": (lambda r, n: change(r, n, torch.zeros(*r.tensors[n].shape[:-1], 5)), "{n} has shape"),
    "flat": (lambda r, n: change(r, n, r.tensors[n].flatten()), "{n} has shape"),
    "rank": (lambda r, n: change(r, n, torch.zeros(1, 99, r.tensors[n].shape[-1])), "{n} has shape"),
    "dtype": (lambda r, n: change(r, n, r.tensors[n].double()), "{n} has dtype torch.float64, expected torch.float32"),
    "whole numbers": (lambda r, n: change(r, n, r.tensors[n].long()), "{n} has dtype torch.int64"),
    "sparse": (lambda r, n: change(r, n, r.tensors[n].to_sparse()), "{n} is a torch.sparse_coo tensor"),
    "meta": (lambda r, n: change(r, n, r.tensors[n].to("meta")), "{n} is a torch.strided tensor on meta"),
    "no tensor": (lambda r, n: change(r, n, [1.0]), "{n} is a list, expected a tensor"),
    "no examples": (lambda r, n: dataclasses.replace(r, examples=0), "examples must be above 0"),
    "nan examples": (lambda r, n: dataclasses.replace(r, examples=float("nan")), "examples must be above 0"),
    "all examples": (lambda r, n: dataclasses.replace(r, examples=1e30), "at most 1e+09, got 1e+30"),
    "words": (lambda r, n: dataclasses.replace(r, examples="many"), "examples must be a number, got 'many'"),
    "another base": (lambda r, n: dataclasses.replace(r, fingerprint="x"), "fingerprint is 'x', expected"),
    "foreign scale": (lambda r, n: dataclasses.replace(r, scalings={**r.scalings, "a": 1.0}), "a has a scale"),
    "its words": (lambda r, n: "out of memory", "out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_client_is_refused_by_name_and_the_round_goes_on_without_it(method):
    """Every kind of bad reply: the adapters are those of a round that this client was never in."""
    quiet = Server(model(method), method)
    good = replies_of(quiet, method)
    name = next(n for n in sorted(quiet.names) if ".bank." in n)
    others = {c: r for c, r in good.items() if c != "client 2"}
    assert quiet.finish(others, list(others)).changed
    for kind, (spoil, message) in BAD.items():
        server = Server(model(method), method)
        done = server.finish({**good, "client 2": spoil(good["client 2"], name)}, list(good))
        assert done.changed and done.taken == ("client 1", "client 3"), kind
        assert list(done.refused) == ["client 2"], kind
        assert message.format(n=name) in done.refused["client 2"], (kind, done.refused)
        for n, tensor in quiet.tensors.items():
            assert torch.equal(server.tensors[n], tensor), (kind, n)
        for n, tensor in quiet.residuals.items():
            assert torch.equal(server.residuals[n], tensor), (kind, n)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_clients_leave_the_adapters_as_they_are(method):
    server = Server(model(method), method, min_clients=3)
    before = copy.deepcopy(server.tensors)
    good = replies_of(server, method)
    vanished = {c: r for c, r in good.items() if c != "client 3"}
    done = server.finish(vanished, list(good))
    assert not done.changed and done.vanished == ("client 3",) and done.up_bytes > 0
    assert all(torch.equal(server.tensors[n], t) for n, t in before.items()) and not server.residuals
    assert server.finish(good, list(good)).changed and server.rounds[1].number == 2
    assert not all(torch.equal(server.tensors[n], t) for n, t in before.items()) or server.residuals


def test_nobody_came():
    server = Server(model())
    done = server.finish({}, ["a", "b"])
    assert not done.changed and done.vanished == ("a", "b")
    uninvited = server.finish({"c": next(iter(replies_of(server, "fedit").values()))}, ["a"])
    assert uninvited.refused == {"c": "it was not asked in this round"} and not uninvited.changed


@pytest.mark.parametrize("method", METHODS)
def test_rounds_are_exact_where_the_method_is(method):
    """Two rounds; what a client of the server's rank computes next is the mean of what clients computed."""
    row = AGGREGATORS[method]
    ranks = (2, 3, 4) if row.ranks else (4, 4, 4)
    server = Server(model(method), method)
    for _ in range(2):
        alphas = (8, 8, 8) if method == "fedsb" else (8, 3, 10)  # each client has a scale of its own
        clients = [model(method, rank=rank, alpha=alpha) for rank, alpha in zip(ranks, alphas, strict=True)]
        download, replies, computed = server.download(), {}, []
        for seed, client in enumerate(clients, 1):
            plain = {n: m.base.weight.detach().clone() for n, m in client.mixtures().items()}
            with received(client, download):
                trained(client, seed)
                computed.append(whole(client))
                replies[seed] = reply_of(client, seed, server.names)
            assert all(torch.equal(m.base.weight, plain[n]) for n, m in client.mixtures().items())
        assert server.finish(replies, list(replies)).changed
        following = model(method, alpha=8 if method == "fedsb" else 5)
        with received(following, server.download()):
            got = whole(following)
        for name, weight in got.items():
            truth = sum(w * c[name] for w, c in zip((1 / 6, 2 / 6, 3 / 6), computed, strict=True))
            error = (weight - truth).norm() / truth.norm()
            assert (error < 1e-5) == row.exact, (name, error)


def test_cores_cost_their_square_whatever_the_clients():
    server = Server(model("fedsb"), "fedsb")
    layers = len(list(model("fedsb").branches()))
    head = sum(t.numel() * 4 for n, t in server.tensors.items() if ".bank." not in n)
    for count in (1, 3):
        good = dict(list(replies_of(server, "fedsb").items())[:count])
        done = server.finish(good, list(good))
        assert done.up_bytes == done.down_bytes == count * (layers * 4 * 4 * 4 + head)


@pytest.mark.parametrize("routers", ["average", "local"])
def test_routers_are_averaged_or_never_leave(routers):
    options = {"router": "topk", "n_experts": 3, "k": 2}
    server = Server(model(**options), routers=routers)
    assert any(".router." in n for n in server.names) == (routers == "average")
    client = model(**options, seed=1)
    own = {n: t.clone() for n, t in update_of(client).tensors.items() if ".router." in n}
    assert own
    with received(client, server.download()):
        reply = reply_of(client, 1, server.names)
    kept = [torch.equal(update_of(client).tensors[n], t) for n, t in own.items()]
    assert all(kept) == (routers == "local")
    assert server.finish({1: reply}, [1]).changed


def test_what_does_not_fit_is_said_before_a_round():
    mixture = model(router="topk", n_experts=3, k=2)
    for method in ("flora", "fedex"):
        with pytest.raises(ConfigError, match=r"bank: clients of .* hold one expert and not 3: 'flexlora'"):
            Server(mixture, method)
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match="min_clients must be a whole number of at least 1"):
            Server(model(), min_clients=wrong)
    with pytest.raises(ConfigError, match="routers must be"):
        Server(model(), routers="mine")
    with pytest.raises(ConfigError, match=r"bank\.\w+ has rank 6 here, above the server's 4: lower it"):
        received(model(rank=6), Server(model(), "zero_pad").download()).__enter__()
    download = Server(model(router="topk", n_experts=3, k=2)).download()
    with pytest.raises(ConfigError, match=r"router\S* came from the server, and this model has nothing"):
        received(model(n_experts=3), download).__enter__()
    with pytest.raises(ShapeError, match=r"has shape \(2, 4, 16\) here, and \(3, 4, 16\) came"):
        received(model(router="topk", n_experts=2, k=2), download).__enter__()


def test_a_screen_s_limits_are_the_user_s():
    server = Server(model(), screen=Screen(largest=1e-6, most_examples=5))
    good = replies_of(server, "fedit")
    assert all("is the largest that is taken" in r for r in server.finish(good, list(good)).refused.values())
    small = Reply({n: torch.zeros_like(t) for n, t in good["client 1"].tensors.items()}, 6)
    assert "at most 5, got 6" in Server(model(), screen=Screen(most_examples=5)).why_not(small)


def test_a_residual_is_taken_off_the_base_when_training_fails():
    server = Server(model("fedex"), "fedex")
    good = replies_of(server, "fedex")
    server.finish(good, list(good))
    client = model("fedex")
    plain = {n: m.base.weight.detach().clone() for n, m in client.mixtures().items()}
    with pytest.raises(RuntimeError, match="diverged"), received(client, server.download()):
        assert any(not torch.equal(m.base.weight, plain[n]) for n, m in client.mixtures().items())
        raise RuntimeError("diverged")
    assert all(torch.equal(m.base.weight, plain[n]) for n, m in client.mixtures().items())
    assert any(isinstance(m, ExpertBank) for m in client.modules())
