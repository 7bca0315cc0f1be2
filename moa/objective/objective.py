"""What a training forward returns as its loss: the task's, the routers' own, the policy term of sampling routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import ContextError, NumericsError
from ..types import Routing
from .exchange import over_processes
from .losses import LOSSES, example_losses, rloo
from .trace import Record, Trace


class Objective:
    """Adds up the losses of one training step.

    L = mean_m L_m + mean over layers of Σ coefficient · auxiliary loss + policy term + consistency

    Auxiliary losses are means over layers, so that a coefficient means the same in deep and shallow models; those of
    the model take the rows of all layers together, and are one value whatever the depth. Under data parallelism they
    are those of the rows of all processes. Under gradient accumulation and data parallelism the whole sum is weighted
    by the batch's share of the labelled items: nothing in it is multiplied by the number of processes or of
    micro-batches.

    Attributes:
        per_example_rule: how per-example losses are found: "shifted", "aligned", "none" (batch losses), or None
            before the first step, which then finds the rule; set it where you know it.
    """

    def __init__(self) -> None:
        self.per_example_rule: str | None = None

    def total(
        self, losses: list[Tensor], examples: Tensor | None, traces: list[Trace], apart: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss () and its parts, detached.

        Args:
            losses: M task losses ().
            examples: (M, B) each example's share of them, detached; None uses the batch losses in the policy term.
            traces: M traces.
            apart: (), how far the outputs of the M are from each other, where that is to count.

        Raises:
            ContextError: a routing carries no gradient to a router that should learn from it.
        """
        task = torch.stack(losses).mean()
        parts = {"task": task, **auxiliary_losses(traces)}
        if any(r.routing.is_sampled for r in traces[0]):
            credit = torch.stack([loss.detach().reshape(1) for loss in losses]) if examples is None else examples
            log_probs = torch.stack([log_prob_per_example(t, credit.shape[1]) for t in traces])
            parts["policy"] = rloo(credit, log_probs)
        if apart is not None:
            parts["consistency"] = apart
        total = task
        for name, value in parts.items():
            total = total if name == "task" else total + value.to(task.dtype)
        return total, {name: value.detach() for name, value in parts.items()}

    def per_example(self, losses: list[Tensor], logits: list[Tensor | None], labels: Any) -> Tensor | None:
        """Return each example's share of the task loss under each selection (M, B), or None where nothing gives it.

        The rule is the one under which the loss has the gradient that the model's own has at the logits. That says
        which label each position is scored by, whatever the logits are: their values say nothing where they are nearly
        uniform. A step whose losses the rule does not give all the same counts as a batch.

        Args:
            losses: M task losses () that the model reports.
            logits: M outputs, (B, C) or (B, S, C), or None.
            labels: (B,) or (B, S) class ids.
        """
        known = [item for item in logits if isinstance(item, Tensor)]
        if len(known) < len(losses) or not isinstance(labels, Tensor):
            return None
        if self.per_example_rule is None:
            self.per_example_rule = rule_of(losses[0], known[0], labels)
        if self.per_example_rule in (None, "none"):
            return None
        with torch.no_grad():
            found = [example_losses(item, labels, self.per_example_rule == "shifted") for item in known]
            rows = [row for row in found if row is not None]
            if len(rows) < len(losses):
                return None
            examples, whole = torch.stack(rows), torch.stack(losses).unsqueeze(1)  # (M, B), (M, 1)
            agree = torch.isclose(examples.sum(1, keepdim=True), whole.to(examples.dtype), rtol=1e-2, atol=1e-4).all()
            return torch.where(agree, examples, whole.to(examples.dtype))

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
    def diagnose(
        total: Tensor,
        traces: list[Trace],
        labels: Any,
        shifts: bool,
        layers: Iterable[tuple[str, nn.Module]],
        step: int,
    ) -> None:
        """Say why a training loss () is not finite, where the routers, the experts or the labels are to blame.

        Args:
            total: the loss.
            traces: M traces.
            labels: (B,) or (B, S) class ids.
            shifts: True where the first position of a row is never predicted.
            layers: what was added to each, by its name, with parameters such as down (E, r, i).
            step: the optimizer step that this loss is for, from 1.

        Raises:
            ContextError: no label is left.
            NumericsError: a router or a layer's experts are not finite; the layer and the step are named.
        """
        if torch.compiler.is_compiling() or bool(torch.isfinite(total)):
            return
        for name, layer in layers:
            for key, parameter in _used_by(layer):
                if not bool(torch.isfinite(parameter).all()):
                    part = "router" if key.startswith("router.") else "experts"
                    raise NumericsError(
                        f"in training step {step} the loss is not finite: the {part} of {name}, {key}, holds NaN or "
                        "infinity. Training diverged; go on from an earlier checkpoint with a lower learning rate."
                    )
        for trace in traces:
            for record in trace:
                logits = record.routing.logits
                if logits is not None and not bool(torch.isfinite(logits).all()):
                    kind = "NaN" if bool(torch.isnan(logits).any()) else "infinite"
                    raise NumericsError(
                        f"in training step {step} the router of {record.name} gives {kind} logits: its input is not "
                        "finite. Lower the learning rate, or look for NaN in the data."
                    )
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            counted = labels[..., 1:] if shifts and labels.ndim > 1 else labels
            if not bool((counted != -100).any()):
                raise ContextError(
                    f"no label is left in this batch: all of {tuple(labels.shape)} are -100 (or are in the first "
                    "position, which is never predicted). Check truncation and the prompt length."
                )


def _used_by(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a layer, of any shape, and those of modules that it calls and that have another owner."""
    for path, user in layer.named_modules():
        yield from user.named_parameters(path, recurse=False)
        for name, lent in vars(user).items():
            if isinstance(lent, nn.Module):
                yield from lent.named_parameters(f"{path}.{name}" if path else name)


@dataclass(frozen=True)
class _Term:
    """One loss of L layers of one trace that are alike: its name, coefficient, whose rows it is of, its sums (L, …)."""

    name: str
    coefficient: float
    over: str
    group: tuple[int, int]  # number of the trace, E
    sums: Tensor


def auxiliary_losses(traces: list[Trace]) -> dict[str, Tensor]:
    """Return name -> mean over selections and layers of coefficient · loss, each ().

    Losses over the global batch are the same in every process, see `moa.objective.exchange`. In a loss of the model, a
    layer has the value of the layers that it shares a selection, a coefficient and a number of experts with.

    Raises:
        ContextError: a routing carries no gradient to a router that should learn from it.
    """
    own = [term for number, trace in enumerate(traces) for term in _terms(number, trace)]
    added = iter(over_processes([term.sums for term in own if term.over == "global"]))
    terms = [replace(term, sums=next(added)) if term.over == "global" else term for term in own]
    values: dict[str, list[Tensor]] = {}
    together: dict[tuple[str, float, str, tuple[int, int]], list[Tensor]] = {}
    for term in terms:
        if LOSSES[term.name].of_model:
            together.setdefault((term.name, term.coefficient, term.over, term.group), []).append(term.sums)
        else:
            values.setdefault(term.name, []).append(term.coefficient * LOSSES[term.name].of(term.sums))
    for (name, coefficient, *_), parts in together.items():
        layers = torch.cat(parts)  # (L, …)
        value = coefficient * LOSSES[name].of(layers.sum(0))
        values.setdefault(name, []).append(value.expand(len(layers)))
    return {name: torch.cat(found).mean() for name, found in values.items()}


def _terms(number: int, trace: Trace) -> Iterator[_Term]:
    """Yield the losses that the routers of one trace ask for, layers that are alike together.

    Raises:
        ContextError: one carries no gradient to a router that should learn from it.
    """
    for alike in _alike(trace):
        router: Any = alike[0].router
        names = [name for name in router.loss_weights if name in LOSSES]
        for name, sums in zip(names, _sums_of_layers(names, alike), strict=True):
            routers: list[Any] = [record.router for record in alike]
            if not sums.requires_grad and any(p.requires_grad for other in routers for p in other.learned()):
                raise ContextError(
                    f"the {name} loss of {alike[0].name} carries no gradient, so its router would not learn from "
                    "it. Reentrant gradient checkpointing does this: use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            group = number, alike[0].routing.n_experts
            yield _Term(name, router.loss_weights[name], router.losses_over, group, sums)


def _alike(records: Iterable[Record]) -> list[list[Record]]:
    """Return records in groups whose routings are made of tensors of the same shapes, with the same mask and losses."""
    groups: list[list[Record]] = []
    for record in records:
        for group in groups:
            if _are_alike(group[0], record):
                group.append(record)
                break
        else:
            groups.append([record])
    return groups


def _are_alike(one: Record, other: Record) -> bool:
    """Whether a loss is one function of both; sizes are compared and not hashed, which would fix them when compiled."""
    if one.mask is not other.mask or one.n_streams != other.n_streams:
        return False
    if one.router.loss_weights != other.router.loss_weights or one.router.losses_over != other.router.losses_over:
        return False
    for mine, theirs in zip(one.routing.given, other.routing.given, strict=True):
        if mine is theirs:
            continue
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
                return False
        elif isinstance(mine, Tensor) or isinstance(theirs, Tensor) or mine != theirs:
            return False
    return True


def _of_layers(records: list[Record]) -> tuple[Any, ...]:
    """Return what the routings of L records that are alike are made of, each tensor (L, *rows, …)."""
    fields = zip(*(record.routing.given for record in records), strict=True)
    return tuple(torch.stack(values) if isinstance(values[0], Tensor) else values[0] for values in fields)


def _sums_of_layers(names: list[str], records: list[Record]) -> list[Tensor]:
    """Return the sums of losses over L records that are alike, (L, …), at once: L small losses cost 5 % of a step."""
    if not names:
        return []
    layers = Routing(*_of_layers(records))
    return [LOSSES[name].sums(layers, records[0].mask, 1) for name in names]


def log_prob_per_example(trace: Trace, n_examples: int) -> Tensor:
    """Return log Q of each example's choices, summed over layers and counted rows, (B,).

    Args:
        trace: of one selection of the whole network.
        n_examples: B; 1 sums the whole batch.
    """
    sums = []
    # layers together: one by one, they cost more than the layers' products
    for alike in _alike([record for record in trace if record.routing.is_sampled]):
        layers = Routing(*_of_layers(alike)).log_prob  # (L, *rows)
        assert layers is not None
        mask = alike[0].mask
        if mask is not None and mask.shape == layers.shape[1:]:
            layers = torch.where(mask, layers, 0)
        sums.append(layers.reshape(len(alike) * alike[0].n_streams, n_examples, -1).sum((0, 2)))
    return torch.stack(sums).sum(0)


@torch.enable_grad()
def rule_of(loss: Tensor, logits: Tensor, labels: Tensor) -> str | None:
    """Return the rule, "shifted" or "aligned", whose loss has the gradient of a model's own at its logits, or "none".

    Args:
        loss: () that the model reports.
        logits: (B, C) or (B, S, C), of which the loss was formed.
        labels: (B,) or (B, S) class ids.

    Returns:
        None where this batch has no finite loss, which says nothing.
    """
    if labels.is_floating_point() or bool((labels >= logits.shape[-1]).any()):  # not class ids, e.g. counts to regress
        return "none"
    if not bool(torch.isfinite(loss)):
        return None
    if not (loss.requires_grad and logits.requires_grad):
        return "none"
    own = _gradient_at(logits, loss)
    for rule in ("shifted", "aligned"):
        leaf = logits.detach().requires_grad_()
        rows = None if own is None else example_losses(leaf, labels, rule == "shifted")
        if rows is not None and own is not None:
            (expected,) = torch.autograd.grad(rows.sum(), leaf)
            # another label makes a difference as large as the gradient itself, 16-bit logits one of some thousandths
            if bool((own - expected).abs().amax() <= 0.02 * expected.abs().amax()):
                return rule
    return "none"


def _gradient_at(logits: Tensor, loss: Tensor) -> Tensor | None:
    """Return ∂loss/∂logits of the logits' shape, or None where the loss was formed of something else.

    A hook, as DeepSpeed puts on every module, may hand out a copy of the logits that the loss was formed of.
    """
    edge: GradientEdge | None = get_gradient_edge(logits)
    while edge is not None:
        (own,) = torch.autograd.grad(loss, edge, retain_graph=True, allow_unused=True)
        if own is not None:
            return own if own.shape == logits.shape else None
        before = [at for at in edge.node.next_functions if at[0] is not None]
        edge = GradientEdge(*before[0]) if len(before) == 1 else None
    return None
