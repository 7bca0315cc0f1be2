"""What is trained whole, and what acts on the base. Run: pytest tests/model/test_whole.py"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import moa
from moa.errors import ConfigError, LostLossWarning
from tests import models


def trained() -> tuple[moa.MoAModel, torch.Tensor]:
    """Return a classifier whose head was moved by training, and the logits of its base as it came."""
    before = models.outputs_of(models.bert(), models.class_batch())
    model = models.randomise(moa.build(models.bert(), "topk", n_experts=4, k=2))
    assert model.modules_to_save == ["classifier"]
    return model, before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_disabled_it_is_the_base_as_it_came_as_in_peft() -> None:
    model, before = trained()
    peft = get_peft_model(models.bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    models.randomise(peft)
    batch = models.class_batch()
    now = models.outputs_of(model, batch)
    with peft.disable_adapter():
        assert torch.equal(models.outputs_of(peft, batch), before)
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, batch), before)
    assert torch.equal(models.outputs_of(model, batch), now) and not torch.equal(now, before)


def test_a_reference_pass_leaves_the_gradients_of_training_alone() -> None:
    """The reference runs between the forward and the backward of the policy, as in DPO."""
    grads = []
    for reference in (False, True):
        model, _ = trained()
        loss = model.train()(**models.class_batch()).loss
        if reference:
            with torch.no_grad(), model.disable_adapter():
                model(**models.class_batch())
        loss.backward()
        grads.append(model.base.classifier.weight.grad)
    assert torch.equal(*grads)


def test_unload_gives_the_base_back_and_merging_keeps_the_trained_head() -> None:
    model, before = trained()
    twin = copy.deepcopy(model)
    assert torch.equal(models.outputs_of(twin.unload(), models.class_batch()), before)
    folded = models.randomise(moa.build(models.bert(), "fixed", n_experts=2))
    now = models.outputs_of(folded, models.class_batch())
    assert torch.allclose(models.outputs_of(folded.merge_and_unload(), models.class_batch()), now, atol=1e-5)


def test_a_new_head_is_the_bases() -> None:
    model, before = trained()
    head = nn.Linear(models.WIDTH, 5)
    model.classifier = head
    assert model.base.classifier is head and "classifier" not in dict(model.named_children())
    batch = {k: v for k, v in models.class_batch().items() if k != "labels"}
    assert models.outputs_of(model, batch).shape == (4, 5)
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, batch), before)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_are_those_of_the_base(tied: bool) -> None:
    batch = models.token_batch()
    model = moa.build(models.llama(tie_word_embeddings=tied), "topk").eval()
    before, children = models.outputs_of(model, batch), list(dict(model.named_children()))
    model.resize_token_embeddings(40)
    after = models.outputs_of(model, batch)
    assert after.shape[-1] == model.config.vocab_size == model.get_input_embeddings().num_embeddings == 40
    assert torch.allclose(after[..., : models.VOCAB], before, atol=1e-6)
    assert list(dict(model.named_children())) == children
    assert not model.get_input_embeddings().weight.requires_grad
    assert (model.base.lm_head.weight is model.base.model.embed_tokens.weight) == tied
    head = nn.Linear(models.WIDTH, 40, bias=False)
    model.set_output_embeddings(head)
    assert model.base.lm_head is head


def test_methods_for_other_adapters_say_what_to_use() -> None:
    model = moa.build(models.llama(), "topk")
    for name in ("add_adapter", "load_adapter", "active_adapters", "enable_adapters"):
        with pytest.raises(ConfigError, match=r"moa\.build"):
            getattr(model, name)()


def test_the_body_is_the_base_model() -> None:
    model = moa.build(models.llama(), "topk").eval()
    batch = models.token_batch()
    want = models.llama().base_model(**batch).last_hidden_state
    assert torch.allclose(model.base_model(**batch).last_hidden_state, want, atol=1e-6)


def test_a_name_may_be_a_string_and_a_wrong_one_is_named() -> None:
    assert moa.build(models.llama(), "topk", modules_to_save="lm_head").modules_to_save == ["lm_head"]
    with pytest.raises(ConfigError, match="'head'"):
        moa.build(models.llama(), "topk", modules_to_save="head")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_end_of_a_name_is_enough_as_in_peft(tmp_path: Path) -> None:
    names = ["lm_head", "input_layernorm"]
    model = models.randomise(moa.build(models.llama(), "topk", targets=["q_proj"], modules_to_save=names))
    peft = get_peft_model(models.llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=names))
    theirs = {n.partition(".modules_to_save")[0] for n, p in peft.named_parameters() if p.requires_grad}
    assert set(model.modules_to_save) == {n.removeprefix("base_model.model.") for n in theirs if "lora" not in n}
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama())
    assert again.modules_to_save == model.modules_to_save
    assert torch.equal(models.outputs_of(again, models.token_batch()), models.outputs_of(model, models.token_batch()))


def test_losses_that_reach_nothing_are_warned_of_once() -> None:
    batch = models.token_batch()
    model = moa.build(models.llama(), "topk", balance=0.1).train()

    def own_loss(model: moa.MoAModel) -> torch.Tensor:
        return model(**batch).logits.square().mean()

    with pytest.warns(LostLossWarning, match="routed_loss"):
        own_loss(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_loss(model).backward()
        own_loss(moa.build(models.llama(), "topk", balance=0.0, z_loss=0.0).train()).backward()
        quiet = moa.build(models.llama(), "topk", balance=0.1).train()
        own_loss(quiet)  # nobody learns from it
        quiet.routed_loss(lambda: own_loss(quiet)).backward()
        own_loss(quiet.eval()).backward()


def test_keywords_of_a_base_beside_a_base_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    moa.build(models.llama(), "topk").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="chek_base"):
        moa.load(tmp_path, base=models.llama(), chek_base=False)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_model_is_loaded_frozen_as_in_peft(tmp_path: Path, is_trainable: bool) -> None:
    model = moa.build(models.llama(), "topk", targets=["q_proj"], modules_to_save=["lm_head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama(), is_trainable=is_trainable)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == (trained if is_trainable else set())
    batch = models.token_batch()
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
