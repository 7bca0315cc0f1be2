"""PEFT's LoRA folders in both directions, against peft itself. Run: pytest tests/formats/test_peft_export.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

import moa
from moa.errors import CheckpointError, ConfigError, FoldError
from moa.formats.peft_export import export_task, tasks_of
from tests import models
from tests.laws import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # peft corrects it layer by layer
]

LLAMA = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1}, "alpha_pattern": {"v_proj": 7}}
KINDS = {"plain rank": {}, "rsLoRA": {"use_rslora": True}, "alpha": {"lora_alpha": 3}, "patterns": PATTERNS}


def adapter(folder: Path, kind: str = "llama", targets: list[str] | None = None, seed: int = 0, **options) -> Tensor:
    """Write a LoRA folder with peft and return the logits that peft's model gives."""
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options}
    base = models.MODELS[kind][0]()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(target_modules=targets or LLAMA, **options)).eval()
    model.save_pretrained(folder)
    return models.outputs_of(model, models.MODELS[kind][1]())


def edit(folder: Path, **changes) -> Path:
    """Change a folder's adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("first", list(KINDS))
def test_pefts_adapters_become_experts(first, tmp_path):
    """Of unequal rank and alpha, on unequal layers: each pinned expert gives what peft gives."""
    logits = [
        adapter(tmp_path / "a", seed=1, **KINDS[first]),
        adapter(tmp_path / "b", seed=2, r=8, lora_alpha=4),
        adapter(tmp_path / "c", seed=3, targets=["o_proj"], r=2),
    ]
    folders = [tmp_path / name for name in "abc"]
    model = moa.build(models.llama(), "topk", experts=folders, k=2).eval()
    assert {len(b.bank.down) for _, b in model.branches()} == {3}
    assert len(model.mixtures()) == 8  # q, v, down and o, in two layers
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    for expert, expected in enumerate(logits):
        with model.pin_expert(expert):
            assert_close(models.outputs_of(model, models.lm_batch()), expected, 1e-5)


def test_experts_of_a_conv1d_model(tmp_path):
    options = {"kind": "gpt2", "targets": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    logits = [adapter(tmp_path / str(seed), seed=seed, **options) for seed in (1, 2)]
    model = moa.build(models.gpt2(), "topk", experts=[tmp_path / "1", tmp_path / "2"], k=1).eval()
    for expert, expected in enumerate(logits):
        with model.pin_expert(expert):
            assert_close(models.outputs_of(model, models.lm_batch()), expected, 1e-5)


def test_given_experts_train_save_and_come_back(tmp_path):
    for seed in (1, 2):
        adapter(tmp_path / str(seed), seed=seed)
    model = moa.build(models.llama(), "remix", experts=[tmp_path / "1", tmp_path / "2"], k=1).train()
    model(**models.lm_batch()).loss.backward()
    assert all(bool(b.router.weight.grad.any()) for _, b in model.branches())
    model.eval().save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out", base=models.llama())
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"targets": ["q_proj", "down_proj"]}),
        ("llama", {"router": "remix"}),
        ("gpt2", {}),
        ("bert", {"modules_to_save": []}),
        ("t5", {}),
        ("vit", {"modules_to_save": []}),
    ],
    ids=str,
)
def test_an_exported_expert_gives_equal_logits_in_peft(kind, options, tmp_path):
    make, make_batch = models.MODELS[kind]
    model = models.randomise(moa.build(make(), **{"router": "topk", "n_experts": 3, "rank": 2, **options})).eval()
    batch = make_batch()
    for expert in (0, 2):
        with model.pin_expert(expert):
            expected = models.outputs_of(model, batch)
        folder = moa.export_expert(model, expert, tmp_path / str(expert))
        theirs = PeftModel.from_pretrained(make(), folder).eval()
        assert_close(models.outputs_of(theirs, batch), expected, 1e-5)
        assert_close(models.outputs_of(theirs.merge_and_unload(), batch), expected, 1e-5)
    back = moa.build(make(), "topk", experts=[tmp_path / "0", tmp_path / "2"], k=1, modules_to_save=[]).eval()
    with back.pin_expert(1):
        assert_close(models.outputs_of(back, batch), expected, 1e-5)


def test_an_expert_of_a_model_that_listens_is_loaded_by_peft(tmp_path: Path) -> None:
    """peft's class for sequence to sequence passes input_ids, which Whisper does not take: the folder asks for none."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 4}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 8}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

    def whisper() -> WhisperForConditionalGeneration:
        torch.manual_seed(0)
        return WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens)).eval()

    batch = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": torch.randint(3, 32, (2, 5))}
    model = models.randomise(moa.build(whisper(), "topk", n_experts=2, k=1, rank=2)).eval()
    moa.export_expert(model, 1, tmp_path)
    theirs = PeftModel.from_pretrained(whisper(), tmp_path).eval()
    with model.pin_expert(1):
        expected = models.outputs_of(model, batch)
    assert_close(models.outputs_of(theirs, batch), expected, 1e-4)
    assert not torch.allclose(models.outputs_of(whisper(), batch), expected, atol=1e-3)


def test_recipes_of_unequal_rank_export_with_patterns(tmp_path):
    model = moa.build(models.llama(), "topk", n_experts=2, k=1, rank=2, targets="attention")
    moa.build(model, "remix", n_experts=2, k=1, rank=5, targets="ffn")
    models.randomise(model).eval()
    with model.pin_expert(1):
        expected = models.outputs_of(model, models.lm_batch())
    theirs = PeftModel.from_pretrained(models.llama(), moa.export_expert(model, 1, tmp_path)).eval()
    assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 1e-5)


def test_a_head_trained_whole_is_exported_with_the_expert(tmp_path):
    model = models.randomise(moa.build(models.bert(), "topk", n_experts=2, k=1, rank=2)).eval()
    assert model.modules_to_save == ["classifier"]
    with model.pin_expert(1):
        expected = models.outputs_of(model, models.class_batch())
    theirs = PeftModel.from_pretrained(models.bert(), moa.export_expert(model, 1, tmp_path)).eval()
    assert_close(models.outputs_of(theirs, models.class_batch()), expected, 1e-5)


def test_the_card_says_what_pefts_own_does(tmp_path):
    model = models.randomise(moa.build(models.llama(), "topk", n_experts=2, k=1, rank=2))
    model.base.name_or_path = "some/base: #1"
    ours = ModelCard.load(moa.export_expert(model, 1, tmp_path / "ours") / "README.md")
    base = models.llama()
    base.config._name_or_path = base.name_or_path = "some/base: #1"
    get_peft_model(base, LoraConfig(target_modules=LLAMA, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "theirs", save_embedding_layers=False
    )
    theirs = ModelCard.load(tmp_path / "theirs" / "README.md")
    wanted = {key: theirs.data.to_dict()[key] for key in ("base_model", "library_name", "pipeline_tag")}
    assert wanted["base_model"] == "some/base: #1"
    assert {key: ours.data.to_dict()[key] for key in wanted} == wanted
    assert set(ours.data.tags) == set(theirs.data.tags) - {"transformers"}
    assert "Expert 1" in ours.text and theirs.text.splitlines()[-1] in ours.text


def test_a_distilled_mixture_is_an_adapter_that_peft_loads(tmp_path):
    model = models.randomise(moa.build(models.gpt2(), "topk", n_experts=3, k=1, rank=2)).eval()
    student = moa.distill(model, 4, [models.lm_batch()]).model
    folder = moa.export_expert(student, 0, tmp_path)
    theirs = PeftModel.from_pretrained(models.gpt2(), folder).eval()
    expected = models.outputs_of(student, models.lm_batch())
    assert_close(models.outputs_of(theirs, models.lm_batch()), expected, 1e-5)


# ------------------------------------------------------------------------------------------------ bad input


def test_export_of_what_is_not_there(tmp_path):
    model = moa.build(models.llama(), "topk", n_experts=3)
    for wrong in (3, -1):
        with pytest.raises(ConfigError, match="experts 0 to 2"):
            moa.export_expert(model, wrong, tmp_path)
    assert not list(tmp_path.iterdir())
    model.unload()
    with pytest.raises(ConfigError, match="no mixtures"):
        moa.export_expert(model, 0, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "ADALORA"}, "has peft_type 'ADALORA': expected 'LORA'"),
        ({"use_dora": True}, "no magnitude, though it sets use_dora"),
        ({"lora_bias": True}, "no bias, though it sets lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapters_that_are_no_plain_low_rank_delta_are_refused(changes, words, tmp_path):
    adapter(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        moa.build(models.llama(), "topk", experts=[edit(tmp_path, **changes)], k=1)


def test_pefts_own_dora_and_bias_adapters_are_refused(tmp_path):
    adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        moa.build(models.llama(), "topk", experts=[tmp_path / "dora"], k=1)
    with pytest.warns(UserWarning, match="embedding layers"):
        adapter(tmp_path / "embedding", targets=["embed_tokens", "q_proj"])
    with pytest.raises(CheckpointError, match="embed_tokens"):
        moa.build(models.llama(), "topk", experts=[tmp_path / "embedding"], k=1)


def test_folders_that_are_no_adapters(tmp_path):
    def fails(words: str, *folders: Path, error: type[Exception] = CheckpointError) -> None:
        base = models.llama()
        with pytest.raises(error, match=words):
            moa.build(base, "topk", experts=list(folders), k=1)
        assert all(p.requires_grad for p in base.parameters())
        assert not any(isinstance(m, moa.Mixture) for m in base.modules())

    fails("adapter_config.json is missing", tmp_path / "nowhere")
    adapter(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    fails("cannot be read", tmp_path / "a")
    weights.write_bytes(data)
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "lora_B" not in k or "layers.1" not in k}, weights)
    fails("holds only A of .* and no B: it is incomplete", tmp_path / "a")
    save_file({**tensors, "base_model.model.x.weight": torch.zeros(1)}, weights)
    fails("base_model.model.x.weight', a tensor saved whole and no LoRA factor", tmp_path / "a")
    save_file({k: torch.zeros(v.shape[0], 99) if "lora_A" in k else v for k, v in tensors.items()}, weights)
    fails("made for another base", tmp_path / "a")
    save_file({k.replace("q_proj", "r_proj"): v for k, v in tensors.items()}, weights)
    fails("no free linear layer or block named .*r_proj", tmp_path / "a", error=ConfigError)
    weights.write_bytes(data)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    fails("is not JSON", tmp_path / "a")


@pytest.mark.parametrize(("options", "words"), [({"n_experts": 4}, "n_experts=4 was asked for, but .* have 2"),
                                                ({"rank": 16}, "rank=16 was asked for, but .* have 3"),
                                                ({"k": 3}, "k=3 with n_experts=2")])  # fmt: skip
def test_sizes_come_from_the_adapters(options, words, tmp_path):
    for seed in (1, 2):
        adapter(tmp_path / str(seed), seed=seed)
    with pytest.raises(ConfigError, match=words):
        moa.build(models.llama(), "topk", experts=[tmp_path / "1", tmp_path / "2"], **options)


def test_a_name_that_looks_like_another(tmp_path):
    """Exported layer names must not match other layers that end alike."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x):
            return self.up(x)

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.up, self.block = nn.Linear(4, 4), Block()

        def forward(self, x):
            return self.block(torch.tanh(self.up(x)))

    model = models.randomise(moa.build(Nested(), "topk", n_experts=2, targets="up")).eval()
    assert list(model.mixtures()) == ["up"]
    x = torch.randn(3, 4)
    with model.pin_expert(1):
        expected = model(x)
    theirs = PeftModel.from_pretrained(Nested(), moa.export_expert(model, 1, tmp_path)).eval()
    assert_close(theirs(x), expected, 1e-5)


@pytest.mark.parametrize("router", ["poly", "mhr", "moelora"])
def test_what_a_task_gets_is_one_lora_that_peft_loads(router, tmp_path):
    options = {"n_tasks": 3, "n_experts": 3, "targets": "all-linear"}
    model = moa.build(models.llama(), router=router, **options)
    for _, branch in model.branches():
        for parameter in branch.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.eval()
    ids = torch.arange(3, 9)[None]
    found = []
    assert list(tasks_of(model)) == [0, 1, 2]
    for task in tasks_of(model):
        export_task(model, task, tmp_path / str(task))
        plain = PeftModel.from_pretrained(models.llama(), tmp_path / str(task)).eval()
        expected = model(input_ids=ids, task_ids=torch.tensor([task])).logits
        found.append(plain(input_ids=ids).logits)
        torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_routing_by_input_has_no_lora_for_a_task(tmp_path):
    model = moa.build(models.llama(), router="topk")
    with pytest.raises(FoldError, match="depends on the input"):
        tasks_of(model)
    with pytest.raises(FoldError, match="depends on the input"):
        export_task(model, 0, tmp_path)
