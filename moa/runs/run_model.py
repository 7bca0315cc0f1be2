"""The model of a run: its tokenizer, its base with mixture and heads in it, and what a checkpoint's heads say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError, MoaError
from ..layers import is_dense
from ..model.build import build
from ..model.heads import MultiTaskForSequenceClassification, pretrained
from ..model.moa_model import MoAModel
from .base_files import check_positions
from .config import TrainConfig
from .encode import EncodedTask
from .yaml_values import one_line


def load_tokenizer(base: str) -> Any:
    """Return the tokenizer of a base.

    Raises:
        ConfigError: there is none there.
    """
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: no tokenizer can be loaded from {base!r}: {one_line(error)}") from error


def with_heads_of(config: TrainConfig, model: MoAModel, folder: Path) -> TrainConfig:
    """Return a configuration whose tasks have the labels or numbers of a trained model's heads, (C, d) each.

    Args:
        config: with the same tasks, in the same order.
        model: of a checkpoint; one without a head per task needs nothing.
        folder: of the checkpoint, named in the error.

    Raises:
        ConfigError: other tasks or labels than the model has heads for, or another pooling.
    """
    labels = getattr(model.config, "labels", None)
    if labels is None:
        return config
    if list(config.tasks) != list(labels):
        raise ConfigError(f"{folder} has heads for {', '.join(labels)}; the tasks are {', '.join(config.tasks)}.")
    numbers = set(model.config.regressions)
    for name, task in config.tasks.items():
        if task.problem is not None and (task.problem == "regression") != (name in numbers):
            kind = "numbers" if name in numbers else "classes"
            raise ConfigError(
                f"{folder}: the head of task {name!r} gives {kind}, the configuration says {task.problem}."
            )
        if name in numbers and task.label_columns != labels[name]:
            raise ConfigError(
                f"{folder}: the head of task {name!r} gives {', '.join(labels[name])}, the configuration's label is "
                f"{', '.join(task.label_columns)}."
            )
        if task.labels is not None and list(task.labels) != labels[name]:
            raise ConfigError(
                f"{folder}: the labels of task {name!r} are {', '.join(labels[name])}, in this order; the "
                f"configuration says {', '.join(task.labels)}. Leave labels out."
            )
    if config.pooling != model.config.pooling:
        raise ConfigError(
            f"{folder} was trained with pooling={model.config.pooling!r}, the configuration says {config.pooling!r}: "
            f"set pooling={model.config.pooling}."
        )
    tasks = {
        name: dataclasses.replace(task, problem="regression")
        if name in numbers
        else dataclasses.replace(task, problem="classification", labels=labels[name])
        for name, task in config.tasks.items()
    }
    return dataclasses.replace(config, tasks=tasks)


def build_model(config: TrainConfig, tasks: Sequence[EncodedTask], **recipe: Any) -> MoAModel:
    """Return the base with the configuration's mixture in it, and a head per task where tasks classify.

    Args:
        config: base, dtype, pooling and recipe are read.
        tasks: encoded.
        recipe: used in place of the configuration's recipe.

    Raises:
        ConfigError: the base cannot be loaded, or the recipe does not fit it.
    """
    options: dict[str, Any] = {} if config.dtype is None else {"dtype": config.dtype}
    base: Any
    try:
        if not tasks[0].writes:
            labels = {task.name: task.labels for task in tasks}
            numbers = [task.name for task in tasks if task.kind == "regression"]
            base = MultiTaskForSequenceClassification.from_encoder(
                config.base, labels, config.pooling, numbers, **options
            )
        else:
            base = pretrained(AutoModelForCausalLM, config.base, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: weights of other shapes
        if isinstance(error, MoaError):
            raise
        raise ConfigError(f"base: {config.base!r} cannot be loaded: {one_line(error)}") from error
    check_positions(_encoder_config(base).to_dict(), config.max_length)
    _check_finite(base, config.base)
    return build(base, **(recipe or {"router": "topk", **config.recipe}))


def _encoder_config(base: Any) -> Any:
    return base.encoder.config if isinstance(base, MultiTaskForSequenceClassification) else base.config


@torch.no_grad()
def _check_finite(base: nn.Module, name: str) -> None:
    """Check that a base's weights, of any shape, are numbers."""
    for key, tensor in base.named_parameters():
        if is_dense(tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"base: {key} of {name} holds NaN or infinity: this base is not usable.")
