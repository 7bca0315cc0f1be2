"""What a checkpoint writes after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .tasks import Task


def framed(prompts: Sequence[str], task: Task | None, tokenizer: Any, where: str) -> tuple[list[str], bool]:
    """Return prompts as the task was trained on them, and whether a chat template wrote their special tokens.

    Args:
        prompts: n of them.
        task: whose template, or whose system prompt and the tokenizer's chat template, goes around; None for neither.
        tokenizer: of the base.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: a task that classifies, or a tokenizer without the chat template that the task needs.
    """
    if task is None or task.kind == "text":
        return list(prompts), False
    if task.kind == "generation":
        return [task.template.replace("{prompt}", prompt) for prompt in prompts], False
    if task.kind != "chat":
        raise ConfigError(f"{where} was trained on tasks of kind {task.kind}: use moa predict.")
    if not tokenizer.chat_template:
        raise ConfigError(f"{where}: its tokenizer has no chat template; pass --raw to take the prompts as they are.")
    system = [{"role": "system", "content": task.system}] if task.system is not None else []
    chats = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats], True


@torch.no_grad()
def continuations(
    model: MoAModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    task: int | None = None,
    templated: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    where: str = "the checkpoint",
) -> list[str]:
    """Return what the model writes after prompts, which are padded on the left into one batch (B, S).

    Args:
        model: with a generating base.
        tokenizer: of the base.
        prompts: B of them.
        task: id of their task, or None.
        templated: they hold their special tokens already.
        max_new_tokens: tokens per answer at most.
        temperature: 0 takes the likeliest token each time; above it they are drawn from softmax(logits / temperature).
        top_p: draw among the likeliest tokens that hold this share of the probability.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: a base that does not generate, a prompt without a token.
    """
    if not model.can_generate():
        raise ConfigError(f"{where} was made on a {type(model.base).__name__}, which does not generate text.")
    model.eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=not templated)
    empty = [i for i, n in enumerate(batch["attention_mask"].sum(-1).tolist()) if n == 0]
    if empty:
        raise ConfigError(f"prompt {empty[0] + 1} of {len(prompts)} holds not one token.")
    batch = batch.to(model.device)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if task is not None:
        options["task_ids"] = torch.full((len(prompts),), task, device=model.device)
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    texts: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
