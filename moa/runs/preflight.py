"""Everything about a run that can be checked before anything heavy is imported or anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, unknown_name
from .arguments import check_device
from .base_files import check_base
from .config import TrainConfig, read_config
from .engines import check_engine
from .joint import decided_by_first, n_processes
from .recipe_keywords import check_written
from .run_folder import CONFIG, RunFolder
from .task_rows import TaskRows, read_tasks
from .tasks import MEASURES, measured_together
from .yaml_values import is_folder

# of a configuration, what scoring does not look at
UNSCORED = ("recipe", "strategy", "output", "overwrite", "packing", "score_before", "compare", "generate", "patience")
SCORED_TRAINING = re.compile(
    r"(dataloader|disable|eval|report|log|logging|torch_compile|torch|include|remove|label)_\w+|use_cpu|"
    r"per_device_eval_batch_size|batch_eval_metrics|bf16\w*|fp16\w*|tf32|full_determinism|accelerator_config"
)


@dataclass(frozen=True)
class Checked:
    """A run that may start.

    Args:
        config: of the run.
        folder: where it will be written.
        rows: of its tasks.
    """

    config: TrainConfig
    folder: RunFolder
    rows: list[TaskRows]


def check_run(config: TrainConfig, resume: bool = False) -> Checked:
    """Return a configuration with its folder and its rows, all checked and nothing written.

    What costs least is looked at first; torch is imported last, for what only a recipe and the device can tell. Of
    several processes the first one looks at the folder, for all of them.

    Args:
        config: of the run.
        resume: go on with what its folder holds.

    Raises:
        ConfigError: an output that cannot be written or holds a run, nothing to resume or another configuration, a base
            or a task's file that cannot be used, a recipe that does not exist, a measure that these tasks do not have.
    """
    folder = decided_by_first(lambda: RunFolder(config, resume))
    check_base(config.base, config.max_length)
    check_written(config.recipe, bool(config.imports))
    rows = read_tasks(config.tasks, config.seed)
    _check_measures(config, rows)
    labelled = [task for task in rows if task.task.kind == "classification"]
    if config.packing and labelled:
        raise ConfigError(
            f"packing is for text to write, and task {labelled[0].name!r} has labels: set packing: false."
        )
    config.check_recipe()
    check_device(config.training)
    after = {"compare": config.compare, "generate": config.generate}
    check_engine(config.training, after, folder.checkpoint, n_processes())
    return Checked(config, folder, rows)


def _check_measures(config: TrainConfig, rows: Sequence[TaskRows]) -> None:
    """Check that what picks the best model is measured, and that a loss made for classes meets no numbers."""
    numbers = [task.name for task in rows if task.regresses]
    if config.training.get("label_smoothing_factor") and numbers:
        raise ConfigError(
            f"training.label_smoothing_factor is for classes, and task {numbers[0]!r} is a regression: leave it out."
        )
    asked = config.training.get("metric_for_best_model")
    if asked is None:
        return
    kind = measured_together([task.kind for task in rows])
    known = ("loss",) if kind is None else MEASURES[kind]
    if str(asked).removeprefix("eval_") not in known:
        why = "" if kind else " (of tasks that are not scored alike only the loss is measured together)"
        raise ConfigError(unknown_name("measure", asked, known, "training.metric_for_best_model") + why)


def check_scored(
    checkpoint: str | Path, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """Return the configuration whose tasks score a checkpoint; nothing heavy is imported.

    Args:
        checkpoint: folder of a run, or of a checkpoint.
        config: YAML file with the tasks; None takes config.yaml of the run.
        overrides: "a.b=c" each.

    Raises:
        ConfigError: no such folder or configuration, a base that is not there, or an override that scoring does not
            look at.
    """
    folder = Path(checkpoint)
    if not is_folder(folder):
        raise ConfigError(f"there is no folder {checkpoint} (looked from {Path.cwd()}).")
    home = folder if (folder / CONFIG).is_file() else folder.parent
    for override in overrides:
        _check_scored_key(override.partition("=")[0].strip())
    own = read_config(config or home / CONFIG, overrides, recipe=False)
    check_base(own.base, own.max_length)
    return own


def _check_scored_key(key: str) -> None:
    """Refuse to set what would change nothing: a score that does not move would seem to say something."""
    first, _, rest = key.partition(".")
    if first in UNSCORED or (first == "training" and rest and not SCORED_TRAINING.fullmatch(rest)):
        raise ConfigError(f"--set {key}: scoring a checkpoint does not look at it; leave it out.")
