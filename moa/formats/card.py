"""The model card beside an adapter: README.md with the metadata that peft writes and the Hub reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ..errors import MoaWarning
from ..experts.mixed import names_in
from .atomic import replacing

CARD = "README.md"
# what only whoever publishes an adapter knows: the Hub's readers look for it
TO_WRITE = {
    "Uses": "what it is for, and what it is not for",
    "Training data": "its source, its licence, its languages, and what was left out",
    "Training procedure": "steps, batch size, learning rate, precision, hardware",
    "Evaluation": "on which data, by which measure, over how many seeds, beside which baseline",
    "Bias, risks and limits": "those of the base, and what training may have added",
    "License": "the base's terms hold for whoever uses both",
}


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
    model = "AutoModelForCausalLM" if task_type == "CAUSAL_LM" else "AutoModel"
    loaded = "model" if base is None else f"{model}.from_pretrained({json.dumps(base)})"
    lines = ["---", *head, "---", "", "# LoRA adapter", "", what, ""]
    lines += ["## Use", "", "```python", "from peft import PeftModel"]
    lines += [] if base is None else [f"from transformers import {model}"]
    lines += ["", f'model = PeftModel.from_pretrained({loaded}, "path/to/this/folder")', "```", ""]
    lines += [
        "It needs the weights that it was trained on. `merge_and_unload()` folds it into them; several adapters of one "
        'base are mixed, with a router that is trained or not, by `moa.build(base, router="topk", experts=[…])`.',
        "",
        *_to_write(),
    ]
    number = peft_version()
    lines += ["### Framework versions", "", f"- PEFT {number}", ""] if number else []
    return "\n".join(lines)


def write_card(folder: Path, description: Mapping[str, Any]) -> None:
    """Write README.md beside a checkpoint; of one that is there, the text stays and the metadata is completed.

    Args:
        folder: of the checkpoint, whose tensors may have any shape.
        description: what the checkpoint says of itself.
    """
    from huggingface_hub import RepoCard

    file, rows, base = folder / CARD, description["recipes"], description["base"]
    text = file.read_text(encoding="utf-8") if file.exists() else _mixture_text(folder, description)
    if not text.lstrip().startswith("---"):  # else the reader complains of metadata that are not there
        text = f"---\nlibrary_name: moa\n---\n{text}"
    try:
        card = RepoCard(text)
    except (ValueError, yaml.YAMLError) as error:
        warnings.warn(
            f"{file} was left as it is: its metadata cannot be read ({' '.join(str(error).split())}).",
            MoaWarning,
            stacklevel=3,
        )
        return
    words = [
        "moa",
        "mixture-of-adapters",
        *(name for row in rows for name in (row["router"], *names_in(row["expert"]))),
    ]
    card.data["library_name"] = "moa"
    if base["name_or_path"]:
        card.data["base_model"] = base["name_or_path"]
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *words]))
    with replacing(file) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def _mixture_text(folder: Path, description: Mapping[str, Any]) -> str:
    """Return what a reader of a checkpoint wants to know first: on what it sits, what is in it, how it is loaded."""
    base, rows = description["base"], description["recipes"]
    name = base["name_or_path"]
    given = json.dumps(folder.name) + ("" if name else ", base=model")
    lines = [f"# Mixture of adapters on {name or 'a ' + base['class']}", ""]
    lines += [
        f"The base is a `{base['class']}`{f', {name}' if name else ' made in memory'}. It is frozen and not in this "
        "folder, which holds what was trained beside it: routers, experts"
        + (
            ", and whole: " + ", ".join(f"`{module}`" for module in description["modules_to_save"]) + "."
            if description["modules_to_save"]
            else "."
        ),
        "",
    ]
    for row in rows:
        kind = ["expert"] if isinstance(row["expert"], str) else []  # of several families it is in the table
        options = {k: v for k, v in row.items() if k not in ("router", *kind, "sites") and v not in (None, (), [])}
        names = " + ".join(names_in(row["expert"]))
        lines += [
            f"## Recipe `{row['router']}`, experts `{names}`, on {len(row['sites'])} layers",
            "",
            "| keyword | value |",
            "|---|---|",
            *(f"| `{key}` | `{json.dumps(value)}` |" for key, value in options.items()),
            "",
        ]
    lines += [
        "## Use",
        "",
        "```python",
        "import moa",
        "",
        f"model = moa.load({given})",
        "with model.disable_adapter():  # the base as it came",
        "    ...",
        'moa.export_expert(model, 0, "expert0")  # one expert as a folder that peft loads, where it is a weight change',
        "```",
        "",
        "`moa inspect` prints what is inside, and `moa.load(…, base=model)` puts it on a model that is loaded already, "
        "whose weights must be those that it was trained on. Routers by task take `task_ids=` beside the inputs.",
        "",
        *_to_write(),
    ]
    return "\n".join(lines)


def _to_write() -> list[str]:
    """Return the headings under which its author says what no file can."""
    return [line for title, what in TO_WRITE.items() for line in (f"## {title}", "", f"[To be written: {what}.]", "")]
