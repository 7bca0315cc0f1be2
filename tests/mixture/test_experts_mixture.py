"""Adapters on the fused experts of a base. Run: pytest tests/mixture/test_experts_mixture.py"""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moa
from moa.errors import CheckpointError, ConfigError, FoldError, UnadaptedWarning
from moa.mixture import fused_experts
from tests import models
from tests.model.test_bases import FUSED, base

# one base of each layout: gate and up (N, o, i), with biases (N, i, o), every token for every expert
LAYOUTS = ["Qwen3Moe", "GptOss", "Llama4"]
CONSTANT = {"fixed": {}, "poly": {"mode": "mu"}, "mhr": {"mode": "mu", "n_heads": 2}}


def adapted(kind: str, router: str = "topk", std: float = 0.2, **options: Any) -> moa.MoAModel:
    options = {"n_experts": 3, "rank": 2, "targets": "moe-experts", **options}
    return models.randomise(moa.build(base(kind), router, **options), std).eval()


def doubled(model: Any) -> Any:
    """Return a model in float64, which grouped kernels do not have."""
    model.set_experts_implementation("eager")
    return model.double()


def with_matrices(kind: str, changes: dict[str, torch.Tensor]) -> nn.Module:
    """Return the plain base with changes of its tensors written in, in float64."""
    plain = doubled(base(kind))
    with torch.no_grad():
        for name, change in changes.items():
            plain.get_parameter(name).add_(change)
    return plain


def changes_of(model: moa.MoAModel, weights: list[float]) -> dict[str, torch.Tensor]:
    """Return Σ_e w_e s up_e^T down_e of every matrix, by tensor, written out from the definition."""
    out = {}
    for name, mixture in model.mixtures().items():
        layout: Any = mixture.layout
        for tensor, branch in zip((layout.up, layout.down), mixture.branches, strict=True):
            n = getattr(mixture.base, tensor).shape[0]
            down, up = (f.detach().double().unflatten(0, (n, -1)) for f in branch.bank.factors())  # (N, E, r, ·)
            w = torch.tensor(weights, dtype=torch.float64)
            change = torch.einsum("e,nero,neri->noi", w, up, down) * branch.bank.scaling
            out[f"{name}.{tensor}"] = change.mT if layout.transposed else change
    return out


@pytest.mark.parametrize("kind", FUSED)
def test_builds_trains_saves_loads_generates_and_unloads(kind, tmp_path):
    batch = models.token_batch(2, 6)
    want = models.outputs_of(base(kind), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnadaptedWarning)  # the fused tensors are what is adapted
        model = moa.build(base(kind), "topk", n_experts=3, k=2, targets="moe-experts")
    assert torch.allclose(models.outputs_of(model, batch), want, atol=1e-6)  # new experts add nothing
    models.randomise(model, 0.1)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name, p in model.named_parameters() if name not in trained and p.grad is not None]
    live = models.outputs_of(model, batch)
    assert not torch.allclose(live, want, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=base(kind))
    assert torch.equal(models.outputs_of(again, batch), live)
    made = again.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    whole = models.outputs_of(again, {"input_ids": made[:, :-1]})[:, -3:]
    assert torch.equal(whole.argmax(-1), made[:, -3:])  # the cache changes nothing
    assert torch.equal(models.outputs_of(again.unload(), batch), want)


@pytest.mark.parametrize("router", CONSTANT)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_fold_is_exact(kind, router):
    batch = models.token_batch(2, 6)
    model = adapted(kind, router, **CONSTANT[router])
    tensors = {n: p.detach().clone() for n, p in base(kind).named_parameters() if ".experts." in n}
    live = models.outputs_of(model, batch)
    with model.folded() as plain:
        assert torch.allclose(models.outputs_of(plain, batch), live, atol=1e-5)
    assert all(
        torch.equal(p, tensors[n.replace(".base.", ".")])
        for n, p in model.base.named_parameters()
        if n.replace(".base.", ".") in tensors
    )
    folded = model.merge_and_unload()
    assert type(folded.get_submodule(next(iter(tensors)).rpartition(".")[0])) is type(
        base(kind).get_submodule(next(iter(tensors)).rpartition(".")[0])
    )
    assert torch.allclose(models.outputs_of(folded, batch), live, atol=1e-5)


@pytest.mark.parametrize("kind", [*LAYOUTS, "Mixtral", "DeepseekV3"])
def test_weights_are_the_routings_times_the_deltas(kind):
    """The truth is the base in float64 with the sum written into its matrices; each pinned adapter is its own delta."""
    batch = models.token_batch(2, 6)
    model = doubled(adapted(kind, "fixed", n_experts=4))
    truth = models.outputs_of(with_matrices(kind, changes_of(model, [0.25] * 4)), batch)
    assert torch.allclose(models.outputs_of(model, batch), truth, atol=1e-10)
    for expert in range(4):
        alone = [float(e == expert) for e in range(4)]
        truth = models.outputs_of(with_matrices(kind, changes_of(model, alone)), batch)
        with model.pin_expert(expert):
            assert torch.allclose(models.outputs_of(model, batch), truth, atol=1e-10)
    with model.disable_adapter():
        assert torch.allclose(models.outputs_of(model, batch), models.outputs_of(doubled(base(kind)), batch))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_token_has_its_own_weights(kind):
    """Of a layer on its own: the output of each token is that of the base with the change of this token's routing."""
    model = doubled(adapted(kind, "topk", std=0.5))
    name, mixture = next(iter(model.mixtures().items()))
    called: list[Any] = []
    hook = model.base.get_submodule(name).register_forward_pre_hook(lambda m, args: called.append(args))
    with torch.no_grad(), model.tracing() as trace:
        model(**models.token_batch(2, 6))
    hook.remove()
    record = next(r for r in trace if r.name == name)
    weights = record.routing.dense().reshape(-1, 3)  # (T, E)
    assert not torch.allclose(weights[0], weights[1])
    with torch.no_grad():
        got = mixture(*called[0])
        for token in (0, 5, 11):
            plain = with_matrices(kind, changes_of(model, weights[token].tolist())).get_submodule(name)
            want = plain(*called[0])
            rows = slice(token, None, 12) if kind == "Llama4" else slice(token, token + 1)
            assert torch.allclose(got[rows], want[rows], atol=1e-10), token


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for the old name
@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_adapter_is_pefts_target_parameters(kind, tmp_path):
    """peft reads the exported folder, and its logits are those of the pinned expert."""
    batch = models.token_batch(2, 6)
    model = adapted(kind, "topk")
    moa.export_expert(model, 1, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind), str(tmp_path)).eval()
    with model.pin_expert(1):
        ours = models.outputs_of(model, batch)
    assert not torch.allclose(ours, models.outputs_of(base(kind), batch), atol=1e-3)
    assert torch.allclose(ours, models.outputs_of(theirs, batch), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for the old name
def test_experts_and_linear_layers_together(tmp_path):
    batch = models.token_batch(2, 6)
    model = adapted("Mixtral", "fixed", targets=["q_proj", "moe-experts"])
    assert list(model.mixtures()) == [
        f"model.layers.{n}.{m}" for n in (0, 1) for m in ("self_attn.q_proj", "mlp.experts")
    ]
    assert model.adapted_summary() == "experts on 2 Linear, 2 MixtralExperts."
    moa.export_expert(model, 0, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("Mixtral"), str(tmp_path)).eval()
    with model.pin_expert(0):
        assert torch.allclose(models.outputs_of(model, batch), models.outputs_of(theirs, batch), atol=1e-5)
    live = models.outputs_of(model, batch)
    assert torch.allclose(models.outputs_of(model.merge_and_unload(), batch), live, atol=1e-5)


RECIPES = {
    "dense": {},
    "remix": {},
    "threshold": {},
    "balanced": {},
    "hydralora": {},
    "expert_choice": {},
    "poly": {"n_tasks": 2},
    "mhr": {"n_tasks": 2, "n_heads": 2},
}


@pytest.mark.parametrize("router", [name for name in RECIPES if name in moa.RECIPES])
def test_recipes(router):
    batch = models.token_batch(2, 6)
    extra = {"task_ids": torch.tensor([0, 1])} if "n_tasks" in RECIPES[router] else {}
    model = models.randomise(moa.build(base("Qwen3Moe"), router, targets="moe-experts", **RECIPES[router]), 0.2)
    loss = model.train()(**batch, **extra, labels=batch["input_ids"]).loss
    loss.backward()
    assert not [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert loss.isfinite()


def test_sequence_routing_sees_examples_though_the_base_flattens_them():
    """Each example by itself gives what it gives in the batch, with a mask and without."""
    ids = models.token_batch(2, 6)["input_ids"]
    model = adapted("Qwen3Moe", "remix", granularity="sequence")
    whole = models.outputs_of(model, {"input_ids": ids})
    for row in (0, 1):
        assert torch.allclose(
            models.outputs_of(model, {"input_ids": ids[row : row + 1]}), whole[row : row + 1], atol=1e-5
        )
    with torch.no_grad(), model.tracing() as trace:
        model(input_ids=ids)
    assert all(record.routing.weights.shape[:2] == (2, 1) for record in trace)


@pytest.mark.parametrize(
    ("router", "options", "words"),
    [
        ("flylora", {}, "multiplies a layer's own input"),
        ("soft", {}, "mixes the rows of an example"),
        ("hydra", {}, "a branch on a layer's output"),
        ("mixlora", {}, "no feed-forward block"),
        ("fixed", {"expert": "vera"}, "share tensors over their layers"),
        ("fixed", {"expert": "dora"}, "cannot be read as one matrix"),
    ],
)
def test_recipes_that_cannot_are_refused_by_name(router, options, words):
    with pytest.raises(ConfigError, match=words):
        moa.build(base("Qwen3Moe"), router, targets="moe-experts", **options)


def test_a_base_without_fused_experts_and_a_class_that_is_not_known():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no fused experts"):
        moa.build(models.llama(), "topk", targets="moe-experts")

    class MyExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 8))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = MyExperts(), nn.Linear(8, 8)

    with pytest.raises(ConfigError, match=r"experts.weight \(4, 8, 8\) belongs to a MyExperts, whose way"):
        moa.build(Model(), "topk", targets="moe-experts")


def test_what_is_said_of_fused_experts():
    with pytest.warns(UnadaptedWarning, match="targets='moe-experts' adapts them"):
        model = moa.build(base("Mixtral"), "topk")
    assert "targets='moe-experts' adapts them" in model.adapted_summary()
    further = moa.build(model, "fixed", n_experts=2, targets="moe-experts")
    assert not fused_experts(further.base) and "2 MixtralExperts" in further.adapted_summary()


def test_a_constant_needs_a_bias_to_fold_into():
    assert torch.isfinite(
        models.outputs_of(adapted("GptOss", "fixed", expert="affine"), models.token_batch(2, 6))
    ).all()
    model = adapted("GptOss", "fixed", expert="affine")
    live = models.outputs_of(model, models.token_batch(2, 6))
    assert torch.allclose(models.outputs_of(model.merge_and_unload(), models.token_batch(2, 6)), live, atol=1e-5)
    with pytest.raises(FoldError, match="has no bias"):
        adapted("Mixtral", "fixed", expert="affine").merge_and_unload()


def test_something_else_that_runs_the_module_is_an_error():
    model = adapted("Mixtral")
    next(iter(model.mixtures().values())).base.register_forward_hook(lambda *a: None)
    with pytest.raises(ConfigError, match="something else runs this MixtralExperts"):
        models.outputs_of(model, models.token_batch(2, 6))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for the old name
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_pefts_target_parameters_become_experts(kind, both, tmp_path):
    """Folders that peft writes: each expert by itself gives peft's logits, on one tensor or on both, beside a layer."""
    batch, folders, want = models.token_batch(2, 6), [], []
    name, mixture = next(iter(adapted(kind, "fixed").mixtures().items()))
    tensors = [mixture.layout.up, mixture.layout.down] if both else [mixture.layout.down]
    for number in range(2):
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False,
            target_parameters=[f"{name.rpartition('.')[2]}.{tensor}" for tensor in tensors],
        )  # fmt: skip
        theirs = peft.get_peft_model(base(kind), config).eval()
        rng = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
        want.append(models.outputs_of(theirs, batch))
        folders.append(tmp_path / f"adapter{number}")
        theirs.save_pretrained(folders[-1])
    model = moa.build(base(kind), "topk", experts=folders, k=1).eval()
    assert name in model.mixtures() and any("q_proj" in layer for layer in model.mixtures())
    for number in range(2):
        with model.pin_expert(number):
            assert torch.allclose(models.outputs_of(model, batch), want[number], atol=1e-5)
    assert not torch.allclose(want[0], want[1], atol=1e-3)
    less = moa.build(base(kind), "topk", experts=folders[:1], k=1).eval()
    less.add_expert(folders[1])
    with less.pin_expert(1):
        assert torch.allclose(models.outputs_of(less, batch), want[1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_folders_on_fused_weights_that_do_not_fit_are_refused(tmp_path):
    model = adapted("Qwen3Moe", "topk")
    moa.export_expert(model, 1, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    said, tensors = json.loads(config.read_text()), load_file(weights)
    config.write_text(json.dumps({**said, "rank_pattern": {"experts": 2}}))
    with pytest.raises(CheckpointError, match="rank_pattern beside target_parameters"):
        moa.build(base("Qwen3Moe"), "topk", experts=[tmp_path])
    config.write_text(json.dumps(said))
    key = next(key for key in tensors if "lora_A" in key and "experts" in key)
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, weights)
    with pytest.raises(CheckpointError, match="made for another base"):
        moa.build(base("Qwen3Moe"), "topk", experts=[tmp_path])
    save_file({name: value for name, value in tensors.items() if name != key}, weights)
    with pytest.raises(CheckpointError, match="only one factor of"):
        moa.build(base("Qwen3Moe"), "topk", experts=[tmp_path])
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="target_parameters"):
        moa.build(models.llama(), "topk", experts=[tmp_path])
