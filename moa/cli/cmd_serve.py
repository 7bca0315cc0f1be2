"""`moa serve`: the engine that is installed, with the right arguments; a thin call, no server of our own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .shared_options import Command, add_import


def add(command: Command) -> None:
    """Add `moa serve` to a parser; `command` makes a sub-parser."""
    serve = command("serve", _serve, "start vLLM's server on a folder of `moa export --to vllm`")
    serve.add_argument("model", help="folder that `moa export CHECKPOINT --to vllm` wrote")
    serve.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    add_import(serve)
    serve.add_argument("rest", nargs="*", help="arguments of `vllm serve`, after --")


def _serve(arguments: argparse.Namespace) -> None:
    """Start vLLM's OpenAI-compatible server on an exported folder; what stands after -- goes to it as it is."""
    import os
    import sys

    words = _command(arguments.model, arguments.rest)
    if arguments.dry_run:
        print(" ".join(words))
        return
    from ..errors import BackendError
    from ..serving.vllm.registration import IMPORTS, check_version, engine_version

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
        CheckpointError: the folder is none that was exported for it, or has a recipe whose module is not imported.
    """
    import sys

    from ..errors import CheckpointError
    from ..serving.vllm.vllm_folder import MIXTURES

    folder = Path(model)
    config = folder / "config.json"
    exported = config.is_file() and "base_config" in json.loads(config.read_text()) and (folder / MIXTURES).is_file()
    if not exported:
        raise CheckpointError(
            f"{folder} was not exported for vLLM: moa export CHECKPOINT --to vllm OUT, then moa serve OUT."
        )
    modules = json.loads(config.read_text())["moa"].get("origins", {})
    if modules:  # only then, since this imports torch
        from ..recipes.origins import unregistered

        missing = unregistered(modules)
        if missing is not None:
            raise CheckpointError(f"{folder}: {missing}")
    # not the `vllm` script: that of the CPU build does not start
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *rest]
