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


class ProgressBar(TrainerCallback):
    """One bar for training with the last loss beside it; nothing else is printed."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
