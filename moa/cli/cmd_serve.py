"""`moa serve`: the engine that is installed, with the right arguments; a thin call, no server of our own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runs.processes import say
from .shared_options import Command, add_import

EXPORT = "moa export CHECKPOINT --to vllm OUT, then moa serve OUT"


def add(command: Command) -> None:
    """Add `moa serve` to a parser; `command` makes a sub-parser."""
    serve = command("serve", _serve, "start vLLM's server, or transformers' own, on a mixture")
    serve.add_argument(
        "model", metavar="MODEL", help="folder that `moa export CHECKPOINT --to vllm` wrote, or of a checkpoint or run"
    )
    serve.add_argument("--engine", choices=("vllm", "transformers"), help="default: what can serve the folder")
    serve.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    add_import(serve)
    serve.usage = "%(prog)s MODEL [options] [-- arguments of `vllm serve` or `transformers serve`]"


def _serve(arguments: argparse.Namespace) -> None:
    """Start an OpenAI-compatible server; what stands after -- goes to it as it is.

    A folder of `moa export --to vllm` goes to vLLM. A checkpoint goes to transformers' own server, one request at a
    time, where vLLM is not installed or cannot serve it; it says so.
    """
    from ..errors import CheckpointError

    exported = _is_exported(Path(arguments.model))
    if not exported and arguments.engine == "vllm":
        raise CheckpointError(f"{arguments.model} was not exported for vLLM: {EXPORT}.")
    if exported and arguments.engine == "transformers":
        raise CheckpointError(f"{arguments.model} was exported for vLLM: give moa serve the checkpoint itself.")
    (_by_vllm if exported else _by_transformers)(arguments)


def _is_exported(folder: Path) -> bool:
    from ..serving.vllm.vllm_folder import MIXTURES

    config = folder / "config.json"
    return config.is_file() and (folder / MIXTURES).is_file() and "base_config" in json.loads(config.read_text())


def _by_vllm(arguments: argparse.Namespace) -> None:
    import os
    import sys

    words = _command(arguments.model, arguments.rest)
    if arguments.dry_run:
        say(" ".join(words))
        return
    from ..errors import BackendError
    from ..serving.vllm.registration import IMPORTS, check_version, engine_version

    if engine_version() is None:
        raise BackendError(
            "vLLM is not installed (pip install 'mixture-of-adapters[vllm]'). Without it transformers' own server "
            "takes the checkpoint that this folder was exported from: moa serve CHECKPOINT."
        )
    check_version(engine_version())
    os.environ[IMPORTS] = os.pathsep.join(str(Path(n).resolve()) if n.endswith(".py") else n for n in arguments.imports)
    sys.stdout.flush()
    try:
        os.execv(words[0], words)
    except OSError as error:
        raise BackendError(f"the engine did not start: {error}") from error


def _command(model: str, rest: list[str]) -> list[str]:
    """Return the words of the engine's command.

    Raises:
        CheckpointError: the folder has a recipe whose module is not imported.
    """
    import sys

    from ..errors import CheckpointError

    modules = json.loads((Path(model) / "config.json").read_text())["moa"].get("origins", {})
    if modules:  # only then, since this imports torch
        from ..recipes.origins import unregistered

        missing = unregistered(modules)
        if missing is not None:
            raise CheckpointError(f"{model}: {missing}")
    # not the `vllm` script: that of the CPU build does not start
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *rest]


def _by_transformers(arguments: argparse.Namespace) -> None:
    from ..errors import CheckpointError
    from ..runs.applied import find_applied
    from ..serving.vllm.registration import engine_version

    applied = find_applied(arguments.model)
    if arguments.dry_run:
        say(" ".join(["transformers", "serve", arguments.model, *arguments.rest]) + " (with the mixture)")
        return
    from ..runs.transformers_server import check_server, serve
    from ..serving.servable import reasons

    check_server()
    model, tokenizer = applied.loaded()
    refused = next(reasons(model), None)
    if arguments.engine is None and refused is None and engine_version() is not None:
        raise CheckpointError(
            f"vLLM is installed and can serve {arguments.model}: {EXPORT}. Slower, as it is: --engine transformers."
        )
    why = "--engine says so" if arguments.engine else "vLLM is not installed"
    if refused is not None:
        why = f"vLLM cannot serve it: {refused}"
    say(f"transformers' own server, one request at a time, on {arguments.model}, since {why}")
    serve(arguments.model, arguments.rest, model, tokenizer)
