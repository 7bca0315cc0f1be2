"""A run's training and scoring, by the stock Trainer, of the mixture and of what it is compared with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from ..monitor.statistics import RoutingStatistics
from ..training.strategy import Strategy
from . import baselines
from .arguments import SHARES, unknown_argument
from .baselines import Scores
from .collate import Collator
from .config import TrainConfig
from .encode import IGNORED, EncodedTask
from .engines import let_go, make_room, score_whole
from .evaluation_trace import EvaluationTrace
from .joint import several
from .metrics import Measures, measures_of
from .packing import packed
from .progress import ProgressBar
from .run_model import build_model
from .tasks import SMALLER_IS_BETTER, measured_together
from .yaml_values import one_line

PREPARED = "_is_accelerate_prepared"  # accelerate's mark


def training_arguments(config: TrainConfig, output: str | Path | None = None) -> TrainingArguments:
    """Return the configuration's TrainingArguments; TensorBoard events are on unless report_to says otherwise.

    Args:
        config: of the run.
        output: folder that Trainer writes into; None is the configuration's.

    Raises:
        ConfigError: a name that TrainingArguments does not have, or a value that it refuses.
    """
    known = {f.name: f.type for f in dataclasses.fields(TrainingArguments) if f.init}
    for name in config.training:
        if name not in known:
            raise ConfigError(unknown_argument(name, known))
    defaults = {"report_to": "tensorboard", "logging_steps": 10, "dataloader_pin_memory": torch.cuda.is_available()}
    if config.patience is not None:
        strategy = config.training.get("eval_strategy", "epoch")
        if strategy in ("no", False):
            raise ConfigError(
                "patience counts evaluations while training, and training.eval_strategy is no: leave one out."
            )
        defaults |= {"eval_strategy": strategy, "save_strategy": strategy, "load_best_model_at_end": True}
        if "eval_steps" in config.training:
            defaults["save_steps"] = config.training["eval_steps"]
    measure = str(config.training.get("metric_for_best_model", "loss")).removeprefix("eval_")
    if measure in SMALLER_IS_BETTER:  # Trainer knows this of losses only
        defaults["greater_is_better"] = False
    options = {**defaults, **config.training}
    if not several():
        options.pop("ddp_backend", None)  # Trainer would look for a group of processes
    options |= {name: float(options[name]) for name in SHARES if name in options}  # torch takes no whole numbers
    try:
        return TrainingArguments(str(output or config.output), seed=config.seed, **options)
    except (TypeError, ValueError, ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ConfigError(f"training: {one_line(error)}") from error


class Run:
    """Trains and evaluates models on the tasks of one configuration.

    Args:
        config: of the run.
        tasks: encoded.
        tokenizer: of the base.
    """

    def __init__(self, config: TrainConfig, tasks: Sequence[EncodedTask], tokenizer: Any) -> None:
        self.config, self.tasks, self.tokenizer = config, tasks, tokenizer
        self.collator = Collator(tokenizer)
        self.steps = 0  # optimizer steps of the last training

    def trainer(
        self,
        model: MoAModel,
        arguments: TrainingArguments,
        rows: Any = None,
        title: str = "training",
        strategy: Strategy | None = None,
    ) -> Trainer:
        """Return a stock Trainer with a quiet progress bar; it evaluates while training where that was asked for."""
        if arguments.deepspeed:
            make_room()
        asked = rows is not None and arguments.eval_strategy != "no"
        measures = self.measures()
        trainer = Trainer(
            model,
            arguments,
            data_collator=self.collator,
            train_dataset=rows,
            eval_dataset=concatenate_datasets([task.eval for task in self.tasks]) if asked else None,
            callbacks=None if strategy is None else strategy.callbacks(),
            optimizers=(None if strategy is None else strategy.optimizer(model, arguments), None),
        )
        if measures is not None:
            _measure(trainer, measures)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        if asked and self.config.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(self.config.patience))
        if not arguments.disable_tqdm:
            trainer.add_callback(ProgressBar(title))
        return trainer

    def measures(self) -> Measures | None:
        """Return how the evaluation rows of all tasks are scored as one; None where only their loss says something."""
        kind = measured_together([task.kind for task in self.tasks])
        return None if kind is None else measures_of(kind, self.tasks[0].labels)

    def fit(
        self,
        model: MoAModel,
        arguments: TrainingArguments,
        rows: Sequence[Any] | None = None,
        title: str = "training",
        monitored: bool = False,
        checkpoint: Path | None = None,
    ) -> float:
        """Train on all tasks together and return the seconds it took.

        Args:
            model: trained in place.
            arguments: for Trainer.
            rows: a data set per task; None takes the tasks' training rows.
            title: of the progress bar.
            monitored: this is the run itself: by its strategy, with its routing watched and Trainer's state kept.
            checkpoint: folder of a checkpoint to go on from.
        """
        together = concatenate_datasets(list(rows or [task.train for task in self.tasks]))
        if self.config.packing:
            together = packed(together, self.config.max_length)
        strategy = self.config.made_strategy() if monitored else None
        trainer = self.trainer(model, arguments, together, title, strategy)
        if monitored:
            from ..monitor.callback import RoutingMonitor

            # before the loggers, so that they get what it adds
            trainer.callback_handler.callbacks.insert(0, RoutingMonitor(tasks=[task.name for task in self.tasks]))
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.steps = trainer.state.global_step
        if monitored:
            trainer.save_state()
        let_go(trainer)
        return time.monotonic() - started

    def check(self, model: MoAModel, arguments: TrainingArguments) -> None:
        """Make an optimizer and a schedule, so that what they refuse is said before work starts.

        Args:
            model: that will be trained.
            arguments: for Trainer.

        Raises:
            ConfigError: they cannot be made of these arguments, or the strategy does not fit the recipe.
        """
        if arguments.deepspeed or arguments.fsdp:
            return  # made by another engine
        rows = concatenate_datasets([task.train for task in self.tasks])
        strategy = self.config.made_strategy()
        if strategy is not None:
            strategy.check(model)
        trainer = self.trainer(model, arguments, rows, strategy=strategy)
        try:
            trainer.create_optimizer_and_scheduler(max(1, arguments.max_steps))
        except (TypeError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"training: no optimizer and schedule can be made: {one_line(error)}.") from error

    def evaluate(
        self,
        model: MoAModel,
        statistics: RoutingStatistics | None = None,
        rows: Sequence[Any] | None = None,
        title: str = "scoring",
        measures: Sequence[Measures] | None = None,
    ) -> Scores:
        """Return the measures of each task.

        Args:
            model: in evaluation mode throughout.
            statistics: counts the routings, where given.
            rows: a data set per task; None takes the tasks' evaluation rows.
            title: of the progress bar.
            measures: one per task; None takes those of its kind.
        """
        measures = measures or [measures_of(task.kind, task.labels) for task in self.tasks]
        arguments = self._quiet({})
        trainer = self.trainer(model, arguments, title=title)
        score_whole(trainer)
        was_prepared = hasattr(model, PREPARED)
        if statistics is not None:
            model.context.trace = EvaluationTrace(model, statistics, trainer.accelerator)
        try:
            scores: Scores = {}
            scored: dict[str, float] = {}
            rows = rows or [task.eval for task in self.tasks]
            for task, own, measured in zip(self.tasks, rows, measures, strict=True):
                _measure(trainer, measured, scored)
                trainer.evaluate(own)
                scores[task.name] = dict(scored)
            return scores
        finally:
            model.context.trace = None
            let_go(trainer)
            if not was_prepared:
                _as_it_came(trainer, model)

    def _quiet(self, changes: Mapping[str, Any]) -> TrainingArguments:
        """Return the run's arguments with changes, writing nothing."""
        quiet = {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        training = {**self.config.training, **quiet, **changes}
        return training_arguments(dataclasses.replace(self.config, training=training, patience=None))

    def fit_recipe(
        self,
        learning_rate: float,
        recipe: Mapping[str, Any],
        rows: Sequence[Any] | None = None,
        epochs: float | None = None,
        name: str = "LoRA",
    ) -> MoAModel:
        """Return the base with another recipe than the run's in it, trained without leaving anything behind.

        Args:
            learning_rate: of its training; all else is as in the run.
            recipe: router and keywords.
            rows: a data set per task; None takes the tasks' training rows.
            epochs: None takes the run's.
            name: of the recipe, in the progress bar.
        """
        set_seed(self.config.seed)
        model = build_model(self.config, self.tasks, **recipe)
        changes: dict[str, Any] = {"learning_rate": learning_rate}
        if epochs is not None:
            changes |= {"num_train_epochs": epochs, "max_steps": -1}
        title = f"{name}, learning rate {learning_rate:g}" + ("" if rows is None else ", picking")
        self.fit(model, self._quiet(changes), rows, title)
        return model

    def lora(self, mixture: MoAModel) -> tuple[Scores, dict[str, Any]]:
        """Return the scores of one LoRA of the mixture's active parameters, and how its learning rate was picked."""
        compare = self.config.compare
        assert compare is not None
        layers, rank = tuple(mixture.mixtures()), baselines.matching_rank(mixture)
        recipe = {"router": "fixed", "n_experts": 1, "rank": rank, "targets": layers}
        own = training_arguments(self.config).learning_rate
        rates = compare.learning_rates or (own / 3, own, own * 3)
        splits = [
            (task.train, *baselines.held_out(len(task.train), compare.validation_fraction, self.config.seed))
            for task in self.tasks
        ]
        inner = [rows.select(kept) for rows, kept, _ in splits]
        outer = [rows.select(left) for rows, _, left in splits]

        def score(rate: float) -> Scores:
            return self.evaluate(self.fit_recipe(rate, recipe, inner, compare.search_epochs), rows=outer)

        best, tried = baselines.pick(rates, score) if len(rates) > 1 else (rates[0], [])
        started = time.monotonic()
        model = self.fit_recipe(best, recipe)
        seconds = time.monotonic() - started
        about = {
            "what": f"one LoRA of rank {rank} on the same {len(layers)} layers, same rows, epochs and batches",
            "parameters": sum(p.numel() for n, p in model.named_parameters() if ".bank." in n),
            "learning_rate": best,
            "tried": tried,
            "search_epochs": compare.search_epochs,
            "seconds": seconds,
        }
        return self.evaluate(model), about

    @torch.no_grad()
    def features(self, model: MoAModel, rows: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the frozen base's pooled features (n, d) of a data set per task, task ids (n,) and labels (n, …)."""
        model.eval()
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        size = training_arguments(self.config).per_device_eval_batch_size
        with model.disable_adapter():
            for dataset in rows:
                lengths = [len(ids) for ids in dataset["input_ids"][:]]
                order = sorted(range(len(lengths)), key=lengths.__getitem__)  # so that little is padding
                for start in range(0, len(order), size):
                    batch = self.collator(dataset.select(order[start : start + size]))
                    batch = {name: value.to(model.device) for name, value in batch.items()}
                    labels, ids = batch.pop("labels"), batch.pop("task_ids")
                    parts.append((model.base.features(**batch).float().cpu(), ids.cpu(), labels.cpu()))  # type: ignore[operator]
        first, second, third = zip(*parts, strict=True)
        if third[0].ndim > 1:
            width = max(labels.shape[1] for labels in third)
            third = tuple(F.pad(labels, (0, width - labels.shape[1]), value=IGNORED) for labels in third)
        return torch.cat(first), torch.cat(second), torch.cat(third)


def _measure(trainer: Trainer, measures: Measures, into: dict[str, float] | None = None) -> None:
    """Let a trainer's evaluations give measures.

    Args:
        trainer: changed in place.
        measures: of its evaluation rows.
        into: gets each evaluation's, as they are: Trainer has a loss of its own, a mean over batches.
    """

    def scores(prediction: Any) -> dict[str, float]:
        kept = prediction.predictions
        found = measures.scores(kept if isinstance(kept, tuple) else (kept,), prediction.label_ids)
        if into is not None:
            into.clear()
            into.update(found)
        return {name: value for name, value in found.items() if not name.startswith("loss")}

    trainer.preprocess_logits_for_metrics = measures.keep  # type: ignore[assignment]
    trainer.compute_metrics = scores


def _as_it_came(trainer: Trainer, model: MoAModel) -> None:
    """Take off what preparing a model for evaluation put on it: training would find it prepared, and not wrap it."""
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop(PREPARED, None)
