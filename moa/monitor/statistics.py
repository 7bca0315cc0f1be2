"""How routers spread their rows over the experts: load, entropy, effective experts, collapse. Pure functions.

Load: Fedus et al. 2021, arXiv 2101.03961. MaxVio: Wang et al. 2024, arXiv 2408.15664. Effective number: Hill 1973.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..rows import in_streams, repeat_to
from ..types import Routing

DEAD_SHARE = 0.1
COLLAPSE_BELOW = 0.1
_CHUNK = 1 << 24  # numbers in the largest temporary of `RoutingStatistics.add`


class RoutingCollapseWarning(UserWarning):
    """A layer sends nearly everything to the fewest experts that it can use; see `has_collapsed`."""


class Recorded(Protocol):
    """What is read of one call of one mixture: see `moa.objective.Record`."""

    @property
    def name(self) -> str:
        """Name of the layer."""

    @property
    def routing(self) -> Routing:
        """Its routing, weights (*rows, K)."""

    @property
    def mask(self) -> Tensor | None:
        """(*rows,) True on rows that count."""

    @property
    def n_streams(self) -> int:
        """How many streams of the batch the rows are of, one after the other."""

    @property
    def router(self) -> Any:
        """The router that decided; layers with several branches have several."""


def expert_use(routing: Routing) -> Tensor:
    """Return how much each row uses each expert, (*rows, E) fp32: 1 where chosen; |weight| where all are chosen.

    Args:
        routing: weights (*rows, K), indices (*rows, K) or None.
    """
    if routing.indices is None:
        return routing.weights.detach().abs().float()
    return routing.selected().float()


def expert_load(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Return the load of each expert, its fraction of the counted rows' slots, (E,) fp32, sum 1.

    load_e = Σ_rows use_e / Σ_rows Σ_e use_e

    Args:
        routing: weights (*rows, K).
        mask: (*rows,) bool, True on rows that count; a routing of other rows (sequence, constant) is averaged unmasked.
    """
    use = expert_use(routing)
    if mask is not None and mask.shape == use.shape[:-1]:
        use = use * mask.unsqueeze(-1)
    return normalise(use.reshape(-1, routing.n_experts).sum(0))


def normalise(counts: Tensor) -> Tensor:
    """Return counts (*, E) divided by their sum over E; all zero where nothing was counted."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


def load_entropy(load: Tensor) -> Tensor:
    """Return the entropy of a load (*, E) in nats, (*,): log E when uniform, 0 when one expert has all.

    H = −Σ_e load_e log load_e
    """
    return torch.special.entr(load).sum(-1)


def effective_experts(load: Tensor) -> Tensor:
    """Return exp(H) of a load (*, E), (*,): how many equally loaded experts would have this entropy, 1 … E.

    Source: Hill 1973, the effective number of order 1.
    """
    return load_entropy(load).exp()


def effective_fraction(load: Tensor) -> Tensor:
    """Return exp(H) / E of a load (*, E), (*,): 1 when uniform, k/E when always the same k experts act."""
    return effective_experts(load) / load.shape[-1]


def dead_fraction(load: Tensor, dead_share: float = DEAD_SHARE) -> Tensor:
    """Return the fraction of experts whose load is below dead_share of the uniform share 1/E, (*,).

    Args:
        load: (*, E).
        dead_share: 0.1 calls an expert dead that gets less than a tenth of its even share.
    """
    return (load < dead_share / load.shape[-1]).to(load.dtype).mean(-1)


def largest_share(load: Tensor) -> Tensor:
    """Return the load of the busiest expert, (*,), of a load (*, E); at most 1/k with k distinct experts a row."""
    return load.amax(-1)


def max_violation(load: Tensor) -> Tensor:
    """Return MaxVio = max_e load_e · E − 1, (*,), of a load (*, E): 0 when uniform.

    Source: Wang et al. 2024, arXiv 2408.15664, eq. 4.
    """
    return largest_share(load) * load.shape[-1] - 1


@dataclass(frozen=True)
class LayerLoad:
    """What one layer did over a window of forwards.

    Args:
        load: (E,) fraction of the counted rows' slots.
        rows: counted rows.
        k: experts that act on a row, distinct; None where all act, weighted.
        by_task: task id -> (E,) load of that task's rows; tasks without rows are absent.
        rows_without_task: counted rows that no task id in range belongs to.
        dead_share: see `dead_fraction`.
    """

    load: Tensor
    rows: float
    k: int | None
    by_task: Mapping[int, Tensor] = field(default_factory=dict)
    rows_without_task: float = 0.0
    dead_share: float = DEAD_SHARE

    @property
    def n_experts(self) -> int:
        """E."""
        return self.load.shape[-1]

    def measures(self) -> dict[str, float]:
        """Return every measure of the load by the name of its function; the entropy is in nats."""
        return {
            "load_entropy": float(load_entropy(self.load)),
            "effective_experts": float(effective_experts(self.load)),
            "effective_fraction": float(effective_fraction(self.load)),
            "dead_fraction": float(dead_fraction(self.load, self.dead_share)),
            "largest_share": float(largest_share(self.load)),
            "max_violation": float(max_violation(self.load)),
        }


def spread(layer: LayerLoad) -> float:
    """Return where the effective experts stand between the fewest possible (0) and all of them (1).

    (exp H − floor) / (E − floor), floor = k for distinct experts, 1 for a weighting of all

    A layer that has no choice (E = k, E = 1) spreads by 1.
    """
    floor = layer.k or 1
    if layer.n_experts <= floor:
        return 1.0
    return (float(effective_experts(layer.load)) - floor) / (layer.n_experts - floor)


def has_collapsed(layer: LayerLoad, below: float = COLLAPSE_BELOW) -> bool:
    """Tell whether a layer has collapsed: its `spread` is less than `below`, seen on at least 16 slots per expert.

    The measure is relative to k, so k = 1 with even load is as far from a warning as k = 4, and a layer without a
    choice (E = k) never warns. Fewer slots say nothing: one row uses only k experts.
    """
    return layer.rows * (layer.k or 1) >= 16 * layer.n_experts and spread(layer) < below


def collapse_message(name: str, layer: LayerLoad, advice: str) -> str:
    """Return a collapse in words: the layer, what was seen over its load (E,), and what to try."""
    floor = layer.k or 1
    top = layer.load.topk(floor)
    which = ", ".join(str(e) for e in sorted(int(e) for e in top.indices))
    m = layer.measures()
    return (
        f"the routing of {name} has collapsed: expert{'s' if floor > 1 else ''} {which} took "
        f"{100 * float(top.values.sum()):.0f} % of the load of {layer.rows:.0f} rows, and "
        f"{m['dead_fraction'] * layer.n_experts:.0f} of {layer.n_experts} experts are dead "
        f"(effective experts {m['effective_experts']:.2f}; {floor} is the least, {layer.n_experts} is even). {advice}"
    )


class RoutingStatistics:
    """Adds up the routings of many forwards on their device, without a host sync; `summary` moves them once.

    Layers are keyed by name; a second router of the same layer is "name#1". Padding (masked rows) is left out. A
    weighting of all experts counts by |weight|, anything else by choice.

    Args:
        n_tasks: rows of the per-task table; 0 keeps no tasks. Ids outside 0 … n_tasks − 1 count without a task.
        dead_share: see `dead_fraction`.

    Raises:
        ConfigError: n_tasks < 0, or dead_share outside (0, 1].
    """

    def __init__(self, n_tasks: int = 0, dead_share: float = DEAD_SHARE) -> None:
        if n_tasks < 0 or not 0 < dead_share <= 1:
            raise ConfigError(f"n_tasks must be >= 0 and dead_share in (0, 1], got {n_tasks} and {dead_share}.")
        self.n_tasks, self.dead_share = n_tasks, dead_share
        self._labels: dict[str, list[int]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; nothing remains on the device."""
        # one table per group of layers that were added together: (L, n_tasks + 1, E) counts, (n_tasks + 1,) rows
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._tables)

    @torch.no_grad()
    def add(self, trace: Iterable[Recorded], task_ids: Tensor | None = None) -> None:
        """Count every record of a forward.

        Args:
            trace: the records.
            task_ids: (B,) int64 task of each example, broadcast to its rows; rows that are not a multiple of B count
                without a task.
        """
        groups: dict[tuple[Any, ...], list[tuple[str, Routing, Tensor | None]]] = {}
        for record in trace:
            routing, mask = record.routing, record.mask
            rows = routing.weights.shape[:-1]
            mask = mask if mask is not None and mask.shape == rows else None
            kind = (routing.indices is None, routing.weights.device, id(mask))
            key = (rows, record.n_streams, routing.k, routing.n_experts, *kind)
            groups.setdefault(key, []).append((self._label(record), routing, mask))
        for (rows, n_streams, _, n_experts, *_), members in groups.items():
            ids = task_ids if task_ids is None else in_streams(task_ids, n_streams)
            step = max(1, _CHUNK // max(1, rows.numel() * n_experts))
            for start in range(0, len(members), step):
                self._count(rows, members[start : start + step], ids)

    def _label(self, record: Recorded) -> str:
        seen = self._labels.setdefault(record.name, [])
        if id(record.router) not in seen:
            seen.append(id(record.router))
        place = seen.index(id(record.router))
        return f"{record.name}#{place}" if place else record.name

    def _count(
        self, rows: torch.Size, members: list[tuple[str, Routing, Tensor | None]], task_ids: Tensor | None
    ) -> None:
        """Add a group of layers whose routings have the same rows, K, E, device and mask."""
        _, first, mask = members[0]
        weights = first.weights
        if first.indices is None:
            use = torch.stack([r.weights for _, r, _ in members]).abs().float()
        else:
            chosen = torch.stack([r.indices for _, r, _ in members if r.indices is not None])
            use = torch.zeros(*chosen.shape[:-1], first.n_experts, device=weights.device).scatter_(-1, chosen, 1.0)
        outer, inner = (rows[0], rows[1:].numel()) if rows else (1, 1)
        use = use.reshape(len(members), outer, inner, first.n_experts)
        if mask is None:
            counted = torch.full((outer,), float(inner), device=weights.device)
        else:
            kept = mask.reshape(outer, inner).float()
            use, counted = use * kept.unsqueeze(-1), kept.sum(1)
        # fp64: autocast does not cast it (counts in bf16 would stop at 256), and long windows stay exact
        exact = torch.float32 if weights.device.type == "mps" else torch.float64
        table = self._task_table(outer, task_ids, weights.device).to(exact)
        counts, n_rows = table @ use.sum(2).to(exact), table @ counted.to(exact)
        k = None if first.indices is None else first.k
        key = (tuple(label for label, _, _ in members), k, weights.device, first.n_experts)
        if key in self._tables:
            self._tables[key][0].add_(counts)
            self._tables[key][1].add_(n_rows)
        else:
            self._tables[key] = (counts, n_rows)

    def _task_table(self, outer: int, task_ids: Tensor | None, device: torch.device) -> Tensor:
        """Return which task each outer row belongs to, (n_tasks + 1, outer) fp32; the last line is "no task"."""
        if task_ids is None or not self.n_tasks or (outer != 1 and outer % task_ids.shape[0]):
            table = torch.zeros(self.n_tasks + 1, outer, device=device)
            table[-1] = 1
            return table
        ids = task_ids.to(device, non_blocking=True)
        ids = torch.where((ids >= 0) & (ids < self.n_tasks), ids, self.n_tasks)
        if outer > 1:
            ids = repeat_to(ids, outer, "task_ids")
        table = (ids == torch.arange(self.n_tasks + 1, device=device).unsqueeze(1)).float()
        return table if outer > 1 else table.sum(1, keepdim=True)  # a routing shared by the batch counts per example

    def summary(self, all_reduce: bool = False) -> dict[str, LayerLoad]:
        """Return layer -> what it did since the last `reset`, (E,) fp64 on the CPU; layers without a row are left out.

        Args:
            all_reduce: add up over the processes of torch.distributed; then every process must call this.
        """
        found = [
            (label, part, rows, k)
            for (labels, k, *_), (table, rows) in self._on_host().items()
            for label, part in zip(labels, table, strict=True)
        ]
        if all_reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            # lists, not tensors: processes may have seen other layers, and this runs at log steps only
            torch.distributed.all_gather_object(everyone, found)
            found = [item for theirs in everyone for item in theirs]
        counts: dict[str, tuple[Tensor, Tensor, int | None]] = {}
        for label, part, rows, k in found:
            before, rows_before, _ = counts.get(label, (part, 0, k))
            if before.shape != part.shape or label not in counts:  # the latest number of experts, if that has changed
                before, rows_before = torch.zeros_like(part), torch.zeros_like(rows)
            counts[label] = (before + part, rows_before + rows, k)
        return {
            label: LayerLoad(
                load=normalise(part.sum(0)),
                rows=float(rows.sum()),
                k=k,
                by_task={t: normalise(part[t]) for t in range(self.n_tasks) if rows[t] > 0},
                rows_without_task=float(rows[-1]),
                dead_share=self.dead_share,
            )
            for label, (part, rows, k) in counts.items()
            if rows.sum() > 0
        }

    def _on_host(self) -> dict[tuple[Any, ...], tuple[Tensor, Tensor]]:
        """Return the tables on the CPU in fp64, one transfer per device."""
        by_device: dict[torch.device, list[tuple[Any, ...]]] = {}
        for key in self._tables:
            by_device.setdefault(key[2], []).append(key)
        out: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        for keys in by_device.values():
            parts = [tensor.flatten() for key in keys for tensor in self._tables[key]]
            pieces = iter(torch.cat(parts).cpu().double().split([p.numel() for p in parts]))
            for key in keys:
                table, rows = self._tables[key]
                out[key] = (next(pieces).view(table.shape), next(pieces).view(rows.shape))
        return {key: out[key] for key in self._tables}
