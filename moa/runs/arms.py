"""Recipes of one configuration as the arms of `moa.compare`: same tasks, rows, steps and seeds."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..monitor.compare import Scored
from .baselines import held_out
from .config import TrainConfig
from .encode import IGNORED, EncodedTask, encode_tasks
from .metrics import Array, Measures, measures_of
from .run_model import load_tokenizer
from .session import Run


class RowScores:
    """The measures of one kind of task; `rows` then has what each row scored, the larger the better.

    Args:
        task: classes and answers score 1 where they are right; texts minus their loss a token, numbers minus their
            squared error.
    """

    def __init__(self, task: EncodedTask) -> None:
        self.kind = task.kind
        self.measures: Measures = measures_of(task.kind, task.labels)
        self.rows: list[float] = []

    def keep(self, logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return what the kind's measures keep of a batch's outputs (B, …)."""
        return self.measures.keep(logits, labels)

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return the kind's measures of n rows, kept (n, …) and labels (n, …)."""
        self.rows = [float(score) for score in self._each(kept, labels)]
        return self.measures.scores(kept, labels)

    def _each(self, kept: Sequence[Array], labels: Array) -> Array:
        n_rows = len(labels)
        if self.kind == "classification":
            return np.asarray(kept[0] == labels.reshape(n_rows, -1)[:, 0])
        if self.kind == "regression":
            truth = labels.reshape(n_rows, -1)
            return -((kept[0].reshape(n_rows, -1)[:, : truth.shape[1]] - truth) ** 2).mean(1)  # type: ignore[no-any-return]
        learned = labels[:, 1:] != IGNORED
        if self.kind == "text":
            return -kept[1] / learned.sum(1)  # type: ignore[no-any-return]
        return np.asarray(((kept[0][:, :-1] == labels[:, 1:]) | ~learned).all(1))


class ConfiguredArms:
    """Trains recipes on the tasks of a configuration: `moa.compare(ConfiguredArms(config, recipes), …)`.

    The share of training rows that is held out for validation, and the evaluation rows, which are the test, are the
    same for every arm, rate and seed; seeds are those of weights, order and dropout.

    Args:
        config: of the run; its recipe, learning rate and seed are not looked at.
        recipes: arm -> router and keywords.
        validation_fraction: share of each task's training rows.

    Raises:
        ConfigError: a task that cannot be read, or with less than two training rows.
    """

    def __init__(
        self, config: TrainConfig, recipes: Mapping[str, Mapping[str, Any]], validation_fraction: float = 0.2
    ) -> None:
        self.config, self.recipes = config, recipes
        self.tokenizer = load_tokenizer(config.base)
        self.tasks = encode_tasks(config.tasks, self.tokenizer, config.max_length, config.seed, config.long_rows)
        self.splits = [held_out(len(task.train), validation_fraction, config.seed) for task in self.tasks]

    def __call__(self, arm: str, learning_rate: float, seed: int) -> Scored:
        """Return what one training of an arm comes to.

        Raises:
            ConfigError: an arm that has no recipe, or one that does not fit the base.
        """
        if arm not in self.recipes:
            raise ConfigError(unknown_name("arm", arm, self.recipes, "recipes"))
        with tempfile.TemporaryDirectory() as scratch:  # Trainer makes its folder, although nothing is written
            run = Run(dataclasses.replace(self.config, seed=seed, output=scratch), self.tasks, self.tokenizer)
            rows = [task.train.select(kept) for task, (kept, _) in zip(self.tasks, self.splits, strict=True)]
            model = run.fit_recipe(learning_rate, self.recipes[arm], rows, name=arm)
            validation = [task.train.select(held) for task, (_, held) in zip(self.tasks, self.splits, strict=True)]
            numbers = [held for _, held in self.splits]
            tested = [list(range(len(task.eval))) for task in self.tasks]
            return Scored(
                self._scored(run, model, validation, numbers, "train"),
                self._scored(run, model, [task.eval for task in self.tasks], tested, "eval"),
                run.steps,
            )

    def _scored(
        self, run: Run, model: Any, rows: Sequence[Any], numbers: Sequence[Sequence[int]], side: str
    ) -> dict[str, float]:
        """Return what the rows of every task score, by task, side and number."""
        measures = [RowScores(task) for task in self.tasks]
        run.evaluate(model, rows=rows, measures=measures)
        return {
            f"{task.name}/{side}/{number}": score
            for task, measured, own in zip(self.tasks, measures, numbers, strict=True)
            for number, score in zip(own, measured.rows, strict=True)
        }
