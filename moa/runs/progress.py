"""The one progress bar of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging


def one_bar() -> None:
    """Turn off the bars of loading and saving: ours is for training."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def quiet() -> None:
    """Turn off all that loading says: it does not know that half of a model was asked for."""
    one_bar()
    logging.set_verbosity_error()


class ProgressBar(TrainerCallback):
    """One bar for training with the last loss beside it, and one for each scoring, which then goes away."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None
        self.scoring: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.bar is not None and logs is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Open the bar of a scoring, and move it."""
        if state.is_world_process_zero and self.scoring is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            title = self.title if self.bar is None else "evaluation"
            self.scoring = tqdm(total=total, desc=title, unit="batch", dynamic_ncols=True, leave=False)
        if self.scoring is not None:
            self.scoring.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it."""
        if self.scoring is not None:
            self.scoring.close()
            self.scoring = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
