"""Every variant of LoRA that peft writes, read for merging and as experts, against peft's own weights and logits.

Run: pytest tests/formats/test_peft_variants.py
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from torch import Tensor, nn

import moa
from moa.cli.merge_config import read_merge
from moa.errors import CheckpointError, NumericsError
from moa.merge import merge, read_peft, write_peft
from tests import models
from tests.laws import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # peft corrects it layer by layer
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # peft's LoRA-GA
    pytest.mark.filterwarnings("ignore:.*have invalid shape.*lora_B.bias:UserWarning"),  # peft takes it for a factor
    pytest.mark.filterwarnings("ignore:.*Setting `save_embedding_layers` to `True`:UserWarning"),
]

UNEQUAL = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 7}}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 5}
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 3, "lora_alpha": 5}
VIT = {"target_modules": ["projection", "query"], "r": 3, "lora_alpha": 5}
BLOCKS = BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2)

# name -> (model, options): low-rank changes
LOW_RANK: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {**LLAMA, **UNEQUAL}),
    "rslora": ("llama", {**LLAMA, **UNEQUAL, "use_rslora": True}),
    "pissa": ("llama", {**LLAMA, **UNEQUAL, "init_lora_weights": "pissa"}),
    "pissa, rslora": ("llama", {**LLAMA, "init_lora_weights": "pissa", "use_rslora": True}),
    "pissa, Conv1D": ("gpt2", {**GPT2, "init_lora_weights": "pissa"}),
    "olora": ("llama", {**LLAMA, **UNEQUAL, "init_lora_weights": "olora"}),
    "kasa": ("llama", {**LLAMA, **UNEQUAL, "kasa_config": KasaConfig()}),
    "block-diagonal": ("llama", {**LLAMA, "r": 4, "use_bdlora": BLOCKS}),
    "velora": ("llama", {**LLAMA, "target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)}),
    "mica": ("llama", {**LLAMA, "init_lora_weights": "mica"}),
    "gaussian": ("llama", {**LLAMA, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {**LLAMA, "r": 4, "init_lora_weights": "orthogonal"}),
    "lm_head": ("llama", {**LLAMA, "target_modules": ["q_proj", "lm_head"]}),
    "some layers": ("llama", {**LLAMA, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {**LLAMA, "exclude_modules": ["v_proj"], "lora_dropout": 0.3}),
    "Conv1D": ("gpt2", GPT2),
    "convolution": ("vit", VIT),
}
# changes that only a merge can hold
OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {**LLAMA, **UNEQUAL, "use_dora": True}),
    "dora, Conv1D": ("gpt2", {**GPT2, "use_dora": True}),
    "dora, convolution": ("vit", {**VIT, "use_dora": True}),
    "dora, pissa": ("llama", {**LLAMA, "use_dora": True, "init_lora_weights": "pissa"}),
    "bias behind the factors": ("bert", {"target_modules": ["query", "dense"], "r": 2, "lora_bias": True}),
    "biases": ("bert", {"target_modules": ["query"], "r": 2, "bias": "all"}),
    "adapted layers' biases": ("bert", {"target_modules": ["query"], "r": 2, "bias": "lora_only"}),
    "head": ("bert", {"target_modules": ["query"], "r": 2, "modules_to_save": ["classifier"]}),
}
REFUSED = {
    "dora": "use_dora=True, whose change of .* is dense",
    "bias behind the factors": "lora_bias=True",
    "biases": "trained whole .bias='all'",
    "adapted layers' biases": "trained whole .bias='lora_only'",
    "head": r"trained whole .modules_to_save=\['classifier'\]",
}


def trained(kind: str, folder: Path, seed: int = 0, initial: Path | None = None, **options: Any) -> nn.Module:
    """Write an adapter with peft, every parameter that peft trains moved a little, and return peft's model."""
    torch.manual_seed(seed)
    model = get_peft_model(models.MODELS[kind][0](), LoraConfig(**options))
    if initial is not None:
        model.save_pretrained(initial)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model.eval()


def plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def change_of(kind: str, theirs: nn.Module) -> dict[str, Tensor]:
    """Return what peft's merge adds to each of the base's tensors, those that change."""
    base = models.MODELS[kind][0]().state_dict()
    merged = theirs.merge_and_unload().state_dict()
    out = {name: merged[name] - base[name] for name in base}
    return {name: change for name, change in out.items() if bool(change.any())}


@pytest.mark.parametrize("name", [*LOW_RANK, *OTHER])
def test_what_is_read_for_merging_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    kind, options = {**LOW_RANK, **OTHER}[name]
    trained(kind, tmp_path, **options)
    make = models.MODELS[kind][0]
    expected = change_of(kind, PeftModel.from_pretrained(make(), tmp_path))
    got = read_peft(tmp_path, make().state_dict())
    assert set(got) == set(expected)
    for tensor in expected:
        assert_close(got[tensor].dense(), expected[tensor], 2e-5, tensor)


@pytest.mark.parametrize("name", LOW_RANK)
def test_as_an_expert_it_gives_pefts_logits(name: str, tmp_path: Path) -> None:
    """Two of unequal rank and alpha behind one router, each pinned in turn."""
    kind, options = LOW_RANK[name]
    make, make_batch = models.MODELS[kind]
    batch = make_batch()
    trained(kind, tmp_path / "a", **options)
    plain = {key: value for key, value in options.items() if key in ("target_modules", "fan_in_fan_out")}
    trained(kind, tmp_path / "b", seed=1, r=2, lora_alpha=9, init_lora_weights=False, **plain)
    model = moa.build(make(), "topk", experts=[tmp_path / "a", tmp_path / "b"], k=1, modules_to_save=[]).eval()
    for expert, folder in enumerate("ab"):
        expected = models.outputs_of(PeftModel.from_pretrained(make(), tmp_path / folder).eval(), batch)
        with model.pin_expert(expert):
            assert_close(models.outputs_of(model, batch), expected, 2e-5)
    with model.disable_adapter():
        assert_close(models.outputs_of(model, batch), models.outputs_of(make(), batch), 1e-6)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_low_rank_change_is_no_expert(name: str, tmp_path: Path) -> None:
    kind, options = OTHER[name]
    trained(kind, tmp_path, **options)
    base = models.MODELS[kind][0]()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=REFUSED[name.split(",")[0]]):
        moa.build(base, "topk", experts=[tmp_path], k=1)
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", ["pissa", "olora", "kasa", "dora", "biases", "head"])
def test_without_the_base_it_is_refused(name: str, tmp_path: Path) -> None:
    kind, options = {**LOW_RANK, **OTHER}[name]
    trained(kind, tmp_path, **options)
    word = {"biases": "bias='all'", "head": "modules_to_save", "kasa": "kasa_config", "dora": "use_dora"}.get(
        name, name
    )
    with pytest.raises(CheckpointError, match=rf"(?s){word}.*base"):
        read_peft(tmp_path)


def test_the_base_can_be_a_folder(tmp_path: Path) -> None:
    trained("llama", tmp_path / "a", **LOW_RANK["pissa"][1])
    models.llama().save_pretrained(tmp_path / "base")
    from_folder = read_peft(tmp_path / "a", tmp_path / "base")
    from_state = read_peft(tmp_path / "a", models.llama().state_dict())
    for name in from_state:
        assert torch.equal(from_folder[name].dense(), from_state[name].dense())


def test_a_merge_in_a_file_hands_its_base_over(tmp_path: Path) -> None:
    trained("llama", tmp_path / "a", **LOW_RANK["pissa"][1])
    models.llama().save_pretrained(tmp_path / "base")
    values = {"adapters": [str(tmp_path / "a")], "out": str(tmp_path / "out")}
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa'"):
        read_merge(values, "here").read()
    (got,) = read_merge({**values, "base": str(tmp_path / "base")}, "here").read()
    expected = change_of("llama", PeftModel.from_pretrained(models.llama(), tmp_path / "a"))
    for tensor in expected:
        assert_close(got[tensor].dense(), expected[tensor], 2e-5, tensor)


# ------------------------------------------------------------------------------------------ the initial adapter


def corda(model: nn.Module, config: LoraConfig) -> None:
    """Leave on each layer the decomposition that peft's preprocess_corda leaves: here that of a scaled weight."""
    for name, layer in model.named_modules():
        if name.endswith(tuple(config.target_modules)):
            scales = torch.linspace(0.5, 2.0, layer.in_features)
            u, s, vh = torch.linalg.svd(layer.weight.detach() * scales, full_matrices=False)
            r = config.r
            layer.eigens = SimpleNamespace(U_WC=u[:, :r], S_WC=s[:r], V_WC=(vh[:r] / scales).T)


def lora_ga(model: nn.Module, config: LoraConfig) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(**models.lm_batch()).loss.backward())


STARTS: dict[str, tuple[dict[str, Any], Callable[[nn.Module, LoraConfig], None] | None]] = {
    "pissa": ({"init_lora_weights": "pissa"}, None),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_3"}, None),
    "olora": ({"init_lora_weights": "olora"}, None),
    "corda": ({"init_lora_weights": "corda", "corda_config": peft.tuners.lora.config.CordaConfig()}, corda),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": peft.tuners.lora.config.LoraGAConfig()}, lora_ga),
}


@pytest.mark.parametrize("name", STARTS)
def test_with_the_initial_adapter_it_is_the_trained_models_change(name: str, tmp_path: Path) -> None:
    """The model that was trained, whose base PEFT had moved, and PEFT's own conversion of it are the oracles."""
    options, prepare = STARTS[name]
    torch.manual_seed(0)
    base = models.llama()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **options)
    if prepare is not None:
        prepare(base, config)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "end")
    expected = models.outputs_of(model, models.lm_batch())
    got = read_peft(tmp_path / "end", initial=tmp_path / "start")
    with pytest.raises(CheckpointError, match="initial="):
        read_peft(tmp_path / "end")
    write_peft(got, tmp_path / "plain")
    theirs = PeftModel.from_pretrained(models.llama(), tmp_path / "plain").eval()
    assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 2e-5)
    ours = moa.build(models.llama(), "fixed", experts=[tmp_path / "plain"]).eval()
    assert_close(models.outputs_of(ours, models.lm_batch()), expected, 2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = read_peft(tmp_path / "converted")
    assert set(converted) == set(got)
    for tensor in got:
        assert_close(got[tensor].dense(), converted[tensor].dense(), 1e-6, tensor)


def test_an_initial_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    options = {"r": 2, "init_lora_weights": "pissa"}
    trained("llama", tmp_path / "end", target_modules=["q_proj", "v_proj"], **options)
    trained("llama", tmp_path / "start", target_modules=["q_proj"], **options)
    with pytest.raises(CheckpointError, match=r"initial adapter of .* does not hold .*v_proj"):
        read_peft(tmp_path / "end", initial=tmp_path / "start")


# ----------------------------------------------------------------------------------------------------- bad input


def test_a_head_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    """PEFT writes an adapted head whole beside its factors: it must be this base's."""
    trained("llama", tmp_path, **LOW_RANK["lm_head"][1])
    other = models.llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.base_layer.weight'.* is not the base's"):
        moa.build(other, "topk", experts=[tmp_path], k=1)
    with pytest.raises(CheckpointError, match=r"lm_head.base_layer.weight'.* is not the base's"):
        read_peft(tmp_path, other.state_dict())


def test_a_start_over_a_base_without_its_weights_is_refused(tmp_path: Path) -> None:
    trained("llama", tmp_path, **LOW_RANK["pissa"][1])
    base = models.llama()
    base.model.layers[0].mlp.down_proj = nn.Linear(24, 16, bias=False, device="meta")
    with pytest.raises(
        CheckpointError, match=r"init_lora_weights='pissa'.*no dense weight of .*layers.0.mlp.down_proj"
    ):
        moa.build(base, "topk", experts=[tmp_path], k=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained("llama", tmp_path, **LOW_RANK["plain"][1])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(name for name in tensors if "lora_B" in name)[1]
    tensors[key][1, 0] = value
    save_file(tensors, file)
    module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    with pytest.raises(NumericsError, match=f"'{module}' from {tmp_path}"):
        moa.build(models.llama(), "topk", experts=[tmp_path], k=1)
    with pytest.raises(NumericsError, match=module):
        merge([read_peft(tmp_path)], method="average")


@pytest.mark.parametrize("kind", [*(kind for kind, (base, _) in LOW_RANK.items() if base == "llama"), "dora", "head"])
def test_bits_read_as_whole_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    """Each factor, bias and vector, and a head saved whole, whose header says that its bits are whole numbers."""
    from safetensors.torch import load_file, save_file

    options = {"modules_to_save": ["lm_head"]} if kind == "head" else {**LOW_RANK, **OTHER}[kind][1]
    trained("llama", tmp_path / "adapter", **options)
    models.llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    keys = [key for key, value in tensors.items() if value.dtype == torch.float32]
    for key in [k for k in keys if "layers.0" in k or "lm_head" in k]:
        save_file({**tensors, key: tensors[key].view(torch.int32)}, file)
        with pytest.raises(CheckpointError, match=f"holds '{re.escape(key)}' as torch.int32: expected floating"):
            read_peft(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens=.5, 6."),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.*embedding"),
        ({"monteclora_config": peft.tuners.lora.config.MontecloraConfig()}, "monteclora_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_folders_that_peft_writes_and_no_weights_can_hold(options: Any, words: str, tmp_path: Path) -> None:
    trained("llama", tmp_path, **{**LLAMA, **options})
    with pytest.raises(CheckpointError, match=words):
        read_peft(tmp_path, models.llama().state_dict())
    with pytest.raises(CheckpointError, match=words):
        moa.build(models.llama(), "topk", experts=[tmp_path], k=1)


def test_tied_adapters_of_an_embedding_are_refused(tmp_path: Path) -> None:
    """What ensure_weight_tying ties is an embedding's, and that is in the file."""
    torch.manual_seed(0)
    options = {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "ensure_weight_tying": True}
    get_peft_model(models.llama(tie_word_embeddings=True), LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"embed_tokens.lora_embedding_"):
        moa.build(models.llama(tie_word_embeddings=True), "topk", experts=[tmp_path], k=1)
