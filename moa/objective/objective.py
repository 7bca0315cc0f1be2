"""What a training forward returns as its loss: the task's, the routers' own, the policy term of sampling routers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, NumericsError
from ..types import Routing
from .losses import LOSSES, MODEL_LOSSES, example_losses, rloo
from .trace import Record, Trace


class Objective:
    """Adds up the losses of one training step.

    L = mean_m L_m + mean over layers of Σ coefficient · auxiliary loss + policy term

    Auxiliary losses are means over layers, so that a coefficient means the same in deep and shallow models; those of
    the model, `MODEL_LOSSES`, take the rows of all layers together, and are one value whatever the depth. Under
    gradient accumulation and data parallelism the whole sum is weighted by the batch's share of the labelled items:
    nothing in it is multiplied by the number of processes or of micro-batches.

    Attributes:
        per_example_rule: how per-example losses are found: "shifted", "aligned", "none" (batch losses), or None
            before the first step. The rule is the one that reproduces the model's own loss.
    """

    def __init__(self) -> None:
        self.per_example_rule: str | None = None

    def total(
        self, losses: list[Tensor], examples: Tensor | None, traces: list[Trace]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss () and its parts, detached.

        Args:
            losses: M task losses ().
            examples: (M, B) each example's share of them, detached; None uses the batch losses in the policy term.
            traces: M traces.

        Raises:
            ContextError: a routing carries no gradient to a router that should learn from it.
        """
        task = torch.stack(losses).mean()
        parts = {"task": task, **auxiliary_losses(traces)}
        if any(r.routing.log_prob is not None for r in traces[0]):
            credit = torch.stack([loss.detach().reshape(1) for loss in losses]) if examples is None else examples
            log_probs = torch.stack([log_prob_per_example(t, credit.shape[1]) for t in traces])
            parts["policy"] = rloo(credit, log_probs)
        total = task
        for name, value in parts.items():
            total = total if name == "task" else total + value.to(task.dtype)
        return total, {name: value.detach() for name, value in parts.items()}

    def per_example(self, losses: list[Tensor], logits: list[Tensor | None], labels: Any) -> Tensor | None:
        """Return each example's share of the task loss under each selection (M, B), or None where nothing gives it.

        Args:
            losses: M task losses () that the model reports.
            logits: M outputs, (B, C) or (B, S, C), or None.
            labels: (B,) or (B, S) class ids.
        """
        known = [item for item in logits if isinstance(item, Tensor)]
        if len(known) < len(losses) or not isinstance(labels, Tensor):
            return None
        if self.per_example_rule is None:
            self.per_example_rule = _matching_rule(losses[0], known[0], labels)
        if self.per_example_rule == "none":
            return None
        with torch.no_grad():
            rows = [example_losses(item, labels, self.per_example_rule == "shifted") for item in known]
        return None if any(row is None for row in rows) else torch.stack([row for row in rows if row is not None])

    @staticmethod
    def share(labels: Any, num_items: Tensor | int | None, shifts: bool) -> Tensor | None:
        """Return this batch's share of the labelled items of the accumulated batch, (), or None without a count.

        Args:
            labels: (B,) or (B, S), -100 where unlabelled.
            num_items: labelled items over all micro-batches and devices.
            shifts: True where the first position of a row is never predicted.
        """
        if num_items is None or not isinstance(labels, Tensor):
            return None
        counted = labels[..., 1:] if shifts and labels.ndim > 1 else labels
        return (counted != -100).sum() / num_items

    @staticmethod
    def diagnose(total: Tensor, traces: list[Trace], labels: Any, shifts: bool) -> None:
        """Say why a training loss () is not finite, where the routers or the labels are to blame.

        Raises:
            ContextError: no label is left.
            NumericsError: a router's logits are not finite; its layer is named.
        """
        if torch.compiler.is_compiling() or bool(torch.isfinite(total)):
            return
        for trace in traces:
            for record in trace:
                logits = record.routing.logits
                if logits is not None and not bool(torch.isfinite(logits).all()):
                    kind = "NaN" if bool(torch.isnan(logits).any()) else "infinite"
                    raise NumericsError(
                        f"the router of {record.name} gives {kind} logits: its input or its weights are not finite. "
                        "Lower the learning rate, or look for NaN in the data."
                    )
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            counted = labels[..., 1:] if shifts and labels.ndim > 1 else labels
            if not bool((counted != -100).any()):
                raise ContextError(
                    f"no label is left in this batch: all of {tuple(labels.shape)} are -100 (or are in the first "
                    "position, which is never predicted). Check truncation and the prompt length."
                )


def auxiliary_losses(traces: list[Trace]) -> dict[str, Tensor]:
    """Return name -> mean over selections and layers of coefficient · loss, each ().

    In a loss of the model, a layer has the value of the layers that it shares a selection, a coefficient and a number
    of experts with.

    Raises:
        ContextError: a routing carries no gradient to a router that should learn from it.
    """
    terms: dict[str, list[Tensor]] = {}
    for alike in _alike([record for trace in traces for record in trace], LOSSES):
        for name, coefficient, values in _terms(LOSSES, alike):
            terms.setdefault(name, []).append(coefficient * values)
    sums = {name: statistic for name, (statistic, _) in MODEL_LOSSES.items()}
    for trace in traces:
        groups: dict[tuple[str, float, int], list[Tensor]] = {}
        for alike in _alike(list(trace), sums):
            for name, coefficient, values in _terms(sums, alike):  # (L, …)
                groups.setdefault((name, coefficient, alike[0].routing.n_experts), []).append(values)
        for (name, coefficient, _), parts in groups.items():
            layers = torch.cat(parts)
            value = MODEL_LOSSES[name][1](layers.sum(0))
            terms.setdefault(name, []).append(coefficient * value.expand(len(layers)))
    return {name: torch.cat(values).mean() for name, values in terms.items()}


def _terms(losses: Losses, alike: list[Record]) -> Iterator[tuple[str, float, Tensor]]:
    """Yield (name, coefficient, values (L, …)) of those losses that the router of L alike records asks for.

    Raises:
        ContextError: one carries no gradient to a router that should learn from it.
    """
    weights: Any = alike[0].router.loss_weights
    for name, values in _of_layers({name: losses[name] for name in weights if name in losses}, alike).items():
        if not values.requires_grad and any(p.requires_grad for r in alike for p in r.router.parameters()):
            raise ContextError(
                f"the {name} loss of {alike[0].name} carries no gradient, so its router would not learn from "
                "it. Reentrant gradient checkpointing does this: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        yield name, weights[name], values


def _alike(records: list[Record], losses: Losses) -> list[list[Record]]:
    """Return the records that have such losses, in groups where these are one function of tensors of the same shapes.

    Records of a group share their mask.
    """
    groups: list[list[Record]] = []
    for record in records:
        weights: Any = record.router.loss_weights
        if not weights.keys().isdisjoint(losses):
            group = next((group for group in groups if _are_alike(group[0], record)), None)
            if group is None:
                groups.append([record])
            else:
                group.append(record)
    return groups


def _are_alike(one: Record, other: Record) -> bool:
    """Whether a loss is one function of both; sizes are compared and not hashed, which would fix them when compiled."""
    if one.mask is not other.mask or one.routing.n_experts != other.routing.n_experts:
        return False
    if one.router.loss_weights != other.router.loss_weights:
        return False
    for mine, theirs in zip(_fields(one.routing), _fields(other.routing), strict=True):
        if mine is None or theirs is None:
            if mine is not theirs:
                return False
        elif mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            return False
    return True


def _of_layers(losses: Losses, records: list[Record]) -> dict[str, Tensor]:
    """Return losses of L records that are alike, (L, …): at once, as L small losses cost 5 % of a step."""
    first, n_experts = records[0], records[0].routing.n_experts
    if len(records) == 1:
        return {name: loss(first.routing, first.mask).unsqueeze(0) for name, loss in losses.items()}
    layers = zip(*(_fields(record.routing) for record in records), strict=True)
    stacked = [None if values[0] is None else torch.stack(values) for values in layers]

    def of_one(*fields: Any) -> list[Tensor]:
        weights, indices, logits, scores, usage = fields
        routing = Routing(weights, indices, n_experts, logits, scores, usage=usage)
        return [loss(routing, first.mask) for loss in losses.values()]

    in_dims = tuple(None if value is None else 0 for value in stacked)
    return dict(zip(losses, torch.vmap(of_one, in_dims)(*stacked), strict=True))


Losses = dict[str, Callable[[Routing, Tensor | None], Tensor]]
# What a loss may look at: weights (*rows, K), indices, logits (*rows, E), scores, usage; None where there are none.
_fields = operator.attrgetter("weights", "indices", "logits", "scores", "usage")


def log_prob_per_example(trace: Trace, n_examples: int) -> Tensor:
    """Return log Q of each example's choices, summed over layers and counted rows, (B,).

    Args:
        trace: of one selection of the whole network.
        n_examples: B; 1 sums the whole batch.
    """
    alike: dict[tuple[torch.Size, int | None], list[Tensor]] = {}
    masks: dict[int | None, Tensor | None] = {None: None}
    for record in trace:
        log_prob, mask = record.routing.log_prob, record.mask
        if log_prob is not None:
            key = None if mask is None or mask.shape != log_prob.shape else id(mask)
            masks[key] = None if key is None else mask
            alike.setdefault((log_prob.shape, key), []).append(log_prob)
    sums = []
    for (_, key), values in alike.items():  # layers together: one by one, they cost more than the layers' products
        layers, mask = torch.stack(values), masks[key]  # (L, *rows)
        layers = layers if mask is None else torch.where(mask, layers, 0)
        sums.append(layers.reshape(len(values), n_examples, -1).sum((0, 2)))
    return torch.stack(sums).sum(0)


def _matching_rule(loss: Tensor, logits: Tensor, labels: Tensor) -> str:
    """Return the rule whose sum over examples is the model's own loss, or "none"."""
    if labels.is_floating_point() or bool((labels >= logits.shape[-1]).any()):  # not class ids, e.g. counts to regress
        return "none"
    with torch.no_grad():
        for rule in ("aligned", "shifted"):
            rows = example_losses(logits, labels, rule == "shifted")
            if rows is not None and torch.isclose(rows.sum().float(), loss.float(), rtol=1e-3, atol=1e-5):
                return rule
    return "none"
