"""Many LoRA adapters on one base in one process. S-LoRA: Sheng et al. 2023, arXiv 2311.03285."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ContextError, ShapeError, unknown_name
from .device_cache import DeviceCache, Resident
from .host_adapters import HostAdapter, put_on_host


@dataclass(frozen=True)
class _Batch:
    """Which adapter each example has: those of one adapter lie side by side once the examples are sorted."""

    size: int
    residents: list[Resident]
    counts: list[int]  # examples of each
    order: Tensor | None  # (n,) the examples that have one, sorted; None where they are in order and all there


class AdapterPool:
    """Thousands of LoRA adapters on the host, a few on the device, and batches whose examples have different ones.

    y_b = W x_b + (x_b down_a^T) up_a with a the adapter of example b; each adapter's own rank, no padding. For
    inference. An example's output does not depend on what else is in the batch.

    Args:
        model: a base without mixtures, in eval mode; its layers (*rows, i) -> (*rows, o) get hooks.
        capacity_bytes: of adapters on the device, at every moment.
        max_rank: the largest rank that `add` takes; None is any.
        host: folder for the host's files; None is a temporary one that ends with the pool.

    Raises:
        ConfigError: a capacity below 1.
    """

    def __init__(
        self, model: nn.Module, capacity_bytes: int, *, max_rank: int | None = None, host: str | Path | None = None
    ) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, got {capacity_bytes}.")
        self.model, self.max_rank = model, max_rank
        self.cache = DeviceCache(capacity_bytes, next(model.parameters()).device)
        self._folder = Path(tempfile.mkdtemp(prefix="moa-pool-") if host is None else host)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clean = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True) if host is None else None
        self._hosts: dict[str, HostAdapter] = {}
        self._hooks: dict[str, Any] = {}
        self._written = 0
        self._lock = threading.Lock()
        self._here = threading.local()

    @property
    def names(self) -> list[str]:
        """Names of the adapters on the host."""
        return list(self._hosts)

    def add(self, name: str, folder: str | Path) -> None:
        """Put a PEFT LoRA folder, factors (r, i) and (o, r), into the pool, while others are served.

        Raises:
            ConfigError: the name is taken, or the adapter by itself is larger than the device's capacity.
            CheckpointError: a folder that is not a LoRA, or is for another base, or whose rank is too large.
            NumericsError: NaN or infinity in a factor.
        """
        if name in self._hosts:
            raise ConfigError(f"adapter {name!r} is in the pool already: replace it, or choose another name.")
        self._put(name, folder)

    def replace(self, name: str, folder: str | Path) -> None:
        """Put a folder, factors (r, i) and (o, r), in the place of an adapter: what runs ends with the old one.

        Raises:
            ContextError: no such adapter.
            ConfigError, CheckpointError, NumericsError: see `add`; the old one stays.
        """
        self._host(name)
        self._put(name, folder)
        self.cache.drop(name)

    def remove(self, name: str) -> None:
        """Take an adapter (r, i), (r, o) out of the pool: what runs ends with it, a new request for it is an error.

        Raises:
            ContextError: no such adapter.
        """
        self._host(name)
        del self._hosts[name]
        self.cache.drop(name)

    @contextlib.contextmanager
    def lease(self, name: str | None) -> Iterator[None]:
        """Keep one request's adapter (r, i), (r, o) on the device inside the block; None is the base.

        A scheduler takes one for each request, so that what cannot run is an error of that request alone.

        Raises:
            ContextError: no such adapter: it was never added, or it was removed.
            BackendError: everything on the device is pinned.
        """
        if name is None:
            yield
            return
        resident = self.cache.pin(self._host(name))
        try:
            yield
        finally:
            self.cache.unpin(resident)

    def __call__(self, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Return the model's output for inputs (B, S), example b with adapter adapter_ids[b].

        Args:
            args, kwargs: of the model.
            adapter_ids: B names, None for the base as it is; None for the whole argument is the base for all.

        Raises:
            ContextError: no such adapter.
            BackendError: the batch's adapters do not fit on the device together.
            ShapeError: later, where the number of rows is not a multiple of B.
        """
        with torch.no_grad(), self._batch(adapter_ids):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_ids: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Return the model's `generate` for inputs (B, S), example b with adapter adapter_ids[b]; see `__call__`."""
        model: Any = self.model
        with torch.no_grad(), self._batch(adapter_ids):
            return model.generate(*args, **kwargs)

    def close(self) -> None:
        """Take the hooks off the layers (*rows, i) -> (*rows, o), and remove the temporary files."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._hosts.clear()
        if self._clean is not None:
            self._clean()

    def _host(self, name: str) -> HostAdapter:
        found = self._hosts.get(name)
        if found is None:
            raise ContextError(unknown_name("adapter", name, self._hosts, "this pool (never added, or removed)"))
        return found

    def _put(self, name: str, folder: str | Path) -> None:
        with self._lock:
            self._written += 1
            file = self._folder / f"{self._written}.safetensors"
        found = put_on_host(name, folder, self.model, file, self.max_rank)
        if found.n_bytes > self.cache.capacity_bytes:
            file.unlink()
            raise ConfigError(
                f"adapter {name!r} has {found.n_bytes} bytes, the pool's device holds {self.cache.capacity_bytes}."
            )
        with self._lock:
            for layer, *_ in found.layout:
                if layer not in self._hooks:
                    module = self.model.get_submodule(layer)
                    self._hooks[layer] = module.register_forward_hook(partial(self._add, layer))
        self._hosts[name] = found

    @contextlib.contextmanager
    def _batch(self, adapter_ids: Sequence[str | None] | None) -> Iterator[None]:
        if isinstance(adapter_ids, str):
            raise ContextError(f"adapter_ids is one name for each example, got the text {adapter_ids!r}: give a list.")
        ids = list(adapter_ids or ())
        by_name: dict[str, list[int]] = {}
        for example, name in enumerate(ids):
            if name is not None:
                by_name.setdefault(name, []).append(example)
        hosts = {name: self._host(name) for name in by_name}  # before anything is loaded
        before = getattr(self._here, "batch", None)
        pinned: list[Resident] = []
        try:
            for name in by_name:
                pinned.append(self.cache.pin(hosts[name]))
            order = [example for examples in by_name.values() for example in examples]
            self._here.batch = _Batch(
                len(ids),
                list(pinned),
                [len(examples) for examples in by_name.values()],
                None if order == list(range(len(ids))) else torch.tensor(order, device=self.cache.device),
            )
            yield
        finally:
            self._here.batch = before
            for resident in pinned:
                self.cache.unpin(resident)

    def _add(self, layer: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """Add what each example's adapter gives to a layer's output (*rows, o) for x (*rows, i)."""
        batch: _Batch | None = getattr(self._here, "batch", None)
        if batch is None or not batch.residents:
            return None
        x: Tensor = args[0]
        n_rows = x.shape[:-1].numel()
        if n_rows % batch.size:
            raise ShapeError(f"{layer} sees {n_rows} rows, no multiple of the {batch.size} adapter_ids of the batch.")
        rows, order = n_rows // batch.size, batch.order
        total = out.reshape(batch.size, rows, -1)  # (B, rows, o), a view
        own = x.reshape(batch.size, rows, -1)
        own = own if order is None else own.index_select(0, order)  # (n, rows, i)
        factors = [resident.factors.get(layer) for resident in batch.residents]
        dtype = next((pair[0].dtype for pair in factors if pair is not None), None)
        if dtype is None:
            return None  # no adapter of the batch has this layer
        parts = own.flatten(0, 1).to(dtype).split([count * rows for count in batch.counts])
        added = [
            part.new_zeros(len(part), total.shape[-1]) if pair is None else part.mm(pair[0].T).mm(pair[1])
            for part, pair in zip(parts, factors, strict=True)
        ]
        change = torch.cat(added).to(out.dtype).view(-1, *total.shape[1:])  # (n, rows, o)
        if order is None:
            total.add_(change)
        else:
            total.index_add_(0, order, change)
        return total.view_as(out)
