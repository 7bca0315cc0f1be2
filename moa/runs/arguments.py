"""The `training:` section checked before transformers is imported, from the source of its TrainingArguments."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name
from ..tables import LARGEST
from .joint import several
from .yaml_values import NAMES, is_file, shortened

# what older versions of transformers call otherwise
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "overwrite, at the top level of the configuration",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps, where a number below 1 is a share of all steps",
}
ELSEWHERE = {"output_dir": "output", "seed": "seed"}

POSITIVE = (
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "eval_accumulation_steps",
    "save_total_limit",
)
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "adam_epsilon")
NOT_NEGATIVE = ("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers")
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")

# a value of report_to, optim, … that another package does -> that package
REPORTERS = {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
OPTIMIZERS = {
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "schedule_free": "schedulefree",
    "grokadamw": "grokadamw",
    "torchao": "torchao",
}
SWITCHES = {"use_liger_kernel": "liger_kernel", "deepspeed": "deepspeed"}
PLAIN: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict}


@cache
def known_arguments() -> dict[str, str]:
    """Return the names of TrainingArguments and their types as written; empty where the source is not there.

    The class itself says the same, after an import of some seconds; `moa.runs.session.training_arguments` asks it.
    """
    spec = find_spec("transformers")
    homes = (spec.submodule_search_locations or ()) if spec is not None else ()
    source = next((file for home in homes if is_file(file := Path(home) / "training_args.py")), None)
    if source is None:
        return {}
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = next(
        (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"), []
    )
    return {
        row.target.id: ast.unparse(row.annotation)
        for row in body
        if isinstance(row, ast.AnnAssign) and isinstance(row.target, ast.Name) and "init=False" not in ast.unparse(row)
    }


def unknown_argument(name: str, known: Mapping[str, Any]) -> str:
    """Return the message for a training argument that does not exist: its new name, or the nearest one."""
    if name in RENAMED:
        return f"unknown training argument {name!r} in training. It is now {RENAMED[name]}."
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown training argument {name!r} in training.{hint} They are those of transformers.TrainingArguments."


def check_training(training: Mapping[str, Any]) -> None:
    """Check names, types, ranges and packages of the `training:` section.

    Raises:
        ConfigError: an argument that does not exist, a value of another type or out of range, or a package that is not
            installed.
    """
    known = known_arguments()
    for name, value in training.items():
        if name in ELSEWHERE:
            raise ConfigError(f"training.{name} belongs to the top level of the configuration: set {ELSEWHERE[name]}.")
        if known and name not in known:
            raise ConfigError(unknown_argument(name, known))
        _check_type(name, value, known.get(name, "Any"))
        _check_range(name, value)
    _check_packages(training)


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Check a value against an annotation as written, where it is made of plain types and lists of them."""
    parts = [part.strip() for part in annotation.split("|")]
    if name.endswith("_kwargs"):
        parts = [part for part in parts if part != "str"]  # JSON on transformers' own command line, and YAML here
    kinds = {part: _kind(part) for part in parts if part != "None"}
    if None in kinds.values() or (value is None and "None" in parts):
        return  # an enumeration, …: the class itself checks it
    if not any(_fits(value, part) for part in kinds):
        expected = " or ".join(str(kind) for kind in dict.fromkeys(kinds.values()))
        raise ConfigError(f"training.{name} must be {expected}, got {shortened(repr(value))} ({type(value).__name__}).")


def _kind(part: str) -> str | None:
    """Return an annotation's part in words, None where it is not of plain types."""
    name, _, inner = part.partition("[")
    if name == "list":
        return "a list of names" if inner == "str]" else None
    return NAMES[PLAIN[name]] if name in PLAIN else None


def _fits(value: Any, part: str) -> bool:
    name, _, inner = part.partition("[")
    if name == "list":
        return isinstance(value, list) and all(_fits(item, inner.removesuffix("]")) for item in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return isinstance(value, PLAIN[name]) and (not isinstance(value, bool) or name == "bool")
    return name in ("int", "float")


def _check_range(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if not abs(value) < math.inf:
        raise ConfigError(f"training.{name} must be a finite number, got {value}.")
    if abs(value) > LARGEST:
        raise ConfigError(f"training.{name} must be below 2**63, got {shortened(value, 40)}.")
    if name in SHARES and not 0 <= value < 1:
        raise ConfigError(f"training.{name} must be at least 0 and below 1, got {value}.")
    if name in POSITIVE and value < 1:
        raise ConfigError(f"training.{name} must be at least 1, got {value}.")
    if name in ABOVE_ZERO and value <= 0:
        raise ConfigError(f"training.{name} must be a positive number, got {value}.")
    if name in NOT_NEGATIVE and value < 0:
        raise ConfigError(f"training.{name} must be at least 0, got {value}.")
    if name == "max_steps" and value < 1 and value != -1:
        raise ConfigError(f"training.max_steps must be at least 1, or -1 for num_train_epochs; got {value}.")


def _check_packages(training: Mapping[str, Any]) -> None:
    reporters = training.get("report_to")
    for reporter in [reporters] if isinstance(reporters, str) else reporters or ():
        _check_installed(f"report_to: {reporter}", REPORTERS.get(str(reporter)))
    optimizer = str(training.get("optim", ""))
    _check_installed(f"optim: {optimizer}", next((p for part, p in OPTIMIZERS.items() if part in optimizer), None))
    for name, package in SWITCHES.items():
        if training.get(name):
            _check_installed(f"{name}: {training[name]}", package)
    plan = training.get("deepspeed")
    if isinstance(plan, str) and not is_file(plan):
        raise ConfigError(f"training.deepspeed: there is no file {shortened(plan)} (looked from {Path.cwd()}).")


def _check_installed(what: str, package: str | None) -> None:
    if package is not None and find_spec(package) is None:
        name = package.replace("_", "-")
        raise ConfigError(f"training.{what} needs the package {package}, which is not installed: pip install {name}.")


def _check_talk(backend: str, distributed: Any, on_cpu: bool) -> None:
    """Check that processes can talk by a backend, on CPUs or not."""
    on = distributed.Backend.backend_capability
    if backend not in on:
        raise ConfigError(unknown_name("backend", backend, tuple(on), "training.ddp_backend"))
    if on_cpu and "cpu" not in on[backend]:
        raise ConfigError(
            f"training.ddp_backend: {backend} talks between {', '.join(on[backend])} devices, and this run is on CPUs: "
            "set gloo, or leave it out."
        )
    if not getattr(distributed, f"is_{backend}_available", lambda: True)():
        raise ConfigError(f"training.ddp_backend: this torch was built without {backend}: set gloo, or leave it out.")


def check_device(training: Mapping[str, Any]) -> None:
    """Check what only torch can tell: half precision, compilers, and what processes talk by, on this machine.

    Raises:
        ConfigError: fp16 where nothing computes in it, an unknown compiler, or a backend of devices that are not there.
    """
    import torch

    if training.get("fp16") and (training.get("use_cpu") or not torch.accelerator.is_available()):
        raise ConfigError("training.fp16 needs an accelerator and has no effect on a CPU: leave it out.")
    talk = training.get("ddp_backend")
    if talk is not None and several():
        _check_talk(str(talk), torch.distributed, bool(training.get("use_cpu")) or not torch.accelerator.is_available())
    backend = training.get("torch_compile_backend")
    if backend is not None:
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            near = difflib.get_close_matches(str(backend), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"training.torch_compile_backend: unknown backend {backend!r}.{hint} Known: {', '.join(known)}."
            )
