"""Mixtures over a base whose weights accelerate keeps on the CPU or on disk. Run: pytest tests/systems"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import moa
from moa.errors import ConfigError, FoldError
from moa.experts import FAMILIES
from moa.model.hot_switch import hot_switch
from tests import laws, models
from tests.experts.test_families import KEYWORDS
from tests.laws import assert_close

# one block on disk, the other and the head on the CPU, from which they are copied to the device that computes
MAP = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"}
MAP |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, _: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "mapped": lambda model, folder: dispatch_model(model, MAP, "cpu", offload_dir=folder, force_hooks=True),
}
hows = pytest.mark.parametrize("how", list(OFFLOADS))


def moved(model: Any) -> Any:
    """Move every trainable parameter a little way from its start, the same way each time."""
    rng = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=rng).to(parameter) * 0.1)
    return model


def check_same_step(bases: list[nn.Module], build: Callable[[nn.Module], Any], **extra: Any) -> None:
    """Check that a training step's loss and gradients (any shape) are the same over two bases in fp64."""
    steps = []
    for base in bases:
        torch.manual_seed(0)
        model = moved(build(base)).train()
        torch.manual_seed(0)
        loss = model(**models.lm_batch(), **extra).loss
        loss.backward()
        steps.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (expected, references), (loss, grads) = steps
    assert_close(loss, expected, 1e-9)
    assert grads.keys() == references.keys() and grads
    for name, reference in references.items():
        assert reference is None or float((grads[name] - reference).norm()) <= 1e-7 * float(reference.norm()) + 1e-12, (
            name
        )


@laws.parametrize(laws.RECIPE_CASES)
def test_every_recipe_trains_as_over_the_base_in_memory(name: str, variant: str, tmp_path: Path) -> None:
    base = OFFLOADS["mapped"](models.llama().double(), tmp_path)
    assert sum(p.is_meta for p in base.parameters()) == 10
    extra = {"task_ids": torch.arange(4) % laws.N_TASKS} if laws.needs_tasks(name) else {}
    check_same_step(
        [models.llama().double(), base], lambda base: moa.build(base, laws.small_recipe(name, variant)), **extra
    )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_finds_the_weight(name: str, tmp_path: Path) -> None:
    """Also those that begin at the base's weight, or multiply it."""
    options = {"compacter": {"n": 2}, **KEYWORDS}.get(name, {})
    options = {**options, **({"rank": 4} if "rank" in FAMILIES[name].uses else {})}
    base = OFFLOADS["disk"](models.llama().double(), tmp_path)
    check_same_step(
        [models.llama().double(), base], lambda base: moa.build(base, "fixed", n_experts=2, expert=name, **options)
    )


@hows
def test_it_generates_saves_loads_and_comes_out_again(how: str, tmp_path: Path) -> None:
    def base() -> Any:
        return OFFLOADS[how](models.llama(), tmp_path / "weights")

    (tmp_path / "weights").mkdir()
    model = models.randomise(moa.build(base(), "topk", n_experts=3, rank=2)).eval()
    expected = models.randomise(moa.build(models.llama(), "topk", n_experts=3, rank=2)).eval()
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    batch, prompt = models.lm_batch(), models.token_batch(3, 6)["input_ids"].clamp(min=2)
    assert_close(models.outputs_of(model, batch), models.outputs_of(expected, batch), 1e-5)
    said = [one.generate(prompt, max_new_tokens=5, do_sample=False) for one in (model, expected)]
    assert torch.equal(*said)
    model.save_pretrained(tmp_path / "out")
    for one in (moa.load(tmp_path / "out", base=base()), moa.load(tmp_path / "out", base=models.llama())):
        assert_close(models.outputs_of(one, batch), models.outputs_of(model, batch), 1e-5)
    torch.manual_seed(7)
    other = LlamaForCausalLM(models.llama().config)
    (tmp_path / "others").mkdir()
    with pytest.raises(moa.errors.CheckpointError, match="wrong base"):
        moa.load(tmp_path / "out", base=OFFLOADS[how](other, tmp_path / "others"))
    assert_close(models.outputs_of(model.unload(), batch), models.outputs_of(models.llama(), batch), 1e-6)


def test_a_folder_is_loaded_with_a_device_map(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "base")
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "base", low_cpu_mem_usage=True)
    model = models.randomise(moa.build(low, "topk", n_experts=3, rank=2)).eval()
    model.save_pretrained(tmp_path / "out")
    again = moa.load(tmp_path / "out", device_map=MAP, offload_folder=tmp_path / "weights")
    assert any(p.is_meta for p in again.base.parameters())
    assert_close(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()), 1e-5)


@hows
def test_what_would_be_lost_is_refused(how: str, tmp_path: Path) -> None:
    """The weight comes back from where it is kept each time the layer runs, so that nothing can be written into it."""
    offload = OFFLOADS[how]
    static = moa.build(offload(models.llama(), tmp_path), "fixed", n_experts=2)
    with pytest.raises(FoldError, match=r"layers\.0.*this Linear is offloaded.*load the base whole"):
        static.merge_and_unload()
    with pytest.raises(FoldError, match="is offloaded"), static.folded():
        pass
    with pytest.raises(FoldError, match="is offloaded"), hot_switch(static):
        pass
    with pytest.raises(ConfigError, match=r"trained parameters are on the meta device \(lm_head\.weight, …\)"):
        moa.build(offload(models.llama(), tmp_path), "topk", modules_to_save=["lm_head"])


def test_experts_that_were_offloaded_themselves_do_not_train() -> None:
    built = models.randomise(moa.build(models.llama(), "topk", n_experts=3, rank=2)).eval()
    model = cpu_offload(built, execution_device="cpu")
    assert models.outputs_of(model, models.lm_batch()).isfinite().all()
    with pytest.raises(ConfigError, match=r"trained parameters are on the meta device.*offload the base first"):
        model.train()


def test_a_base_without_values_is_refused() -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(models.llama().config)
    with pytest.raises(ConfigError, match=r"Linear are on the meta device, without values.*load the base first"):
        moa.build(base, "topk")
    assert not any(".branches" in name for name, _ in base.named_modules())
