"""One base in several precisions: what trains in a step, what is drawn, and which set a base gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import moa
from moa.errors import CheckpointError, ConfigError
from moa.formats.precision_folders import bits_of, set_folder, set_for, stored_sets
from moa.serving.pool import AdapterPool
from moa.training.precisions import PrecisionSets, draw, parameters, tilted
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
BITS = (2, 4, 8)
OPTIONS: dict[str, Any] = {"router": "sigmoid", "n_experts": 3, "k": 2, "bias_rate": 0.1, "targets": "all-linear"}


def quantised(bits: int, **options: Any) -> moa.MoAModel:
    """Return a mixture on a base whose linears lie on a grid of 2^bits levels."""
    base = models.llama()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            step = module.weight.abs().max() / 2 ** (bits - 1)
            module.weight.data = (module.weight.data / step).round() * step
    torch.manual_seed(bits)
    return models.randomise(moa.build(base, **{**OPTIONS, **options}), seed=bits)


def sets_of(**options: Any) -> tuple[PrecisionSets, torch.optim.Optimizer]:
    built = {bits: quantised(bits) for bits in BITS}
    optimizer = torch.optim.AdamW(parameters(built), lr=0.01, weight_decay=0.1)
    return PrecisionSets(built, optimizer, **options), optimizer


def state_of(sets: PrecisionSets) -> dict[tuple[int, str, str], torch.Tensor]:
    """Return every tensor of every mixture, by its set, its block and its name."""
    return {
        (bits, name.split(".self_attn")[0].split(".mlp")[0], f"{name}.{inner}"): tensor.detach().clone()
        for bits, model in sets.models.items()
        for name, mixture in model.mixtures().items()
        for inner, tensor in mixture.state_dict().items()
    }


def test_experts_of_another_set_do_not_move_by_a_bit() -> None:
    sets, optimizer = sets_of()
    moved_at_all = set()
    for _ in range(4):
        before = state_of(sets)
        sets.model.train()
        for _ in range(2):  # a step of two micro-batches
            sets.model(**models.lm_batch()).loss.backward()
        drawn = dict(sets.drawn)
        optimizer.step()
        after = state_of(sets)
        assert len(drawn) == 2
        for key, tensor in after.items():
            bits, block, name = key
            if bits != drawn[block] or ".base." in f".{name}.":
                assert torch.equal(tensor, before[key]), f"{name} of {bits} bits moved; drawn {drawn}"
            elif not torch.equal(tensor, before[key]):
                moved_at_all.add((bits, "router" if "bias" in name else "experts"))
        for bits, model in sets.models.items():
            for name, mixture in model.mixtures().items():
                chosen = bits == drawn[name.split(".self_attn")[0].split(".mlp")[0]]
                grads = [p.grad is not None for p in mixture.parameters() if p.requires_grad]
                assert grads == [chosen] * len(grads)
        optimizer.zero_grad()
    assert {bits for bits, _ in moved_at_all} == set(BITS), "a set was never drawn: another seed"
    assert {kind for _, kind in moved_at_all} == {"router", "experts"}


def test_a_step_runs_the_layers_that_were_drawn_and_between_steps_each_model_is_itself() -> None:
    sets, _ = sets_of()
    alone = {bits: quantised(bits).train() for bits in BITS}
    batch = models.lm_batch()
    sets.model.train()(**batch)
    for bits in BITS:
        sets.drawn = dict.fromkeys(sets.blocks, bits)
        assert torch.equal(sets.model(**batch).logits, alone[bits](**batch).logits)
    sets.drawn = dict(zip(sets.blocks, (2, 8), strict=True))
    mixed = sets.model(**batch).logits
    assert not any(torch.equal(mixed, model(**batch).logits) for model in alone.values())
    widest = sets.model.eval()(**batch).logits
    assert torch.equal(widest, alone[8].eval()(**batch).logits)
    sets.close()
    for bits, model in sets.models.items():
        assert torch.equal(model.eval()(**batch).logits, alone[bits].eval()(**batch).logits)


def test_the_average_precision_is_drawn_evenly() -> None:
    """By itself the average of 64 blocks is the middle; balanced it is flat from the least to the most."""
    shares = {}
    for balanced in (True, False):
        rng = torch.Generator().manual_seed(0)
        means = [sum(draw(64, (2, 3, 4), rng, balanced=balanced)) / 64 for _ in range(1000)]
        counts = torch.histc(torch.tensor(means), 8, 2, 4)
        shares[balanced] = counts / counts.sum()
    assert (shares[True] - 1 / 8).abs().max() < 0.04
    assert shares[False][3:5].sum() > 0.95
    levels = torch.tensor([2.0, 3.0, 4.0, 8.0], dtype=torch.float64)
    for mean in (2.001, 3.0, 4.25, 7.9):
        assert float(tilted(levels, mean) @ levels) == pytest.approx(mean, abs=1e-9)
    torch.testing.assert_close(tilted(levels[:3], 3.0), torch.full((3,), 1 / 3, dtype=torch.float64))


def as_of(bits: int) -> Any:
    base = quantised(bits).unload()
    base.config.quantization_config = {"quant_method": "gptq", "bits": bits}
    return base


def test_a_loaded_base_gets_its_own_set(tmp_path: Path) -> None:
    sets, _ = sets_of()
    sets.save(tmp_path)
    assert stored_sets(tmp_path) == list(BITS)
    batch = models.lm_batch()
    for bits in BITS:
        model = moa.load(tmp_path, base=as_of(bits))
        assert torch.equal(model(**batch).logits, sets.models[bits].eval()(**batch).logits)
    with pytest.raises(CheckpointError, match=r"bases of 2, 4, 8 bits, this base has 32"):
        moa.load(tmp_path, base=models.llama())
    with pytest.raises(ConfigError, match=r"'other', whose configuration does not say"):
        base = models.llama()
        base.config.quantization_config = {"quant_method": "other"}
        moa.load(tmp_path, base=base)


def test_the_pool_takes_the_set_of_its_base(tmp_path: Path) -> None:
    for seed, bits in enumerate(BITS):
        base = models.llama()
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(set_folder(tmp_path, bits))
    ids = models.lm_batch()["input_ids"]
    found = []
    for folder in (tmp_path, set_folder(tmp_path, 4), set_folder(tmp_path, 8)):
        pool = AdapterPool(as_of(4), 10**6)
        pool.add("x", folder)
        found.append(pool(input_ids=ids, adapter_ids=["x"] * len(ids)).logits)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_bits_of_a_base() -> None:
    for config, bits in (({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8), ({"bits": 3}, 3)):
        base = models.llama()
        base.config.quantization_config = {"quant_method": "x", **config}
        assert bits_of(base) == bits
    assert bits_of(models.llama().half()) == 16
    assert set_for("nowhere", models.llama()) == Path("nowhere")


def train(folder: Path, steps: int, resume: bool = False) -> PrecisionSets:
    """Train with the stock Trainer, whose checkpoints fall after 3 steps; the sets begin anew at each call."""
    sets, optimizer = sets_of(seed=3)
    batch = models.lm_batch()
    rows = [{key: value[n] for key, value in batch.items()} for n in range(len(batch["input_ids"]))]
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, report_to=[], use_cpu=True, lr_scheduler_type="constant"
    )
    trainer = Trainer(sets.model, args, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return sets


def test_a_run_goes_on_from_trainers_checkpoint_with_every_set(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    resumed = train(tmp_path / "parts", 6, resume=True)
    assert whole.steps == resumed.steps == 6
    ours, theirs = state_of(resumed), state_of(whole)
    begun = state_of(sets_of(seed=3)[0])
    assert {key[0] for key in theirs if not torch.equal(theirs[key], begun[key])} == set(BITS)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_an_optimizers_state_without_the_sets_is_refused() -> None:
    sets, optimizer = sets_of()
    state = optimizer.state_dict()
    other = torch.optim.AdamW(parameters(sets.models), lr=0.01).state_dict()
    with pytest.raises(CheckpointError, match=r"for \[2, 4\] bits, and has None"):
        optimizer.load_state_dict(other)
    state["moa_precision_sets"]["sets"].pop(2)
    with pytest.raises(CheckpointError, match=r"for \[2, 4\] bits, and has \[4\]"):
        optimizer.load_state_dict(state)


def test_models_that_do_not_fit_together_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ConfigError, match="two precisions"):
        PrecisionSets({4: quantised(4)}, optimizer)
    with pytest.raises(ConfigError, match="other recipes or layers"):
        PrecisionSets({4: quantised(4), 8: quantised(8, n_experts=2)}, optimizer)
    with pytest.raises(ConfigError, match=r"of the base of 4 bits is not that of the widest"):
        some = {"targets": ["q_proj"]}
        PrecisionSets({4: quantised(4, **some), 8: quantised(8, **some)}, optimizer)
    with pytest.raises(ConfigError, match="that layers share"):
        PrecisionSets({bits: quantised(bits, expert="vera") for bits in (4, 8)}, optimizer)
