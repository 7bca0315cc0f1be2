"""TRL's trainers take a mixture without a subclass. Run: pytest tests/model/test_trl.py"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moa
from moa.errors import ContextError, LostLossWarning
from tests import models
from tests.laws import assert_close

trl = pytest.importorskip("trl", reason="TRL is not installed")
trainer_utils = pytest.importorskip("trl.trainer.utils")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.utils.data")
TOPK: dict[str, Any] = {"router": "topk", "n_experts": 4, "k": 2, "balance": 0.5, "z_loss": 0.1}
HOW: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 0.01,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": None,
}
PREFERENCES = {"prompt": ["w1 w2 w3"] * 8, "chosen": [" w4 w5"] * 8, "rejected": [" w6 w7 w8"] * 8}


@pytest.fixture(autouse=True)
def no_bars() -> None:
    datasets.disable_progress_bars()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["<pad>", "</s>", *(f"w{i}" for i in range(models.VOCAB - 2))]
    table = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>")


def train(kind: str, model: nn.Module, rows: dict[str, list[str]], folder: Path, **options: Any) -> Any:
    """Return a trainer of a kind after two steps, every trainable tensor having moved."""
    how = {name: value for name, value in HOW.items() if value is not None} | options.pop("how", {})
    cls = options.pop("cls", getattr(trl, f"{kind}Trainer"))
    arguments = getattr(trl, f"{kind}Config")(str(folder), **how)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = cls(
        model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer(), **options
    )
    trainer.train()
    still = [name for name, p in model.named_parameters() if name in start and torch.equal(p, start[name])]
    assert start and not still, f"not moved: {still}"
    return trainer


def test_sft_has_the_routers_own_losses(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = moa.build(models.llama(), **TOPK)
    train("SFT", model, {"prompt": ["w1 w2 w3"] * 8, "completion": [" w4 w5"] * 8}, tmp_path)
    assert set(model.last_losses) == {"task", "balance", "z"}
    assert not [w for w in recwarn if issubclass(w.category, LostLossWarning)]


@pytest.mark.parametrize("router", ["topk", "remix"])
def test_a_fused_head_learns_what_the_model_learns(router: str) -> None:
    """TRL's own fused head, and the loss that SFTTrainer makes of it for a share of a larger batch, in fp64."""
    batch = models.lm_batch()
    options = TOPK if router == "topk" else {"router": router, "n_experts": 4, "k": 2}
    gradients = []
    for fused in (False, True):
        model = models.randomise(moa.build(models.llama(), **options)).double().train()
        torch.manual_seed(0)
        if fused:
            trainer_utils.add_fused_lm_head(model)
            loss = -model(**batch, fused_lm_head=True).log_probs.sum() / 100
        else:
            model.objective.per_example_rule = "none"  # a fused head has no logits: one credit for the whole batch
            loss = model(**batch, num_items_in_batch=torch.tensor(100)).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    own, fused_ones = gradients
    assert own.keys() == fused_ones.keys() and any("router" in name for name in own)
    for name, grad in own.items():
        assert_close(fused_ones[name], grad, 1e-5, name)  # TRL's head works in fp32


def test_a_fused_head_lets_routers_count() -> None:
    """Routers that balance by a bias count in a forward that never comes by the model's own."""
    counts = []
    for fused in (False, True):
        model = moa.build(models.llama(), "sigmoid", n_experts=4, k=1, bias_rate=0.1).train()
        if fused:
            trainer_utils.add_fused_lm_head(model)
        model(**models.lm_batch(), **({"fused_lm_head": True} if fused else {}))
        counts.append(torch.stack([branch.router.counts for _, branch in model.branches()]))  # type: ignore[misc]
    assert counts[0].sum() > 0 and torch.equal(*counts)


def reference_of(trainer: Any) -> tuple[Tensor, ...]:
    """Return the reference log-likelihoods that a DPOTrainer takes of its first batch, (B,) each."""
    batch = next(iter(trainer.get_train_dataloader()))
    return tuple(trainer.compute_ref_log_probs(trainer.ref_model, batch))


def test_the_reference_of_dpo_is_the_base_as_it_came(tmp_path: Path) -> None:
    base = models.llama()
    as_it_came = copy.deepcopy(base)
    model = models.randomise(moa.build(base, modules_to_save=["lm_head"], **TOPK))
    with pytest.warns(LostLossWarning, match="routed_loss"):
        trainer = train("DPO", model, PREFERENCES, tmp_path, ref_model=model.reference())
    assert not model.last_losses.keys() & {"balance", "z"}
    trainer_utils.add_fused_lm_head(as_it_came)
    batch = next(iter(trainer.get_train_dataloader()))
    assert model.training
    for got, want in zip(reference_of(trainer), trainer.compute_ref_log_probs(as_it_came, batch), strict=True):
        assert torch.equal(got, want)
    assert model.training and trainer.ref_model is not model


def test_a_reference_shares_the_model_and_has_nothing_of_it() -> None:
    model = models.randomise(moa.build(models.llama(), **TOPK))
    reference, batch = model.reference(), models.token_batch()
    want = models.llama()(**batch).logits
    assert torch.equal(reference(**batch).logits, want) and not reference(**batch).logits.requires_grad
    assert not list(reference.parameters()) and not reference.state_dict()
    assert reference.config is model.config and not torch.equal(model(**batch).logits, want)


def test_grpo_and_rewards_train_and_say_what_is_left_out(tmp_path: Path) -> None:
    def distinct(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    model = moa.build(models.llama(), **TOPK)
    how = {"num_generations": 4, "max_completion_length": 6, "seed": 1}
    with pytest.warns(LostLossWarning, match="balance, z"):
        train("GRPO", model, {"prompt": ["w1 w2 w3"] * 8}, tmp_path / "grpo", reward_funcs=distinct, how=how)
    config = models.llama().config
    config.num_labels = 1
    scored = moa.build(transformers.LlamaForSequenceClassification(config), **TOPK)
    rows = {"chosen": ["w1 w4 w5"] * 8, "rejected": ["w1 w6 w7 w8"] * 8}
    with pytest.warns(LostLossWarning, match="balance, z"):
        train("Reward", scored, rows, tmp_path / "reward")


def test_sampling_recipes_refuse_a_loss_of_preferences_and_take_it_inside_routed_loss(tmp_path: Path) -> None:
    class Routed(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model.routed_loss(lambda: super(Routed, self).compute_loss(model, inputs, *args, **kwargs))

    options: dict[str, Any] = {"router": "remix", "n_experts": 4, "k": 2}
    model = moa.build(models.llama(), **options)
    with pytest.raises(ContextError, match="routed_loss"):
        train("DPO", model, PREFERENCES, tmp_path / "a", ref_model=model.reference())
    model = models.randomise(moa.build(models.llama(), **options))
    train("DPO", model, PREFERENCES, tmp_path / "b", ref_model=model.reference(), cls=Routed)
    assert set(model.last_losses) >= {"task", "policy"}
