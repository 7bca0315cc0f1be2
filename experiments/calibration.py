"""How well ways to fine-tune are calibrated: `python -m experiments.calibration`. Needs what `moa demo --prepare` gets.

The comparison of HypeLoRA (Trojan and Gębala 2026, arXiv 2603.19278), in small: LoRA, LoRA with A frozen, LoRAs that a
network emits, with A frozen or not, full fine-tuning, and the heads only, on two tasks with a head each (MiniLM's first
block). By the rule of `moa.compare`: one grid of learning rates for all arms, the same rows, steps and seeds,
rates picked by accuracy on validation rows, figures of other rows. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import moa
from experiments.bench.common import RESULTS, write
from moa.model.heads import MultiTaskForSequenceClassification
from moa.monitor.calibration import bins, calibration
from moa.monitor.compare import Scored, paired_bootstrap
from moa.monitor.figures import reliability_figure
from moa.runs import comparison, demo
from moa.runs.collate import Collator
from moa.runs.encode import EncodedTask, encode_rows
from moa.runs.progress import quiet
from moa.runs.run_model import load_tokenizer
from moa.runs.task_rows import read_tasks
from moa.runs.tasks import Task

COMMAND = "python -m experiments.calibration"
TASKS = {"tweets": "vader/tweets", "sarcasm": "sarcasm/sarcasm"}
TRAINED, VALIDATED, TESTED = 100, 120, 250  # rows of each task
RATES = comparison.GRID
BLOCKS = 1  # of MiniLM's six
LORA = {"router": "fixed", "n_experts": 1, "rank": 8, "alpha": 16}
NETWORK = {**LORA, "expert": "hypelora", "width": 128}  # the paper's is of 2,048, for an encoder that holds more
# arm -> recipe; None is full fine-tuning
ARMS: dict[str, Mapping[str, Any] | None] = {
    "LoRA": LORA,
    "LoRA, A frozen": LORA,
    "hypernetwork": NETWORK,
    "hypernetwork, A frozen": {**NETWORK, "down": "frozen"},
    "full fine-tuning": None,
    "heads only": {**LORA, "train_experts": False},
}
MEASURES = ("ece", "class_ece", "mce", "ace", "brier")


class Trainings:
    """Trains an arm, scores its rows, and keeps what it says of the test rows.

    Args:
        cache: what `moa demo --prepare` filled.
        folder: where the probabilities of the test rows go.
    """

    def __init__(self, cache: Path, folder: Path) -> None:
        self.cache, self.folder = cache, folder
        tokenizer = load_tokenizer(str(cache / comparison.BASE))
        self.collator = Collator(tokenizer)
        sources = {
            name: Task(
                train=str(cache / f"{stem}.train.jsonl"),
                eval=str(cache / f"{stem}.eval.jsonl"),
                label="label",
                max_train_rows=TRAINED + VALIDATED,
                max_eval_rows=TESTED,
            )
            for name, stem in TASKS.items()
        }
        encoded = encode_rows(read_tasks(sources, 0), tokenizer, comparison.MAX_LENGTH)
        self.tasks = [dataclasses.replace(task, train=task.train.select(range(TRAINED))) for task in encoded]
        self.held_out = [task.train.select(range(TRAINED, len(task.train))) for task in encoded]

    def __call__(self, arm: str, learning_rate: float, seed: int) -> Scored:
        """Return what an arm scores, 1 for each right row, and write the probabilities of the test rows."""
        torch.manual_seed(seed)
        model = self.model(arm)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": learning_rate}]
        steps = comparison.fit(model, groups, self.tasks, self.collator)
        model.eval()
        validation = self.probabilities(model, self.held_out)
        test = self.probabilities(model, [task.eval for task in self.tasks])
        self.file(arm, learning_rate, seed).write_text(json.dumps({task: p.tolist() for task, (p, _) in test.items()}))
        return Scored(right(validation, "validation"), right(test, "test"), steps)

    def model(self, arm: str) -> nn.Module:
        """Return an arm's model, untrained: what it trains needs a gradient."""
        labels = {task.name: task.labels for task in self.tasks}
        base: nn.Module = MultiTaskForSequenceClassification.from_encoder(
            str(self.cache / comparison.BASE), labels, num_hidden_layers=BLOCKS
        )
        recipe = ARMS[arm]
        if recipe is None:
            return base
        model = moa.build(base, **recipe)
        if arm == "LoRA, A frozen":
            for _, branch in model.branches():
                branch.bank.down.requires_grad_(False)
        return model

    @torch.no_grad()
    def probabilities(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return task -> probabilities (n, C) and labels (n,) of its rows."""
        found = {}
        for task, own in zip(self.tasks, rows, strict=True):
            batches: Any = DataLoader(own, 50, collate_fn=self.collator)
            made = [(model(**batch).logits[:, : len(task.labels)].softmax(-1), batch["labels"]) for batch in batches]
            found[task.name] = (torch.cat([p for p, _ in made]), torch.cat([y for _, y in made]))
        return found

    def file(self, arm: str, learning_rate: float, seed: int) -> Path:
        """Return where the probabilities of one training lie."""
        return self.folder / f"{list(ARMS).index(arm)}-{learning_rate!r}-{seed}.json"

    def kept(self, arm: str, learning_rate: float, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return task -> probabilities (n, C) and labels (n,) of the test rows, as a finished training left them."""
        known = json.loads(self.file(arm, learning_rate, seed).read_text())
        return {task.name: (torch.tensor(known[task.name]), labels_of(task)) for task in self.tasks}


def labels_of(task: EncodedTask) -> Tensor:
    """Return the labels (n,) of a task's test rows."""
    return torch.tensor(task.eval["labels"][:])


def right(found: Mapping[str, tuple[Tensor, Tensor]], side: str) -> dict[str, float]:
    """Return row -> 1 where the likeliest class is its label, of probabilities (n, C) and labels (n,) by task."""
    return {
        f"{task}/{side}/{row}": float(hit)
        for task, (p, y) in found.items()
        for row, hit in enumerate((p.argmax(-1) == y).tolist())
    }


def brier(found: Mapping[str, tuple[Tensor, Tensor]]) -> np.ndarray:
    """Return Σ_c (p_c - [c is the label])² of each row (n,), all tasks after each other."""
    parts = [(p - nn.functional.one_hot(y, p.shape[1])).square().sum(-1) for p, y in found.values()]
    return torch.cat(parts).double().numpy()


def measured(kept: Callable[[str, int], dict[str, tuple[Tensor, Tensor]]], seeds: Sequence[int]) -> dict[str, Any]:
    """Return what the arms' probabilities are worth.

    Args:
        kept: (arm, seed) -> probabilities (n, C) and labels (n,) by task, at the picked rate.
        seeds: of every arm.

    Returns:
        arm -> "tasks" (task -> measure -> one value a seed), the mean over tasks of every measure with its standard
        deviation over seeds, "brier_minus_lora" with its interval, and the "bins" of all tasks and seeds.
    """
    rows = {arm: np.stack([brier(kept(arm, seed)) for seed in seeds]) for arm in ARMS}  # (S, n)
    out: dict[str, Any] = {}
    for arm in ARMS:
        runs = [{task: calibration(p, y) for task, (p, y) in kept(arm, seed).items()} for seed in seeds]
        own = {task: {m: [run[task][m] for run in runs] for m in MEASURES} for task in TASKS}
        means = {m: [statistics.mean(own[task][m][n] for task in TASKS) for n in range(len(seeds))] for m in MEASURES}
        all_of = [pair for seed in seeds for pair in kept(arm, seed).values()]
        top = torch.cat([p.max(-1).values for p, _ in all_of])
        drawn = bins(top, torch.cat([p.argmax(-1) == y for p, y in all_of]))
        out[arm] = {
            "tasks": own,
            **{m: {"mean": statistics.mean(v), "deviation": statistics.stdev(v)} for m, v in means.items()},
            "brier_minus_lora": None if arm == "LoRA" else paired_bootstrap(rows[arm] - rows["LoRA"]),
            "bins": {name: getattr(drawn, name).tolist() for name in ("counts", "confidence", "accuracy")},
        }
    return out


def study(cache: Path, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return accuracy and calibration of every arm at the rate that validation picks for it.

    Args:
        cache: what `moa demo --prepare` filled.
        folder: of finished trainings.
        seeds: at least two, of weights, order and dropout.
    """
    settings = {"trained": TRAINED, "validated": VALIDATED, "tested": TESTED, "tasks": list(TASKS)}
    said = folder / "probabilities"
    said.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(cache, said)
    found = moa.compare(trainings, dict.fromkeys(ARMS, RATES), folder, seeds=seeds, baseline="LoRA", settings=settings)
    picked = {arm: row["learning_rate"] for arm, row in found["arms"].items()}
    values = measured(lambda arm, seed: trainings.kept(arm, picked[arm], seed), seeds)
    sizes = {arm: sum(p.numel() for p in trainings.model(arm).parameters() if p.requires_grad) for arm in ARMS}
    for arm, row in found["arms"].items():
        row |= {"trained_parameters": sizes[arm], "calibration": values[arm]}
    return found


def main() -> None:
    """Write experiments/results/calibration.json and the figure beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=demo.cache_folder(), help="what `moa demo --prepare` filled")
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"), help="finished trainings, to go on from")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    found = study(options.cache, options.work, range(options.seeds))
    write("calibration", found, f"{COMMAND} --seeds {options.seeds}")
    drawn = {arm: row["calibration"]["bins"] for arm, row in found["arms"].items()}
    reliability_figure(drawn).savefig(RESULTS / "calibration.png", dpi=80)
    for arm, row in found["arms"].items():
        print(arm, row["learning_rate"], row["at_edge"], row["test"], row["calibration"]["ece"])


if __name__ == "__main__":
    main()
