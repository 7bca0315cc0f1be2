"""Saving and loading: exact, atomic, and clear about what does not fit.

Run: pytest tests/formats/test_checkpoint.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import moa
from moa.errors import CheckpointError, ConfigError, NumericsError
from moa.formats import checkpoint
from moa.recipes import make_recipe, recipe_class
from tests import models

WEIGHTS = checkpoint.WEIGHTS


def build(kind: str = "llama", name: str = "topk", **options) -> moa.MoAModel:
    options = {"n_experts": 4, "rank": 2, **options}
    return models.randomise(moa.build(models.MODELS[kind][0](), name, **options)).eval()


def saved(folder: Path, kind: str = "llama", **options) -> Path:
    build(kind, **options).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    """Let change(tensors, header) alter a checkpoint's tensors and header in place."""
    with safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    tensors, header = load_file(folder / WEIGHTS), json.loads(metadata["moa"])
    change(tensors, header)
    save_file(tensors, folder / WEIGHTS, metadata={**metadata, "moa": json.dumps(header)})


@pytest.mark.parametrize("kind", list(models.MODELS))
def test_every_kind_of_model_comes_back_bit_for_bit(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = moa.load(tmp_path / "new" / "folder", base=models.MODELS[kind][0]())
    again.save_pretrained(tmp_path / "twice")
    (one, held), (other, twice) = (checkpoint.read(tmp_path / name) for name in ("new/folder", "twice"))
    assert one == other and held.keys() == twice.keys()
    assert all(torch.equal(held[key], twice[key]) for key in held)
    batch = models.MODELS[kind][1]()
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    assert not again.training and again.modules_to_save == model.modules_to_save


def test_several_recipes_and_whole_modules_come_back(tmp_path):
    recipes = [make_recipe("sigmoid", targets="attention"), make_recipe("remix", targets="ffn", granularity="sequence")]
    model = models.randomise(moa.build(models.llama(), recipes, modules_to_save=["lm_head"])).eval()
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama())
    assert again.recipes == model.recipes
    batch = models.lm_batch()
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    assert again.base.lm_head.weight.requires_grad


def test_the_file_holds_adapters_alone_and_says_what_it_is(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", WEIGHTS]
    held = load_file(tmp_path / WEIGHTS)
    assert all(".branches." in key or key.startswith("base.classifier.") for key in held)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["model_type"] == description["format"] == "moa"
    assert description["format_version"] == checkpoint.FORMAT_VERSION
    assert description["base"]["class"] == "BertForSequenceClassification"
    with safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert json.loads(opened.metadata()["moa"]).items() <= description.items()


def test_saving_over_another_checkpoint_and_beside_other_files(tmp_path):
    saved(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = build(targets=["q_proj"])
    model.save_pretrained(tmp_path)
    assert moa.load(tmp_path, base=models.llama()).recipes == model.recipes
    assert (tmp_path / "notes.txt").read_text() == "mine"
    model.save_pretrained(tmp_path / "never", is_main_process=False)
    assert not (tmp_path / "never").exists()


def test_loading_finds_the_base_by_its_path(tmp_path):
    models.llama().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = models.randomise(moa.build(LlamaForCausalLM.from_pretrained(tmp_path / "base"), "topk")).eval()
    model.save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out")
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))
    other = moa.MoAModel.from_pretrained(tmp_path / "out")
    assert torch.equal(models.outputs_of(other, models.lm_batch()), models.outputs_of(model, models.lm_batch()))
    for word in ("dtype", "torch_dtype"):
        half = moa.load(tmp_path / "out", **{word: torch.bfloat16})
        assert half.base.lm_head.weight.dtype == torch.bfloat16


def test_a_base_in_another_precision_is_the_same_base(tmp_path):
    saved(tmp_path)
    moa.load(tmp_path, base=models.llama().to(torch.bfloat16))
    moa.load(tmp_path, base=models.llama().double())


# ------------------------------------------------------------------------------------------------ wrong files


def assert_fails(
    folder: Path, words: str, error: type[Exception] = CheckpointError, base: nn.Module | None = None
) -> str:
    with pytest.raises(error, match=re.compile(words, re.DOTALL)) as caught:
        moa.load(folder, base=base or models.llama())
    return str(caught.value)


def test_a_checkpoint_for_another_base(tmp_path):
    saved(tmp_path)
    other = models.llama()
    torch.manual_seed(5)
    other.apply(other._init_weights)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert_fails(tmp_path, r"wrong base: .*LlamaForCausalLM.*the values of .* differ.*check_base=False", base=other)
    assert_fails(tmp_path, "wrong base: .*has a matrix .*BertForSequenceClassification has none", base=models.bert())
    assert_fails(
        tmp_path, r"wrong base: .*\(32, 16\); here it is \(32, 32\)|wrong base", base=models.llama(hidden_size=32)
    )
    moa.load(tmp_path, base=other, check_base=False)


def test_missing_unexpected_and_misshaped_tensors_are_one_error(tmp_path):
    saved(tmp_path)
    keys = list(build().adapter_state_dict())

    def change(tensors, header):
        del tensors[keys[0]]
        del tensors[keys[1]]
        tensors["base.stranger"] = torch.zeros(2)
        tensors[keys[2]] = torch.zeros(3, 1)

    rewrite(tmp_path, change)
    text = assert_fails(tmp_path, "does not fit this model")
    assert "2 missing: " in text and keys[0] in text and keys[1] in text
    assert "1 unexpected: base.stranger" in text
    assert f"1 of another shape: {keys[2]}: (3, 1) in the file" in text
    model = build()
    before = {key: value.clone() for key, value in model.adapter_state_dict().items()}
    with pytest.raises(CheckpointError):
        checkpoint.fill(model.adapter_state_dict(), checkpoint.read(tmp_path)[1], tmp_path)
    assert all(torch.equal(model.adapter_state_dict()[key], value) for key, value in before.items())


def test_many_missing_tensors_are_counted_not_listed(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors, header: [tensors.pop(key) for key in list(tensors)[:20]])
    assert "20 missing" in (text := assert_fails(tmp_path, "and 15 more")) and len(text) < 1500


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(tmp_path, keep):
    data = (saved(tmp_path) / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert_fails(tmp_path, "truncated or not a safetensors file")


def test_foreign_files(tmp_path):
    assert_fails(tmp_path / "nowhere" / "at" / "all", "no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    assert_fails(tmp_path / "empty", "has no model.safetensors .*nothing.*name the folder")
    (tmp_path / "file").write_text("hello")
    assert_fails(tmp_path / "file", "is a file: name the folder")
    models.llama().save_pretrained(tmp_path / "plain")
    assert_fails(tmp_path / "plain", "not written by moa")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / WEIGHTS).write_text("this is no checkpoint, it is prose")
    assert_fails(tmp_path / "text", "truncated or not")
    with pytest.raises(CheckpointError, match="it is a file"):
        build().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(("version", "words"), [(99, "this moa reads up to .*upgrade moa"), (1, "train it anew")])
def test_a_format_of_another_time(tmp_path, version, words):
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors, header: header.update(format_version=version))
    assert_fails(tmp_path, f"format version {version}, .*{words}")


def test_a_recipe_or_a_layer_that_is_not_there(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors, header: header["recipes"][0].update(router="topkk"))
    assert_fails(tmp_path, "unknown router 'topkk'", ConfigError)
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors, header: header["recipes"][0]["sites"].append("model.layers.9.q"))
    assert_fails(tmp_path, "no free linear layer or block named model.layers.9.q", ConfigError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite(tmp_path, value):
    saved(tmp_path)
    key = next(iter(build().adapter_state_dict()))
    rewrite(tmp_path, lambda tensors, header: tensors[key].fill_(value))
    assert_fails(tmp_path, f"{re.escape(key)} in .* holds NaN or infinity", NumericsError)


def test_a_checkpoint_without_a_base_says_how_to_give_one(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"names no base.*load\(path, base=model\)"):
        moa.load(tmp_path)


# ------------------------------------------------------------------------------------------------ atomic writes


def state(folder: Path) -> int:
    """Return which write a checkpoint is from; fail unless all of it is from the same one."""
    description, tensors = checkpoint.read(folder)
    values = {int(v) for tensor in tensors.values() for v in (tensor.min(), tensor.max())} | {description["step"]}
    assert len(values) == 1, f"half a checkpoint: {values}"
    return values.pop()


def write(folder: Path, step: int) -> None:
    checkpoint.write(folder, {"step": step}, {name: torch.full((50, 50), step) for name in "abc"})


class Killed(BaseException):
    """What a kill looks like from inside."""


POINTS = [
    "moa.formats.checkpoint.save_file",
    "os.fsync",
    "os.chmod",
    "os.replace",
    "pathlib.Path.write_text",
    "tempfile.mkstemp",
]


@pytest.mark.parametrize("error", [Killed, OSError])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_error_at_any_point_leaves_the_old_or_the_new(tmp_path, monkeypatch, point, nth, error, after):
    write(tmp_path, 1)
    module, _, name = point.rpartition(".")
    owner: object = {"moa.formats.checkpoint": checkpoint, "os": os, "pathlib.Path": Path}.get(module) or sys.modules[
        module
    ]
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth and not after:
            raise error
        out = real(*args, **kwargs)
        if len(calls) == nth:
            raise error
        return out

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        try:
            write(tmp_path, 2)
            died = False
        except (Killed, OSError):
            died = True
    assert died == (len(calls) >= nth)
    assert state(tmp_path) in (1, 2)
    if point != "tempfile.mkstemp":
        assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]
    write(tmp_path, 3)
    assert state(tmp_path) == 3


KILLING = """
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    import torch
    torch.set_num_threads(1)
    from moa.formats import checkpoint
    folder = Path({folder!r})

    def write(step):
        checkpoint.write(folder, {{"step": step}}, {{name: torch.full((300, 300), step) for name in "abc"}})

    def state():
        description, tensors = checkpoint.read(folder)
        values = {{int(v) for t in tensors.values() for v in (t.min(), t.max())}} | {{description["step"]}}
        assert len(values) == 1, values
        return values.pop()

    start = time.time()
    for _ in range(3):
        write(0)
    one = (time.time() - start) / 3  # seconds
    random.seed(0)
    last, moved = 0, 0
    for _ in range({n}):
        child = os.fork()
        if child == 0:
            step = last
            while True:
                step += 1
                write(step)
        time.sleep(random.uniform(0.2, 4) * one)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = state()
        assert now >= last, (now, last)
        moved += now > last
        last = now
    assert moved > 3, moved
    print("survived", last)
"""


def test_a_real_kill_leaves_the_old_or_the_new(tmp_path):
    """A process that does nothing but save is killed at thirty random moments."""
    root = str(Path(__file__).parents[2])
    script = textwrap.dedent(KILLING.format(root=root, folder=str(tmp_path / "out"), n=30))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "survived" in done.stdout, done.stderr


def test_fingerprints_see_the_same_values_with_and_without_mixtures():
    base = models.llama()
    before = checkpoint.fingerprint(base)
    model = moa.build(base, "topk")
    after = checkpoint.fingerprint(model.base)
    assert before == after == {} or all(before[key] == after[key] for key in before.keys() & after.keys())
    assert after and all(".branches." not in key and ".base." not in key for key in after)


@pytest.mark.parametrize("key", ["rank", "n_experts"])
def test_a_claim_that_the_tensors_cannot_hold_is_refused_before_anything_is_made(key, tmp_path, monkeypatch):
    moa.build(models.llama(), "topk", n_experts=2, k=1, rank=2).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["moa"])
    tensors = load_file(file)
    held = sum(tensor.numel() for tensor in tensors.values())

    def claim(value):
        header["recipes"][0][key] = value
        save_file(tensors, file, metadata={"format": "pt", "moa": json.dumps(header)})

    monkeypatch.setattr("moa.recipes.origins.make_recipe", lambda *_, **__: pytest.fail("it was made"))
    for value, said in ((10**9, 10**9), (2**16 + 1, 2**16 + 1), (2**15 + 1, 2**16 + 2)):  # the last one: E · r
        claim(value)
        with pytest.raises(CheckpointError, match=rf"{key}.*={said} .*holds {held}"):
            moa.load(tmp_path, models.llama())


@pytest.mark.parametrize("name", sorted(moa.RECIPES))
def test_no_recipe_claims_more_than_it_saves(name, tmp_path):
    """The bound on what a file may claim holds for every recipe at sizes that are large beside the layers'."""
    if recipe_class(name).wants_experts:
        pytest.skip("reads adapters")
    own = {"hydra": {"gate": "experts"}, "flylora": {"n_experts": 24}}
    options = {"n_experts": 7, "rank": 24, **own.get(name, {})}
    known = {field.name for field in dataclasses.fields(recipe_class(name))}
    model = moa.build(models.llama(), name, **{key: value for key, value in options.items() if key in known})
    model.save_pretrained(tmp_path)
    moa.load(tmp_path, models.llama())


def test_a_save_does_not_replace_the_base(tmp_path: Path) -> None:
    base = models.llama()
    base.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = moa.build(base, "topk", n_experts=2, k=1, rank=2)
    with pytest.raises(moa.MoaError, match="holds a model of type 'llama', which would be replaced"):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_state_dict_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    """Trainer passes an empty one where DeepSpeed may not gather."""
    model = build()
    with pytest.raises(CheckpointError, match=r"state_dict to save lacks .* stage3_gather_16bit_weights_on_model_s"):
        model.save_pretrained(tmp_path / "out", state_dict={})
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_is_saved_whole_is_no_mark_of_the_base(name: str, tmp_path: Path) -> None:
    """One tensor of two names: whichever module is saved has it, and the base's other name for it is not looked at."""
    model = models.randomise(moa.build(models.llama(tie_word_embeddings=True), "topk", modules_to_save=[name]))
    expected = models.outputs_of(model, models.lm_batch())
    model.save_pretrained(tmp_path)  # without a warning that something is lost
    found = moa.load(tmp_path, models.llama(tie_word_embeddings=True)).eval()
    assert torch.equal(models.outputs_of(found, models.lm_batch()), expected)
    with pytest.raises(CheckpointError, match="wrong base"):
        moa.load(tmp_path, models.randomise(models.llama(tie_word_embeddings=True)))


def test_a_base_with_a_layer_of_no_features_is_saved_and_loaded(tmp_path):
    """As MobileBERT's head has one where its two widths are the same."""

    def make():
        torch.manual_seed(0)
        base = nn.ModuleDict({"body": nn.Linear(4, 4), "rest": nn.Linear(4, 4)})
        base["rest"].weight = nn.Parameter(torch.empty(0, 4))
        return base

    model = models.randomise(moa.build(make(), "topk", n_experts=2, k=1, targets=["body"]))
    model.save_pretrained(tmp_path / "saved")
    again = moa.load(tmp_path / "saved", base=make())
    x = torch.randn(3, 4)
    assert torch.equal(again.base["body"](x), model.base["body"](x))
