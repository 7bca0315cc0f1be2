"""A student that learns a teacher: what it can hold it reaches, what it cannot is a gap that is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ConfigError, NumericsError
from moa.training.transfer import transfer
from tests import models


def prompts(n: int = 4, length: int = 6) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, models.VOCAB, (4, length), generator=rng)} for _ in range(n)]


def teacher_of(kind: str = "llama", **options: Any) -> moa.MoAModel:
    model = moa.build(getattr(models, kind)(), "topk", **{"n_experts": 3, "k": 2, "rank": 2, **options})
    return models.randomise(model)


def test_a_student_that_can_hold_the_teacher_comes_close_and_one_that_cannot_says_its_gap() -> None:
    teacher = teacher_of(targets=["q_proj"])
    close = moa.build(models.llama(), "topk", n_experts=3, k=2, rank=2, targets=["q_proj"], balance=0.0)
    close.load_state_dict(teacher.state_dict())
    near = transfer(teacher, close, prompts(), steps=1, lr=1e-12)
    assert near.before < 1e-9 and near.after < 1e-9
    strong = teacher_of(targets="all-linear", alpha=64)
    for family, options in (("lora", {}), ("shira", {"density": 0.2})):
        student = moa.build(models.llama(), "fixed", n_experts=1, expert=family, targets="all-linear", **options)
        found = transfer(strong, student, prompts(), steps=10, lr=2e-2)
        assert 0 < found.after < 0.8 * found.before, family
        assert "before" in found.summary()


def test_the_gap_is_the_divergence_of_the_two_models() -> None:
    teacher, student = teacher_of(), moa.build(models.llama(), "dense", n_experts=2, rank=2)
    held = prompts(2, 5)
    found = moa.transfer(teacher, student, prompts(), steps=3, evaluation=held)
    total = 0.0
    for batch in held:
        with torch.no_grad():
            p, q = (model.eval()(**batch).logits.double().log_softmax(-1) for model in (teacher, student))
        total += float((p.exp() * (p - q)).sum())
    assert found.after == pytest.approx(total / (2 * 4 * 5), rel=1e-5)


def test_one_expert_goes_over_alone_and_labels_are_not_looked_at() -> None:
    teacher = teacher_of()
    data = [{**batch, "labels": batch["input_ids"]} for batch in prompts()]
    other = [{**batch, "labels": batch["input_ids"].flip(0)} for batch in prompts()]
    student = moa.build(models.llama(), "fixed", n_experts=1)
    first = {name: value.clone() for name, value in student.state_dict().items()}
    found = []
    for batches in (data, other):
        student.load_state_dict(first)
        transfer(teacher, student, batches, steps=4, expert=1)
        found.append({name: value.clone() for name, value in student.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    with teacher.pin_expert(1):
        expected = transfer(teacher, moa.build(models.llama(), "fixed", n_experts=1), data, steps=0).before
    assert (
        transfer(teacher, moa.build(models.llama(), "fixed", n_experts=1), data, steps=0, expert=1).before == expected
    )


def test_the_student_follows_what_the_teacher_writes() -> None:
    teacher, student = teacher_of(), moa.build(models.llama(), "fixed", n_experts=1)
    seen: list[Tensor] = []
    student.base.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    transfer(teacher, student, prompts(1), steps=1, max_new_tokens=3)
    expected = teacher.eval().generate(**prompts(1)[0], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert all(torch.equal(ids, expected) for ids in seen)


def test_a_router_that_samples_learns_by_its_own_rule() -> None:
    teacher = teacher_of("bert", modules_to_save=[])
    student = moa.build(models.bert(), "remix", n_experts=3, k=1, rank=2, modules_to_save=[])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    transfer(teacher, student, [{"input_ids": b["input_ids"]} for b in prompts()], steps=2)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any("router" in name for name in moved) and any("bank" in name for name in moved)


class Other:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}


class Same:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": -1}, "cannot be negative"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"objective": "kll"}, "unknown objective 'kll'"),
        ({"prompts": []}, "holds no batch"),
        ({"prompts": iter(prompts())}, "gone through once"),
        ({"max_new_tokens": -1}, "cannot be negative"),
        ({"tokenizers": (Same(), Other())}, "differ in 1 tokens, e.g. 'a'"),
        ({"expert": 7}, "expert"),
    ],
)
def test_what_cannot_be_transferred_is_refused_and_nothing_changes(options: dict[str, Any], says: str) -> None:
    teacher, student = teacher_of(), moa.build(models.llama(), "fixed", n_experts=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ConfigError, match=says):
        transfer(teacher, student, **{"prompts": prompts(), "steps": 1, **options})
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_other_vocabularies_one_model_and_no_number_are_refused() -> None:
    teacher = teacher_of()
    wider = moa.build(models.llama(), "fixed", n_experts=1)
    wider.resize_token_embeddings(models.VOCAB + 3)
    with pytest.raises(ConfigError, match="vocabulary has 32 tokens and the student's 35"):
        transfer(teacher, wider, prompts(), steps=1)
    with pytest.raises(ConfigError, match="one model"):
        transfer(teacher, teacher, prompts(), steps=1)
    student = moa.build(models.llama(), "fixed", n_experts=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        next(iter(teacher.mixtures().values())).branches[0].bank.up[:] = 1e38
    with pytest.raises(NumericsError):
        transfer(teacher, student, prompts(), steps=2)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
