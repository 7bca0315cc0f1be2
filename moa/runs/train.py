"""A validated configuration into a run: scores before and after, baselines, checkpoint, figure, results."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .. import __version__
from ..formats.sharded import size_of
from ..model.build import load
from ..model.load import base_from
from ..model.moa_model import MoAModel
from ..monitor.report import routing_table
from ..monitor.statistics import LayerLoad, RoutingStatistics
from . import baselines
from .calibrated import CalibratedClasses, check_classify
from .config import TrainConfig
from .encode import EncodedTask, encode_rows, encode_tasks
from .generate import continuations
from .joint import joint, meet, n_processes
from .metrics import measures_of
from .packing import bins, check_packing
from .preflight import Checked, check_run, check_scored
from .processes import is_first, say
from .run_folder import FIGURE, MODEL, RESULTS
from .run_model import build_model, load_tokenizer, with_heads_of
from .session import Run, training_arguments
from .summary import RunResult

WORSE = 10.0  # times the loss before training


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with the words that say how to go on."""


@joint()
def train(config: TrainConfig, resume: bool = False, checked: Checked | None = None) -> RunResult:
    """Return the run that a configuration describes, after training it.

    Nothing is written before the configuration, the rows, the base and the recipe are accepted; a run that takes the
    place of another one is written beside it and moved in at the end. A start that fails leaves no trace.

    Args:
        config: see `moa.runs.config.TrainConfig`.
        resume: go on from the newest whole checkpoint of the run, bit for bit.
        checked: what `check_run` returned for this configuration; None checks it here.

    Raises:
        ConfigError: an argument that TrainingArguments does not have, a base or a task that cannot be read, an output
            folder that already holds a run, nothing to resume, or a run that was trained with another configuration.
    """
    started = time.monotonic()
    checked = checked or check_run(config, resume)
    folder = checked.folder
    model, run, arguments, rows = prepare(checked)

    meet()
    if is_first():
        folder.begin(rows)
    meet()
    try:
        results, routing = _trained(checked, model, run, arguments)
    except BaseException as error:
        way_on = folder.way_on()
        if is_first():
            folder.abandon()
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(way_on) from error
        raise
    results["seconds"]["total"] = time.monotonic() - started
    if is_first():
        (folder.work / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        folder.commit()
    meet()
    return RunResult(Path(config.output), results, routing)


def prepare(checked: Checked) -> tuple[MoAModel, Run, Any, dict[str, Any]]:
    """Return a run that is ready to train: model, run, TrainingArguments, and what its rows are known by.

    Nothing is written; what should be known of rows and model is said.

    Args:
        checked: what `check_run` returned.

    Raises:
        ConfigError: see `train`.
    """
    config, folder = checked.config, checked.folder
    arguments = training_arguments(config, folder.work)
    tokenizer = load_tokenizer(config.base)
    transformers.set_seed(config.seed)
    tasks = encode_rows(checked.rows, tokenizer, config.max_length, config.long_rows)
    rows = {task.name: task.fingerprint() for task in tasks}
    folder.check_rows(rows)
    for task in tasks:
        say(f"{task.name}: {len(task.train)} training rows, {len(task.eval)} evaluation rows")
    for note in (note for task in tasks for note in task.notes):
        say(f"note: {note}")
    model = build_model(config, tasks)
    if is_first():
        model.print_trainable_parameters()
    rows_of_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * n_processes()
    for note in [*folder.notes(rows_of_a_step), *_notes(config, model)]:
        say(f"note: {note}")
    if config.packing:
        check_packing(model)
        lengths = [len(ids) for task in tasks for ids in task.train["input_ids"]]
        n_bins = len(bins(lengths, config.max_length))
        say(
            f"packed {len(lengths)} training rows into {n_bins} sequences, "
            f"{sum(lengths) / n_bins / config.max_length:.0%} full."
        )
    weights = sum(size_of(p) * p.element_size() for p in model.parameters() if p.requires_grad)
    run = Run(config, tasks, tokenizer)
    folder.check_space(4 * weights)  # the model twice, and two moments
    return model, run, arguments, rows


def _trained(checked: Checked, model: MoAModel, run: Run, arguments: Any) -> tuple[dict[str, Any], str]:
    """Return the results of training and scoring, and the routing as a table; model and figure are written."""
    config, folder, tasks, tokenizer = checked.config, checked.folder, run.tasks, run.tokenizer
    run.check(model, arguments)  # Trainer makes its folder, which a refusal here takes away again
    before = {}
    if config.score_before:
        say("before training")
        before = run.evaluate(model, title="before training")
    seconds = run.fit(model, arguments, monitored=True, checkpoint=folder.checkpoint)
    model.save_pretrained(folder.work / MODEL, is_main_process=is_first())
    if is_first():
        tokenizer.save_pretrained(folder.work / MODEL)
        strategy = config.made_strategy()
        if strategy is not None:
            strategy.finish(model, folder.work)
    statistics = RoutingStatistics(n_tasks=len(tasks))
    say("after training")
    after = run.evaluate(model, statistics, title="after training")
    for task, scores in before.items():
        if not after[task]["loss"] < WORSE * scores["loss"]:
            say(
                f"note: {task}: the loss rose from {scores['loss']:.3g} to {after[task]['loss']:.3g}: is the learning "
                f"rate of {arguments.learning_rate:g} too high?"
            )
    layers = statistics.summary(all_reduce=True)
    if is_first():
        _write_figure(folder.work / FIGURE, layers, [task.name for task in tasks])

    results = _describe(config, model, tasks, layers)
    results["seconds"] = {"training": seconds}
    results["scores"] = {**({"before": before} if before else {}), "mixture": after}
    if config.compare is not None:
        _compare(run, model, results)
    if config.generate is not None and tasks[0].writes:
        results["answers"] = answers(model, tokenizer, tasks, config.generate.rows, config.generate.max_new_tokens)
    return results, routing_table(layers)


def _notes(config: TrainConfig, model: MoAModel) -> list[str]:
    """Return what the user should know of a model that is built."""
    notes = []
    above = [name for name, b in model.branches() if getattr(b.bank, "rank", 0) > min(b.bank.d_in, b.bank.d_out)]
    if above:
        notes.append(f"the rank is above the size of {len(above)} layers, e.g. {above[0]}: it adds nothing there.")
    own = sorted({loss for _, b in model.branches() for loss, weight in b.router.loss_weights.items() if weight})
    if config.training.get("label_smoothing_factor") and own:
        notes.append(
            "label_smoothing_factor makes Trainer compute the loss itself, from the logits: the routers' own losses "
            f"({', '.join(own)}) are left out."
        )
    return notes


def evaluate(
    checkpoint: str | Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    calibrated: bool = False,
) -> dict[str, Any]:
    """Return a checkpoint's scores on tasks, in the form of results.json.

    Args:
        checkpoint: folder of a run, or of a checkpoint.
        config: YAML file with the tasks; None takes config.yaml of the run.
        overrides: "a.b=c" each.
        calibrated: measure how far the probabilities can be believed, too: under "calibration", task -> the measures of
            `moa.monitor.calibration.calibration`, and "bins", the predictions by confidence.

    Raises:
        ConfigError: no configuration, tasks that the checkpoint has no head for, an override that changes nothing, or
            the calibration of a task that does not classify.
        CheckpointError: no checkpoint there, or a base that is not the one it was made on.
    """
    folder = Path(checkpoint)
    own = check_scored(checkpoint, config, overrides)
    own.check_recipe()
    if calibrated:
        check_classify({name: task.problem or task.kind for name, task in own.tasks.items()})
    saved = folder / MODEL if (folder / MODEL).is_dir() else folder
    model = load(saved, base_from(saved, own.base, **({} if own.dtype is None else {"dtype": own.dtype})))
    stored = json.loads(json.dumps(model.recipes[0][0].to_dict()))
    for key, value in json.loads(json.dumps(dict(own.recipe))).items():
        if key in stored and stored[key] != value:
            say(f"note: the configuration says recipe.{key}={value}, the checkpoint was made with {stored[key]}.")
    own = with_heads_of(own, model, folder)
    tokenizer = load_tokenizer(own.base)
    tasks = encode_tasks(own.tasks, tokenizer, own.max_length, own.seed, own.long_rows)
    run = Run(own, tasks, tokenizer)
    described = {task.name: _describe_task(task) for task in tasks}
    if not calibrated:
        return {"tasks": described, "scores": {"mixture": run.evaluate(model)}}
    check_classify({task.name: task.kind for task in tasks})
    measures = [CalibratedClasses(len(task.labels)) for task in tasks]
    scores = run.evaluate(model, measures=measures)
    found = {task.name: measured.found for task, measured in zip(tasks, measures, strict=True)}
    return {"tasks": described, "scores": {"mixture": scores}, "calibration": found}


def _describe(
    config: TrainConfig, model: MoAModel, tasks: Sequence[EncodedTask], layers: Mapping[str, LayerLoad]
) -> dict[str, Any]:
    trainable, total = model.get_nb_trainable_parameters()
    banks = sum(size_of(p) for _, branch in model.branches() for p in branch.bank.parameters())
    routers = sum(size_of(p) for p in {p for _, branch in model.branches() for p in branch.router.learned()})
    return {
        "versions": {"moa": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": str(model.device),
        "base": config.base,
        "recipe": {  # as JSON gives it back
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.recipes[0][0].to_dict().items()
        },
        "parameters": {
            "all": total,
            "trainable": trainable,
            "experts": banks,
            "active": baselines.active_parameters(model),
            "routers": routers,
        },
        "tasks": {task.name: _describe_task(task) for task in tasks},
        "routing": {name: {**layer.measures(), "load": layer.load.tolist()} for name, layer in layers.items()},
    }


def _describe_task(task: EncodedTask) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "training_rows": len(task.train),
        "evaluation_rows": len(task.eval),
        "majority": _majority(task),
        "constant": _constant(task),
    }


def _majority(task: EncodedTask) -> float | None:
    """Return the accuracy of always answering with the commonest training label; None for other tasks."""
    if task.kind != "classification":
        return None
    known, asked = (np.asarray(rows["labels"][:]).reshape(len(rows), -1)[:, 0] for rows in (task.train, task.eval))
    return float((asked == Counter(known.tolist()).most_common(1)[0][0]).mean())


def _constant(task: EncodedTask) -> dict[str, float] | None:
    """Return the errors of always answering with the mean of the training numbers; None where there are none."""
    if task.kind != "regression":
        return None
    known, asked = (np.asarray(rows["labels"][:]) for rows in (task.train, task.eval))
    scores = measures_of(task.kind, task.labels).scores([np.broadcast_to(known.mean(0), asked.shape)], asked)
    return {name: scores[name] for name in ("rmse", "mae")}


def _compare(run: Run, model: MoAModel, results: dict[str, Any]) -> None:
    """Add the baselines' scores to the results."""
    compare = run.config.compare
    assert compare is not None
    results["compare"] = {}
    if compare.frozen:
        say("frozen base")
        if not run.tasks[0].writes:
            scores, about = baselines.probe(
                run.tasks,
                run.features(model, [task.train for task in run.tasks]),
                run.features(model, [task.eval for task in run.tasks]),
                compare.l2,
                compare.validation_fraction,
                run.config.seed,
            )
        elif "before" in results["scores"] and all(branch.bank.zero_at_init for _, branch in model.branches()):
            scores = results["scores"]["before"]
            about = {"what": "the base as it is, not trained (experts that start at zero: the same as before)"}
        else:
            with model.disable_adapter():
                scores, about = run.evaluate(model), {"what": "the base as it is, not trained"}
        results["scores"]["frozen base"], results["compare"]["frozen base"] = scores, about
    if compare.lora:
        scores, about = run.lora(model)
        results["scores"]["LoRA"], results["compare"]["LoRA"] = scores, about


def _write_figure(path: Path, layers: Mapping[str, LayerLoad], tasks: Sequence[str]) -> None:
    from ..monitor.figures import routing_figure

    per_task = {
        task: {name: layer.by_task[t] for name, layer in layers.items() if t in layer.by_task}
        for t, task in enumerate(tasks)
    }
    per_task = {task: loads for task, loads in per_task.items() if loads}
    loads = {name: layer.load for name, layer in layers.items()}
    routing_figure(loads, per_task=per_task, title="load of the experts on the evaluation rows").savefig(path, dpi=150)


def answers(
    model: MoAModel, tokenizer: Any, tasks: Sequence[EncodedTask], rows: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """Return greedy answers to each task's first prompts, padded on the left into one batch (B, S) per task.

    Args:
        model: with a generating base.
        tokenizer: of the base.
        tasks: of text to write; those of kind text have no prompts.
        rows: prompts per task.
        max_new_tokens: tokens per answer at most.
    """
    out = []
    for number, task in enumerate(tasks):
        chosen = task.prompts[:rows]
        if not chosen:
            continue
        texts = continuations(
            model,
            tokenizer,
            [prompt for prompt, _ in chosen],
            task=number,
            templated=task.kind == "chat",
            max_new_tokens=max_new_tokens,
        )
        for (prompt, answer), text in zip(chosen, texts, strict=True):
            out.append({"task": task.name, "prompt": prompt, "answer": answer, "generated": text})
    return out
