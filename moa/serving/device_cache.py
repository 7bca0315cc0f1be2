"""Which adapters are on the device: least recently used ones leave, pinned ones stay, capacity is never passed."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from ..errors import BackendError
from .host_adapters import HostAdapter


class Resident:
    """An adapter on the device: by layer, down (r, i) and up (r, o)."""

    def __init__(self, host: HostAdapter, device: torch.device) -> None:
        self.host, self.pins = host, 0
        flat = torch.empty_like(host.flat, device=device).copy_(host.flat)
        self.factors: dict[str, tuple[Tensor, Tensor]] = host.factors(flat)


class DeviceCache:
    """Residents by name, up to so many bytes at every moment.

    Args:
        capacity_bytes: of all factors together.
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

    def pin(self, host: HostAdapter) -> Resident:
        """Return an adapter, (r, i) and (r, o) by layer, that stays until it is unpinned; load it if it is not here.

        Raises:
            BackendError: everything here is pinned, and it does not fit beside that.
        """
        with self._lock:
            found = self._residents.get(host.name)
            if found is None or found.host is not host:
                self.drop(host.name)
                self._make_room(host)
                found = self._residents[host.name] = Resident(host, self.device)
                self.used += host.n_bytes
                self.loads += 1
            self._residents.move_to_end(host.name)
            found.pins += 1
            return found

    def unpin(self, resident: Resident) -> None:
        """Let an adapter (r, i), (r, o) leave when room is needed; one that was dropped leaves now."""
        with self._lock:
            resident.pins -= 1
            if not resident.pins and self._residents.get(resident.host.name) is not resident:
                self.used -= resident.host.n_bytes

    def drop(self, name: str) -> None:
        """Take an adapter (r, i), (r, o) out; what runs with it keeps it, and its bytes count until then."""
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
