"""PEFT folders of families beyond LoRA, in both directions, against peft itself. Run: pytest tests/formats"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moa
from moa.errors import CheckpointError, ConfigError, FoldError, NumericsError
from moa.formats.peft_kinds import KINDS
from tests import models
from tests.laws import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # peft corrects it layer by layer
    pytest.mark.filterwarnings("ignore:Specified to not (load|save):UserWarning"),  # bases come from their seed
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # peft's SHiRA
    pytest.mark.filterwarnings("ignore:.*CUDA extension.*"),  # of peft's BOFT, which it does not need
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
]

CONFIGS: dict[str, Any] = {
    "ia3": peft.IA3Config,
    "vera": peft.VeraConfig,
    "shira": peft.ShiraConfig,
    "lokr": peft.LoKrConfig,
    "loha": peft.LoHaConfig,
    "randlora": peft.RandLoraConfig,
    "oft": peft.OFTConfig,
    "boft": peft.BOFTConfig,
    "dora": peft.LoraConfig,
}
# (family, what is special about it) -> options of peft's configuration
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("ia3", "feedforward"): {"feedforward_modules": ["down_proj"]},
    ("ia3", "outputs"): {"feedforward_modules": []},
    ("vera", "seed"): {"r": 4, "projection_prng_key": 7, "save_projection": False},
    ("vera", "stored"): {"r": 4},
    ("shira", "random"): {"r": 2, "random_seed": 3},
    ("lokr", "whole"): {"r": 8, "alpha": 4},
    ("lokr", "low rank"): {"r": 1, "alpha": 3},
    ("lokr", "both"): {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4},
    ("loha", "plain"): {"r": 3, "alpha": 4},
    ("loha", "patterns"): {"r": 3, "alpha": 4, "alpha_pattern": {"q_proj": 7}},
    ("randlora", "seed"): {"r": 4, "randlora_alpha": 12, "save_projection": False, "projection_prng_key": 5},
    ("randlora", "sparse"): {"r": 3, "randlora_alpha": 12, "sparse": True},
    ("oft", "neumann"): {"oft_block_size": 4, "r": 0},
    ("oft", "exact shared"): {"oft_block_size": 8, "r": 0, "use_cayley_neumann": False, "block_share": True},
    ("oft", "three terms"): {"oft_block_size": 4, "r": 0, "num_cayley_neumann_terms": 3},
    ("boft", "blocks"): {"boft_block_size": 4},
    ("dora", "plain"): {"r": 3, "lora_alpha": 6, "use_dora": True},
}
START = {"ia3": "init_ia3_weights", "dora": "init_lora_weights"}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
ROW = {"router": "topk", "k": 1}
cases = pytest.mark.parametrize(("family", "what"), list(CASES))


def adapter(folder: Path, family: str, options: dict[str, Any], seed: int = 1, kind: str = "llama") -> Tensor:
    """Write a folder with peft, its values drawn at random, and return the logits that peft's model gives."""
    base, make_batch = models.MODELS[kind][0](), models.MODELS[kind][1]
    torch.manual_seed(seed)
    config = CONFIGS[family](target_modules=TARGETS[kind], **{START.get(family, "init_weights"): False}, **options)
    model = get_peft_model(base, config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # peft draws too large for a rotation, and its scales far from one
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                start = 1.0 if family in ("ia3",) or "boft_s" in name else 0.0
                drawn = start + torch.randn(parameter.shape, generator=rng) * 0.2
                parameter.copy_(parameter.abs() + 0.1 if "magnitude" in name else drawn)
    model.save_pretrained(folder)
    return models.outputs_of(model, make_batch())


def row_for(family: str) -> dict[str, Any]:
    """Return a recipe that fits: whole weights want a routing by example."""
    return {"router": "remix", "granularity": "sequence", "k": 1} if family in ("oft", "boft", "dora") else ROW


def given(folders: list[Path], family: str, kind: str = "llama", **options: Any) -> Any:
    extra = {"expert": "dora"} if family == "dora" else {}
    return moa.build(models.MODELS[kind][0](), experts=folders, **row_for(family), **extra, **options).eval()


@cases
def test_pefts_adapters_become_experts(family: str, what: str, tmp_path: Path) -> None:
    """Each pinned expert gives what peft gives, and a checkpoint brings the mixture back bit for bit."""
    logits = [adapter(tmp_path / str(seed), family, CASES[family, what], seed) for seed in (1, 2)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    model = given([tmp_path / "1", tmp_path / "2"], family)
    assert {type(b.bank).__name__.lower()[:3] for _, b in model.branches()} <= {family[:3], "inp", "out"}
    for expert, expected in enumerate(logits):
        with model.pin_expert(expert):
            assert_close(models.outputs_of(model, models.lm_batch()), expected, 2e-5, f"expert {expert}")
    model.save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out", base=models.llama())
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))
    bases = [key for key in load_file(tmp_path / "out" / "model.safetensors") if "shared_by_layers" in key]
    assert not bases, "what a seed gives is stored"


@cases
def test_an_expert_goes_back_to_peft(family: str, what: str, tmp_path: Path) -> None:
    """The folder that moa writes gives peft the logits of the pinned expert, and moa the same numbers."""
    adapter(tmp_path / "1", family, CASES[family, what], 1)
    expected = adapter(tmp_path / "2", family, CASES[family, what], 2)
    model = given([tmp_path / "1", tmp_path / "2"], family)
    folder = moa.export_expert(model, 1, tmp_path / "back")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == KINDS[family].peft_type
    theirs = PeftModel.from_pretrained(models.llama(), folder).eval()
    assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 2e-5)
    again = given([folder], family)
    with again.pin_expert(0):
        assert_close(models.outputs_of(again, models.lm_batch()), expected, 2e-5)


@pytest.mark.parametrize("family", ["ia3", "vera", "randlora", "dora"])
def test_experts_of_a_conv1d_model(family: str, tmp_path: Path) -> None:
    options = next(o for (name, _), o in CASES.items() if name == family)
    if family == "ia3":
        options = {"feedforward_modules": ["c_fc"]}
    expected = adapter(tmp_path / "1", family, {**options, "fan_in_fan_out": True}, kind="gpt2")
    model = given([tmp_path / "1"], family, "gpt2")
    with model.pin_expert(0):
        assert_close(models.outputs_of(model, models.lm_batch()), expected, 2e-5)
    theirs = PeftModel.from_pretrained(models.gpt2(), moa.export_expert(model, 0, tmp_path / "back")).eval()
    assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 2e-5)


def test_bases_that_no_seed_gives_are_stored(tmp_path: Path) -> None:
    """As another machine may draw others: the file's are used, saved and exported."""
    adapter(tmp_path / "a", "vera", CASES["vera", "stored"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] = torch.randn_like(tensors["base_model.vera_A"])
    save_file(tensors, file)
    expected = models.outputs_of(PeftModel.from_pretrained(models.llama(), tmp_path / "a").eval(), models.lm_batch())
    model = given([tmp_path / "a"], "vera")
    assert model.recipes[0][0].family.save_bases
    with model.pin_expert(0):
        assert_close(models.outputs_of(model, models.lm_batch()), expected, 2e-5)
    model.save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out", base=models.llama())
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))
    theirs = PeftModel.from_pretrained(models.llama(), moa.export_expert(model, 0, tmp_path / "back")).eval()
    assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 2e-5)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_option_of_pefts_configuration_is_known(family: str) -> None:
    theirs = {field.name for field in dataclasses.fields(CONFIGS[family])}
    missing = theirs - set(KINDS[family].options) - {"runtime_config"}
    assert not missing, f"{family}: {missing}"


def test_a_core_and_vera_go_out_as_loras(tmp_path: Path) -> None:
    for family, rank in (("core", 3), ("vera", 4)):
        model = moa.build(models.llama(), "topk", n_experts=2, k=1, expert=family, rank=rank)
        models.randomise(model).eval()
        with model.pin_expert(1):
            expected = models.outputs_of(model, models.lm_batch())
        folder = moa.export_expert(model, 1, tmp_path / family, as_lora=True)
        theirs = PeftModel.from_pretrained(models.llama(), folder).eval()
        assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 2e-5)


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("oft", {"coft": True}, r"sets coft=True, and a constrained rotation"),
        ("vera", {"bias": "all"}, r"sets bias='all', and a trained bias"),
        ("loha", {"modules_to_save": ["lm_head"]}, r"sets modules_to_save"),
        ("loha", {"brand_new": 3}, r"sets brand_new=3, an option that this version of moa does not know"),
        ("loha", {"r": 5}, r"left_up of model\.layers\.\d\.self_attn\.q_proj is \(16, 3\), the layer's is \(16, 5\)"),
        ("loha", {"alpha": "x"}, r"alpha='x'"),
    ],
)
def test_what_a_folder_means_is_honoured_or_refused(
    family: str, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    options = next(o for (name, _), o in CASES.items() if name == family)
    adapter(tmp_path, family, options)
    with pytest.raises(CheckpointError, match=match):
        given([edit(tmp_path, **changes)], family)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    adapter(tmp_path / "loha", "loha", CASES["loha", "plain"])
    adapter(tmp_path / "ia3", "ia3", CASES["ia3", "outputs"])
    with pytest.raises(CheckpointError, match=r"ia3 is a IA3 adapter and .*loha a LOHA one"):
        given([tmp_path / "loha", tmp_path / "ia3"], "loha")
    with pytest.raises(ConfigError, match="expert=lokr was asked for, but the adapters given have loha"):
        given([tmp_path / "loha"], "loha", expert="lokr")
    file = tmp_path / "loha" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    for change, match in (
        ({key: tensors[key] * float("nan")}, "holds NaN"),
        ({"base_model.model.model.norm.weight": torch.ones(16)}, "is not a part of a LOHA expert"),
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises((CheckpointError, NumericsError), match=match):
            given([tmp_path / "loha"], "loha")
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=r"gives 'left_up'|gives 'left_down'|another rank or factor|incomplete"):
        given([tmp_path / "loha"], "loha")


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES}))
def test_bits_read_as_numbers_of_another_kind_are_refused(family: str, tmp_path: Path) -> None:
    """The bits of 0.3 are 1,050,253,722 as a whole number: a header that says so was damaged."""
    adapter(tmp_path, family, next(options for (name, _), options in CASES.items() if name == family))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        bits = {torch.float32: torch.int32, torch.int32: torch.float32, torch.int64: torch.float64}[value.dtype]
        save_file({**tensors, key: value.view(bits)}, file)
        with pytest.raises(CheckpointError, match=f"holds '{re.escape(key)}' as {bits}: expected"):
            given([tmp_path], family)


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = moa.build(models.llama(), "fixed", n_experts=1, expert="shira", density=0.1)
    with pytest.raises(FoldError, match=r"peft's SHiRA has r \(o \+ i\) entries"):
        moa.export_expert(model, 0, tmp_path)
    model = moa.build(models.llama(), "fixed", n_experts=1, expert="loha", place="output", rank=2)
    with pytest.raises(FoldError, match="stands on the input of a linear layer"):
        moa.export_expert(model, 0, tmp_path)
    moa.build(model.unload(), "fixed", n_experts=1)
    both = moa.build(models.llama(), "fixed", n_experts=1, expert="loha", targets="attention")
    moa.build(both, "fixed", n_experts=1, targets="ffn")
    with pytest.raises(FoldError, match="families loha, lora, and a PEFT folder holds one kind"):
        moa.export_expert(both, 0, tmp_path)
    assert isinstance(both.base, nn.Module)
