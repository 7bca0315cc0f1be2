"""A checkpoint behind transformers' own server, which speaks OpenAI's protocol: for what vLLM does not serve."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from ..errors import BackendError, ConfigError
from ..model.decoding import looks_beyond_rows
from ..serving.servable import BY_TASK

BATCHED = "--continuous-batching"


def check_server() -> None:
    """Check that the server's packages are installed; no tensors.

    Raises:
        BackendError: one is missing, or a transformers that is too old.
    """
    from transformers.utils.import_utils import is_serve_available

    if importlib.util.find_spec("transformers.cli.serving") is None:
        raise BackendError("this transformers has no server that takes a model: pip install --upgrade transformers.")
    if not is_serve_available():
        raise BackendError(
            "transformers' own server needs packages that are not installed: pip install 'mixture-of-adapters[serve]'. "
            "For a few prompts without a server: moa generate."
        )


def serve(name: str, options: Sequence[str], model: Any, tokenizer: Any) -> None:
    """Run the server on a model, inputs (1, S), a request at a time, until it is told to stop.

    Args:
        name: of the model; requests say it, or none.
        options: of `transformers serve`.
        model: a `MoAModel` that generates: base, mixtures, routing by sequence and first passes as they are.
        tokenizer: its tokenizer.

    Raises:
        ConfigError: a model that routes by the task of a request, for which a request has no word; continuous
            batching where the routing looks at more than a row; options that would change the base.
    """
    for kind, reason in looks_beyond_rows(model):
        if kind == "task":
            raise ConfigError(f"transformers' server has no task for a request. {reason}: {BY_TASK}.")
        if BATCHED in options:
            raise ConfigError(f"{BATCHED} is for routing of each row by itself. {reason}: leave it out.")
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    theirs = model_manager.ModelManager

    class Manager(theirs):  # type: ignore[misc, valid-type]
        """Has one model, which is here already."""

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            given = {
                "--dtype": self.dtype != "auto",
                "--device": self.device != "auto",
                "--quantization": self.quantization is not None,
                "--attn-implementation": self.attn_implementation is not None,
            }
            for option in (option for option, is_given in given.items() if is_given):
                raise ConfigError(
                    f"{option} is for a base that the server loads; a checkpoint's comes as it was saved."
                )
            return model

        @staticmethod
        def get_gen_models(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            """Return what `/v1/models` lists; no tensors."""
            return [{"id": name, "object": "model", "created": 0, "owned_by": "moa"}]

    model_manager.ModelManager = Manager  # type: ignore[misc]
    try:
        app(args=["serve", name, *options], standalone_mode=False)
    finally:
        model_manager.ModelManager = theirs  # type: ignore[misc]
