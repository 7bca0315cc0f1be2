"""Which adapters are on the device: least recently used ones leave, pinned ones stay, capacity is never passed."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..delta import Delta
from ..errors import BackendError
from .host_adapters import HostAdapter
from .small_products import Factors, factors_of


class Resident:
    """An adapter on the device: by layer, its change (o, i). Whoever makes it loads it; others wait.

    Args:
        host: the adapter.

    Attributes:
        changes: by layer.
        factors: by layer, for few rows on a CPU.
        pins: how many use it.
        is_sparse: all its changes are of a few entries.
    """

    def __init__(self, host: HostAdapter) -> None:
        self.host, self.pins = host, 0
        self.changes: dict[str, Delta] = {}
        self.factors: dict[str, Factors] = {}
        self.is_sparse = all(part.rank is None for part in host.parts)
        self.loaded, self.failed = threading.Event(), False
        self._copied: torch.cuda.Event | None = None

    @property
    def is_small(self) -> bool:
        """Whether NumPy sees all its factors, down (i, r) and up (r, o)."""
        return len(self.factors) == len(self.changes)

    def load(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        """Copy the numbers, (n,), to a device; on a GPU beside what runs there, if a stream is given."""
        try:
            with torch.cuda.stream(stream):
                self.changes = self.host.on(device)
                found = {layer: factors_of(change) for layer, change in self.changes.items()}
                self.factors = {layer: pair for layer, pair in found.items() if pair is not None}
                if stream is not None:
                    self._copied = torch.cuda.Event()
                    self._copied.record(stream)
        except BaseException:
            self.failed = True
            raise
        finally:
            self.loaded.set()

    def wait(self) -> None:
        """Let what this thread runs next on a GPU, on tensors of any shape, wait for the copy."""
        if self._copied is not None:
            now = torch.cuda.current_stream(next(iter(self.changes.values())).device)
            now.wait_event(self._copied)
            for change in self.changes.values():
                for tensor in vars(change).values():
                    if isinstance(tensor, Tensor):
                        tensor.record_stream(now)


class DeviceCache:
    """Residents by name, up to so many bytes at every moment.

    Args:
        capacity_bytes: of all changes together.
        device: where they go.

    Attributes:
        used: bytes now, those of replaced or removed adapters that still run included.
        loads: how many copies to the device there were.
    """

    def __init__(self, capacity_bytes: int, device: torch.device) -> None:
        self.capacity_bytes, self.device = capacity_bytes, device
        self.used = self.loads = 0
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._lock = threading.RLock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: ThreadPoolExecutor | None = None

    def pin(self, host: HostAdapter) -> Resident:
        """Return an adapter, (o, i) by layer, that stays until it is unpinned; load it if it is not here.

        Raises:
            BackendError: everything here is pinned, and it does not fit beside that; or another thread that was
                loading it has failed.
        """
        found = self._pinned(host, None)
        found.wait()
        return found

    def prefetch(self, host: HostAdapter) -> None:
        """Load an adapter, (o, i) by layer, from a thread of its own, on a GPU in a stream of its own.

        A hint: where it has no room beside what is pinned, nothing happens.
        """

        def run() -> None:
            with contextlib.suppress(BackendError):
                self.unpin(self._pinned(host, self._stream))

        with self._lock:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "moa prefetch")
            self._ahead.submit(run)

    def close(self) -> None:
        """End the thread that loads ahead, once it has loaded what it was asked for; no tensors."""
        with self._lock:
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.shutdown()

    def _pinned(self, host: HostAdapter, stream: torch.cuda.Stream | None) -> Resident:
        with self._lock:
            found = self._residents.get(host.name)
            is_new = found is None or found.host is not host
            if found is None or is_new:
                self.drop(host.name)
                self._make_room(host)
                found = self._residents[host.name] = Resident(host)
                self.used += host.n_bytes
                self.loads += 1
            self._residents.move_to_end(host.name)
            found.pins += 1
        try:  # outside of the lock: others go on while this copies
            if is_new:
                found.load(self.device, stream)
            found.loaded.wait()
            if found.failed:
                raise BackendError(f"adapter {host.name!r} could not be loaded: another thread has the reason.")
        except BaseException:
            with self._lock:
                if self._residents.get(host.name) is found:
                    self.drop(host.name)
                self.unpin(found)
            raise
        return found

    def unpin(self, resident: Resident) -> None:
        """Let an adapter, (o, i) by layer, leave when room is needed; one that was dropped leaves now."""
        with self._lock:
            resident.pins -= 1
            if not resident.pins and self._residents.get(resident.host.name) is not resident:
                self.used -= resident.host.n_bytes

    def drop(self, name: str) -> None:
        """Take an adapter, (o, i) by layer, out; what runs with it keeps it, and its bytes count until then."""
        with self._lock:
            found = self._residents.pop(name, None)
            if found is not None and not found.pins:
                self.used -= found.host.n_bytes

    def _make_room(self, host: HostAdapter) -> None:
        idle = [name for name, resident in self._residents.items() if not resident.pins]  # least recently used first
        spare = self.capacity_bytes - self.used
        if spare + sum(self._residents[name].host.n_bytes for name in idle) < host.n_bytes:
            raise BackendError(
                f"no room for adapter {host.name!r} ({host.n_bytes} bytes): {self.used} of {self.capacity_bytes} bytes "
                "are used, and what runs is pinned. Wait until a request ends, or give the pool more capacity_bytes."
            )
        for name in idle:
            if self.capacity_bytes - self.used >= host.n_bytes:
                return
            self.drop(name)
