"""`RoutingMonitor`: watches the routing of a training run, in TensorBoard and in `routing.jsonl`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from ..objective.trace import Trace
from .runlog import SCALARS, LogStep, RunLog
from .statistics import (
    COLLAPSE_BELOW,
    DEAD_SHARE,
    LayerLoad,
    RoutingCollapseWarning,
    RoutingStatistics,
    collapse_message,
    has_collapsed,
)

MAX_TASKS = 64


class RoutingMonitor(TrainerCallback):
    """Logs load, entropy, effective experts, dead fraction, largest share, gradients and losses of the routers.

    With the stock Trainer: `Trainer(..., callbacks=[RoutingMonitor()])` logs at the Trainer's logging steps. In a bare
    loop::

        monitor = RoutingMonitor("runs/a", every=10)
        monitor.attach(model)
        for step, batch in enumerate(data, 1):
            model(**batch).loss.backward()
            optimizer.step()
            monitor.step(step)        # before zero_grad, so that the routers' gradients can be read
            optimizer.zero_grad()
        monitor.close()

    Each log step covers all training forwards since the last one: micro-batches, ReMix's several selections, but not
    the recomputation of gradient checkpointing, nor evaluation. Under torch.distributed every process must run the
    monitor; the first one writes.

    It writes TensorBoard events under `moa/`: `moa/mean` and `moa/worst` over layers, which it opens on,
    `moa/objective/NAME`, `moa/router_grad_norm`, `moa_layers/MEASURE/LAYER`, the images `moa_load/all` and
    `moa_load/by_task`, a custom-scalars layout, collapse warnings as text; with `detailed`, `moa_load/LAYER/expert_N`.
    And `routing.jsonl`, a line per log step.

    Args:
        log_dir: where both go. Default, with Trainer only: `routing.jsonl` in `output_dir`, events in
            `TENSORBOARD_LOGGING_DIR`, else `args.logging_dir` where this transformers has it, else
            `output_dir/runs/moa`, which `tensorboard --logdir output_dir` finds.
        every: optimizer steps between log steps, in a bare loop only.
        tasks: names of the tasks by id, or their number; default up to 64 tasks, shown by their number.
        detailed: write one scalar per expert and layer.
        images: write heat maps.
        dead_share: an expert is dead below this fraction of its even share.
        collapse_below: see `moa.monitor.statistics.has_collapsed`.
        all_reduce: add up the processes of torch.distributed; False shows only the first process.

    Raises:
        ConfigError: every < 1, no tasks, or dead_share or collapse_below outside (0, 1].
    """

    def __init__(
        self,
        log_dir: str | Path | None = None,
        every: int = 50,
        *,
        tasks: Sequence[str] | int | None = None,
        detailed: bool = False,
        images: bool = True,
        dead_share: float = DEAD_SHARE,
        collapse_below: float = COLLAPSE_BELOW,
        all_reduce: bool = True,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every must be at least 1 step, got {every}.")
        if not 0 < collapse_below <= 1 or not 0 < dead_share <= 1:
            raise ConfigError(
                f"collapse_below and dead_share must be in (0, 1], got {collapse_below} and {dead_share}."
            )
        n_tasks = MAX_TASKS if tasks is None else tasks if isinstance(tasks, int) else len(tasks)
        if n_tasks < 1:
            raise ConfigError(f"tasks must name at least one task, got {tasks!r}: leave it out where there are none.")
        self.log_dir = Path(log_dir) if log_dir is not None else None
        self.every, self.detailed, self.images, self.all_reduce = every, detailed, images, all_reduce
        self.tasks = [f"task {t}" for t in range(n_tasks)] if tasks is None or isinstance(tasks, int) else list(tasks)
        self.dead_share, self.collapse_below = dead_share, collapse_below
        self.last: dict[str, LayerLoad] = {}
        self._window: Window | None = None
        self._log: RunLog | None = None
        self._collapsed: set[str] = set()
        self._told_about_tasks = False
        self._step = self._logged = 0

    # ---------------------------------------------------------------- bare loop

    def attach(self, model: nn.Module, start_step: int = 0) -> None:
        """Start watching the `MoAModel` that model is or holds (`DistributedDataParallel`, compiled, …).

        Args:
            model: any module.
            start_step: optimizer steps already done; lines and events of later steps are those of a run that was cut
                off, and are dropped.

        Raises:
            ConfigError: no `MoAModel` inside, no log_dir, or already attached to another model.
        """
        if self.log_dir is None:
            raise ConfigError("RoutingMonitor needs log_dir=... in a bare loop: where shall it write?")
        self._attach(model, self.log_dir, self.log_dir, start_step)

    def step(self, global_step: int) -> None:
        """Take note of an optimizer step, and log if it is one to log; call before `zero_grad`.

        Args:
            global_step: optimizer steps done, from 1.

        Raises:
            ConfigError: not attached.
        """
        if self._window is None:
            raise ConfigError("RoutingMonitor.step was called before attach(model).")
        self._window.note_gradients()
        self._step = global_step
        if global_step % self.every == 0:
            self.log(global_step)

    def log(self, global_step: int) -> dict[str, LayerLoad]:
        """Write what happened since the last log step, and return it: layer -> loads (E,); empty if nothing ran.

        Raises:
            ConfigError: not attached.
        """
        if self._window is None:
            raise ConfigError("RoutingMonitor.log was called before attach(model).")
        self._step = self._logged = global_step
        layers = self._window.statistics.summary(self.all_reduce)
        losses, grad_norm = self._window.scalars()
        self._window.reset()
        if not layers:
            return layers
        self.last = layers
        told = [*self._collapse_warnings(layers), *self._task_warning(layers)]
        if self._log is not None:
            self._log.write(LogStep(global_step, layers, self._by_task(layers), losses, grad_norm, told))
        return layers

    def close(self) -> None:
        """Log the steps since the last log step and stop watching: nothing stays attached to the model.

        Does nothing if not attached.
        """
        if self._window is not None:
            if self._step > self._logged:
                self.log(self._step)
            self._window.detach()
            self._window = None
        if self._log is not None:
            self._log.close()
            self._log = None

    # ---------------------------------------------------------------- Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model that Trainer trains."""
        events = self.log_dir
        if events is None:
            named = os.environ.get("TENSORBOARD_LOGGING_DIR") or getattr(args, "logging_dir", None)
            events = Path(named).expanduser() if named else Path(args.output_dir) / "runs" / "moa"
        self._attach(kwargs["model"], self.log_dir or Path(args.output_dir), events, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the routers' gradients, as the optimizer will see them (after clipping)."""
        if self._window is not None:
            self._window.note_gradients()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log where Trainer logs its training loss, and add the means over layers to what Trainer logs.

        They are in Trainer's history, and in every logger that is called after this one.
        """
        if self._window is None or logs is None or "loss" not in logs:
            return
        measures = [layer.measures() for layer in self.log(state.global_step).values()]
        for what in SCALARS if measures else ():
            logs[f"moa/{what}"] = sum(m[what] for m in measures) / len(measures)
            if state.log_history:
                state.log_history[-1][f"moa/{what}"] = logs[f"moa/{what}"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the rest and detach."""
        self._step = state.global_step
        self.close()

    # ---------------------------------------------------------------- inside

    def _attach(self, model: nn.Module, folder: Path, events: Path, start_step: int) -> None:
        found = next((m for m in model.modules() if isinstance(m, MoAModel)), None)
        if found is None:
            raise ConfigError(
                f"RoutingMonitor found no MoAModel in {type(model).__name__}: make one with moa.build(model)."
            )
        if self._window is not None and self._window.model is not found:
            raise ConfigError("this RoutingMonitor is attached to another model: close() it, or make a second one.")
        self.close()
        self._step = self._logged = found.steps_done = start_step
        self._collapsed.clear()
        self._window = Window(found, len(self.tasks), self.dead_share)
        if _rank() == 0:
            self._log = RunLog(folder, events, start_step, list(found.mixtures()), self.detailed, self.images)

    def _collapse_warnings(self, layers: Mapping[str, LayerLoad]) -> list[str]:
        """Warn once per layer until it has recovered, i.e. spreads twice as far as where it warns; return the words."""
        told = []
        window = self._window
        assert window is not None
        for name, layer in layers.items():
            if name not in self._collapsed and has_collapsed(layer, self.collapse_below) and window.learns(name):
                self._collapsed.add(name)
                told.append(collapse_message(name, layer, window.advice(name)))
            elif name in self._collapsed and not has_collapsed(layer, 2 * self.collapse_below):
                self._collapsed.discard(name)
        if _rank() == 0:
            for message in told:
                warnings.warn(message, RoutingCollapseWarning, stacklevel=3)
        return told

    def _task_warning(self, layers: Mapping[str, LayerLoad]) -> list[str]:
        """Warn once of rows whose task id is out of range; return the words."""
        stray = max(layer.rows_without_task for layer in layers.values())
        if not stray or self._told_about_tasks or self._window is None or not self._window.saw_tasks:
            return []
        self._told_about_tasks = True
        message = (
            f"{stray:.0f} rows belong to no task 0 … {len(self.tasks) - 1}; they count only in the total load. "
            "Give RoutingMonitor the tasks=[names] (or their number) of your data."
        )
        if _rank() == 0:
            warnings.warn(message, stacklevel=3)
        return [message]

    def _by_task(self, layers: Mapping[str, LayerLoad]) -> dict[str, dict[str, Tensor]]:
        """Return task name -> layer -> (E,) load, for the tasks that were seen."""
        seen = sorted({task for layer in layers.values() for task in layer.by_task})
        return {
            self.tasks[task]: {name: layer.by_task[task] for name, layer in layers.items() if task in layer.by_task}
            for task in seen
        }


class Window:
    """What happened since the last log step, kept on the device; the one thing that is attached to the model.

    Args:
        model: its training forwards call this with their traces.
        n_tasks: see `RoutingStatistics`.
        dead_share: see `RoutingStatistics`.
    """

    def __init__(self, model: MoAModel, n_tasks: int, dead_share: float) -> None:
        self.model = model
        self.statistics = RoutingStatistics(n_tasks, dead_share)
        self.saw_tasks = False
        self._routers = {name: branch.router for name, branch in reversed(list(model.branches()))}
        self._parameters = [p for _, branch in model.branches() for p in branch.router.learned()]
        self._last_losses: dict[str, Tensor] | None = None
        self.reset()
        model.observers.append(self)

    def reset(self) -> None:
        """Start the next window."""
        self.statistics.reset()
        self._losses: dict[str, tuple[Tensor, int]] = {}
        self._norms: tuple[Tensor, int] | None = None

    def detach(self) -> None:
        """Take this off the model."""
        if self in self.model.observers:
            self.model.observers.remove(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, traces: list[Trace]) -> None:
        """Count the M traces of one training forward, and its losses ()."""
        for trace in traces:
            self.saw_tasks = self.saw_tasks or trace.task_ids is not None
            self.statistics.add(trace, trace.task_ids)
        losses = self.model.last_losses
        if losses is not self._last_losses:  # a forward without a loss leaves those of an earlier one
            for name, value in losses.items():
                total, count = self._losses.get(name, (torch.zeros_like(value), 0))
                self._losses[name] = (total + value, count + 1)
        self._last_losses = losses

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Add the norm of all routers' gradients, (), if they have any."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            total, count = self._norms or (torch.zeros_like(norm), 0)
            self._norms = (total + norm, count + 1)

    def scalars(self) -> tuple[dict[str, float], float | None]:
        """Return the window's mean losses by name, and the mean norm of the routers' gradients (None without any)."""
        losses = {name: float(total) / count for name, (total, count) in self._losses.items()}
        return losses, None if self._norms is None else float(self._norms[0]) / self._norms[1]

    def learns(self, name: str) -> bool:
        """Tell whether the layer's router can change: a fixed routing cannot collapse."""
        router = self._routers[name.partition("#")[0]]
        return any(p.requires_grad for p in router.learned())

    def advice(self, name: str) -> str:
        """Return what to try against the collapse of a layer, by what its router has."""
        router = self._routers[name.partition("#")[0]]
        loss = next(
            (which for which in ("balance", "model_balance", "importance") if router.loss_weights.get(which)), None
        )
        if loss is not None:
            weight = router.loss_weights[loss]
            keyword = loss.removeprefix("model_")
            return f"Try a larger {keyword}= (now {weight:g}), router='sigmoid', or a lower learning rate."
        if getattr(router, "bias_rate", 0):
            return f"Try a larger bias_rate= (now {router.bias_rate:g}), or a lower learning rate."
        if router.stochastic:
            return f"Try more samples= (now {router.samples}), or a lower learning rate for the routers."
        return "Try router='topk' with balance=0.01 or more, router='sigmoid', or a lower learning rate."


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
