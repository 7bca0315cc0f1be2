"""The start that restores what quantising lost: against numpy's least squares, and measured on the layers' outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import CheckpointError, ConfigError, NumericsError
from moa.experts.hadamard import hadamard, orders
from moa.kernels.walsh import kronecker_rows
from moa.training import restore as module
from moa.training.originals import Originals
from moa.training.restoration import coefficients, damped, quotas
from moa.training.restore import restore
from tests import models
from tests.laws import assert_close
from tests.systems import packed

GIVEN: dict[str, Any] = {"expert": "qwha", "mask": "given", "density": 0.3, "scale": 2.0}


def rounded(model: nn.Module, bits: int = 3) -> nn.Module:
    """Round the weights of a model's linear layers, its head aside, to so many bits, a scale a row."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name not in ("lm_head", "classifier"):
                scale = layer.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
                layer.weight.copy_((layer.weight / scale).round() * scale)
    return model


def batches(n: int = 2) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    out = []
    for _ in range(n):
        ids = torch.randint(1, models.VOCAB, (4, 9), generator=rng)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


# ------------------------------------------------------------------------------------------------ the arithmetic


def problem(d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], np.ndarray]:
    """Return E, X^T X, the transform, and H / √i as one matrix."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(40, d_in, generator=rng).double() * torch.logspace(0, 1.5, d_in).double()
    lost = torch.randn(d_out, d_in, generator=rng).double() * torch.rand(d_out, 1, generator=rng).double() ** 2
    blocks = [hadamard(order) for order in orders(d_in)]
    whole = np.ones((1, 1))
    for block in blocks:
        whole = np.kron(whole, block.numpy())
    return lost, damped(x.T @ x, "q"), lambda rows: kronecker_rows(rows, blocks), whole / d_in**0.5


def check_fit(lost: Tensor, gram: Tensor, start: Tensor, matrix: np.ndarray) -> None:
    """The kept coefficients are numpy's least squares of R E on R's columns, R being the root of X^T X."""
    values, vectors = np.linalg.eigh(gram.numpy())
    root = np.sqrt(values)[:, None] * vectors.T
    dense = start.to_dense().numpy()
    for channel in range(len(lost)):
        kept = dense[channel].nonzero()[0]
        expected = np.linalg.lstsq(root @ matrix[:, kept], root @ lost[channel].numpy(), rcond=None)[0]
        assert_close(torch.tensor(dense[channel, kept]), torch.tensor(expected), 1e-8, f"channel {channel}")


@pytest.mark.parametrize(("sizes", "count"), [((6, 12), 20), ((5, 16), 33), ((9, 20), 150), ((3, 4), 12)])
def test_the_start_is_numpys_least_squares_on_the_coefficients_that_are_noticed_most(
    sizes: tuple[int, int], count: int
) -> None:
    lost, gram, transform, matrix = problem(*sizes)
    start, (before, after) = coefficients(lost, gram, transform, count)
    start = start.coalesce()
    assert start.values().shape == (count,)
    check_fit(lost, gram, start, matrix)
    values, vectors = np.linalg.eigh(gram.numpy())
    root = np.sqrt(values)[:, None] * vectors.T
    spectrum = np.linalg.solve(root @ matrix, root @ lost.numpy().T).T  # (o, i), as the released code has it
    noticed = np.abs(spectrum) * np.linalg.norm(root @ matrix, axis=0)
    per_channel = quotas(torch.tensor(np.linalg.norm(spectrum, axis=1)), count, sizes[1])
    for channel, quota in enumerate(per_channel.tolist()):
        expected = set(np.argsort(-noticed[channel])[:quota].tolist())
        assert set(start.to_dense()[channel].nonzero().flatten().tolist()) == expected
    change = start.to_dense().numpy() @ matrix.T
    assert np.isclose(before, np.linalg.norm(root @ lost.numpy().T) ** 2, rtol=1e-9)
    assert np.isclose(after, np.linalg.norm(root @ (lost.numpy() - change).T) ** 2, rtol=1e-6, atol=1e-9 * before)


def test_values_that_are_not_fitted_are_seen() -> None:
    lost, gram, transform, matrix = problem(6, 12)
    start, _ = coefficients(lost, gram, transform, 20)
    check_fit(lost, gram, start, matrix)
    with pytest.raises(AssertionError, match="off by"):
        check_fit(lost, gram, start * 1.01, matrix)
    unfitted = torch.where(start.to_dense() != 0, transform(lost), 0).to_sparse()
    with pytest.raises(AssertionError, match="off by"):
        check_fit(lost, gram, unfitted, matrix)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_never_loses_more_than_nothing_or_than_what_was_cut_off(seed: int) -> None:
    lost, gram, transform, _ = problem(8, 24, seed)
    last = float("inf")
    for count in (1, 20, 60, 191, 192):
        start, (before, after) = coefficients(lost, gram, transform, count)
        left = transform(lost) - torch.where(start.to_dense() != 0, transform(lost), 0)
        cut = (left @ transform(transform(gram).mT) * left).sum()
        assert after <= before and after <= cut * (1 + 1e-9) + 1e-9 * before
        assert after <= last + 1e-9 * before
        last = after
    assert last <= 1e-12 * before, "all coefficients are the whole change"


def test_chunks_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, gram, transform, _ = problem(9, 20)
    expected, _ = coefficients(lost, gram, transform, 90)
    monkeypatch.setattr("moa.training.restoration.AT_ONCE", 1)
    assert_close(coefficients(lost, gram, transform, 90)[0].to_dense(), expected.to_dense(), 1e-12)


def test_quotas_are_in_proportion_whole_and_capped() -> None:
    assert quotas(torch.tensor([1.0, 2.0, 3.0]), 12, 20).tolist() == [2, 4, 6]
    assert quotas(torch.tensor([1.0, 2.0, 97.0]), 15, 6).tolist() == [3, 6, 6]
    assert quotas(torch.tensor([0.0, 0.0]), 3, 4).sum() == 3
    assert quotas(torch.tensor([0.0, 5.0]), 7, 5).tolist() == [2, 5]
    assert quotas(torch.tensor([3.0, 5.0]), 10, 5).tolist() == [5, 5]
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        norms = torch.rand(7, generator=rng) ** 6
        count = int(torch.randint(1, 7 * 11 + 1, (), generator=rng))
        found = quotas(norms, count, 11)
        assert found.sum() == count and found.min() >= 0 and found.max() <= 11
        inside = found < 11
        share = norms[inside] / norms[inside].sum() * found[inside].sum()
        assert bool(((found[inside] - share).abs() <= 1 + 1e-4).all())


# ------------------------------------------------------------------------------------------------ whole models


def outputs_of_layers(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and outputs of layers on the batches, padding left out."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    mask: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: seen.setdefault(name, []).append((x[0][mask[-1]], y[mask[-1]]))
        )
        for name in names
    ]
    for batch in batches():
        mask.append(batch["attention_mask"].bool())
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: tuple(torch.cat(parts) for parts in zip(*rows, strict=True)) for name, rows in seen.items()}  # type: ignore[misc]


@pytest.mark.parametrize("router", ["fixed", "topk"])
def test_what_is_reported_is_what_the_layers_lose(router: str) -> None:
    original = models.llama().double()
    base = rounded(copy.deepcopy(original))
    far = (base(**batches()[0]).logits - original(**batches()[0]).logits).norm()
    n_experts = 1 if router == "fixed" else 3
    model = moa.build(base, router, n_experts=n_experts, **GIVEN).double().eval()
    rows = outputs_of_layers(rounded(copy.deepcopy(original)), list(model.mixtures()))
    found = restore(model, batches(), original)
    assert found.keys() == model.mixtures().keys()
    for name, one in found.items():
        (x, _), mixture = rows[name], model.mixtures()[name]
        bank = mixture.branches[0].bank
        whole = original.get_submodule(name).weight.detach()
        lost = whole - mixture.base.weight.detach()
        for expert in range(n_experts):
            left = lost - bank.delta(expert).dense()
            assert float((x @ left.T).norm() / (x @ whole.T).norm()) == pytest.approx(one.after, rel=0.02)
        assert float((x @ lost.T).norm() / (x @ whole.T).norm()) == pytest.approx(one.before, rel=0.02)
        assert 0 <= one.after < 0.8 * one.before < 0.4, name
        assert one.share == pytest.approx(1 - one.after**2 / one.before**2)
    near = (model(**batches()[0]).logits - original(**batches()[0]).logits).norm()
    assert near < 0.7 * far


def test_initialize_gives_the_shares_and_all_coefficients_give_the_original_back() -> None:
    original = models.llama().double()
    for density, least in ((0.05, 0.05), (0.3, 0.5), (1.0, 1 - 1e-9)):
        model = moa.build(rounded(copy.deepcopy(original)), "topk", n_experts=2, k=1, **{**GIVEN, "density": density})
        shares = moa.initialize(model.double(), batches(), "qwha", original=original)
        assert all(least <= share <= 1 for share in shares.values()), shares
    expected = original.eval()(**batches()[0]).logits
    assert_close(model.eval()(**batches()[0]).logits, expected, 1e-9)


@pytest.mark.parametrize("kind", ["gptq", "quanto-int8", "bnb-nf4", "torchao-int4", "hqq"])
def test_a_quantised_base_is_restored_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    original, base = packed.llama(), packed.quantised(kind)
    data = [{"input_ids": torch.arange(24).view(3, 8) + 2}]
    expected = original(**data[0]).logits
    far = (base(**data[0]).logits - expected).norm()
    model = moa.build(base, "topk", n_experts=2, k=1, **GIVEN)
    found = restore(model, data, original)
    assert all(one.after < one.before for one in found.values())
    after = model.eval()(**data[0]).logits
    assert (after - expected).norm() < 0.7 * far
    model.save_pretrained(tmp_path)
    assert torch.equal(moa.load(tmp_path, base=packed.quantised(kind)).eval()(**data[0]).logits, after)


def test_nothing_else_changes() -> None:
    original = models.llama()
    model = moa.build(rounded(copy.deepcopy(original)), "topk", n_experts=2, k=1, **GIVEN).train()
    kept = {name: t.clone() for name, t in model.state_dict().items() if not name.endswith(("values", "places"))}
    modes = [m.training for m in model.modules()]
    restore(model, batches(), original)
    assert [m.training for m in model.modules()] == modes
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert all(p.grad is None for p in model.parameters())
    model(**models.lm_batch()).loss.backward()
    assert all(bool(b.bank.values.grad.any()) for _, b in model.branches())


def test_few_layers_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    original, results, passes = models.llama(), [], []
    for held in (2**28, 600):
        model = moa.build(rounded(copy.deepcopy(original)), "fixed", n_experts=1, **GIVEN)
        monkeypatch.setattr(module, "HELD", held)
        seen: list[int] = []
        hook = model.base.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        results.append(restore(model, iter(batches()), original))
        hook.remove()
        passes.append(len(seen))
    assert passes[0] == 2 < passes[1]
    assert results[0] == results[1]


def test_a_layer_that_lost_nothing_stays_as_it_is() -> None:
    original = models.llama()
    base = rounded(copy.deepcopy(original))
    whole = "model.layers.0.mlp.up_proj"
    base.get_submodule(whole).weight.data.copy_(original.get_submodule(whole).weight)
    model = moa.build(base, "fixed", n_experts=1, **GIVEN)
    places = model.mixtures()[whole].branches[0].bank.places.clone()
    found = restore(model, batches(), original)
    assert (found[whole].before, found[whole].share) == (0, 1)
    bank = model.mixtures()[whole].branches[0].bank
    assert torch.equal(bank.places, places) and not bank.values.any()


# ------------------------------------------------------------------------------------------------ originals


def test_originals_are_a_model_tensors_or_a_folder(tmp_path: Path) -> None:
    original = models.bert()
    original.save_pretrained(tmp_path)
    inner = original.bert  # a model that stands inside the one that is adapted
    results = []
    for held in (original, original.state_dict(), tmp_path, str(tmp_path), inner, inner.state_dict()):
        model = moa.build(rounded(models.bert()), "fixed", n_experts=1, targets=["query", "dense"], **GIVEN)
        layers = [name for name in model.mixtures() if not name.startswith("bert.")]
        if held is inner or layers:
            assert not layers, "the test's targets lie inside"
        results.append(restore(model, batches(), held))
    assert all(result == results[0] for result in results)


def test_originals_of_a_gpt2_are_stored_the_other_way_round() -> None:
    original = models.gpt2()
    base = copy.deepcopy(original)
    with torch.no_grad():
        for name, tensor in base.named_parameters():
            if name.endswith("c_proj.weight"):
                tensor.copy_((tensor * 100).round() / 100)
    for held in (original, original.state_dict()):
        model = moa.build(copy.deepcopy(base), "fixed", n_experts=1, targets=["c_proj"], **GIVEN)
        found = restore(model, batches(), held)
        assert all(one.after < one.before < 0.9 for one in found.values())


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({}, r"q_proj: the original weights hold no one model\.layers\.0\.self_attn\.q_proj\.weight: there is none"),
        (
            {"a.model.layers.0.self_attn.q_proj.weight": 0, "b.model.layers.0.self_attn.q_proj.weight": 0},
            r"a\.model.* and b\.model.* could both be it",
        ),
    ],
)
def test_originals_that_do_not_say_are_refused(held: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Originals(held).key("model.layers.0.self_attn.q_proj")


def of(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    state = models.llama().state_dict()
    change(state)
    return state


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("build", "call", "error", "says"),
    [
        ({}, {"original": None}, ConfigError, r"'qwha' restores what quantising the base lost.*give original="),
        ({}, {"method": "eva"}, ConfigError, r"original is the weights before.*'eva' does not read it"),
        ({}, {"lr": 1e-3}, ConfigError, r"lr is the size of the first step of 'lora-sb'"),
        ({}, {"data": []}, ConfigError, r"there is no data"),
        ({}, {"batches": 0}, ConfigError, r"batches must be from 1"),
        ({"mask": "random"}, {}, ConfigError, r"QWHABank experts do not start by 'qwha'.*mask='given'"),
        (
            {"expert": "shira", "scale": None},
            {},
            ConfigError,
            r"ShiRABank experts do not start by 'qwha', which is for expert='qwha'",
        ),
        ({"place": "output"}, {}, ConfigError, r"one mixture on the input of a layer"),
        ({}, {"original": "nowhere"}, CheckpointError, r"nowhere does not exist"),
        ({}, {"original": of(lambda s: s.pop(Q))}, ConfigError, r"q_proj: the original weights hold no one"),
        ({}, {"original": of(lambda s: s.update({Q: torch.ones(3, 4)}))}, ConfigError, r"\(3, 4\).*another model"),
        ({}, {"original": of(lambda s: s.update({Q: -s[Q]}))}, ConfigError, r"0 is nearer to its original.*another"),
        (
            {},
            {"original": of(lambda s: s.update({Q: s[Q].to("meta")}))},
            ConfigError,
            r"original weight is on the meta",
        ),
    ],
)
def test_what_cannot_start_is_refused_by_name_and_leaves_all_as_it_was(
    build: dict[str, Any], call: dict[str, Any], error: type[Exception], says: str
) -> None:
    options = {key: value for key, value in {**GIVEN, **build}.items() if value is not None}
    model = moa.build(rounded(models.llama()), "topk", n_experts=2, k=1, **options)
    kept = {name: p.detach().clone() for name, p in model.state_dict().items()}
    call = {"data": batches(), "method": "qwha", "original": models.llama(), **call}
    with pytest.raises(error, match=says):
        moa.initialize(model, **call)
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())


def test_a_base_that_lost_nothing_has_no_values_or_sees_nothing_is_refused() -> None:
    model = moa.build(models.llama(), "fixed", n_experts=1, **GIVEN)
    with pytest.raises(ConfigError, match="nothing was lost that could be restored"):
        restore(model, batches(), models.llama())
    with pytest.raises(
        ConfigError, match="q_proj: its experts are on the meta device and have no values: load the model"
    ):
        restore(model.to("meta"), batches(), models.llama())
    half = moa.build(rounded(models.llama()), "fixed", n_experts=1, **GIVEN)
    half.mixtures()["model.layers.1.mlp.up_proj"].base.to("meta")
    with pytest.raises(ConfigError, match=r"1\.mlp\.up_proj.*on the meta device and has no values yet: load the base"):
        restore(half, batches(), models.llama())
    blind, broken = (moa.build(rounded(models.llama()), "fixed", n_experts=1, **GIVEN) for _ in range(2))
    with torch.no_grad():
        blind.base.get_input_embeddings().weight.zero_()
        broken.base.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="q_proj: all of its inputs are 0"):
        restore(blind, batches(), models.llama())
    with pytest.raises(NumericsError, match="its inputs are not finite"):
        restore(broken, batches(), models.llama())
    moved = models.randomise(moa.build(rounded(models.llama()), "fixed", n_experts=1, **GIVEN))
    with pytest.raises(ConfigError, match="moved already"):
        restore(moved, batches(), models.llama())
