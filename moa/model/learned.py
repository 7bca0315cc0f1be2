"""What a training forward of a host runs and adds up: every selection, the routers' own losses, what routers count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ..compat import is_captured
from ..formats.sharded import size_of
from ..objective import Objective, Trace
from ..objective.agreement import disagreement
from .averaged import check_averaged, ready_for_engine
from .host import Host
from .outputs import logits_of, loss_of, with_loss
from .outside import LABELLED, LIKELIHOODS, asked_of, carried, hook_all, refuse_sampled, warn_of_lost
from .running import hold_still, moved_once
from .selections import Selections
from .turns import alone


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
    _warned_of_lost_losses: bool = False
    _engine_seen: bool = False  # asked at the first training forward, when an engine has taken the model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the forward; in training also of one that another library has put in its place."""
        replaced = "forward" in self.__dict__
        first = self.training and not self._engine_seen
        learns = (replaced or first) and self._learns() and not torch.compiler.is_compiling()
        if learns and first:
            self._engine_seen = True
            ready_for_engine(self)  # here, before the engine's own hooks
        if not (learns and replaced):
            return super().__call__(*args, **kwargs)

        def run() -> tuple[Any, Tensor | None]:
            outputs = super(Learned, self).__call__(*args, **kwargs)
            return outputs, loss_of(outputs)

        outputs, loss = self._train_forward(run, kwargs.get("labels"))
        came = loss_of(outputs)
        if loss is None or came is None or loss is came:
            return outputs
        own = [name for name in self.last_losses if name != "task"]
        if own and isinstance(outputs, dict) and isinstance(outputs.get(LABELLED), Tensor):
            refused = partial(self._left_out, own)
            outputs[LIKELIHOODS] = carried(outputs[LIKELIHOODS], outputs[LABELLED], loss - came, refused)
        return with_loss(outputs, loss)

    def _learns(self) -> bool:
        """Whether this forward is one to learn from, and its loss nobody's outside of the model."""
        return self.training and torch.is_grad_enabled() and not self.scope.in_closure

    def _train_forward(self, run: Callable[[], tuple[Any, Tensor | None]], labels: Any) -> tuple[Any, Tensor | None]:
        """Run every selection, all under the same dropout; return the first's outputs with the training loss ()."""
        check_averaged(self)
        samples = self.samples
        passes: list[tuple[Any, Tensor | None]] = []
        traces: list[Trace] = []
        for selected in self.selections.of(samples):
            with selected, self._again(bool(passes)), self.tracing() as trace:
                passes.append(run())
            traces.append(trace)
            if not trace:  # the experts are off, or a forward inside has seen to all this
                return passes[0]
            if passes[0][1] is None:  # nothing to compare selections by: this is a forward like any other
                break
        losses = [loss for _, loss in passes if loss is not None]
        if not losses:
            self._learned_outside(passes[0][0], traces)
            return passes[0]
        examples, apart = None, None
        if samples > 1:
            logits = [logits_of(outputs) for outputs, _ in passes]
            examples = self.objective.per_example(losses, logits, labels)
            if self.consistency:
                apart = self.consistency * disagreement(logits, self.context)
        total = self._add_up(losses, examples, traces, labels, apart)
        return passes[0][0], total

    def _entered_inside(self, outputs: Any, trace: Trace) -> None:
        """Take note of a training forward of a part, whose outputs somebody else makes a loss of."""
        if trace:
            self._learned_outside(outputs, [trace])

    def _learned_outside(self, outputs: Any, traces: list[Trace]) -> None:
        """Count a training forward without a loss; a backward from its outputs says what it goes without, or refuses.

        Only who learns from the outputs needs a loss that the routers see: under a sampling recipe, too, looking at
        them is free, and it is the backward that is refused. Compiled code has no such hook and is refused at once.
        """
        asked, sampled = asked_of(traces), self.samples > 1
        if torch.compiler.is_compiling():
            if sampled:
                refuse_sampled()
        elif sampled or (asked and not self._warned_of_lost_losses):
            hook_all(outputs, partial(self._left_out, asked))
        self._notice(traces)

    def _left_out(self, asked: list[str]) -> None:
        """Say once that a backward goes without the routers' own losses, or refuse it under a sampling recipe."""
        if self.samples > 1:
            refuse_sampled()
        self.last_losses = {name: value for name, value in self.last_losses.items() if name not in asked}
        if not self._warned_of_lost_losses:
            self._warned_of_lost_losses = True
            warn_of_lost(asked)

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
        samples = self.samples if self.training else 1
        with self._undisturbed(samples), self.scope.closure():
            for selected in self.selections.of(samples):
                with selected, self._again(bool(values)), self.tracing() as trace:
                    values.append(closure())
                traces.append(trace)
        losses = [v.mean() for v in values]
        if not self.training:
            return losses[0]
        examples = torch.stack([v.detach() / v.shape[0] for v in values]) if values[0].ndim == 1 else None
        return self._add_up(losses, examples, traces, None)

    def _add_up(
        self,
        losses: list[Tensor],
        examples: Tensor | None,
        traces: list[Trace],
        labels: Any,
        apart: Tensor | None = None,
    ) -> Tensor:
        total, self.last_losses = self.objective.total(losses, examples, traces, apart)
        if not is_captured(total):
            decoder = self._kind() == "decoder"
            self.objective.diagnose(total, traces, labels, decoder, self.branches(), self.steps_done + 1)
        self._notice(traces)
        return total

    def optimizer_step_done(self) -> None:
        """Let every router take its step; called after each step of an optimizer that trains this model."""
        super().optimizer_step_done()
        self.selections.forget()

    @alone
    def train(self, mode: bool = True) -> Self:
        """Set training mode as every module does; the frozen base's running statistics, (C,), stay as they came."""
        super().train(mode)
        hold_still(self.base, [whole.module for whole in self.whole])
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters, counted once each."""
        return sum(size_of(p) for p in self.parameters() if p.requires_grad), sum(size_of(p) for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print trainable and all parameters in one line, as peft does, and what carries experts in another."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
        print(self.adapted_summary())

    def _again(self, again: bool) -> contextlib.AbstractContextManager[None]:
        """Run a forward on the batch of the one before, if so: what it moved is moved once."""
        return moved_once([whole.module for whole in self.whole]) if again else contextlib.nullcontext()

    def _undisturbed(self, samples: int) -> contextlib.AbstractContextManager[None]:
        """Let no other thread draw from the random state of several selections, or see modes that a first pass sets.

        A compiled forward waits for no thread, and no thread for it: locks are not in a graph.
        """
        preview = self.preview
        # asked of this model first: another thread's pass may have its parts in evaluation just now
        switches = preview is not None and (self.training or preview.switches_modes)
        apart = (samples > 1 or switches) and not torch.compiler.is_compiling()
        return self.scope.turns.alone() if apart else contextlib.nullcontext()

    def _shifts(self) -> bool:
        """Whether Trainer leaves the first label of a row out of its count: the share must follow its rule."""
        return self.loss_type == "ForCausalLM" and not getattr(self.config, "is_encoder_decoder", False)

    def _kind(self) -> str:
        if getattr(self.config, "is_encoder_decoder", False):
            return "encoder-decoder"
        return "decoder" if self.can_generate() else "encoder"

    def _notice(self, traces: list[Trace]) -> None:
        self.settle()
        self._counted = True
        for trace in traces:
            for record in trace:
                record.router.observe(record.routing, record.mask)  # type: ignore[operator]
        for observer in self.observers:
            observer(traces)
