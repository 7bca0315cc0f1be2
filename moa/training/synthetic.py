"""Prompts that a base writes itself, after a few examples, and a filter that keeps those that could be real.

Trans-LoRA, arXiv 2405.17258.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

Keep = Callable[[list[str]], Tensor]
TRIES = 10  # times as many texts are written at most as are asked for


@torch.no_grad()
def synthetic_prompts(
    model: MoAModel,
    tokenizer: Any,
    seeds: Sequence[str],
    n: int,
    *,
    shots: int = 3,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.95,
    keep: Keep | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[str]:
    """Return n different prompts that the model's base, without its experts, writes after some real ones.

    Args:
        model: a mixture on a base that generates.
        tokenizer: of the base.
        seeds: real prompts, about five; none of them is returned.
        n: how many are wanted.
        shots: how many of the seeds, drawn anew each time, stand before each one.
        max_new_tokens: tokens per prompt at most; the first line of what is written is taken.
        temperature: of the draws.
        top_p: draw among the likeliest tokens that hold this share of the probability.
        keep: texts -> probability (n,) that each could be real, e.g. a `Discriminator`; those below 1/2 are dropped.
        batch_size: texts written at a time.
        seed: of all draws; the random state outside stays as it is.

    Raises:
        ConfigError: fewer seeds than shots, numbers out of range, a base that does not generate, or too few prompts
            that differ and are kept after 10 n texts.
    """
    if not 1 <= shots <= len(set(seeds)):
        raise ConfigError(f"shots={shots} must be from 1 to the number of different seeds, {len(set(seeds))}.")
    if n < 1 or max_new_tokens < 1 or batch_size < 1 or not temperature > 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"n={n}, max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1, "
            f"temperature={temperature} above 0, and top_p={top_p} in (0, 1]."
        )
    if not model.can_generate():
        raise ConfigError(f"a {type(model.base).__name__} does not generate text: it cannot write prompts.")
    was, found = model.training, dict[str, None]()
    draw = torch.Generator().manual_seed(seed)
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), model.disable_adapter():
            torch.manual_seed(seed)
            for _ in range(-(-TRIES * n // batch_size)):
                asked = [_framed(seeds, shots, draw) for _ in range(batch_size)]
                texts = _lines(model, tokenizer, asked, max_new_tokens, temperature, top_p)
                fresh = [text for text in dict.fromkeys(texts) if text and text not in seeds and text not in found]
                if keep is not None and fresh:
                    fresh = [text for text, p in zip(fresh, keep(fresh).tolist(), strict=True) if p >= 0.5]
                found |= dict.fromkeys(fresh)
                if len(found) >= n:
                    return list(found)[:n]
    finally:
        model.train(was)
    raise ConfigError(
        f"{len(found)} of {n} prompts differ from each other and from the seeds{' and pass keep' if keep else ''}, in "
        f"{TRIES * n} texts: give more seeds, a higher temperature, or ask for fewer."
    )


def _framed(seeds: Sequence[str], shots: int, draw: torch.Generator) -> str:
    """Return some seeds, in an order that is drawn, as numbered lines with the next one open."""
    different = list(dict.fromkeys(seeds))
    chosen = [different[i] for i in torch.randperm(len(different), generator=draw)[:shots].tolist()]
    lines = [f"{number}. {' '.join(text.split())}" for number, text in enumerate(chosen, 1)]
    return "\n".join([*lines, f"{shots + 1}."])


def _lines(
    model: MoAModel, tokenizer: Any, texts: list[str], max_new_tokens: int, temperature: float, top_p: float
) -> list[str]:
    """Return the first line that is written after each text, padded on the left into one batch (B, S)."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    written = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in written]


class Discriminator:
    """Tells real prompts from synthetic ones: logistic regression on the base's mean hidden state.

    loss = mean cross-entropy + l2/2 · ‖w‖², on features less their mean, over their deviation; both kinds weigh alike.

    Args:
        model: a mixture, whose base, without its experts, gives the features (n, d).
        tokenizer: of the base.
        real: prompts.
        synthetic: prompts, e.g. of `synthetic_prompts` without a filter.
        l2: strength of the penalty.

    Raises:
        ConfigError: none of one kind, or a text without a token.
    Source: Trans-LoRA, arXiv 2405.17258, §3.2.
    Differs: there the discriminator is a LoRA that is trained beside the adapter; here the base stays as it is, so that
        one can be had for any adapter afterwards.
    """

    def __init__(
        self, model: MoAModel, tokenizer: Any, real: Sequence[str], synthetic: Sequence[str], l2: float = 1e-2
    ) -> None:
        if not real or not synthetic:
            raise ConfigError(f"a discriminator needs texts of both kinds, got {len(real)} real, {len(synthetic)} not.")
        self.model, self.tokenizer = model, tokenizer
        features = self.features([*real, *synthetic])  # (n, d)
        truth = torch.tensor([1.0] * len(real) + [0.0] * len(synthetic), device=features.device)
        share = truth.mean()
        weights = torch.where(truth > 0, 0.5 / share, 0.5 / (1 - share))  # (n,)
        self.mean, self.deviation = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
        x = (features - self.mean) / self.deviation
        self.w = torch.zeros(x.shape[1] + 1, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.w], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = x @ self.w[1:] + self.w[0]
            loss = F.binary_cross_entropy_with_logits(logits, truth, weights) + l2 / 2 * self.w[1:].square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.w = self.w.detach()

    @torch.no_grad()
    def features(self, texts: Sequence[str], batch_size: int = 16) -> Tensor:
        """Return the mean of the last hidden states over each text's tokens, (n, d), float32."""
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        was = self.model.training
        parts = []
        self.model.eval()
        try:
            with self.model.disable_adapter():
                for start in range(0, len(texts), batch_size):
                    batch = self.tokenizer(list(texts[start : start + batch_size]), return_tensors="pt", padding=True)
                    batch = batch.to(self.model.device)
                    mask = batch["attention_mask"].unsqueeze(-1)  # (B, S, 1)
                    if not mask.sum(1).all():
                        raise ConfigError("a text holds not one token: leave it out.")
                    out = self.model(
                        input_ids=batch["input_ids"], attention_mask=mask[..., 0], output_hidden_states=True
                    )
                    hidden = out.hidden_states[-1].float() * mask  # (B, S, d)
                    parts.append(hidden.sum(1) / mask.sum(1))
        finally:
            self.model.train(was)
        return torch.cat(parts)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the probability (n,) that each text is real."""
        x = (self.features(texts) - self.mean) / self.deviation
        return (x @ self.w[1:] + self.w[0]).sigmoid()
