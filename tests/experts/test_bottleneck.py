"""Bottlenecks in every place: formulas by torch's own layers, hooks in a plain base. Run: pytest tests/experts"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import moa
from moa.errors import ConfigError, ContextError, FoldError, ShapeError
from moa.experts import ExpertBank
from moa.recipes import RECIPES
from tests import laws, models
from tests.laws import assert_close

FAMILIES = ["bottleneck", "convpass", "conformer"]
families = pytest.mark.parametrize("name", FAMILIES)
PLACES = ["block", "sequential", "parallel"]
places = pytest.mark.parametrize("place", PLACES)
SMALL: dict[str, dict[str, Any]] = {"conformer": {"kernel": 3}}
# the first and the last layer of the two sub-layers of a block, attention and feed-forward
SUBLAYERS = {
    "llama": [("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.down_proj")],
    "gpt2": [("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")],
    "bert": [("attention.self.query", "attention.output.dense"), ("intermediate.dense", "output.dense")],
    "t5": [("SelfAttention.q", "SelfAttention.o"), ("DenseReluDense.wi", "DenseReluDense.wo")],
}


def built(name: str, place: str, kind: str = "bert", router: str = "fixed", n_experts: int = 1, **options: Any) -> Any:
    own = {"rank": 3, "modules_to_save": [], **SMALL.get(name, {}), **options}
    return moa.build(models.MODELS[kind][0](), router, expert=name, n_experts=n_experts, place=place, **own)


def network(bank: Any, expert: int = 0) -> nn.Module:
    """Return an expert as torch's own layers, with the bank's values."""
    network = nn.Sequential(nn.Linear(bank.d_in, bank.rank), nn.GELU(), nn.Linear(bank.rank, bank.d_out))
    with torch.no_grad():
        for layer, side in ((network[0], "down"), (network[2], "up")):
            weight = getattr(bank, side)[expert]
            layer.weight.copy_(weight if side == "down" else weight.T)
            layer.bias.copy_(getattr(bank, f"{side}_bias")[expert])
    return network


def convolved(bank: Any, x: Tensor, expert: int = 0) -> Tensor:
    """Return an expert of a convolved bank by torch's own layers, on x (B, S, i)."""
    r, value = bank.rank, lambda name: getattr(bank, name)[expert].detach()
    up = nn.Linear(r, bank.d_out)
    conv = nn.Conv1d(r, r, bank.kernel, padding="same", groups=r if type(bank).__name__ == "ConformerBank" else 1)
    up.load_state_dict({"weight": value("up").T, "bias": value("up_bias")})
    conv.load_state_dict({"weight": value("conv").view(conv.weight.shape), "bias": value("conv_bias")})
    if type(bank).__name__ == "ConvpassBank":
        quick = lambda h: h * torch.sigmoid(1.702 * h)  # noqa: E731
        return up(quick(conv(quick(x @ value("down").T).mT).mT))
    first, second = nn.LayerNorm(bank.d_in), nn.LayerNorm(r)
    first.load_state_dict({"weight": value("gain"), "bias": torch.zeros(bank.d_in)})
    second.load_state_dict({"weight": value("norm"), "bias": value("norm_bias")})
    hidden = nn.GLU()(first(x) @ value("down").T)
    return up(nn.SiLU()(second(conv(hidden.mT).mT)))


def first_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def with_first(out: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(out, Tensor) else (hidden, *out[1:])


def by_hooks(base: Any, expected: dict[str, Callable[[Tensor], Tensor]], place: str, pairs: list[Any]) -> None:
    """Put functions at the places of a plain base by torch's hooks, in place of mixtures."""
    if place == "parallel":
        for first, last in pairs:
            seen: list[Tensor] = []
            base.get_submodule(first).register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            base.get_submodule(last).register_forward_hook(
                lambda _m, _a, out, run=expected[first], seen=seen: out + run(seen.pop())
            )
        return
    for name, run in expected.items():
        base.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, run=run: with_first(out, first_of(out) + run(first_of(out)))
        )


def pairs_of(model: Any, kind: str, which: int | None = None) -> list[tuple[str, str]]:
    chosen = SUBLAYERS[kind] if which is None else SUBLAYERS[kind][which : which + 1]
    names = list(model.mixtures())
    return [
        (head.removesuffix(first) + first, head.removesuffix(first) + last)
        for head in names
        for first, last in chosen
        if head.endswith(f".{first}") and not (first == "output.dense" and "attention" in head)
    ]


@places
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_a_bottleneck_in_its_place_is_torchs_own_layers_in_hooks(place: str, kind: str) -> None:
    """Blocks of llama give a tensor, those of t5 a tuple."""
    model = models.randomise(built("bottleneck", place, kind, scale=0.5)).eval()
    batch = models.MODELS[kind][1]()
    branches = dict(model.branches())
    nets = {name: network(branch.bank) for name, branch in branches.items()}
    expected = {name: lambda x, net=net: 0.5 * net(x) for name, net in nets.items()}
    plain = models.MODELS[kind][0]()
    pairs = pairs_of(model, kind) if place == "parallel" else []
    by_hooks(plain, expected, place, pairs)
    n_blocks = 2 * (1 if kind != "t5" else 2)
    count = {"block": n_blocks, "sequential": 2 * n_blocks, "parallel": 2 * n_blocks}[place]
    cross = 2 if kind == "t5" and place != "block" else 0  # attention to the encoder
    assert len(branches) == count + cross
    if kind == "t5" and place == "parallel":
        pairs += [(name, name.replace(".q", ".o")) for name in branches if "EncDec" in name]
        plain = models.t5()
        by_hooks(plain, expected, place, pairs)
    got = models.outputs_of(model, batch)
    assert_close(got, models.outputs_of(plain, batch), 1e-5)
    assert not torch.allclose(got, models.outputs_of(models.MODELS[kind][0](), batch), atol=1e-3)


def spectrogram() -> Any:
    torch.manual_seed(1)
    config = ASTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=16,
        num_mel_bins=8,
        num_labels=3,
    )
    return ASTForAudioClassification(config).eval()


@families
@pytest.mark.parametrize("place", ["sequential", "parallel"])
@pytest.mark.parametrize("targets", ["ffn", "all-linear"], ids=["pfeiffer", "houlsby"])
def test_a_spectrogram_transformer_has_the_papers_four_placements(name: str, place: str, targets: str) -> None:
    base = spectrogram()
    model = moa.build(
        base, "fixed", expert=name, n_experts=1, place=place, targets=targets, rank=3, modules_to_save=[],
        **SMALL.get(name, {}),
    )  # fmt: skip
    models.randomise(model)
    branches = dict(model.branches())
    assert len(branches) == (2 if targets == "ffn" else 4)
    batch = {"input_values": torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))}
    plain = spectrogram()

    def run(bank: Any) -> Callable[[Tensor], Tensor]:
        return network(bank) if name == "bottleneck" else lambda x: convolved(bank, x)

    names = list(model.mixtures())
    assert all("intermediate" in n or "attention" in n or "output" in n or "mlp" in n for n in names), names
    pairs = list(zip(names[::2], names[1::2], strict=True)) if place == "parallel" else []
    by_hooks(plain, {n: run(branch.bank) for n, branch in branches.items()}, place, pairs)
    with torch.no_grad():
        got, want = model(**batch).logits, plain(**batch).logits
    assert_close(got, want, 1e-5)
    assert not torch.allclose(got, spectrogram()(**batch).logits, atol=1e-3)


@families
@places
def test_it_starts_as_its_base_and_learns_without_a_dead_start(name: str, place: str) -> None:
    """The released bottleneck starts with zeros on both sides: up would never leave zero."""
    model, batch = built(name, place, n_experts=2), models.class_batch()
    assert torch.equal(models.outputs_of(model, batch), models.outputs_of(models.bert(), batch))
    nn.init.normal_(model.base.classifier.weight, generator=torch.Generator().manual_seed(0))
    before = model.train()(**batch).loss.item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.1)
    model(**batch).loss.backward()
    for _, branch in model.branches():
        assert bool(branch.bank.up.grad.any()) and not bool(branch.bank.down.grad.any())  # up is zero, down is not
    for _ in range(8):
        optimizer.step()
        optimizer.zero_grad()
        model(**batch).loss.backward()
    assert model(**batch).loss.item() < before - 0.02
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    after = model.unload().state_dict()
    for key, value in models.bert().state_dict().items():
        assert torch.equal(after[key], value) or key.startswith("classifier"), f"{key} is the base's and moved"


@families
@places
def test_it_is_saved_and_folding_and_exporting_say_why_not(name: str, place: str, tmp_path: Path) -> None:
    model, batch = models.randomise(built(name, place, n_experts=2)).eval(), models.class_batch()
    before = models.outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.bert())
    assert torch.equal(models.outputs_of(again, batch), before)
    assert again.recipes[0][0] == model.recipes[0][0] and list(again.mixtures()) == list(model.mixtures())
    reason = {"block": "whole block", "parallel": "whole sub-layer", "sequential": "are not a weight change"}[place]
    with pytest.raises(FoldError, match=rf"encoder\.layer\.0.*{reason}"):
        model.merge_and_unload()
    with pytest.raises(FoldError, match=r"not a weight change|whole"):
        moa.export_expert(model, 0, tmp_path / "out")
    assert torch.equal(models.outputs_of(model, batch), before)
    assert torch.equal(models.outputs_of(model.unload(), batch), models.outputs_of(models.bert(), batch))


@families
def test_its_parameters_are_the_closed_formula(name: str) -> None:
    (_, branch), *_ = built(name, "sequential", n_experts=3).branches()
    d, r, k = 16, 3, branch.bank.kernel if name != "bottleneck" else 0
    formulas = {
        "bottleneck": 2 * d * r + r + d,
        "convpass": 2 * d * r + r * r * k + r + d,
        "conformer": d + 3 * d * r + r * k + r + 2 * r + d,
    }
    assert sum(p.numel() for p in branch.bank.parameters()) == 3 * formulas[name]


@families
@places
@pytest.mark.parametrize("router", list(RECIPES))
def test_it_runs_under_every_recipe_that_fits(name: str, place: str, router: str) -> None:
    recipe = RECIPES[router]
    if recipe.wants_experts:
        return
    fields = laws.recipe_options(router, next(iter(laws.RECIPE_OPTIONS.get(router, {"default": {}}))))
    options = {k: v for k, v in fields.items() if k not in ("alpha", "dropout", "targets", "n_experts")}
    options["targets"] = "all-linear"
    make = lambda: built(name, place, "llama", router, fields.get("n_experts", 4), **options)  # noqa: E731
    if recipe.families is not None and name not in recipe.families:
        with pytest.raises(ConfigError, match="has experts of its own kind"):
            make()
        return
    if place not in recipe.places:
        with pytest.raises(ConfigError, match=r"puts experts on|has no such place"):
            make()
        return
    if router == "soft" and name != "bottleneck":
        with pytest.raises(ConfigError, match="a slot is a mixture of rows"):
            make()
        return
    model, batch = models.randomise(make()), models.lm_batch()
    if laws.needs_tasks(router):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    model.train()(**batch).loss.backward()
    banks = {k: p for k, p in model.named_parameters() if p.requires_grad and ".bank." in k}
    assert banks and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in banks.values())
    assert any(bool(p.grad.any()) for p in banks.values())


@places
def test_a_routed_mixture_in_its_place_checkpoints_and_generates(place: str) -> None:
    model = models.randomise(built("bottleneck", place, "llama", "topk", 4, k=2)).double()
    batch, found = models.lm_batch(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for key, grad in found[0].items():
        assert_close(found[1][key], grad, 1e-9, key)
    model.gradient_checkpointing_disable()
    prompt = batch["input_ids"][:1, :5].clamp(min=2)
    out = model.eval().generate(prompt, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        full = model(input_ids=out.sequences).logits
    assert_close(torch.stack(out.logits, 1), full[:, 4:-1], 1e-6)
    with model.disable_adapter():
        assert_close(model(**batch).logits, models.llama().double()(**batch).logits)


@pytest.mark.parametrize("name", ["convpass", "conformer"])
@places
def test_padding_changes_nothing_for_experts_that_look_around(name: str, place: str) -> None:
    model = models.randomise(built(name, place, router="topk", n_experts=3, k=2)).double().eval()
    batch = models.class_batch()
    together = models.outputs_of(model, batch)
    for row in range(4):
        real = int(batch["attention_mask"][row].sum())
        one = {key: value[row : row + 1, :real] for key, value in batch.items() if key != "labels"}
        assert_close(models.outputs_of(model, one), together[row : row + 1], 1e-9, f"row {row}")


@pytest.mark.parametrize("name", ["convpass", "conformer"])
def test_experts_that_look_around_do_not_generate(name: str) -> None:
    model = built(name, "block", "llama", "topk", 3, k=2)
    prompt = models.lm_batch()["input_ids"][:, :4]
    with pytest.raises(ContextError, match=r"cannot generate: the experts of model\.layers\.0 \(and 1 more\) look at"):
        model.generate(prompt, max_new_tokens=2)
    with pytest.raises(ContextError, match="cannot generate"), model.pin_expert(0):
        model.generate(prompt, max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"continuous batching cannot run.*experts look at the rows around"):
        model.init_continuous_batching()


def test_every_second_block_and_a_small_start() -> None:
    model = built("bottleneck", "block", "llama", layers=range(1, 2, 2), start="small", activation="relu")
    assert list(model.mixtures()) == ["model.layers.1"]
    (_, branch), *_ = model.branches()
    assert not branch.bank.zero_at_init and 0 < branch.bank.up.abs().max() < 1e-3
    batch = models.lm_batch()
    change = models.outputs_of(model, batch) - models.outputs_of(models.llama(), batch)
    assert 0 < change.abs().max() < 1e-2
    weights = moa.build(models.llama(), "topk", n_experts=4, k=1, expert="bottleneck", rank=2)
    assert next(iter(weights.mixtures())) == "model.layers.0.self_attn.o_proj"  # after its sub-layers, unless told
    bank = next(iter(weights.branches()))[1].bank
    assert type(bank).forward is not ExpertBank.forward and bank.zero_at_init


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation": "gleu"}, r"activation must be one of.*'gelu'.*got 'gleu'|unknown activation 'gleu'.*'gelu'"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"start": "xavier"}, r"start must be.*'xavier'"),
        ({"alpha": 4.0}, r"family 'bottleneck' have no alpha"),
        ({"expert": "convpass", "kernel": 4}, "kernel must be odd and at least 1, got 4"),
        ({"expert": "conformer", "kernel": 0}, "kernel must be odd and at least 1, got 0"),
        ({"expert": "conformer", "rank": 1}, "a conformer needs rank=2 or more"),
        ({"expert": "conformer", "place": "output"}, "'conformer' sit on sequential or parallel or block"),
        ({"router": "mixlora", "k": 1, "place": "block"}, "recipe 'mixlora' puts experts on input: place='block'"),
        ({"router": "mixlora", "k": 1, "expert": "convpass"}, "the recipe 'mixlora' has no such place"),
        ({"place": "parallel", "targets": ("k_proj",)}, r"targets=\('k_proj',\) names no layer.*ends a sub-layer"),
        ({"place": "sequential", "targets": ("kproj",)}, r"targets='kproj' matches no linear layer.*Near: .*k_proj"),
        ({"place": "beside"}, "place='beside' does not fit"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.build(models.llama(), **{"router": "fixed", "expert": "bottleneck", "n_experts": 1, **options})


def test_a_sub_layer_on_other_rows_and_a_layer_without_a_sequence_are_named() -> None:
    class Pooling(nn.Module):
        """A feed-forward block that averages rows between its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).mean(1))

    model = moa.build(Pooling(), "fixed", n_experts=1, expert="bottleneck", place="parallel")
    with pytest.raises(ShapeError, match=r"down writes \(2, 4\).*\(2, 3, 4\).*place='sequential'"):
        model(torch.randn(2, 3, 4))
    flat = moa.build(models.plain(), "fixed", n_experts=1, expert="bottleneck", place="input")
    models.randomise(flat)
    assert models.outputs_of(flat, models.plain_batch()).shape == (4, models.CLASSES)
    bank = laws.make_bank("convpass", "default", 4, 4, 2, 2)
    with pytest.raises(ShapeError, match=r"ConvpassBank experts.*need x \(B, S, i\), got \(3, 4\)"):
        bank.expert_forward(torch.randn(3, 4, dtype=torch.float64), 0)
