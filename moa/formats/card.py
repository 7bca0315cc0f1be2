"""The model card beside an adapter: README.md with the metadata that peft writes and the Hub reads."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version


def peft_version() -> str | None:
    """Return the installed peft's version, None without it; no tensors, so no shapes."""
    try:
        return version("peft")
    except PackageNotFoundError:
        return None


def model_card(base: str | None, what: str, task_type: str | None = None) -> str:
    """Return the text of README.md for a LoRA adapter; no tensors, so no shapes.

    Args:
        base: id or folder of the base model; None leaves it out.
        what: one sentence on what the adapter is.
        task_type: PEFT's, e.g. "CAUSAL_LM".
    """
    # A JSON string is a YAML string, whatever is in it.
    head = [] if base is None else [f"base_model: {json.dumps(base)}"]
    head += ["library_name: peft"]
    head += ["pipeline_tag: text-generation"] if task_type == "CAUSAL_LM" else []
    head += ["tags:", *([] if base is None else [f"- {json.dumps('base_model:adapter:' + base)}"]), "- lora"]
    lines = ["---", *head, "---", "", "# LoRA adapter", "", what, ""]
    number = peft_version()
    lines += ["### Framework versions", "", f"- PEFT {number}", ""] if number else []
    return "\n".join(lines)
