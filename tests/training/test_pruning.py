"""What pruning keeps is the full model's, and what it leaves out is as good as zero."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertModel, LlamaForCausalLM, LlamaModel

import moa
from moa.errors import CheckpointError, ConfigError, NumericsError
from moa.model.heads import MultiTaskForSequenceClassification, pretrained
from moa.model.pruned import cuts, smaller
from tests import models
from tests.laws import assert_close
from tests.training.pruned_bases import CHANNELS, KV_HEADS, WIDTH, features, full, without_the_rest

IDS = models.token_batch()["input_ids"].clamp(min=1)


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_ratio_of_zero_is_the_full_model_bit_for_bit() -> None:
    whole = full()
    small = moa.prune(whole, 0.0, [0, 1])
    assert same_weights(small, whole)
    assert torch.equal(logits(small), logits(whole))
    assert small.config.moa_pruned["layers.1.mlp"] == {"of": CHANNELS, "kept": list(range(CHANNELS))}


def test_kept_weights_are_the_full_ones_and_the_rest_is_as_good_as_zero() -> None:
    whole = full(3)
    before = copy.deepcopy(whole)
    small = moa.prune(whole, 0.5, [0, 2])
    assert same_weights(whole, before) and not hasattr(whole.config, "moa_pruned")
    n_narrow = 0
    for name, module in small.named_modules():
        if not name.endswith("_proj"):
            continue
        full_one, found = whole.get_submodule(name), features(small, name)
        weight, bias = full_one.weight, full_one.bias
        if found is not None:
            n_narrow += 1
            weight = weight[:, found[1]] if found[0] else weight[found[1]]
            bias = bias if found[0] else bias[found[1]]
        assert torch.equal(module.weight, weight) and torch.equal(module.bias, bias), name
    assert n_narrow == 14
    assert len(small.config.moa_pruned["layers.0.self_attn"]["kept"]) == 2  # of 3, half rounded down goes
    assert len(small.config.moa_pruned["layers.2.mlp"]["kept"]) == CHANNELS // 2
    assert_close(logits(small), logits(without_the_rest(small)), 1e-12)
    assert (logits(small) - logits(whole)).abs().max() > 0.1
    with torch.no_grad():
        small.model.embed_tokens.weight.zero_()
    assert same_weights(whole, before)  # nothing is shared


def test_a_pruned_model_writes_with_either_cache_what_it_writes_without() -> None:
    small = moa.prune(full(), 0.5, [1])
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = small.generate(IDS, use_cache=False, **options)
    assert torch.equal(small.generate(IDS, **options), plain)
    assert torch.equal(small.generate(IDS, cache_implementation="static", **options), plain)


def magnitudes(whole: LlamaForCausalLM, factor: dict[str, Tensor] | None = None) -> list[float]:
    """Return Σ |w| (times |∂loss/∂w|) of each key-value head of block 1 with its query heads, number by number."""
    scores = [0.0] * KV_HEADS
    size = WIDTH // 6
    for name, per in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1), ("o_proj", 2)):
        path = f"model.layers.1.self_attn.{name}.weight"
        weight = whole.get_parameter(path).detach()
        value = weight.abs() if factor is None else (weight * factor[path]).abs()
        value = value.T if name == "o_proj" else value
        for row in range(value.shape[0]):
            scores[row // size // per] += float(value[row].sum())
    return scores


def channel_losses(whole: LlamaForCausalLM, gradients: dict[str, Tensor]) -> list[float]:
    """Return Σ |w · ∂loss/∂w| of each channel of block 1."""
    lost = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        path = f"model.layers.1.mlp.{name}.weight"
        lost[name] = (whole.get_parameter(path).detach() * gradients[path]).abs()
    return (lost["gate_proj"].sum(1) + lost["up_proj"].sum(1) + lost["down_proj"].sum(0)).tolist()


def best(scores: list[float], n: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:n])


def test_heads_are_scored_by_size_or_by_what_the_loss_would_lose() -> None:
    whole = full()
    for ratio, n in ((0.34, 2), (0.67, 1)):
        kept = moa.prune(whole, ratio, [1]).config.moa_pruned["layers.1.self_attn"]["kept"]
        assert kept == best(magnitudes(whole), n)
    batches = [{"input_ids": IDS[i : i + 2], "labels": IDS[i : i + 2]} for i in (0, 2)]
    for batch in batches:
        whole(**batch).loss.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    wanted = magnitudes(whole, gradients)
    whole.zero_grad()
    whole.train()
    for ratio, n in ((0.34, 2), (0.67, 1)):
        kept = moa.prune(whole, ratio, [1], data=[*batches, {}], batches=2).config.moa_pruned
        assert kept["layers.1.self_attn"]["kept"] == best(wanted, n)
        assert kept["layers.1.mlp"]["kept"] == best(channel_losses(whole, gradients), CHANNELS - int(ratio * CHANNELS))
    assert whole.training and all(p.grad is None for p in whole.parameters())
    assert best(wanted, 1) != best(magnitudes(whole), 1)  # so that the test can tell them apart


def test_channels_are_scored_over_gate_up_and_down() -> None:
    whole = full()
    mlp = whole.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[:, :] = 1.0
        mlp.up_proj.weight[:, :] = 1.0
        mlp.down_proj.weight[:, :] = 1.0
        mlp.gate_proj.weight[7] = mlp.up_proj.weight[8] = 5.0
        mlp.down_proj.weight[:, 9] = 5.0
    kept = moa.prune(whole, 37 / 40, [1]).config.moa_pruned["layers.1.mlp"]["kept"]
    assert kept == [7, 8, 9]


def test_the_first_four_and_last_two_blocks_stay_by_default() -> None:
    small = moa.prune(full(8), 0.5)
    assert {name.split(".")[1] for name in small.config.moa_pruned} == {"4", "5"}
    assert {name.split(".")[1] for name in moa.prune(full(3), 0.5, [-1, 0]).config.moa_pruned} == {"0", "2"}
    with pytest.raises(ConfigError, match="has 2 blocks, and the first 4 and last 2 stay whole unless layers"):
        moa.prune(full(), 0.5)


def test_an_encoder_is_pruned_too() -> None:
    whole = models.bert().double()
    small = moa.prune(whole, 0.5, [1])
    heads = small.config.moa_pruned["encoder.layer.1.attention"]
    channels = small.config.moa_pruned["encoder.layer.1"]
    assert heads["of"] == 2 and len(heads["kept"]) == 1 and channels["of"] == 24 and len(channels["kept"]) == 12
    attention = small.bert.encoder.layer[1].attention
    assert attention.self.query.out_features == attention.output.dense.in_features == 8
    assert attention.self.num_attention_heads == 1 and attention.self.all_head_size == 8
    lost = [d for d in range(16) if d // 8 not in heads["kept"]]
    with torch.no_grad():
        layer = whole.bert.encoder.layer[1]
        layer.attention.output.dense.weight[:, lost] = 0
        layer.output.dense.weight[:, [c for c in range(24) if c not in channels["kept"]]] = 0
    assert_close(logits(small), logits(whole), 1e-12)


def test_a_folder_of_a_pruned_model_is_read_by_moa_and_refused_by_the_stock_classes(tmp_path: Path) -> None:
    small = moa.prune(full(), 0.5, [1])
    small.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["moa_pruned"] == small.config.moa_pruned and config["architectures"] == ["LlamaForCausalLM"]
    back = pretrained(AutoModelForCausalLM, tmp_path / "small", dtype=torch.float64)
    assert type(back) is LlamaForCausalLM and same_weights(back, small)
    assert_close(logits(back), logits(small), 1e-12)
    body = pretrained(AutoModel, tmp_path / "small", dtype=torch.float64)
    assert type(body) is LlamaModel and same_weights(body, small.model)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("where", ["full", "small"])
def test_a_mixture_on_a_pruned_base_is_loaded_on_it(tmp_path: Path, where: str) -> None:
    """From the full base that the checkpoint names, or from a folder of the pruned one."""
    full().save_pretrained(tmp_path / "full")
    small = moa.prune(LlamaForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float64), 0.5, [1])
    if where == "small":
        small.save_pretrained(tmp_path / "small")
        small = pretrained(LlamaForCausalLM, tmp_path / "small", dtype=torch.float64)
    assert small.name_or_path == str(tmp_path / where)
    model = models.randomise(moa.build(small, "topk", n_experts=3, k=2, rank=2, targets="all-linear"))
    model.save_pretrained(tmp_path / "out")
    back = moa.load(tmp_path / "out")
    assert same_weights(back, model) and back.config.moa_pruned == small.config.moa_pruned
    assert_close(logits(back), logits(model.eval()), 1e-12)
    with pytest.raises(CheckpointError, match=r"made on a pruned base, .* moa.recover\(.*\) takes it to the full one"):
        moa.load(tmp_path / "out", base=full(), check_base=False)


def test_a_classifier_around_a_pruned_encoder_is_loaded_on_it(tmp_path: Path) -> None:
    models.bert().bert.save_pretrained(tmp_path / "full")
    moa.prune(BertModel.from_pretrained(tmp_path / "full"), 0.5, [0]).save_pretrained(tmp_path / "small")
    base = MultiTaskForSequenceClassification.from_encoder(tmp_path / "small", {"a": ["no", "yes"]})
    assert base.encoder.encoder.layer[0].intermediate.dense.out_features == 12
    base.save_pretrained(tmp_path / "whole")
    again = MultiTaskForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert same_weights(again, base)
    model = models.randomise(moa.build(base, "topk", n_experts=2, k=1, rank=2, targets="all-linear")).eval()
    model.save_pretrained(tmp_path / "out")
    tasks = {"task_ids": torch.zeros(4, dtype=torch.long)}
    assert torch.equal(logits(moa.load(tmp_path / "out"), **tasks), logits(model, **tasks))


def test_indices_that_do_not_fit_are_named() -> None:
    whole = full()
    row = {"of": KV_HEADS, "kept": [0]}
    for kept, said in (
        ({"layers.7.self_attn": row}, "has no layers.7.self_attn with q_proj, k_proj, v_proj, o_proj"),
        ({"layers.1.self_attn": {**row, "of": 4}}, "they are of 4 units of layers.1.self_attn, and it has 3"),
        ({"layers.1.self_attn": {**row, "kept": [0, 3]}}, "ascending numbers from 0 to 2"),
        ({"layers.1.self_attn": {**row, "kept": [1, 0]}}, "ascending numbers from 0 to 2"),
        ({"layers.1.self_attn": {**row, "kept": []}}, "at least one"),
    ):
        with pytest.raises(ConfigError, match=said):
            cuts(whole, kept)
        with pytest.raises(ConfigError, match=said):
            smaller(whole, kept)


class Counted(nn.Module):
    """Attention with one number a head beside its layers, as some models have."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.sinks = nn.Parameter(torch.zeros(6))
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)
        self.o_proj = nn.Linear(24, 24)


def test_what_cannot_be_pruned_is_named() -> None:
    whole = full()
    looked_for = r"attention: q_proj, k_proj, v_proj, o_proj; .*feed-forward: intermediate.dense, output.dense"
    for make in (models.gpt2, models.t5):
        with pytest.raises(ConfigError, match=f"has no block that can be pruned: .*{looked_for}"):
            moa.prune(make(), 0.5, [0])
    with pytest.raises(ConfigError, match=f"layers.0 has no feed-forward that can be pruned: .*{looked_for}"):
        moa.prune(models.vit(), 0.5, [0])
    with pytest.raises(ConfigError, match="a Plain has no configuration of its body"):
        moa.prune(models.plain(), 0.5, [0])
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="from 0 to below 1"):
            moa.prune(whole, ratio, [0])
    with pytest.raises(ConfigError, match="must name blocks from 0 to 1"):
        moa.prune(whole, 0.5, [2])
    with pytest.raises(ConfigError, match="is pruned already: prune the full one"):
        moa.prune(moa.prune(whole, 0.3, [0]), 0.5, [0])
    with pytest.raises(ConfigError, match="no configuration of its body"):
        moa.prune(MultiTaskForSequenceClassification.around(models.bert().bert, {"a": ["x", "y"]}), 0.5, [0])
    with torch.device("meta"):
        nowhere = LlamaForCausalLM(whole.config)
    with pytest.raises(ConfigError, match="q_proj is on the meta device or offloaded"):
        moa.prune(nowhere, 0.5, [0])
    with pytest.raises(ConfigError, match="put labels into the batches"):
        moa.prune(whole, 0.5, [0], data=[{"input_ids": IDS}])
    with pytest.raises(ConfigError, match="there is no data"):
        moa.prune(whole, 0.5, [0], data=[])
    with pytest.raises(ConfigError, match="batches must be at least 1"):
        moa.prune(whole, 0.5, [0], data=[], batches=0)
    with_sinks = full()
    with_sinks.model.layers[0].self_attn = Counted().double()
    with pytest.raises(ConfigError, match=r"sinks \(6,\) depends on the number of attention units"):
        moa.prune(with_sinks, 0.5, [1])
    moa.build(whole, "topk", targets=["q_proj"])
    with pytest.raises(ConfigError, match="q_proj is a Mixture that is quantised or carries experts"):
        moa.prune(whole, 0.5, [0])
    lost = full()
    with torch.no_grad():
        lost.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layers.0.self_attn: scores"):
        moa.prune(lost, 0.5, [0])


class Packed(nn.Linear):
    """A linear whose weight is codes."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(torch.zeros(d_out * d_in // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_a_quantised_base_is_refused() -> None:
    whole = full().float()
    layer = whole.model.layers[0].self_attn
    layer.q_proj = Packed(24, 24)
    with pytest.raises(ConfigError, match="q_proj is a Packed that is quantised or carries experts: prune the base as"):
        moa.prune(whole, 0.5, [0])


def test_a_configuration_changed_by_hand_is_refused(tmp_path: Path) -> None:
    moa.prune(full(), 0.5, [1]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for wrong in ([1], {"layers.1.mlp": [1, 2]}, {"layers.1.mlp": {"of": 40, "kept": ["1"]}}):
        file.write_text(json.dumps({**values, "moa_pruned": wrong}))
        with pytest.raises(ConfigError, match=r"moa_pruned must be \{group"):
            pretrained(AutoModelForCausalLM, tmp_path)
