"""Hadamard matrices, the fast transform, and QWHA's experts against explicit matrices. Run: pytest tests/experts"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moa
from moa.errors import ConfigError, FoldError
from moa.experts.families import qwha
from moa.experts.hadamard import hadamard, orders
from moa.kernels.walsh import kronecker_rows
from moa.types import Routing
from tests import laws, models
from tests.experts.bank_laws import random_routing
from tests.laws import assert_close
from tests.systems import packed

NAMED = (12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172)  # of the released code
SIZES = (1, 2, 8, 128, *NAMED, 384, 576)  # of MiniLM and SmolLM2, too


def blocks(n: int) -> list[Tensor]:
    return [hadamard(order) for order in orders(n)]


def whole(n: int) -> np.ndarray:
    """Return H (n, n), by numpy's own Kronecker product."""
    out = np.ones((1, 1))
    for block in blocks(n):
        out = np.kron(out, block.numpy())
    return out


def test_blocks_multiply_to_the_order_and_the_larger_come_last() -> None:
    assert [orders(n) for n in (1, 64, 384, 1536, 4096, 11008)] == [
        (),
        (64,),
        (12, 32),
        (12, 8, 16),
        (64, 64),
        (172, 64),
    ]


@pytest.mark.parametrize("n", [2**k for k in range(10)])
def test_powers_of_two_are_sylvester_s(n: int) -> None:
    assert np.array_equal(whole(n), scipy.linalg.hadamard(n))


def test_every_order_has_orthogonal_rows_of_signs() -> None:
    found = 0
    for n in (*range(1, 257), *NAMED, 924):
        try:
            h = whole(n)
        except ConfigError:
            continue
        found += 1
        assert np.array_equal(np.abs(h), np.ones((n, n))) and np.array_equal(h @ h.T, n * np.eye(n)), n
    assert found == 2 + 64 - 6 + len(NAMED) + 1  # of the multiples of 4 all but 92, 116, 184, 188, 232 and 236


@pytest.mark.parametrize(
    ("n", "near"), [(3, "2 and 4"), (7, "4 and 8"), (90, "88 and 96"), (116, "112 and 120"), (4036, "4032 and 4080")]
)
def test_an_order_without_a_matrix_names_the_nearest(n: int, near: str) -> None:
    with pytest.raises(ConfigError, match=f"no Hadamard matrix of order {n} .* the nearest are {near}"):
        orders(n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_fast_transform_is_the_dense_product_with_its_gradient(n: int, transposed: bool) -> None:
    torch.manual_seed(0)
    x, above = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, n, dtype=torch.float64)
    h = torch.tensor(whole(n)) / n**0.5
    expected = x.detach() @ (h.T if transposed else h)
    y = kronecker_rows(x, blocks(n), transposed)
    assert_close(y.detach(), expected, 1e-12)
    assert_close(kronecker_rows(y, blocks(n), not transposed).detach(), x.detach(), 1e-12)
    (grad,) = torch.autograd.grad(y, x, above)
    assert_close(grad, above @ (h if transposed else h.T), 1e-12)


def test_gradients_of_gradients() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    run = lambda x: kronecker_rows(x, blocks(24)).square()  # noqa: E731
    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("n", [64, 384, 576, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_as_exact_as_the_dense_product_in_its_type(n: int, dtype: torch.dtype) -> None:
    """Three ways: fp64 is the truth, and the error at most twice that of PyTorch's product with the whole matrix."""
    x = torch.randn(64, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    h = torch.tensor(whole(n)) / n**0.5
    truth = x.double() @ h
    ours, dense = kronecker_rows(x, blocks(n)), x @ h.to(dtype)
    assert ours.dtype == dtype
    assert (ours.double() - truth).norm() <= 2 * (dense.double() - truth).norm()


def test_large_inputs_stay_finite_in_float16() -> None:
    x = torch.full((1, 4096), 500.0, dtype=torch.float16)
    y = kronecker_rows(x, blocks(4096))
    assert y[0, 0] == 500 * 64 and not y[0, 1:].any()


# ------------------------------------------------------------------------------------------------ experts


def bank_on(d_in: int, d_out: int, n_experts: int = 2, **keywords: Any) -> Any:
    site = moa.Site("q", nn.Linear(d_in, d_out, bias=False), d_in, d_out)
    made = laws.make_family("qwha", keywords).build(site, n_experts, None, rank=2, scaling=1.0)
    return laws.randomised(made.double())


@pytest.mark.parametrize("sizes", [(16, 12), (12, 7), (40, 5)])
def test_a_change_is_its_coefficients_times_the_matrix(sizes: tuple[int, int]) -> None:
    """ΔW = s · F · H⁻¹ √i, entry by entry, with numpy's inverse."""
    d_in, d_out = sizes
    bank = bank_on(d_in, d_out, density=0.4, scale=3.0)
    for e in range(2):
        spectrum = np.zeros(d_out * d_in)
        spectrum[bank.places[e].numpy()] = bank.values[e].detach().numpy()
        expected = 3.0 * spectrum.reshape(d_out, d_in) @ np.linalg.inv(whole(d_in)) * d_in**0.5
        assert_close(bank.delta(e).dense(), torch.tensor(expected), 1e-12)


def test_as_many_coefficients_as_a_lora_make_any_rank() -> None:
    """K = r (o + i): of 48 rows and columns, r = 2 leaves some 2 without any."""
    bank = bank_on(48, 48)
    assert bank.values.shape == (2, 2 * (48 + 48))
    assert int(torch.linalg.matrix_rank(bank.delta(0).dense())) >= 45
    lora = laws.make_bank("lora", "default", 48, 48, 2, 2)
    assert sum(p.numel() for p in lora.parameters()) == bank.values.numel()
    assert int(torch.linalg.matrix_rank(lora.delta(0).dense())) == 2


def test_x_is_transformed_once_and_unchosen_experts_are_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    whole_transform, whole_matrix = qwha.kronecker_rows, qwha.QWHABank.matrix
    monkeypatch.setattr(qwha, "kronecker_rows", lambda x, *a: seen.append(tuple(x.shape)) or whole_transform(x, *a))
    monkeypatch.setattr(qwha.QWHABank, "matrix", lambda self, t: seen.append("F") or whole_matrix(self, t))
    bank = bank_on(16, 24, n_experts=8)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    routing = Routing(torch.rand(2, 40, 2).double(), torch.tensor([5, 1]).expand(2, 40, 2).contiguous(), 8)
    bank(x, routing)
    assert seen == [(2, 40, 16), "F", "F"]
    seen.clear()
    with torch.no_grad():  # a step of decoding: entry by entry
        bank(x[:, :1], Routing(routing.weights[:, :1], routing.indices[:, :1], 8))
    assert seen == [(2, 1, 16)]
    seen.clear()
    few = torch.ones(8).double()
    few[2:] = 0
    bank(x, Routing(few, None, 8))
    assert seen == [(2, 40, 16), "F", "F"]
    seen.clear()
    bank(x.repeat(4, 1, 1), Routing(few, None, 8))  # one routing on many rows: one weight of all experts
    assert seen == ["F", (24, 16)] * 2


def test_wrong_transforms_are_seen() -> None:
    """A bank whose change is not what it does to rows, as with H in the place of H^T, breaks the laws."""
    from tests.experts.bank_laws import bank_delta_is_expert

    class Turned(qwha.QWHABank):
        def on_rows(self, x: Tensor, tensors: Any) -> Tensor:
            return self.on_spectrum(self.transform(x, inverse=True), tensors)

    bank = bank_on(12, 8, density=0.5)  # Paley's matrix of order 12 is not symmetric
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    bank_delta_is_expert(bank, x)
    bank.__class__ = Turned
    with pytest.raises(AssertionError, match="off by"):
        bank_delta_is_expert(bank, x)


def test_half_precision_rows_meet_masters_in_fp32() -> None:
    bank, x = bank_on(384, 96).float(), torch.randn(4, 40, 384).bfloat16()
    routing = random_routing((4, 40), 2, 1)
    y = bank(x, routing)
    exact = bank.double()(x.double(), routing)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 40}, r"at most rank=\d+ fits, or set density"),
        ({"mask": "magnitude"}, r"mask must be one of random, given, got 'magnitude'"),
        ({"density": 2.0}, r"density must be in \[0, 1\]"),
        ({"alpha": 2.0}, r"family 'qwha' have no alpha"),
        ({"scale": 0.0}, r"scale must be above 0, got 0"),
        ({"scal": 1.0}, r"Did you mean 'scale'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), "fixed", n_experts=2, expert="qwha", **options)


def test_a_layer_without_a_hadamard_matrix_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"0: QWHA transforms its 6 inputs\. no Hadamard.*nearest are 4 and 8\. Leave"
    ):
        moa.build(nn.Sequential(nn.Linear(6, 4)), "fixed", n_experts=1, expert="qwha", targets=("0",), rank=1)


def test_given_places_are_stored_and_seeds_give_the_others(tmp_path: Path) -> None:
    options = {"router": "topk", "n_experts": 2, "k": 1, "expert": "qwha", "density": 0.1}
    places = {}
    for mask in ("random", "given"):
        model = models.randomise(moa.build(models.llama(), mask=mask, **options))
        with torch.no_grad():
            for _, branch in model.branches():
                branch.bank.places.copy_(branch.bank.places if mask == "random" else branch.bank.places.flip(-1))
        model.save_pretrained(tmp_path / mask)
        stored = [key for key in load_file(tmp_path / mask / "model.safetensors") if key.endswith("places")]
        assert bool(stored) == (mask == "given")
        again = moa.load(tmp_path / mask, base=models.llama())
        assert torch.equal(*(models.outputs_of(m.eval(), models.lm_batch()) for m in (model, again)))
        places[mask] = [branch.bank.places for _, branch in again.branches()]
    first = places["random"]
    assert not torch.equal(first[0][0], first[0][1]), "every expert draws its own"
    other = moa.build(models.llama(), **options, seed=1)
    assert not torch.equal(next(iter(other.branches()))[1].bank.places, first[0])


def test_it_is_no_low_rank_change_to_export(tmp_path: Path) -> None:
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=1, expert="qwha", density=0.1))
    with pytest.raises(FoldError, match="dense changes, which a LoRA folder has no place for"):
        moa.export_expert(model, 0, tmp_path / "a", as_lora=True)


def test_it_stands_beside_other_families_in_one_bank(tmp_path: Path) -> None:
    options = {"expert": ["lora", "qwha"], "density": 0.1, "rank": 2}
    model = models.randomise(moa.build(models.llama(), "topk", n_experts=4, k=2, **options)).eval()
    expected = models.outputs_of(model, models.lm_batch())
    model.save_pretrained(tmp_path)
    assert torch.equal(models.outputs_of(moa.load(tmp_path, base=models.llama()), models.lm_batch()), expected)


def test_it_adapts_the_matrices_of_a_layer_of_experts_and_folds() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts_per_tok=2, **sizes, **heads)).eval()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    before = base(**batch).logits
    options = {"expert": "qwha", "density": 0.2, "targets": ["experts"]}
    model = models.randomise(moa.build(base, "fixed", n_experts=2, **options)).eval()
    after = model(**batch).logits
    assert (after - before).norm() > 0.1
    assert_close(model.merge_and_unload()(**batch).logits, after, 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in packed.KINDS if kind not in packed.SLOW])
def test_it_learns_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    base = packed.quantised(kind)
    batch = {"input_ids": torch.arange(12).view(2, 6) + 2}
    batch["labels"] = batch["input_ids"]
    before = base(**batch).logits.detach()
    model = moa.build(base, "topk", n_experts=3, k=2, expert="qwha", rank=2)
    assert_close(model.eval()(**batch).logits, before, 1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(6):
        losses.append(model.train()(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    after = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(moa.load(tmp_path, base=packed.quantised(kind)).eval()(**batch).logits, after)
