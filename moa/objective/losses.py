"""Losses on routings, as pure functions: balance, z, importance and load, entropy, and the policy term of RLOO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, ContextError, ShapeError
from ..types import Routing


@dataclass(frozen=True)
class Loss:
    """A loss on routings as what is summed over rows, and the loss of the sums.

    Sums of several processes add up to those of their rows together, so that a loss is that of the global batch,
    however unevenly its rows are spread.

    Args:
        sums: routing, mask (*rows,) or None, n -> sums over the rows that count, of a fixed shape, e.g. (2, E), behind
            the first n axes of the routing, which are those of several layers.
        of: those sums, behind any leading axes -> the loss of each, (*,).
        of_model: one loss on the rows of all layers with equally many experts together, not one for each layer.
        of_examples: it compares examples, so that it matters which rows (tokens) are of one.
    """

    sums: Callable[[Routing, Tensor | None, int], Tensor]
    of: Callable[[Tensor], Tensor]
    of_model: bool = False
    of_examples: bool = False

    def __call__(self, routing: Routing, mask: Tensor | None = None) -> Tensor:
        """Return the loss of one routing, (), over the rows that count, mask (*rows,)."""
        return self.of(self.sums(routing, mask, 0))


def masked_sums(values: Tensor, mask: Tensor | None, n_lead: int = 0) -> Tensor:
    """Return the sums of values (*lead, *rows, E) over the rows that count, and how many these are, (*lead, E + 1).

    Args:
        values: (*lead, *rows, E).
        mask: (*rows,) bool, True on rows that count; None counts all. A routing of fewer rows than the mask
            (sequence or task rows) is summed unmasked.
        n_lead: how many axes come before the rows.
    """
    lead, rows = values.shape[:n_lead], values.shape[n_lead:-1]
    flat = values.reshape(*lead, rows.numel(), values.shape[-1])
    weight = values.new_ones(rows) if mask is None or mask.shape != rows else mask.to(values.dtype)
    count = weight.sum().expand(*lead, 1)
    return torch.cat([(flat * weight.reshape(-1, 1)).sum(-2), count], -1)


def mean_of(sums: Tensor) -> Tensor:
    """Return the means over rows of what `masked_sums` summed, (*, E), of sums (*, E + 1); 0 where nothing counts."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=1)


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return how uneven the load of one layer is: E/k · Σ_e f_e P_e, 1 when uniform, scalar.

    f_e is the fraction of counted rows that chose expert e, k = Σ_e f_e the mean number of experts per row, P_e the
    mean score normalised per row.

    Raises:
        ContextError: the routing carries no scores.
    Source: Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4-6.
    Differs: divided by k, so that the minimum is 1 for every k; transformers' Mixtral loss is k times this one, on the
        rows of all layers together ("model_balance" in `LOSSES`).
    """
    return LOSSES["balance"](routing, mask)


def _balance_sums(routing: Routing, mask: Tensor | None, n_lead: int) -> Tensor:
    """Return what the balance loss is made of, (2, E): over counted rows, how many chose e, and the sum of its scores.

    Sums of several layers add up to those of their rows together.

    Raises:
        ContextError: the routing carries no scores.
    """
    scores = routing.scores
    if scores is None:
        raise ContextError("balance loss needs the router's scores, and this routing has none: set balance=0.")
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    both = torch.stack([routing.selected().to(scores.dtype), scores], -2)  # (*rows, 2, E)
    rows = both.shape[n_lead:]  # (*rows, 2, E)
    if mask is not None and rows[: mask.ndim] == mask.shape:
        both = both * mask.to(both.dtype).reshape(*mask.shape, *([1] * (len(rows) - mask.ndim)))
    return both.sum(tuple(range(n_lead, both.ndim - 2))) if len(rows) > 2 else both


def _balance_of(sums: Tensor) -> Tensor:
    """Return the balance loss E · Σ_e c_e s_e / (Σ_e c_e · Σ_e s_e) of counts and summed scores (*, 2, E), (*,).

    With T rows, f = c / T, P = s / T, k = Σ c / T and Σ s = T it is E/k · Σ_e f_e P_e.
    """
    counts, scores = sums.unbind(-2)
    total = (counts.sum(-1) * scores.sum(-1).detach()).clamp(min=torch.finfo(torch.float32).tiny)
    return counts.shape[-1] * (counts * scores).sum(-1) / total


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return the mean over counted rows of (log Σ_e exp logit_e)², scalar: keeps logits small.

    Raises:
        ContextError: the routing carries no logits.
    Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    return LOSSES["z"](routing, mask)


def _z_sums(routing: Routing, mask: Tensor | None, n_lead: int) -> Tensor:
    if routing.logits is None:
        raise ContextError("z-loss needs the router's logits, and this routing has none: set z_loss=0.")
    return masked_sums(routing.logits.logsumexp(-1, keepdim=True).square(), mask, n_lead)


def _z_of(sums: Tensor) -> Tensor:
    return mean_of(sums).squeeze(-1)


def _cv_squared(mean: Tensor, variance: Tensor) -> Tensor:
    """Return var/mean², each (*,)."""
    return variance / (mean.square() + 1e-10)


def _unevenness(sums: Tensor) -> Tensor:
    """Return var/mean² over experts of what `masked_sums` summed, (*,), of sums (*, E + 1); 0 for one expert."""
    means = mean_of(sums)  # (*, E)
    return _cv_squared(means.mean(-1), means.var(-1, correction=min(1, means.shape[-1] - 1)))


def importance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation over experts of the summed weights, scalar, minimum 0.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 6-7.
    """
    return LOSSES["importance"](routing, mask)


def _importance_sums(routing: Routing, mask: Tensor | None, n_lead: int) -> Tensor:
    return masked_sums(routing.dense(), mask, n_lead)


def load_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of the smooth load (probability of being chosen), scalar.

    Raises:
        ContextError: the routing carries no usage (only a noisy router in training has it).
    Source: Shazeer et al. 2017, arXiv 1701.06538, appendix A, eq. 8-11.
    """
    return LOSSES["load"](routing, mask)


def _load_sums(routing: Routing, mask: Tensor | None, n_lead: int) -> Tensor:
    if routing.usage is None:
        raise ContextError("load loss needs a noisy router in training (routing.usage is None).")
    return masked_sums(routing.usage, mask, n_lead)


def localized_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of the usage over all (example, expert) pairs, scalar, minimum 0.

    Args:
        routing: with usage (B, S, E), averaged over each example's counted rows, or (B, E).
        mask: (B, S) bool, True on rows that count.

    Raises:
        ContextError: the routing carries no usage.
    Source: Dou et al. 2023 (LoRAMoE), arXiv 2312.09979, eq. 7.
    Differs: var/mean² as in the released code, the paper has var/mean; means over an example's rows, where both have
        sums, so that a long example does not count as an uneven one.
    """
    return LOSSES["localized"](routing, mask)


def _localized_sums(routing: Routing, mask: Tensor | None, n_lead: int) -> Tensor:
    """Return Σ v, Σ v² and the number of (example, expert) pairs, (*, 3), of v = E · usage − 1, 0 where even."""
    if routing.usage is None:
        raise ContextError("localized balance needs a router that reports usage in training (routing.usage is None).")
    usage = routing.usage
    rows = usage.shape[n_lead:-1]
    if len(rows) > 1:
        fits = mask is not None and mask.shape == rows
        weight = mask.to(usage.dtype) if fits and mask is not None else usage.new_ones(rows)
        weight = weight.reshape(rows[0], -1, 1)  # (B, S, 1)
        usage = usage.reshape(*usage.shape[:n_lead], *weight.shape[:2], usage.shape[-1])
        usage = (usage * weight).sum(-2) / weight.sum(-2).clamp(min=1)
    off = (usage * usage.shape[-1] - 1).flatten(n_lead)  # (*, B · E); squares of the usage itself would cancel
    return torch.stack([off.sum(-1), off.square().sum(-1), torch.ones_like(off).sum(-1)], -1)


def _localized_of(sums: Tensor) -> Tensor:
    total, squares, pairs = sums.unbind(-1)  # each (*,)
    off = total / pairs
    return _cv_squared(1 + off, (squares - total * off) / (pairs - 1).clamp(min=1))


def entropy(scores: Tensor) -> Tensor:
    """Return the entropy in nats of scores (*rows, E) normalised per row, (*rows,)."""
    p = scores / scores.sum(-1, keepdim=True)
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


LOSSES: dict[str, Loss] = {
    "balance": Loss(_balance_sums, _balance_of),
    "model_balance": Loss(_balance_sums, _balance_of, of_model=True),
    "z": Loss(_z_sums, _z_of),
    "importance": Loss(_importance_sums, _unevenness),
    "load": Loss(_load_sums, _unevenness),
    "localized": Loss(_localized_sums, _localized_of, of_examples=True),
}
"""Losses of routings by name; the training loss has their mean over layers."""


def rloo(losses: Tensor, log_probs: Tensor) -> Tensor:
    """Return the policy term: its gradient is the leave-one-out estimate of ∇ E[loss] through the choices, scalar.

    Σ_b Σ_m stopgrad((L_{m,b} − mean_m L_{m,b}) / (M − 1)) · log Q_{m,b}

    The value has no meaning; only its gradient has. Each column b is its own estimator, so losses must be the
    example's own share of the total loss.

    Args:
        losses: (M, B) loss of each example under each of M selections (or (M, 1) batch losses).
        log_probs: (M, B) log-probability of that example's choices over all layers.

    Raises:
        ConfigError: M < 2, where no baseline exists.
        ShapeError: the two shapes differ.
        ContextError: log_probs carries no gradient, so the routers would silently not learn.
    Source: ReMix, arXiv 2603.10160, §4.2; Kool et al. 2019 (RLOO).
    """
    if losses.shape[0] < 2:
        raise ConfigError(f"RLOO needs at least 2 samples (M), got {losses.shape[0]}: set samples=2 or more.")
    if losses.shape != log_probs.shape:
        raise ShapeError(f"losses {tuple(losses.shape)} and log_probs {tuple(log_probs.shape)} must be equal (M, B).")
    if not log_probs.requires_grad:
        raise ContextError(
            "the log-probability of the routing carries no gradient, so the routers would not learn. Reentrant "
            "gradient checkpointing does this: pass gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    losses = losses.detach().to(log_probs.dtype)
    # as differences of pairs: equal losses then give exactly 0, which three of them less their rounded mean may not
    advantage = (losses.unsqueeze(1) - losses.unsqueeze(0)).mean(1) / (losses.shape[0] - 1)  # (M, B)
    return (advantage * log_probs).sum()


def example_losses(logits: Tensor, labels: Tensor, shift: bool) -> Tensor | None:
    """Return each example's share of the mean cross-entropy, (B,), or None when labels are not class ids.

    Their sum is the mean over all labelled tokens (or examples), which is what transformers' losses report.

    Args:
        logits: (B, C) with labels (B,), or (B, S, C) with labels (B, S); -100 marks unlabelled positions.
        labels: int64 class ids.
        shift: True where position t predicts label t + 1 (causal decoders).
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1] or labels.ndim not in (1, 2):
        return None
    if shift:
        if labels.ndim != 2:
            return None
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide, labels.flatten(), ignore_index=-100, reduction="none")
    count = (labels != -100).sum()
    return flat.view(labels.shape[0], -1).sum(1) / count
