"""The errors of moa: each says what came, what was expected, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MoaError(Exception):
    """Base class of every error that moa raises on purpose."""


class ConfigError(MoaError, ValueError):
    """A value, keyword or name that cannot be used (recipes, build, training configurations)."""


class ShapeError(MoaError, ValueError):
    """Tensors whose shapes, dtypes or devices do not belong together."""


class ContextError(MoaError, LookupError):
    """Something a router needs beside x (task ids, a mask, a loss) is missing or out of range."""


class CheckpointError(MoaError, RuntimeError):
    """A checkpoint that cannot be read, or does not belong to this base or these recipes."""


class WriteError(CheckpointError, OSError):
    """A place that the system does not let moa write: full, read-only, without permission, a name too long."""


class BackendError(MoaError, RuntimeError):
    """A kernel engine that is not available here, with the reason and what to install."""


class NumericsError(MoaError, ArithmeticError):
    """NaN or infinity where a finite number is needed, with the layer that produced it."""


class FoldError(MoaError, RuntimeError):
    """A mixture that has no exact meaning as one weight."""


class SaidElsewhere(MoaError):
    """Another process of the same run has failed first, and says why; this one has nothing to add."""


class MoaWarning(UserWarning):
    """Base class of every warning that moa gives on purpose."""


class UnusedKeywordWarning(MoaWarning):
    """A keyword that changes nothing in a call that is meaningful without it."""


class UnadaptedWarning(MoaWarning):
    """Weights of a base that get no experts though its layers were asked for as a group, such as "all-linear"."""


class LostLossWarning(MoaWarning):
    """Losses that routers ask for and that no training loss holds."""


@contextmanager
def every_process(at: str) -> Iterator[None]:
    """Exchange something with all processes inside the block, and say it where one of them did not come.

    Args:
        at: where all of them should be.

    Raises:
        ContextError: one was not there within the timeout of its group, or has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise ContextError(
            f"not every process came to {at}, where all of them add up what they have counted: let each of them do it, "
            f"or none. The wait is the timeout of init_process_group. ({error})"
        ) from error


def unknown_name(kind: str, name: object, known: Iterable[str], where: str = "") -> str:
    """Return the message for a name that is not known: the nearest known one, and the list.

    Args:
        kind: what the name should have been, e.g. "router".
        name: what came.
        known: the names that would have been accepted.
        where: optional place, e.g. "moa.build".
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    place = f" in {where}" if where else ""
    return f"unknown {kind} {name!r}{place}.{hint} Known: {', '.join(names) or 'none'}."


def plain_text(value: object, kept: str = "") -> str:
    """Return a value as text that moves no cursor and turns no direction; what does not print is escaped.

    Args:
        value: anything, e.g. a name that a user or a file gave, or a message with such a name in it.
        kept: characters that stay as they are, e.g. a line's end.
    """
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape", "surrogatepass").decode() for c in str(value)
    )


def shown(value: object, most: int = 120) -> str:
    """Return a value as text that fits into a message and moves no cursor: short, and without control characters.

    Args:
        value: anything, e.g. a name that a user or a file gave.
        most: characters.
    """
    text = plain_text(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
