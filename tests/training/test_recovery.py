"""A recovered mixture is the trained one where the pruned base was, and nothing elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel, LlamaForCausalLM, QuantoConfig

import moa
from moa.errors import CheckpointError, ConfigError
from moa.experts import FAMILIES
from moa.model.heads import MultiTaskForSequenceClassification, pretrained
from moa.recipes import RECIPES
from tests import laws, models
from tests.laws import assert_close
from tests.training.pruned_bases import HEADS, KV_HEADS, features, full, without_the_rest

SIZES = {"n_experts": 3, "k": 2, "rank": 2, "targets": "all-linear"}


def trained(router: str = "topk", ratio: float = 0.5, **options: Any) -> moa.MoAModel:
    """Return a mixture with no zero in it on a base whose second block is pruned."""
    sizes = {name: value for name, value in {**SIZES, **options}.items() if value is not None}
    model = moa.build(moa.prune(full(), ratio, [1]), router, **sizes)
    return models.randomise(model).double().eval()  # type: ignore[return-value]


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**models.token_batch(), **inputs).logits


def test_a_change_is_the_trained_one_on_what_was_kept_and_zero_elsewhere() -> None:
    model = trained()
    out = moa.recover(model, full())
    n_pruned = 0
    for name, mixture in model.mixtures().items():
        found, wide = features(model.base, name), out.mixtures()[name]
        for expert in range(3):
            small, large = (m.branches[0].bank.delta(expert).dense() for m in (mixture, wide))
            assert large.shape == wide.base.weight.shape
            assert torch.linalg.matrix_rank(large) == torch.linalg.matrix_rank(small) == 2
            if found is None:
                assert torch.equal(small, large)
                continue
            n_pruned += 1
            large = large.T if found[0] else large
            small = small.T if found[0] else small
            rest = [i for i in range(len(large)) if i not in found[1]]
            assert_close(large[found[1]], small, 1e-14)
            assert rest and not large[rest].any()
    assert n_pruned == 7 * 3


def test_kept_rows_and_columns_are_equal_bit_for_bit_and_the_others_zero() -> None:
    """Of the experts, and of a router that reads inputs that were pruned; what read whole inputs is a copy."""
    model = trained()
    out = moa.recover(model, full())
    small, large = model.adapter_state_dict(), out.adapter_state_dict()
    assert small.keys() == large.keys()
    seen = set()
    for key, value in small.items():
        layer, _, tensor = key.removeprefix("base.").partition(".branches.0.")
        axis, kept = features(model.base, layer) or (None, [])
        if (axis, tensor) in ((0, "bank.up"), (1, "bank.down"), (1, "router.weight")):
            seen.add(tensor)
            assert torch.equal(large[key][..., kept], value)  # what pruning the recovered one gives back
            rest = [i for i in range(large[key].shape[-1]) if i not in kept]
            assert rest and not large[key][..., rest].any()
        else:
            assert torch.equal(large[key], value), key
    assert seen == {"bank.up", "bank.down", "router.weight"}


def test_a_head_goes_with_the_queries_that_read_it() -> None:
    """The oracle of the other tests, in one case by hand: of key-value heads 0, 1, 2 one goes, with two query heads."""
    model = trained()
    kept = model.base.config.moa_pruned["layers.1.self_attn"]["kept"]
    (lost,) = {0, 1, 2} - set(kept)
    out = moa.recover(model, full())
    heads = {
        name: out.mixtures()[f"model.layers.1.self_attn.{name}"].branches[0].bank.up.unflatten(-1, (-1, 4)).any(-1)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    empty = {name: (~found).all(0).all(0).nonzero().flatten().tolist() for name, found in heads.items()}
    assert empty == {"q_proj": [2 * lost, 2 * lost + 1], "k_proj": [lost], "v_proj": [lost]}
    assert HEADS == 2 * KV_HEADS


def recipe_cases() -> list[tuple[str, str]]:
    return [case for case in laws.RECIPE_CASES if case[0] not in ("mhr", "flylora")]


@laws.parametrize(recipe_cases())
def test_every_recipe_runs_on_the_full_model_without_the_rest_as_it_ran_on_the_pruned_one(
    name: str, variant: str
) -> None:
    options = {} if RECIPES[name]().targets == "all-linear" else {"targets": "all-linear"}
    small = moa.prune(full(), 0.5, [1])
    model = models.randomise(moa.build(small, laws.small_recipe(name, variant, **options))).double().eval()
    model.experts_changed()
    out = moa.recover(model, without_the_rest(small))
    tasks = {"task_ids": torch.arange(4) % laws.N_TASKS} if laws.needs_tasks(name) else {}
    with model.disable_adapter():
        off = logits(model, **tasks)
    assert (logits(model, **tasks) - off).abs().max() > 1e-3
    assert_close(logits(out, **tasks), logits(model, **tasks), 1e-10)


BY_ROWS = {"lora", "shared", "affine", "dylora", "bottleneck", "loha", "ia3", "headed"}


def family_cases() -> list[tuple[str, str]]:
    ours = [case for case in laws.BANK_CASES if case[0] in FAMILIES]
    return [case for case in ours if case not in (("headed", "heads"), ("loldu", "default"))]  # sizes; pivots of zeros


@laws.parametrize(family_cases())
def test_a_family_of_rows_and_columns_is_recovered_and_any_other_refused_by_name(name: str, variant: str) -> None:
    options = {**laws.BANK_OPTIONS.get(name, {}).get(variant, {})}
    options |= {"rank": 2} if "rank" in FAMILIES[name].uses else {}
    small = moa.prune(full(), 0.5, [1])
    if name in ("oft", "boft", "dora"):  # a routing by row is not for them, and blocks must divide sizes
        options |= {"block_size": 2} if name != "dora" else {}
        model = moa.build(small, "fixed", n_experts=2, expert=name, targets="all-linear", **options)
    else:
        model = moa.build(small, "topk", n_experts=3, k=2, expert=name, targets="all-linear", **options)
    models.randomise(model).double().eval()
    base = without_the_rest(small)
    if name not in BY_ROWS or options.get("start") in ("pissa", "olora"):
        before = copy.deepcopy(base)
        with pytest.raises(ConfigError, match=r"Bank experts are a family whose tensors are not rows and columns"):
            moa.recover(model, base)
        assert all(torch.equal(p, q) for p, q in zip(base.parameters(), before.parameters(), strict=True))
        assert [n for n, _ in base.named_modules()] == [n for n, _ in before.named_modules()]
        return
    out = moa.recover(model, base)
    with model.disable_adapter():
        off = logits(model)
    assert (logits(model) - off).abs().max() > 1e-3
    assert_close(logits(out), logits(model), 1e-10)


def test_kinds_in_one_bank_are_recovered_if_each_is() -> None:
    model = trained(expert=["lora", "loha"], n_experts=4)
    assert_close(logits(moa.recover(model, without_the_rest(model.base))), logits(model), 1e-10)
    with pytest.raises(ConfigError, match="ShiRABank experts are a family"):
        moa.recover(trained(expert=["lora", "shira"], n_experts=4, density=0.2), full())


def test_experts_that_read_the_whole_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match="InputScaleBank experts are a family"):
        moa.recover(trained(expert="ia3", place="input", rank=None), full())


def test_adapters_on_an_output_are_scattered_on_both_sides() -> None:
    model = trained(place="output")
    assert_close(logits(moa.recover(model, without_the_rest(model.base))), logits(model), 1e-10)


def test_what_is_made_anew_from_a_size_is_refused_where_that_was_pruned() -> None:
    """FlyLoRA's projections are of their layer's inputs: those of the hidden size are the same on the full base."""
    inputs = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    small = moa.prune(full(), 0.5, [1])
    model = models.randomise(moa.build(small, "flylora", rank=4, k=2, targets=inputs)).double().eval()
    assert_close(logits(moa.recover(model, without_the_rest(small))), logits(model), 1e-10)
    with pytest.raises(ConfigError, match=r"o_proj.*projection \(4, 24\) of ProjectionRouter is made anew"):
        moa.recover(moa.build(moa.prune(full(), 0.5, [1]), "flylora", rank=4, k=2, targets=["o_proj"]), full())
    with pytest.raises(ConfigError, match="HeadedLoRABank experts are a family"):
        moa.recover(_heads(), full())


def _heads() -> moa.MoAModel:
    small = moa.prune(full(), 0.5, [1])
    return moa.build(small, "mhr", n_experts=3, n_heads=4, n_tasks=3, rank=2, targets="all-linear")


def test_nothing_pruned_is_a_copy() -> None:
    model = trained(ratio=0.0)
    out = moa.recover(model, full())
    small, large = model.adapter_state_dict(), out.adapter_state_dict()
    assert small.keys() == large.keys() and all(torch.equal(small[key], large[key]) for key in small)
    assert torch.equal(logits(out), logits(model))


def test_normal_fills_what_a_down_reads_of_removed_inputs() -> None:
    model = trained()
    plain = moa.recover(model, full()).adapter_state_dict()
    first, again, other = (
        moa.recover(model, full(), fill="normal", seed=seed).adapter_state_dict() for seed in (1, 1, 2)
    )
    drawn = []
    for key, value in plain.items():
        layer, _, tensor = key.removeprefix("base.").partition(".branches.0.")
        axis, kept = features(model.base, layer) or (None, [])
        assert torch.equal(first[key], again[key])
        if axis != 1 or tensor != "bank.down":
            assert torch.equal(first[key], value)
            continue
        rest = [i for i in range(value.shape[-1]) if i not in kept]
        assert torch.equal(first[key][..., kept], value[..., kept])
        assert not torch.equal(first[key][..., rest], other[key][..., rest])
        drawn.append(first[key][..., rest].flatten())
    values = torch.cat(drawn)
    assert values.std() == pytest.approx(2**-0.5, rel=0.2) and abs(values.mean()) < 0.2  # 168 of N(0, 1 / r), r = 2


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a full base, and a mixture on a pruned one of it, which names the full one."""
    full().save_pretrained(tmp_path / "full")
    small = moa.prune(LlamaForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float64), 0.5, [1])
    models.randomise(moa.build(small, "topk", **SIZES)).save_pretrained(tmp_path / "trained")
    return tmp_path


def test_a_checkpoint_is_recovered_without_its_base_and_saved_as_any_other(saved: Path) -> None:
    out = moa.recover(saved / "trained", LlamaForCausalLM.from_pretrained(saved / "full", dtype=torch.float64))
    assert_close(logits(out), logits(moa.recover(moa.load(saved / "trained"), full())), 1e-12)
    out.save_pretrained(saved / "recovered")
    back = moa.load(saved / "recovered")
    assert not hasattr(back.config, "moa_pruned")
    assert_close(logits(back), logits(out), 1e-12)
    with pytest.raises(ConfigError, match=r"was not trained on a base from moa\.prune"):
        moa.recover(saved / "recovered", full())


def test_trained_heads_and_encoders_go_along(tmp_path: Path) -> None:
    models.bert().bert.save_pretrained(tmp_path / "full")
    moa.prune(BertModel.from_pretrained(tmp_path / "full"), 0.5, [1]).save_pretrained(tmp_path / "small")
    labels = {"a": ["no", "yes"], "b": ["x", "y", "z"]}
    base = MultiTaskForSequenceClassification.from_encoder(tmp_path / "small", labels)
    model = models.randomise(moa.build(base, "topk", **SIZES)).eval()
    wide = moa.recover(model, MultiTaskForSequenceClassification.from_encoder(tmp_path / "full", labels))
    small, large = model.adapter_state_dict(), wide.adapter_state_dict()
    heads = [key for key in small if ".heads." in key]
    assert heads and all(torch.equal(small[key], large[key]) for key in heads)
    kept = base.encoder.config.moa_pruned["encoder.layer.1"]["kept"]
    key = "base.encoder.encoder.layer.1.intermediate.dense.branches.0.bank.up"
    assert torch.equal(large[key][..., kept], small[key]) and large[key].shape[-1] == 24
    wide.save_pretrained(tmp_path / "out")
    moa.load(tmp_path / "out")


def other_base() -> LlamaForCausalLM:
    base = full()
    with torch.no_grad():
        base.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
        base.model.layers[1].mlp.gate_proj.weight.mul_(1.5)
    return base


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another base": (other_base, CheckpointError, "wrong base: this mixture was made on LlamaForCausalLM"),
    "fewer blocks": (lambda: full(1), ConfigError, "do not fit this LlamaForCausalLM: it has no layers.1"),
    "other heads": (
        lambda: full(num_key_value_heads=2),
        ConfigError,
        "they are of 3 units of layers.1.self_attn, and it has 2",
    ),
    "other channels": (
        lambda: full(intermediate_size=44),
        ConfigError,
        "they are of 40 units of layers.1.mlp, and it has 44",
    ),
    "a pruned base": (lambda: moa.prune(full(), 0.3, [1]), ConfigError, "the base given is pruned itself"),
    "another kind": (models.gpt2, ConfigError, "it has no layers.1.self_attn with q_proj, k_proj, v_proj, o_proj or"),
    "one that carries experts": (
        lambda: moa.build(full(), "topk", targets=["q_proj"]).base,
        ConfigError,
        "already carries experts",
    ),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_base_that_does_not_fit_is_refused_and_stays_as_it_was(kind: str) -> None:
    make, error, said = WRONG[kind]
    base, model = make(), trained()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    grads = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error, match=said):
        moa.recover(model, base)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in base.parameters()] == grads


def test_other_wrong_inputs_are_named() -> None:
    model = trained()
    with pytest.raises(ConfigError, match="is the pruned one that carries the mixture"):
        moa.recover(model, model.base)
    with pytest.raises(ConfigError, match="Did you mean 'normal'"):
        moa.recover(model, full(), fill="normals")  # type: ignore[arg-type]
    moa.recover(model, other_base(), check_base=False)


def test_a_module_that_was_trained_whole_must_not_have_been_pruned() -> None:
    small = moa.prune(full(), 0.5, [1])
    name = "model.layers.1.mlp.up_proj"
    model = moa.build(small, "topk", **{**SIZES, "targets": ["q_proj"]}, modules_to_save=[name])
    base = full()
    with pytest.raises(CheckpointError, match=r"of another shape: .*up_proj.weight: \(20, 24\)"):
        moa.recover(model, base)
    assert [n for n, _ in base.named_modules()] == [n for n, _ in full().named_modules()]


def test_a_quantised_proxy_and_a_quantised_full_base(tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    kind = QuantoConfig(weights="int8")
    moa.prune(full().float(), 0.5, [1]).save_pretrained(tmp_path / "small")
    full().float().save_pretrained(tmp_path / "full")
    proxy = pretrained(LlamaForCausalLM, tmp_path / "small", quantization_config=kind)
    model = models.randomise(moa.build(proxy, "topk", **SIZES))
    plain, packed = (LlamaForCausalLM.from_pretrained(tmp_path / "full", quantization_config=q) for q in (None, kind))
    out = moa.recover(model, plain).adapter_state_dict()
    again = moa.recover(model, packed).adapter_state_dict()
    assert all(torch.equal(out[name], again[name]) for name in out)
    with pytest.raises(ConfigError, match="q_proj is a QLinear that is quantised"):
        moa.prune(LlamaForCausalLM.from_pretrained(tmp_path / "full", quantization_config=kind), 0.5, [1])


def test_pruned_layers_without_experts_do_not_matter() -> None:
    model = trained(targets=["gate_proj"], layers=[0])
    out = moa.recover(model, full())
    assert list(out.mixtures()) == ["model.layers.0.mlp.gate_proj"]
