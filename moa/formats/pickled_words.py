"""The words of a pickle that torch wrote, listed without running it."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown

MOST_BYTES = 2**20  # Trainer's arguments have some thousands
KEEP, AGAIN = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")  # what was said last, under a number
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}
# what zipfile and pickletools end in, on bytes that nobody wrote so
DAMAGE = (*(EOFError, LookupError, OSError, RuntimeError, ValueError), struct.error, zipfile.BadZipFile)


def pickled_words(file: Path) -> list[Any]:
    """Return what the opcodes of a file by `torch.save` are given, in order: texts, numbers, "module name" of classes.

    An opcode that is given nothing has None. Nothing is built of them and nothing is imported; tensors are not read.

    Raises:
        CheckpointError: the file is missing, damaged, compressed, or too large.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found, *_ = (one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            if found.file_size > MOST_BYTES or found.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{found.filename} has {found.file_size} bytes, or is compressed")
            data = archive.read(found)
        words: list[Any] = [None]
        kept: dict[Any, Any] = {}
        for opcode, word, _ in pickletools.genops(data):
            if opcode.name in KEEP:
                kept[word] = words[-1]
            else:
                words.append(kept.get(word) if opcode.name in AGAIN else CONSTANTS.get(opcode.name, word))
        return words
    except DAMAGE as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {shown(error, 300)}") from error
