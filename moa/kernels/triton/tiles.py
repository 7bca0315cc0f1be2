"""Tile sizes of a launch: fixed ones, or with MOA_AUTOTUNE=1 the fastest of a few, measured once and kept in a file.

Rows per tile, warps and stages vary; the blocks over which sums run do not. The choice is kept, so that later runs on
the same device repeat the same sums. Nothing is measured unless it was asked for, nor while a graph is captured.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from .thin import Sizes

TUNE = os.environ.get("MOA_AUTOTUNE") == "1"
_ROUNDS = 7

Timer = Callable[[Callable[[], None]], float]
_known: dict[str, Sizes] = {}
_read: set[Path] = set()


def cdiv(n: int, size: int) -> int:
    """Return how many tiles cover n. Triton's own, which kernels may call as well, takes 2 µs of each launch's time."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not less than n > 0."""
    return 1 << (n - 1).bit_length()


def launch(kernel: str, n_rows: int, shape: tuple[int | str, ...], fixed: Sizes, run: Callable[[Sizes], None]) -> None:
    """Launch a kernel with its fixed tiles, or with the ones that were measured to be fastest for these sizes.

    Args:
        kernel: its name.
        n_rows: T; sizes are chosen for buckets of a power of two.
        shape: what else the time depends on: features, columns, dtype, flags.
        fixed: the tiles that are taken where nothing is tuned.
        run: launches it; may be called several times, and writes the same each time.
    """
    if not TUNE or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        run(fixed)
        return
    file = tiles_file()
    if file not in _read:
        _known.update(read(file))
        _read.add(file)
    key = "/".join(map(str, (kernel, next_power_of_2(n_rows), *shape)))
    if key not in _known:
        _known[key] = fastest(candidates(fixed), run, device_time)
        write(file, _known)
    run(_known[key])


def tiles_file() -> Path:
    """Return where the tiles of this device and version of triton are kept, in $MOA_CACHE or ~/.cache/moa."""
    folder = Path(os.environ.get("MOA_CACHE") or Path.home() / ".cache" / "moa").expanduser()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return folder / f"tiles-{device.replace(' ', '-')}-triton-{triton.__version__}.json"


def candidates(fixed: Sizes) -> list[Sizes]:
    """Return the tiles to try, the fixed ones first: half and twice the rows, fewer and more warps and stages."""
    rows = [n for n in (fixed.block_t, fixed.block_t // 2, fixed.block_t * 2) if 16 <= n <= 256]
    tried = [(n, w, s) for n in rows for w in (4, 8) for s in (2, 3, 4)]
    others = [replace(fixed, block_t=n, warps=w, stages=s) for n, w, s in tried]
    return [fixed, *(size for size in others if size != fixed)]


def fastest(tried: list[Sizes], run: Callable[[Sizes], None], timer: Timer) -> Sizes:
    """Return the tiles whose launch takes least; those that a device has no room for are passed over.

    Raises:
        OutOfResources: there is room for none.
    """
    times: dict[Sizes, float] = {}
    failed: OutOfResources | None = None
    for size in tried:
        try:
            times[size] = timer(lambda size=size: run(size))  # type: ignore[misc]
        except OutOfResources as error:
            failed = error
    if not times:
        assert failed is not None
        raise failed
    return min(times, key=times.__getitem__)


def device_time(step: Callable[[], None]) -> float:
    """Return the median time of a launch in ms, between events on the device."""
    step()  # compiles
    times = []
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def read(file: Path) -> dict[str, Sizes]:
    """Return the tiles that a file holds, none where there is no file.

    Raises:
        ValueError: the file is not one that `write` wrote; delete it.
    """
    if not file.exists():
        return {}
    try:
        return {key: Sizes(*values) for key, values in json.loads(file.read_text()).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold tile sizes: delete it, and they are measured again.") from error


def write(file: Path, known: dict[str, Sizes]) -> None:
    """Write all tiles, in one step: another process sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({key: astuple(size) for key, size in sorted(known.items())}, indent=1))
    scratch.replace(file)
