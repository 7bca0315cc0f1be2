"""Starts from data: against the weight's own gradient, peft's EVA, and what must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, NumericsError
from moa.training.principal import Principal
from tests import models

CORE: dict[str, Any] = {"expert": "core", "save_bases": True, "rank": 3}


class Branching(nn.Module):
    """A model with a layer that nothing goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.used(x)
        return y.square().mean(), y


def batches(n: int = 3, rows: int = 4, length: int = 6) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    out = []
    for _ in range(n):
        ids = torch.randint(1, models.VOCAB, (rows, length), generator=rng)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        out.append({"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % models.CLASSES})
    return out


def gradients(base: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return the weights' own gradients (o, i), summed over the batches."""
    weights = [base.get_submodule(name).weight for name in names]
    for weight in weights:
        weight.requires_grad_()
    sums = [torch.zeros_like(weight) for weight in weights]
    for batch in batches():
        for total, part in zip(sums, torch.autograd.grad(base(**batch).loss, weights), strict=True):
            total += part
    return dict(zip(names, sums, strict=True))


def layer_of(model: moa.MoAModel, branch: nn.Module) -> str:
    return next(name for name, mixture in model.mixtures().items() if branch in mixture.branches)


@pytest.mark.parametrize("recipe", ["fixed", "topk", "dense"])
def test_lora_sb_starts_at_the_first_sign_step_of_the_weight(recipe: str) -> None:
    base = models.bert().double()
    model = moa.build(base, recipe, n_experts=1 if recipe == "fixed" else 3, alpha=6, **CORE).double()
    shares = moa.initialize(model, batches(), "lora-sb", lr=1e-3)
    expected = gradients(models.bert().double(), list(shares))
    assert shares.keys() == model.mixtures().keys()
    for _, branch in model.branches():
        update = -1e-3 * expected[layer_of(model, branch)].sign()
        u, s, vt = torch.linalg.svd(update)
        nearest = u[:, :3] * s[:3] @ vt[:3]
        for expert in range(branch.bank.n_experts):
            torch.testing.assert_close(branch.bank.delta(expert).dense(), nearest, rtol=1e-9, atol=1e-12)
        for basis in (branch.bank.down, branch.bank.up.T):
            torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))


def test_a_core_s_gradient_is_the_weight_s_seen_from_the_bases() -> None:
    """With orthonormal bases the gradient of R solves min_R ‖G - B R A‖ (arXiv 2411.19557, theorem 2)."""
    model = moa.build(models.bert().double(), "fixed", n_experts=1, **CORE).double()
    names = list(moa.initialize(model, batches()))
    model.eval()
    loss = model(**batches(1)[0]).loss
    loss.backward()
    twin = models.bert().double()
    for name, m in model.mixtures().items():
        bank = m.branches[0].bank
        twin.get_submodule(name).weight.data += bank.delta(0).dense()
    for name in names:
        twin.get_submodule(name).weight.requires_grad_()
    twin(**batches(1)[0]).loss.backward()
    for name, m in model.mixtures().items():
        bank, whole = m.branches[0].bank, twin.get_submodule(name).weight.grad
        best = bank.up.T @ whole @ bank.down.T  # of min_R ‖whole - B R A‖
        torch.testing.assert_close(bank.core.grad[0] / bank.scaling, best, rtol=1e-9, atol=1e-12)


def test_lora_sb_holds_more_of_the_update_than_bases_of_the_weight() -> None:
    def held(model: moa.MoAModel, updates: dict[str, Tensor]) -> float:
        out = 0.0
        for name, m in model.mixtures().items():
            bank, whole = m.branches[0].bank, updates[name]
            out += float((bank.up @ (bank.up.T @ whole @ bank.down.T) @ bank.down).norm() / whole.norm())
        return out

    weights = moa.build(models.bert().double(), "fixed", n_experts=1, **CORE).double()
    started = moa.build(models.bert().double(), "fixed", n_experts=1, **CORE).double()
    names = list(moa.initialize(started, batches()))
    updates = {name: g.sign() for name, g in gradients(models.bert().double(), names).items()}
    assert held(started, updates) > 1.5 * held(weights, updates)


def test_a_started_core_is_saved_with_its_bases_and_folds(tmp_path: Any) -> None:
    model = moa.build(models.bert(), "fixed", n_experts=1, **CORE)
    moa.initialize(model, batches())
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, models.bert())
    batch = batches(1)[0]
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(again.eval()(**batch).logits, expected, rtol=0, atol=0)
    with model.folded():
        torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_eva_starts_where_peft_s_does() -> None:
    """One token a text, of four kinds: each layer sees four vectors, so that peft's sketch of r components is exact."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    kinds = torch.tensor([3, 3, 3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 20])
    data = [{"input_ids": kinds.roll(n).unsqueeze(1)} for n in range(4)]
    config = LoraConfig(r=3, target_modules=["query", "dense"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    theirs = get_peft_model(models.bert(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        theirs,
        data * 8,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, -2),
        show_progress_bar=False,
    )
    ours = moa.build(models.bert(), "fixed", n_experts=1, rank=3, targets=["query", "dense"])
    shares = moa.initialize(ours, data, "eva")
    for name, mixture in ours.mixtures().items():
        expected = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
        cosines = (mixture.branches[0].bank.down[0] * expected).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(3), rtol=1e-3, atol=1e-3, msg=name)
        assert shares[name] == pytest.approx(1, abs=1e-4)


def test_eva_deals_directions_to_the_experts_and_adds_nothing() -> None:
    model = moa.build(models.bert().double(), "topk", n_experts=2, k=1, rank=2).double().eval()
    before = model(**batches(1)[0]).logits
    moa.initialize(model, batches(), "eva")
    torch.testing.assert_close(model(**batches(1)[0]).logits, before, rtol=0, atol=0)
    seen: dict[str, list[Tensor]] = {}
    base = models.bert().double()
    for name in model.mixtures():
        base.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.setdefault(name, []).append(inputs[0])
        )
    for batch in batches():
        base(**batch)
    for name, m in model.mixtures().items():
        masks = [b["attention_mask"].bool() for b in batches()]
        parts = [x[mask] if x.ndim == 3 else x for x, mask in zip(seen[name], masks, strict=True)]
        rows = torch.cat(parts)
        _, _, vectors = torch.linalg.svd(rows - rows.mean(0))
        down = m.branches[0].bank.down
        for number, (expert, row) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            torch.testing.assert_close((down[expert, row] @ vectors[number]).abs(), torch.tensor(1.0).double())


def test_convolutions_and_text_models_start_too() -> None:
    pixels = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.arange(4) % models.CLASSES}
    vit = moa.build(models.vit(), "fixed", n_experts=1, rank=2, targets=["projection", "q_proj"])
    assert len(moa.initialize(vit, [pixels], "eva")) == len(vit.mixtures())
    core = moa.build(models.vit(), "fixed", n_experts=1, targets=["projection", "q_proj"], **CORE)
    moa.initialize(core, [pixels])
    twin = models.vit()
    weight = twin.vit.embeddings.patch_embeddings.projection.weight.requires_grad_()
    twin(**pixels).loss.backward()
    (name,) = [n for n in core.mixtures() if n.endswith("projection")]
    bank = core.mixtures()[name].branches[0].bank
    u, s, vt = torch.linalg.svd(-1e-5 * weight.grad.flatten(1).sign())
    torch.testing.assert_close(bank.delta(0).dense(), u[:, :3] * s[:3] @ vt[:3], rtol=1e-3, atol=1e-8)


def test_principal_is_the_svd_of_centred_rows_where_nothing_was_dropped() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 5, generator=rng, dtype=torch.float64) @ torch.randn(5, 12, generator=rng).double()
    found = Principal(7)
    for part in rows.split(9):
        found.add(part)
    vectors, share = found.directions(3)
    _, values, expected = torch.linalg.svd(rows - rows.mean(0))
    torch.testing.assert_close((vectors * expected[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64))
    assert share == pytest.approx(float((values[:3] ** 2).sum() / (values**2).sum()), rel=1e-10)
    assert len(found.directions(8)[0]) == 5


def test_nothing_else_changes() -> None:
    model = moa.build(models.bert(), "topk", n_experts=2, k=1, **CORE).train()
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if ".core" not in name}
    modes = [m.training for m in model.modules()]
    moa.initialize(model, batches())
    assert [m.training for m in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert ".core" in name or torch.equal(parameter, kept[name]), name
    fresh = moa.build(models.bert(), "topk", n_experts=2, k=1, **CORE)
    for (name, parameter), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad, name


def without_labels() -> list[dict[str, Tensor]]:
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches()]


@pytest.mark.parametrize(
    ("build", "call", "says"),
    [
        (CORE, {"method": "lora-bs"}, "Did you mean 'lora-sb'"),
        (CORE, {"method": "pissa"}, "start='pissa'"),
        (CORE, {"method": "eva"}, "expert='lora'"),
        ({"expert": "lora"}, {"method": "lora-sb"}, "save_bases=True"),
        ({"expert": "core"}, {"method": "lora-sb"}, "save_bases=True"),
        ({"expert": "lora"}, {"method": "eva", "lr": 1e-3}, "lr is the size"),
        (CORE, {"lr": 0.0}, "above 0"),
        (CORE, {"batches": 0}, "from 1 to"),
        (CORE, {"data": []}, "there is no data"),
        (CORE, {"data": without_labels()}, "put labels into the batches"),
        ({"expert": "lora", "rank": 12, "n_experts": 2}, {"method": "eva"}, "span"),
    ],
)
def test_what_cannot_start_is_refused_by_name(build: dict[str, Any], call: dict[str, Any], says: str) -> None:
    model = moa.build(models.bert(), "topk", **{"n_experts": 2, "k": 1, **build})
    kept = {name: p.detach().clone() for name, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match=says):
        moa.initialize(model, **{"data": batches(), **call})
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_experts_that_moved_and_numbers_that_are_none_are_refused() -> None:
    model = moa.build(models.bert(), "fixed", n_experts=1, **CORE)
    moa.initialize(model, batches())
    with pytest.raises(ConfigError, match="moved already"):
        moa.initialize(model, batches())
    broken = moa.build(models.bert(), "fixed", n_experts=1, **CORE)
    with torch.no_grad():
        broken.base.bert.embeddings.word_embeddings.weight[:] = torch.nan
    with pytest.raises(NumericsError, match="its gradient holds NaN"):
        moa.initialize(broken, batches())
    with torch.no_grad():
        eva = moa.build(models.bert(), "fixed", n_experts=1)
        eva.base.bert.embeddings.word_embeddings.weight[:] = torch.nan
    with pytest.raises(NumericsError, match="its inputs are not finite"):
        moa.initialize(eva, batches(), "eva")


def test_a_layer_that_the_data_does_not_reach_is_named() -> None:
    for method, options in (("eva", {"rank": 2}), ("lora-sb", CORE)):
        model = moa.build(Branching(), "fixed", n_experts=1, targets=["used", "unused"], **options)
        with pytest.raises(ConfigError, match="unused and 0 more layers were not reached by 1 batches"):
            moa.initialize(model, [{"x": torch.randn(20, 8)}], method)
