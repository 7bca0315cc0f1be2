"""An expert or a mixture into another family, rank or base: the student learns the teacher's outputs on prompts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigError, NumericsError
from .divergence import check_objective, check_steps, divergence, gap

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

Batch = Mapping[str, Any]
NAMES = ("teacher", "student")


@dataclass(frozen=True)
class Transferred:
    """What a transfer reached.

    Args:
        objective: "kl" in nats or "mse" on logits.
        before: the student's divergence from the teacher per row before the first step, on the evaluation batches.
        after: the same after the last one.
        losses: "teacher" and "student" -> mean loss per label there; empty without labels.
    """

    objective: str
    before: float
    after: float
    losses: Mapping[str, float]

    def summary(self) -> str:
        """Return the gap in words."""
        words = f"{self.objective} to the teacher per row: {self.before:.3e} before, {self.after:.3e} after"
        if self.losses:
            words += f"; loss {self.losses['teacher']:.4f} of the teacher, {self.losses['student']:.4f} of the student"
        return words + "."


def transfer(
    teacher: MoAModel,
    student: MoAModel,
    prompts: Iterable[Batch],
    *,
    steps: int,
    lr: float = 1e-3,
    objective: str = "kl",
    expert: int | None = None,
    max_new_tokens: int = 0,
    evaluation: Iterable[Batch] | None = None,
    tokenizers: Sequence[Any] | None = None,
    progress: bool = False,
) -> Transferred:
    """Train a student, of any family, rank, router or base, on a teacher's outputs; labels are not looked at.

    All that is trained in the student takes AdamW steps, with its routers' own losses; the teacher is not changed.
    What one cannot hold of the other stays as a gap, which is returned.

    Args:
        teacher: a mixture.
        student: another one, on the same or another base with the same vocabulary or classes; changed in place.
        prompts: batches on the models' device, input_ids (B, S) and so on; a list or a DataLoader. `synthetic_prompts`
            makes them where data is not at hand.
        steps: one batch each, the prompts again from their start where they end.
        lr: of the first step, falling to 0 along a cosine.
        objective: "kl": KL(teacher ‖ student) of the softmax of the logits; "mse": mean squared error of the logits.
        expert: only this expert of the teacher, (1,) in place of its routing.
        max_new_tokens: the teacher first writes so many tokens after each prompt, the likeliest each time, and the
            student follows it there, too; for bases that generate.
        evaluation: batches for the gap; None takes the prompts.
        tokenizers: the teacher's and the student's, to be compared.
        progress: show a bar.

    Raises:
        ConfigError: other vocabularies or classes, nothing to train, one model as both, data without a batch or that
            can be gone through only once, or a number out of range. Nothing is changed.
        NumericsError: the divergence became NaN or infinite; the student is as it was before.
    Source: Trans-LoRA, arXiv 2405.17258, §3.
    Differs: there the teacher's answers are texts to learn by cross-entropy; here the student sees all of its
        distribution.
    """
    check_objective(objective, teacher, "moa.transfer")
    check_steps(steps, lr, prompts)
    _check_pair(teacher, student, tokenizers)
    if max_new_tokens < 0 or (max_new_tokens and not teacher.can_generate()):
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: it cannot be negative, and the teacher's {type(teacher.base).__name__} "
            "must generate where it is above 0."
        )
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("nothing in the student is trained: build it with a recipe whose experts or routers are.")
    modes = teacher.training, student.training
    pinned = nullcontext() if expert is None else teacher.pin_expert(expert)
    kept = [p.detach().clone() for p in trained]
    teacher.eval()
    try:
        with pinned:
            batches = [_written(teacher, batch, max_new_tokens) for batch in prompts] if max_new_tokens else prompts
            asked = batches if evaluation is None else evaluation
            _, before = gap(teacher, student.eval(), asked, objective, NAMES)
            _follow(teacher, student.train(), batches, steps, lr, objective, progress)
            losses, after = gap(teacher, student.eval(), asked, objective, NAMES)
    except NumericsError:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        raise
    finally:
        teacher.train(modes[0])
        student.train(modes[1])
    return Transferred(objective, before, after, losses)


def _check_pair(teacher: MoAModel, student: MoAModel, tokenizers: Sequence[Any] | None) -> None:
    if teacher is student or teacher.base is student.base:
        raise ConfigError("teacher and student are one model: build the student on a base of its own.")
    sizes = [getattr(model.config, "get_text_config", lambda: None)() for model in (teacher, student)]
    vocabularies = [getattr(config, "vocab_size", None) for config in sizes]
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"the teacher's vocabulary has {vocabularies[0]} tokens and the student's {vocabularies[1]}: a transfer "
            "needs one tokenizer."
        )
    if tokenizers is not None:
        first, second = (tokenizer.get_vocab() for tokenizer in tokenizers)
        other = sorted(token for token in first.keys() | second.keys() if first.get(token) != second.get(token))
        if other:
            raise ConfigError(
                f"the tokenizers differ in {len(other)} tokens, e.g. {other[0]!r}: a transfer needs one tokenizer."
            )


@torch.no_grad()
def _written(teacher: MoAModel, batch: Batch, max_new_tokens: int) -> dict[str, Any]:
    """Return a batch with what the teacher writes after each of its prompts: input_ids and mask (B, S + n)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    pad = teacher.config.get_text_config().pad_token_id
    tokens = teacher.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    new = tokens[:, ids.shape[1] :]  # (B, n)
    there = torch.ones_like(new) if pad is None else (new != pad).to(mask.dtype)
    return {**inputs, "input_ids": tokens, "attention_mask": torch.cat([mask, there], 1)}


def _follow(
    teacher: MoAModel,
    student: MoAModel,
    data: Iterable[Batch],
    steps: int,
    lr: float,
    objective: str,
    progress: bool,
) -> None:
    optimizer = torch.optim.AdamW(student.optimizer_groups(lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(data)), steps)
    for number, batch in enumerate(tqdm(batches, total=steps, desc="transfer", disable=not progress)):
        with torch.no_grad():
            theirs = teacher(**batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}

        def closure(inputs: Batch = inputs, theirs: Any = theirs) -> Tensor:
            return divergence(teacher, inputs, theirs, student(**inputs), objective).mean()

        value = student.routed_loss(closure)
        reached = float(value.detach())
        if not math.isfinite(reached):
            raise NumericsError(f"the divergence from the teacher is {reached} at step {number}: lower lr={lr}.")
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
