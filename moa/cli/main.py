"""The command line: each sub-command is a thin call into the library."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from safetensors import SafetensorError

from ..errors import MoaError, MoaWarning, SaidElsewhere, plain_text, shown
from ..runs.processes import say
from . import (
    cmd_bench,
    cmd_demo,
    cmd_distill,
    cmd_eval,
    cmd_export,
    cmd_fold,
    cmd_generate,
    cmd_init,
    cmd_inspect,
    cmd_merge,
    cmd_predict,
    cmd_prune,
    cmd_recipes,
    cmd_recover,
    cmd_report,
    cmd_serve,
    cmd_train,
)

DESCRIPTION = "Mixtures of adapters behind a router: train them, look at them, take them apart."
FULL = "No space left on device"
# what torch says where it cannot have the memory that it asks for
NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
WITH_REST = ("serve",)  # commands that hand on what stands after --; argparse loses it behind an option
STOPPED = 130  # what a shell gives for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error that moa raises on purpose, 130 for Ctrl-C.

    Args:
        argv: words after the program's name; None takes the process's own.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    end = words.index("--") if words[:1] and words[0] in WITH_REST and "--" in words else len(words)
    arguments = parser(words).parse_args(words[:end])
    arguments.rest = getattr(arguments, "rest", words[end + 1 :])
    try:
        with _plain_warnings(arguments.command):
            _import(getattr(arguments, "imports", ()))
            arguments.run(arguments)
    except SaidElsewhere:
        return 2
    except MoaError as error:
        say(f"moa {arguments.command}: {error}", error=True)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, e.g. `moa inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        said = str(stop) or "nothing half-written is left behind."
        say("", f"moa {arguments.command}: stopped; {said}", error=True)
        return STOPPED
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        room = _no_room(error)
        if room is None:
            raise
        say(f"moa {arguments.command}: {room}", error=True)
        return 2
    return 0


def _import(names: Sequence[str]) -> None:
    """Import what --import names; nothing heavy is imported for none."""
    if names:
        from ..runs.config import import_module

        for name in names:
            import_module(name)


def _no_room(error: BaseException) -> str | None:
    """Return what to say of an error that means a full disk or memory, None of any other."""
    text = str(error)
    if FULL in text:  # safetensors gives the system's words and no number
        return f"{FULL.lower()} where it writes. Make room and run it again; no half-written checkpoint is left behind."
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return (
            "not enough memory. Take a smaller base, fewer or smaller experts (n_experts, rank), shorter rows or a "
            f"smaller batch; the system said: {shown(' '.join(text.split()))}"
        )
    return None


@contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Print warnings of moa as one line each, without the place in the source that gave them."""
    usual = warnings.formatwarning

    def one_line(message: Any, category: type[Warning], *place: Any) -> str:
        if issubclass(category, MoaWarning):
            return f"moa {command}: warning: {plain_text(message)}\n"
        return plain_text(usual(message, category, *place), kept="\n")

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = usual


class _Parser(argparse.ArgumentParser):
    """A parser that repeats words of the command line as text."""

    def error(self, message: str) -> NoReturn:
        """End the program, with the usage and a message."""
        super().error(plain_text(message))


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all sub-commands.

    Args:
        words: the command line; where it asks for the help of `train`, that help lists every configuration key (to
            read their documentation imports torch, which nothing else here does).
    """
    from .. import __version__

    top = _Parser(prog="moa", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], None], help: str, epilog: str = "") -> argparse.ArgumentParser:
        text = inspect.cleandoc(run.__doc__ or help)
        sub = commands.add_parser(
            name,
            help=help,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    helps = bool({"-h", "--help"} & set(words))
    cmd_init.add(command)
    cmd_demo.add(command)
    cmd_train.add(command, helps and "train" in words)
    cmd_eval.add(command)
    cmd_predict.add(command)
    cmd_generate.add(command)
    cmd_inspect.add(command)
    cmd_report.add(command)
    cmd_recipes.add(command)
    cmd_merge.add(command, helps and "merge" in words)
    cmd_fold.add(command)
    cmd_distill.add(command)
    cmd_prune.add(command)
    cmd_recover.add(command)
    cmd_export.add(command)
    cmd_serve.add(command)
    cmd_bench.add(command)
    return top
