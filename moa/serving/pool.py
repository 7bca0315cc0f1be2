"""Many adapters on one base in one process. S-LoRA: Sheng et al. 2023, arXiv 2311.03285."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..delta import Delta, LowRank
from ..errors import BackendError, ConfigError, ContextError, ShapeError, unknown_name
from ..merge.codec import BIT_WIDTHS
from ..model.turns import Turns
from .device_cache import DeviceCache, Resident
from .host_adapters import HostAdapter, put_on_host
from .scattered import weights_of, written
from .small_products import MOST_ROWS, add_small


@dataclass(frozen=True)
class _Batch:
    """Which adapter each example has: those of one adapter lie side by side once the examples are sorted."""

    size: int
    residents: list[Resident]
    counts: list[int]  # examples of each
    order: Tensor | None  # (n,) the examples that have one, sorted; None where they are in order and all there
    called: set[str] = field(default_factory=set)  # layers that the base has called

    def check_called(self) -> None:
        """Check that the base has called layers (*rows, i) -> (*rows, o) of every kind that an adapter changes.

        Raises:
            BackendError: it has not: it computes with their weights in another way, which hides their input.
        """
        reached = {layer.rpartition(".")[2] for layer in self.called}
        for resident in self.residents:
            for layer in resident.changes:
                if layer.rpartition(".")[2] not in reached:
                    raise BackendError(
                        f"the base never called {layer}, so adapter {resident.host.name!r} could not act on it: a "
                        "fused or quantised kernel hides the layer's input. Load the base without that kernel, or use "
                        "an adapter of other layers."
                    )

    @functools.cached_property
    def small(self) -> bool:
        """Tell whether each adapter has few examples, and factors that NumPy can see."""
        return max(self.counts) <= MOST_ROWS and all(resident.is_small for resident in self.residents)

    @functools.cached_property
    def rows(self) -> Any:
        """`order` as an array (n,)."""
        return None if self.order is None else self.order.numpy()


class AdapterPool:
    """Thousands of adapters on the host, a few on the device, and batches whose examples have different ones.

    y_b = W x_b + (x_b down_a^T) up_a with a the adapter of example b; each adapter's own rank, no padding. A SHiRA's
    change has a few entries: a batch that has no other adapter runs with them written into the base's weights, and the
    stored values back afterwards, while other threads' batches wait; beside others it is a sparse product. For
    inference. An example's output does not depend on what else is in the batch.

    Args:
        model: a base without mixtures, in eval mode; its layers (*rows, i) -> (*rows, o) get hooks.
        capacity_bytes: of adapters on the device, at every moment.
        max_rank: the largest rank that `add` takes; None is any.
        host_bits: 1, 2, 4 or 8 bits a number on the host, by `moa.merge.codec`, decoded on the device; None is as they
            came. 1 bit is 1/32 of the host's memory, and other numbers than those that were trained.
        host: folder for the host's files; None is a temporary one that ends with the pool.

    Raises:
        ConfigError: a capacity below 1, or bits that the codec has not.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity_bytes: int,
        *,
        max_rank: int | None = None,
        host_bits: int | None = None,
        host: str | Path | None = None,
    ) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, got {capacity_bytes}.")
        if host_bits not in (None, *BIT_WIDTHS):
            raise ConfigError(f"host_bits is {host_bits}, expected one of {BIT_WIDTHS}, or None.")
        self.model, self.max_rank, self.host_bits = model, max_rank, host_bits
        self.cache = DeviceCache(capacity_bytes, next(model.parameters()).device)
        self._folder = Path(tempfile.mkdtemp(prefix="moa-pool-") if host is None else host)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clean = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True) if host is None else None
        self._hosts: dict[str, HostAdapter] = {}
        self._hooks: dict[str, Any] = {}
        self._written = 0
        self._lock = threading.Lock()
        self._here = threading.local()
        self._turns = Turns()

    @property
    def names(self) -> list[str]:
        """Names of the adapters on the host."""
        return list(self._hosts)

    def add(self, name: str, folder: str | Path) -> None:
        """Put a PEFT folder of a LoRA or SHiRA, changes (o, i), into the pool, while others are served.

        Raises:
            ConfigError: the name is taken, or the adapter by itself is larger than the device's capacity.
            CheckpointError: a folder that is neither, or is for another base, or whose rank is too large.
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

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to bring adapters (r, i), (r, o) onto the device that requests will soon ask for; a hint.

        A thread of its own copies them, on a GPU in a stream of its own, beside what runs; those that have no room
        beside what is pinned come when they are asked for.

        Raises:
            ContextError: no such adapter.
        """
        for host in [self._host(name) for name in names]:
            self.cache.prefetch(host)

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
            BackendError: the batch's adapters do not fit on the device together; or the base has not called a layer
                that one of them changes.
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
        self.cache.close()
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
        found = put_on_host(name, folder, self.model, file, self.max_rank, self.host_bits)
        if found.n_bytes > self.cache.capacity_bytes:
            file.unlink()
            raise ConfigError(
                f"adapter {name!r} has {found.n_bytes} bytes, the pool's device holds {self.cache.capacity_bytes}."
            )
        with self._lock:
            for part in found.parts:
                if part.layer not in self._hooks:
                    module = self.model.get_submodule(part.layer)
                    self._hooks[part.layer] = module.register_forward_hook(partial(self._add, part.layer))
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
            batch = _Batch(
                len(ids),
                list(pinned),
                [len(examples) for examples in by_name.values()],
                None if order == list(range(len(ids))) else torch.tensor(order, device=self.cache.device),
            )
            only = batch.residents[0] if batch.counts == [batch.size] else None
            weights = weights_of(self.model, only.changes) if only is not None and only.is_sparse else None
            if only is None or weights is None:
                self._here.batch = batch
                with self._turns.beside():
                    yield
                batch.check_called()
            else:
                self._here.batch = None  # the hooks have nothing to add
                with self._turns.alone(), written(weights, only.changes):
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
        batch.called.add(layer)
        x: Tensor = args[0]
        n_rows = x.shape[:-1].numel()
        if n_rows % batch.size:
            raise ShapeError(f"{layer} sees {n_rows} rows, no multiple of the {batch.size} adapter_ids of the batch.")
        rows, order = n_rows // batch.size, batch.order
        total = out.reshape(batch.size, rows, -1)  # (B, rows, o), a view
        if rows == 1 and self._added_small(layer, batch, total[:, 0], x):
            return total.view_as(out)
        own = x.reshape(batch.size, rows, -1)
        own = own if order is None else own.index_select(0, order)  # (n, rows, i)
        changes = [resident.changes.get(layer) for resident in batch.residents]
        dtype = next((change.stored.dtype for change in changes if change is not None), None)
        if dtype is None:
            return None  # no adapter of the batch has this layer
        parts = own.flatten(0, 1).to(dtype).split([count * rows for count in batch.counts])
        added = [_changed(part, change, total.shape[-1]) for part, change in zip(parts, changes, strict=True)]
        change = torch.cat(added).to(out.dtype).view(-1, *total.shape[1:])  # (n, rows, o)
        if order is None:
            total.add_(change)
        else:
            total.index_add_(0, order, change)
        return total.view_as(out)

    def _added_small(self, layer: str, batch: _Batch, y: Tensor, x: Tensor) -> bool:
        """Add a decoding step's changes to y (B, o) in place of x (*rows, i) and return True, where NumPy can."""
        fits = batch.small and y.dtype == x.dtype == torch.float32 and y.is_contiguous()
        if fits:
            factors = [resident.factors.get(layer) for resident in batch.residents]
            add_small(y, x.reshape(batch.size, -1), batch.rows, batch.counts, factors)
        return fits


def _changed(x: Tensor, change: Delta | None, d_out: int) -> Tensor:
    """Return ΔW x, (T, o), of rows x (T, i)."""
    if isinstance(change, LowRank):
        return x.mm(change.down.T).mm(change.up.T)
    return x.new_zeros(len(x), d_out) if change is None else change.before(x.T).dense().T
