"""Folders and files that appear whole or not at all, with a list of what was written: nothing else is removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError, ConfigError, WriteError
from .json_files import read_json
from .scratch import put, scratch, sweep

MANIFEST = ".moa_files.json"  # in each folder that is written at once: the names of what moa wrote into it
FULL = os.strerror(errno.ENOSPC)  # safetensors gives the system's words and no number
OWN = ("model.safetensors", "config.json")  # of a checkpoint of moa, which is written file by file


@contextmanager
def staged(out: str | Path, *, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Give a new folder beside `out` to write into, and move it to `out` when the block ends without an error.

    Files of a replaced `out` that moa did not write stay; where the new folder has one of that name, the old one gets
    ".old" behind it. Until then `out` is untouched. A block that raises leaves nothing behind. A process that is killed
    leaves `out` as it was, or as it was to become; what else it leaves is hidden, and the next one that writes to `out`
    clears it up.

    Args:
        out: the folder to make; its parent is made if it is missing.
        overwrite: allow replacing what moa wrote there.
        inputs: files and folders the block reads: `out` may not be, hold, or lie in one of them.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: `out` exists and overwrite is False, or moa did not write what it holds.
        WriteError: the place cannot be written, e.g. as the disk is full.
        ConfigError: `out` is one of the inputs, or lies in or around one.
    """
    target = check_target(out, overwrite=overwrite, inputs=inputs)
    with said_of(target), scratch(target) as partial:
        partial = partial / "folder"  # the outer one is locked, and stays
        partial.mkdir()
        yield partial
        names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if not path.is_dir()]
        allowed = _allowed(partial / MANIFEST)
        (partial / MANIFEST).write_text(json.dumps({"files": names}) + "\n", encoding="utf-8")
        for path in partial.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.chmod(path, allowed)  # some writers ask for less than the umask leaves
                _sync(path)
        if target.exists():
            if not overwrite:
                raise FileExistsError(errno.EEXIST, "another process has written it meanwhile")
            _keep_foreign(target, partial)
        _sync(partial)
        put(partial, target)
        _sync(target.parent)


def check_target(out: str | Path, *, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> Path:
    """Return the absolute path of an output folder that may be written, by the rules of `staged`; no tensors.

    Raises:
        CheckpointError: `out` exists and overwrite is False, or moa did not write what it holds.
        ConfigError: `out` is one of the inputs, or lies in or around one.
    """
    target = Path(out).absolute()
    for source in inputs:
        read, written = Path(source).resolve(), target.resolve()
        if read == written or read in written.parents or written in read.parents:
            raise ConfigError(f"the output {target} and the input {source} are the same or one holds the other.")
    with said_of(target):
        sweep(target)
        exists = target.exists() or target.is_symlink()
    if exists:
        if not overwrite:
            raise CheckpointError(
                f"{target} exists already: choose another output folder, or pass overwrite=True to replace it."
            )
        if target.is_symlink() or not target.is_dir() or not (is_empty(target) or written_files(target)):
            raise CheckpointError(
                f"{target} is no folder with a checkpoint or adapter that moa wrote, so overwrite=True does not "
                "replace it: remove it yourself or choose another output folder."
            )
    return target


def is_empty(folder: Path) -> bool:
    """Tell whether nothing is in a folder."""
    return not any(folder.iterdir())


def written_files(folder: Path) -> set[str]:
    """Return the names, below a folder, of what moa wrote there: its list says so, or it is a checkpoint of moa."""
    names: set[str] = set()
    with suppress(CheckpointError):
        if read_json(folder / OWN[1]).get("model_type") == "moa":
            names.update(OWN)
    with suppress(CheckpointError):
        listed = read_json(folder / MANIFEST).get("files")
        if isinstance(listed, list):
            names.update(name for name in listed if isinstance(name, str))
            names.add(MANIFEST)
    return names


def _keep_foreign(old: Path, new: Path) -> None:
    """Take what moa did not write from an old folder into a new one, under another name where that one is taken."""
    own = written_files(old)
    for source in sorted(old.rglob("*")):
        inside = source.relative_to(old)
        if str(inside) in own or (source.is_dir() and not source.is_symlink()):
            continue
        kept = new / inside
        while kept.exists() or kept.is_symlink():
            kept = kept.with_name(f"{kept.name}.old")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, kept, follow_symlinks=False)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside target; on success flush it to disk and rename it onto target, else remove it.

    The file has the permissions that the process's umask leaves to a new one.

    Raises:
        WriteError: the place cannot be written, e.g. as the disk is full.
    """
    with said_of(target), scratch(target) as folder:
        temporary = folder / "file"
        allowed = _allowed(temporary)
        yield temporary
        _sync(temporary)
        os.chmod(temporary, allowed)  # whoever wrote it may have made a new file
        os.replace(temporary, target)


@contextmanager
def said_of(target: Path) -> Iterator[None]:
    """Turn an error of the system in the block into moa's, which names the target.

    Raises:
        WriteError: a disk that is full, a place that may not be written, a name that is too long.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL in reason
        raise WriteError(
            f"{target} cannot be written: {reason}. Nothing half-written is left behind, and what was there before is "
            f"as it was; {'make room' if full else 'choose another place'} and write it again."
        ) from error


def _allowed(probe: Path) -> int:
    """Return the permissions that the umask leaves to a new file, by making one."""
    probe.touch(exist_ok=False)
    return probe.stat().st_mode & 0o777


def _sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's entries, on disk, where it can (folders: not on Windows)."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
