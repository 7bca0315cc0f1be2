"""Hidden folders beside a target: written in, moved to its place in one step, cleared up when their process is dead.

A process holds a lock on what it works in, which the system takes from a dead one: what can be locked is nobody's.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: what a killed process left there stays
    fcntl = None  # type: ignore[assignment]

PARTIAL, REPLACED = "partial", "replaced"  # being written or removed; set aside and whole
TAG = re.compile(r"[0-9a-f]{12}\.(partial|replaced)")


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Give an empty hidden folder beside a target, and remove what is left of it afterwards.

    The parents are made, and removed again if the block raises and nothing is in them.

    Raises:
        OSError: the place cannot be written.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    for attempts_left in (2, 1, 0):  # between the two lines a sweep of another process may come
        folder = _beside(target, PARTIAL)
        folder.mkdir()
        lock = _lock(folder)
        if not attempts_left or (lock is not None and folder.exists()):  # some file systems have no locks
            break
        _unlock(lock)
        _remove(folder)
    try:
        yield folder
    except BaseException:
        _remove(folder)
        for parent in made:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
    finally:
        _remove(folder)
        _unlock(lock)


def put(new: Path, target: Path) -> None:
    """Move a folder to its target in one step, or in two where one is there; that one is removed last.

    A kill between the two leaves the old folder whole beside the target, where `sweep` finds it.

    Raises:
        OSError: it cannot be moved; the target is then as it was.
    """
    if not target.exists():
        os.rename(new, target)
        return
    lock = _lock(target)
    try:
        aside = _beside(target, REPLACED)
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            if not target.exists():  # else somebody else put theirs there meanwhile
                os.rename(aside, target)
            raise
        finally:
            if aside.exists():
                rubbish = aside.with_suffix(f".{PARTIAL}")  # from here on it is not whole
                os.rename(aside, rubbish)
                _remove(rubbish)
    finally:
        _unlock(lock)


def sweep(target: Path) -> None:
    """Clear up after dead processes: bring a target back that was set aside, and remove what was half-written.

    What another process works in, or has locked, is left alone.
    """
    if not target.parent.is_dir():
        return
    beginning = f".{target.name}."
    found = [
        path
        for path in target.parent.iterdir()
        if path.name.startswith(beginning) and TAG.fullmatch(path.name.removeprefix(beginning))
    ]
    for path in sorted(found, key=lambda path: path.suffix, reverse=True):  # the ones set aside first
        lock = _lock(path)
        if lock is None:
            continue
        try:
            if path.suffix == f".{REPLACED}" and not target.exists():
                os.rename(path, target)
            else:
                _remove(path)
        finally:
            _unlock(lock)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.{kind}")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Return a handle that holds the lock of a folder; None where another process holds it, or there are no locks."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _unlock(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
