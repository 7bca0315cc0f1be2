"""`MoAModel`: a frozen base with mixtures inside, which trains, saves and generates as a transformers model does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import checkpoint
from .errors import ContextError
from .inputs import describe_batch, input_names, prompt_attention
from .objective import Objective
from .outputs import logits_of, loss_of, with_loss
from .recipes import Recipe
from .recompute import Recomputed
from .stepping import watch
from .trace import Trace
from .types import Context


class MoAModel(Recomputed, PreTrainedModel):  # type: ignore[misc, override]
    """A base model with mixtures of adapters inside; everything else of the base is frozen.

    Made by `moa.build` or `moa.load`. It is a `PreTrainedModel` over any base, so the stock `Trainer` accepts it; its
    `config` is the base's own object.

    Args:
        base: the model that holds the mixtures, changed in place.

    Attributes:
        base: the wrapped model.
        context: what the mixtures share, see `moa.types.Context`.
        recipes: (recipe, names of its layers), in the order in which they were built.
        last_losses: name -> scalar of the last training forward, detached: "task", "policy", each auxiliary loss.
        observers: called after each training forward with the list of its traces.
    """

    base_model_prefix = "base"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, base: nn.Module) -> None:
        config = getattr(base, "config", None)
        super().__init__(config if isinstance(config, PreTrainedConfig) else PreTrainedConfig())
        self.base = base
        self.context = Context()
        self.encoder_context = Context()
        self.recipes: list[tuple[Recipe, list[str]]] = []
        self.modules_to_save: list[str] = []
        self.streams = None
        self.objective = Objective()
        self.last_losses: dict[str, Tensor] = {}
        self._in_closure = False
        self._input_names = input_names(base)
        self.observers: list[Callable[[list[Trace]], None]] = []
        self.loss_type: str | None = getattr(base, "loss_type", None)  # type: ignore[assignment]
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self._hf_peft_config_loaded = bool(getattr(base, "is_quantized", False))
        base.requires_grad_(False)
        watch(self)

    def forward(
        self,
        *args: Any,
        task_ids: Tensor | None = None,
        routing_mask: Tensor | None = None,
        labels: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the base's outputs; in training their loss holds the routers' own losses too.

        With a sampling recipe (ReMix) and labels, training runs M selections; outputs other than the loss are those
        of the first.

        Args:
            args: the base's positional inputs.
            task_ids: (B,) int64 task of each example, for routers and heads that need it.
            routing_mask: (B, S) bool, what sequence-level routers may look at. Default: the prompt, i.e. the
                positions before the first label, or the attention mask where labels are not per token.
            labels: passed to the base when given.
            num_items_in_batch: labelled items of the whole accumulated batch over all devices, as Trainer passes it:
                every loss is then weighted by this batch's share of them.
            kwargs: the base's inputs.

        Raises:
            ContextError: task ids out of range; in training, a sampling recipe without labels (use `routed_loss`), or
                labels that leave no token.
            NumericsError: a router produced NaN or infinity (its layer is named).
        """
        inputs = {**dict(zip(self._input_names, args, strict=False)), **kwargs}  # whichever way they were passed
        if labels is None:
            labels = inputs.get("labels")
        elif "labels" not in inputs:
            kwargs["labels"] = labels
        describe_batch(
            self.context,
            self.encoder_context,
            inputs,
            kind=self._kind(),
            task_ids=task_ids,
            routing_mask=routing_mask,
            labels=labels,
        )
        if task_ids is not None and "task_ids" in self._input_names:
            kwargs["task_ids"] = task_ids

        preview = self.preview
        if preview is not None:
            preview.run(args, kwargs)

        def run() -> tuple[Any, Tensor | None]:
            outputs = self.base(*args, **kwargs)
            # a dict names its loss, also where it comes from start_positions and the like
            return outputs, loss_of(outputs) if labels is not None or isinstance(outputs, dict) else None

        if self.training and torch.is_grad_enabled() and not self._in_closure:
            outputs, loss = self._train_forward(run, labels)
        else:
            outputs, loss = run()
        share = self.objective.share(labels, num_items_in_batch, self._shifts())
        return outputs if loss is None else with_loss(outputs, loss if share is None else loss * share)

    def _train_forward(self, run: Callable[[], tuple[Any, Tensor | None]], labels: Any) -> tuple[Any, Tensor | None]:
        """Run every selection and return the first's outputs with the whole training loss ()."""
        samples = self.samples
        passes, traces = [], []
        for _ in range(samples):
            with self.tracing() as trace:
                passes.append(run())
            traces.append(trace)
            if samples > 1 and passes[-1][1] is None:
                raise ContextError(
                    "a sampling recipe learns from the loss of several selections, and this training forward has no "
                    "loss: pass labels, or compute your loss inside model.routed_loss(lambda: ...)."
                )
        losses = [loss for _, loss in passes if loss is not None]
        if not losses:
            self._notice(traces)
            return passes[0]
        examples = None
        if samples > 1:
            logits = [logits_of(outputs) for outputs, _ in passes]
            examples = self.objective.per_example(losses, logits, labels)
        total = self._add_up(losses, examples, traces, labels)
        return passes[0][0], total

    def routed_loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the training loss of any closure, the routers' own losses included, scalar.

        For loops whose loss the model does not compute: `closure` calls the model and returns the loss, () or per
        example (B,), which gives a sampling router a finer signal. It is called M times for a sampling recipe.

        Args:
            closure: calls `model(...)` and returns a loss () or (B,).

        Raises:
            NumericsError: a router produced NaN or infinity.
        """
        traces: list[Trace] = []
        values: list[Tensor] = []
        self._in_closure = True
        try:
            for _ in range(self.samples if self.training else 1):
                with self.tracing() as trace:
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

    # ---------------------------------------------------------------- what transformers asks of a model

    def generate(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the base's `generate` (B, S) under the mixtures; sequence routings are kept from the prompt on.

        Args:
            args: as the base's, input ids (B, S) first.
            task_ids: (B,) int64, for routers that need them.
            kwargs: as the base's.

        Raises:
            ContextError: a router is not causal, so that cached decoding would differ from the full forward.
        """
        wrong = sorted({name for name, branch in self.branches() if not branch.router.causal})
        if wrong:
            raise ContextError(f"cannot generate: the routing of {wrong[0]} (and {len(wrong) - 1} more) is not causal.")
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        mask = kwargs.get("attention_mask")
        if mask is None and isinstance(inputs, Tensor):
            mask = prompt_attention(inputs, self.generation_config)
        decoder = kwargs.get("decoder_input_ids")
        if decoder is None and mask is not None:
            decoder = mask[:, :1]
        prompt = {"attention_mask": mask, "decoder_input_ids": decoder}
        describe_batch(self.context, self.encoder_context, prompt, kind=self._kind(), task_ids=task_ids)
        self.context.frozen_routings = {}
        self.encoder_context.frozen_routings = {}
        preview = self.preview
        try:
            with preview.before_each_forward() if preview is not None else contextlib.nullcontext():
                return self.base.generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.context.frozen_routings = self.encoder_context.frozen_routings = None

    def can_generate(self) -> bool:  # type: ignore[override]
        """Tell whether the base generates."""
        base = self._modules.get("base") if "_modules" in self.__dict__ else None
        return isinstance(base, PreTrainedModel) and bool(base.can_generate())

    @property
    def generation_config(self) -> Any:
        """The base's generation config."""
        return getattr(self.base, "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base.generation_config = value

    def get_input_embeddings(self) -> Any:
        """Return the base's input embeddings, (V, d)."""
        return self.base.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> Any:
        """Return the base's output embeddings, (V, d), or None."""
        return self.base.get_output_embeddings()  # type: ignore[operator]

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the base's weights."""
        if isinstance(self.base, PreTrainedModel):
            self.base.tie_weights(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base"], name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)

    # ---------------------------------------------------------------- saving

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Names of the frozen base's tensors: they are not in a checkpoint, and Trainer's resume expects that."""
        return set(self.state_dict()) - set(self.adapter_state_dict())

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """transformers sets this in `post_init`; here it is derived."""

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json and model.safetensors: recipes, routers and experts, not the base.

        The write is atomic: a kill at any moment leaves the old or the new checkpoint.

        Args:
            save_directory: made if it does not exist.
            is_main_process: False writes nothing.
            kwargs: `state_dict` may replace this model's (sharded training gathers it first); `push_to_hub=True`
                uploads afterwards; others that transformers passes change nothing here.
        """
        if not is_main_process:
            return
        state = kwargs.get("state_dict")
        tensors = self.adapter_state_dict()
        if state is not None:
            tensors = {name: state[name] for name in tensors}
        checkpoint.write(Path(save_directory), self.describe(), tensors)
        if kwargs.get("push_to_hub"):
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name))

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> MoAModel:  # type: ignore[override]
        """Return `moa.load(path)`."""
        from .build import load

        return load(path, *args, **kwargs)
