"""What a training forward of a host runs and adds up: every selection, the routers' own losses, what routers count."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, LostLossWarning
from ..objective import Objective, Trace
from .host import Host
from .outputs import logits_of, tensors_of
from .selections import Selections


class Learned(Host):
    """A host whose training loss holds what its routers add.

    Attributes:
        objective: adds the losses up.
        last_losses: name -> scalar of the last training forward, detached.
        observers: called after each training forward with the list of its traces.
        loss_type: transformers' name of the base's loss function.
        selections: the M forwards of a step.
    """

    objective: Objective
    last_losses: dict[str, Tensor]
    observers: list[Callable[[list[Trace]], None]]
    loss_type: str | None
    config: Any
    can_generate: Callable[[], bool]
    selections: Selections
    _in_closure: bool
    _warned_of_lost_losses: bool = False

    def _train_forward(self, run: Callable[[], tuple[Any, Tensor | None]], labels: Any) -> tuple[Any, Tensor | None]:
        """Run every selection, all under the same dropout; return the first's outputs with the training loss ()."""
        samples = self.samples
        passes, traces = [], []
        for selected in self.selections.of(samples):
            with selected, self.tracing() as trace:
                passes.append(run())
            traces.append(trace)
            if samples > 1 and passes[-1][1] is None:
                raise ContextError(
                    "a sampling recipe learns from the loss of several selections, and this training forward has no "
                    "loss: pass labels, or compute your loss inside model.routed_loss(lambda: ...)."
                )
        losses = [loss for _, loss in passes if loss is not None]
        if not losses:
            self._warn_if_learned_from(passes[0][0], traces)
            self._notice(traces)
            return passes[0]
        examples = None
        if samples > 1:
            logits = [logits_of(outputs) for outputs, _ in passes]
            examples = self.objective.per_example(losses, logits, labels)
        total = self._add_up(losses, examples, traces, labels)
        return passes[0][0], total

    def _warn_if_learned_from(self, outputs: Any, traces: list[Trace]) -> None:
        """Say once, in a backward from outputs of any shape, that it goes without the losses that routers asked for."""
        weights: list[Any] = [record.router.loss_weights for trace in traces for record in trace]
        asked = sorted({name for own in weights for name in own})
        if not asked or self._warned_of_lost_losses or torch.compiler.is_compiling():
            return

        def warn(gradient: Tensor) -> None:
            if not self._warned_of_lost_losses:
                self._warned_of_lost_losses = True
                warnings.warn(
                    f"this loss was computed outside of the model (it got no labels), so the routers' own losses "
                    f"({', '.join(asked)}) are not in it: compute yours inside model.routed_loss(lambda: …), or build "
                    "without them.",
                    LostLossWarning,
                    stacklevel=2,
                )

        for tensor in tensors_of(outputs):
            if tensor.requires_grad:
                tensor.register_hook(warn)

    def routed_loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the training loss of any closure, the routers' own losses included, scalar.

        For loops whose loss the model does not compute: `closure` calls the model and returns the loss, () or per
        example (B,), which gives a sampling router a finer signal. It is called M times for a sampling recipe,
        each time from the same random state: dropout and what the closure draws are the same in all M.

        Args:
            closure: calls `model(...)` and returns a loss () or (B,).

        Raises:
            NumericsError: a router produced NaN or infinity.
        """
        traces: list[Trace] = []
        values: list[Tensor] = []
        self._in_closure = True
        try:
            for selected in self.selections.of(self.samples if self.training else 1):
                with selected, self.tracing() as trace:
                    values.append(closure())
                traces.append(trace)
        finally:
            self._in_closure = False
        losses = [v.mean() for v in values]
        if not self.training:
            return losses[0]
        examples = torch.stack([v.detach() / v.shape[0] for v in values]) if values[0].ndim == 1 else None
        return self._add_up(losses, examples, traces, None)

    def _add_up(self, losses: list[Tensor], examples: Tensor | None, traces: list[Trace], labels: Any) -> Tensor:
        total, self.last_losses = self.objective.total(losses, examples, traces)
        self.objective.diagnose(total, traces, labels, self._kind() == "decoder")
        self._notice(traces)
        return total

    def optimizer_step_done(self) -> None:
        """Let every router take its step; called by a hook after an optimizer that holds this model's parameters."""
        super().optimizer_step_done()
        self.selections.forget()

    def _shifts(self) -> bool:
        """Whether Trainer leaves the first label of a row out of its count: the share must follow its rule."""
        return self.loss_type == "ForCausalLM" and not getattr(self.config, "is_encoder_decoder", False)

    def _kind(self) -> str:
        if getattr(self.config, "is_encoder_decoder", False):
            return "encoder-decoder"
        return "decoder" if self.can_generate() else "encoder"

    def _notice(self, traces: list[Trace]) -> None:
        for trace in traces:
            for record in trace:
                record.router.observe(record.routing, record.mask)  # type: ignore[operator]
        for observer in self.observers:
            observer(traces)
