"""A validated configuration into a run: scores before and after, baselines, checkpoint, figure, results."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from .. import __version__
from ..errors import ConfigError
from ..model.build import load
from ..model.moa_model import MoAModel
from ..monitor.report import routing_table
from ..monitor.statistics import LayerLoad, RoutingStatistics
from . import baselines
from .config import TrainConfig, read_config
from .session import Run, build_model, load_tokenizer, training_arguments, with_heads_of
from .tasks import EncodedTask, encode_tasks

RESULTS, FIGURE, CONFIG, MODEL = "results.json", "routing.png", "config.yaml", "model"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: of the run: config.yaml, results.json, routing.png, routing.jsonl, TensorBoard events under runs/, the
            trained mixture and its tokenizer under model/, Trainer's own checkpoints.
        results: what results.json holds.
        routing: a text table, a line per layer.
    """

    folder: Path
    results: dict[str, Any]
    routing: str


def train(config: TrainConfig, resume: bool = False) -> RunResult:
    """Return the run that a configuration describes, after training it.

    Args:
        config: see `moa.runs.config.TrainConfig`.
        resume: go on from the newest Trainer checkpoint of the run, bit for bit.

    Raises:
        ConfigError: an argument that TrainingArguments does not have, a base or a task that cannot be read, an output
            folder that already holds a run, or nothing to resume.
    """
    started = time.monotonic()
    folder = Path(config.output)
    arguments = training_arguments(config)
    _prepare(folder, config, resume)
    tokenizer = load_tokenizer(config.base)
    transformers.set_seed(config.seed)
    tasks = encode_tasks(config.tasks, tokenizer, config.max_length, config.seed)
    for task in tasks:
        print(f"{task.name}: {len(task.train)} training rows, {len(task.eval)} evaluation rows")
    model = build_model(config, tasks)
    model.print_trainable_parameters()

    run = Run(config, tasks, tokenizer)
    print("before training")
    before = run.evaluate(model)
    seconds = run.fit(model, arguments, monitored=True, resume=resume)
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    print("after training")
    statistics = RoutingStatistics(n_tasks=len(tasks))
    after = run.evaluate(model, statistics)
    layers = statistics.summary()
    _write_figure(folder / FIGURE, layers, [task.name for task in tasks])

    results = _describe(config, model, tasks, layers)
    results["seconds"] = {"training": seconds}
    results["scores"] = {"before": before, "mixture": after}
    if config.compare is not None:
        _compare(run, model, results)
    if config.generate is not None and tasks[0].kind == "generation":
        results["answers"] = answers(model, tokenizer, tasks, config.generate.rows, config.generate.max_new_tokens)
    results["seconds"]["total"] = time.monotonic() - started
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return RunResult(folder, results, routing_table(layers))


def evaluate(checkpoint: str | Path, config: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a checkpoint's scores on tasks, in the form of results.json.

    Args:
        checkpoint: folder of a run, or of a checkpoint.
        config: YAML file with the tasks; None takes config.yaml of the run.
        overrides: "a.b=c" each.

    Raises:
        ConfigError: no configuration, or tasks that the checkpoint has no head for.
        CheckpointError: no checkpoint there.
    """
    folder = Path(checkpoint)
    home = folder if (folder / CONFIG).is_file() else folder.parent
    own = read_config(config or home / CONFIG, overrides)
    model = load(folder / MODEL if (folder / MODEL).is_dir() else folder)
    own = with_heads_of(own, model, folder)
    tokenizer = load_tokenizer(own.base)
    tasks = encode_tasks(own.tasks, tokenizer, own.max_length, own.seed)
    scores = Run(own, tasks, tokenizer).evaluate(model)
    return {"tasks": {task.name: _describe_task(task) for task in tasks}, "scores": {"mixture": scores}}


def _prepare(folder: Path, config: TrainConfig, resume: bool) -> None:
    """Make the run's folder, and clear what an earlier run left in it where that is allowed."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file, name a folder.")
    if (folder / CONFIG).exists() and not resume:
        if not config.overwrite:
            raise ConfigError(
                f"output: {folder} already holds a run. Name another folder, set overwrite=true, or resume it "
                "(moa train --resume)."
            )
        for path in (folder / "runs", folder / MODEL, *folder.glob("checkpoint-*")):
            shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def _describe(
    config: TrainConfig, model: MoAModel, tasks: Sequence[EncodedTask], layers: Mapping[str, LayerLoad]
) -> dict[str, Any]:
    trainable, total = model.get_nb_trainable_parameters()
    banks = sum(p.numel() for _, branch in model.branches() for p in branch.bank.parameters())
    routers = sum({p: p.numel() for _, branch in model.branches() for p in branch.router.parameters()}.values())
    return {
        "versions": {"moa": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": str(model.device),
        "base": config.base,
        "recipe": model.recipes[0][0].to_dict(),
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
    }


def _majority(task: EncodedTask) -> float | None:
    """Return the accuracy of always answering with the commonest training label; None for generation."""
    if task.kind != "classification":
        return None
    commonest = Counter(task.train["labels"][:]).most_common(1)[0][0]
    return sum(label == commonest for label in task.eval["labels"][:]) / len(task.eval)


def _compare(run: Run, model: MoAModel, results: dict[str, Any]) -> None:
    """Add the baselines' scores to the results."""
    compare = run.config.compare
    assert compare is not None
    results["compare"] = {}
    if compare.frozen:
        print("frozen base")
        if run.tasks[0].kind == "classification":
            scores, about = baselines.probe(
                {task.name: len(task.labels) for task in run.tasks},
                run.features(model, [task.train for task in run.tasks]),
                run.features(model, [task.eval for task in run.tasks]),
                compare.l2,
                compare.validation_fraction,
                run.config.seed,
            )
        elif all(branch.bank.zero_at_init for _, branch in model.branches()):
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


@torch.no_grad()
def answers(
    model: MoAModel, tokenizer: Any, tasks: Sequence[EncodedTask], rows: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """Return greedy answers to each task's first prompts, padded on the left into one batch (B, S) per task.

    Args:
        model: with a generating base.
        tokenizer: of the base.
        tasks: of kind generation.
        rows: prompts per task.
        max_new_tokens: tokens per answer at most.
    """
    model.eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    out = []
    for number, task in enumerate(tasks):
        chosen = task.prompts[:rows]
        batch = tokenizer([prompt for prompt, _ in chosen], return_tensors="pt", padding=True).to(model.device)
        ids = torch.full((len(chosen),), number, device=model.device)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            task_ids=ids,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for (prompt, answer), text in zip(chosen, texts, strict=True):
            out.append({"task": task.name, "prompt": prompt, "answer": answer, "generated": text})
    return out


def score_table(results: Mapping[str, Any]) -> str:
    """Return the scores of a run as text: a line per task, accuracy and loss of every model that was scored.

    Args:
        results: what `RunResult.results` or results.json holds.
    """
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = results["scores"]
    order = [name for name in ("before", "frozen base", "LoRA", "mixture") if name in scores]
    majority = {task: row["majority"] for task, row in results["tasks"].items() if row["majority"] is not None}
    columns = (["majority"] if majority else []) + order
    width = max(len("evaluation loss"), *(len(task) for task in results["tasks"]))
    lines = []
    for measure, title in (("accuracy", "accuracy"), ("loss", "evaluation loss")):
        shown = [column for column in columns if measure == "accuracy" or column != "majority"]
        lines.append(f"{title:<{width}}  rows  " + "  ".join(f"{column:>11}" for column in shown))
        table = {
            task: [majority[task] if c == "majority" else scores[c][task][measure] for c in shown]
            for task in results["tasks"]
        }
        for task, values in table.items():
            rows = results["tasks"][task]["evaluation_rows"]
            lines.append(f"{task:<{width}}  {rows:4}  " + "  ".join(f"{value:11.3f}" for value in values))
        means = [sum(column) / len(table) for column in zip(*table.values(), strict=True)]
        lines.append(f"{'mean':<{width}}        " + "  ".join(f"{value:11.3f}" for value in means))
        lines.append("")
    return "\n".join(lines[:-1])


def summary(result: RunResult) -> str:
    """Return what a run did, as text for the terminal: scores, what they compare, routing, answers, next commands."""
    results, folder = result.results, result.folder
    parameters = results["parameters"]
    recipe = results["recipe"]
    parts = [
        f"{recipe['router']}, {recipe['n_experts']} experts, k = {recipe['k']}: {parameters['active']:,} of "
        f"{parameters['experts']:,} expert parameters act on a row, {parameters['routers']:,} are in routers.",
        score_table(results),
    ]
    for name, about in results.get("compare", {}).items():
        picked = [f"{row['value']:g} ({row['accuracy']:.3f})" for row in about.get("tried", [])]
        chosen = about.get("learning_rate", about.get("l2"))
        how = f"; {'learning rate' if 'learning_rate' in about else 'l2'} {chosen:g}" if chosen is not None else ""
        how += f", picked on held-out training rows from {', '.join(picked)}" if picked else ""
        size = f" ({about['parameters']:,} parameters)" if "parameters" in about else ""
        parts.append(f"{name}: {about['what']}{size}{how}.")
    parts.append(result.routing)
    for row in results.get("answers", []):
        parts.append(f"[{row['task']}] {row['prompt']!r}\n  wanted {row['answer']!r}, written {row['generated']!r}")
    parts.append(f"{results['seconds']['training']:.0f} s of training, {results['seconds']['total']:.0f} s in all.")
    parts.append(f"checkpoint {folder / MODEL}, figure {folder / FIGURE}, scores {folder / RESULTS}. Next:")
    commands = (f"moa report {folder}", f"moa inspect {folder / MODEL}", f"tensorboard --logdir {folder}")
    return "\n\n".join(parts) + "\n" + "\n".join(f"  {command}" for command in commands)
