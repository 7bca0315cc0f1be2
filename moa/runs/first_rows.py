"""The first evaluation rows of each task of a run, as inputs of its model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .collate import Collator
from .encode import encode_tasks
from .preflight import check_scored
from .run_model import load_tokenizer, with_heads_of


def first_rows(folder: str | Path, model: MoAModel, n: int) -> dict[str, dict[str, Tensor]]:
    """Return task -> the inputs (n, S) of its first evaluation rows, labels included.

    Args:
        folder: of the run; its configuration says the tasks.
        model: of the run's checkpoint.
        n: rows of each task at most.

    Raises:
        ConfigError: n below 1, no configuration, or tasks that cannot be read or that the model has no head for.
    """
    if n < 1:
        raise ConfigError(f"rows={n} must be at least 1.")
    config = with_heads_of(check_scored(folder), model, Path(folder))
    tokenizer = load_tokenizer(config.base)
    collator = Collator(tokenizer)
    tasks = encode_tasks(config.tasks, tokenizer, config.max_length, config.seed, config.long_rows)
    batches = {task.name: collator(task.eval.select(range(min(n, len(task.eval))))) for task in tasks}
    return {task: {name: value.to(model.device) for name, value in batch.items()} for task, batch in batches.items()}
