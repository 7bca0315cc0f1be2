"""`MoAModel`: a frozen base with mixtures inside, which trains, saves and generates as a transformers model does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, ContextError
from ..formats import checkpoint
from ..formats.card import write_card
from ..formats.sharded import chosen_of, is_sharded, whole, writes
from ..mixture import Mixture
from ..objective.objective import Objective
from ..objective.trace import Trace
from ..recipes import Recipe
from .decoding import Decoding, handed_on
from .inputs import describe_batch, input_names, outermost, prompt_attention
from .judged import Judged, judged_by
from .learned import Learned
from .load import load_host
from .on_base import OnBase
from .outputs import loss_of, with_loss
from .pinning import Pinning
from .recompute import Recomputed
from .resizing import Resized
from .running import hold_still, marks
from .scope import ModelScope
from .selections import Selections
from .signature import joint_signature
from .stepping import watch


class MoAModel(Pinning, Resized, Learned, Recomputed, Decoding, OnBase, Judged, PreTrainedModel):  # type: ignore[misc, override]
    """A base model with mixtures of adapters inside; everything else of the base is frozen.

    Made by `moa.build` or `moa.load`. It is a `PreTrainedModel` over any base, so the stock `Trainer` accepts it; its
    `config` is the base's own object.

    Args:
        base: the model that holds the mixtures, changed in place.

    Attributes:
        base: the wrapped model.
        scope: gives the mixtures the context of the forward that runs, see `moa.types.Context`.
        recipes: (recipe, names of its layers), in the order in which they were built.
        last_losses: name -> scalar of the last training forward, detached: "task", "policy", each auxiliary loss.
        observers: called after each training forward with the list of its traces.
    """

    base_model_prefix = "base"

    def __init__(self, base: nn.Module) -> None:
        config = getattr(base, "config", None)
        super().__init__(config if isinstance(config, PreTrainedConfig) else PreTrainedConfig())
        self.register_module("base", None)  # first in order and set last: a name of the base's is not yet looked at
        self.selections = Selections()
        self.scope = ModelScope(self.selections)
        self.recipes: list[tuple[Recipe, list[str]]] = []
        self.modules_to_save: list[str] = []
        self.whole = []
        self.shared_by_layers = nn.ModuleDict()
        self.streams = None
        self.objective = Objective()
        self.last_losses: dict[str, Tensor] = {}
        self._input_names = input_names(base)
        self.observers: list[Callable[[list[Trace]], None]] = []
        self.loss_type: str | None = getattr(base, "loss_type", None)  # type: ignore[assignment]
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self._hf_peft_config_loaded = bool(getattr(base, "is_quantized", False))
        self.base = base.requires_grad_(False)
        hold_still(base, ())
        self.buffers_that_came = marks(base)
        self._begin()

    def forward(
        self,
        *args: Any,
        task_ids: Tensor | None = None,
        adapter_ids: Any = None,
        routing_mask: Tensor | None = None,
        labels: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the base's outputs; in training their loss holds the routers' own losses too.

        With a sampling recipe (ReMix) and labels, training runs M selections; outputs other than the loss are those
        of the first. Without labels there is nothing to compare selections by: training mode runs one, drawn as in
        training, and it is a backward from its outputs that raises (use `routed_loss`).

        Args:
            args: the base's positional inputs.
            task_ids: (B,) int64 task of each example, for routers and heads that need it.
            adapter_ids: the one expert of each example, in place of the routers: B names or numbers, None for the base
                as it is, or a tensor (B,) with -1 for it. peft's `adapter_names` is understood.
            routing_mask: (B, S) bool, what sequence-level routers may look at. Default: the prompt, i.e. the
                positions before the first label, or the attention mask where labels are not per token.
            labels: passed to the base when given.
            num_items_in_batch: labelled items of the whole accumulated batch over all devices, as Trainer passes it:
                every loss is then weighted by this batch's share of them.
            kwargs: the base's inputs.

        Raises:
            ContextError: task ids out of range; an unknown expert, or not one for each example; in training, labels
                that leave no token.
            NumericsError: a router holds or produced NaN or infinity, or experts that made the training loss so (the
                layer is named, and in training the step).
        """
        self.settle()
        pinned = self._chosen(adapter_ids, args, kwargs)
        inputs = {**dict(zip(self._input_names, args, strict=False)), **kwargs}  # whichever way they were passed
        if labels is None:
            labels = inputs.get("labels")
        elif "labels" not in inputs:
            kwargs["labels"] = labels
        told = {"task_ids": task_ids, "routing_mask": routing_mask, "labels": labels, "pinned": pinned}
        batch = describe_batch(inputs, kind=self._kind(), **told)
        if task_ids is not None and "task_ids" in self._input_names:
            kwargs["task_ids"] = task_ids
        outputs = None
        with self._undisturbed(self.samples if self._learns() else 1):
            self.scope.enter(self, outermost(self.context, batch))
            try:
                outputs = self._described(args, kwargs, labels, num_items_in_batch)
                return outputs
            finally:
                self.scope.leave(self, outputs)

    def _described(self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any, num_items: Any) -> Any:
        """Return the base's outputs with the training loss (), the batch having been described."""
        context, preview = self.context, self.preview
        if isinstance(context.trace, Trace):
            context.trace.task_ids = context.task_ids
        if preview is not None:
            args, kwargs = preview.run(args, kwargs)

        def run() -> tuple[Any, Tensor | None]:
            outputs = self.base(*args, **kwargs)
            # a dict names its loss, also where it comes from start_positions and the like
            return outputs, loss_of(outputs) if labels is not None or isinstance(outputs, dict) else None

        if self._learns():
            outputs, loss = self._train_forward(run, labels)
        else:
            outputs, loss = run()
        share = self.objective.share(labels, num_items, self._shifts())
        return outputs if loss is None else with_loss(outputs, loss if share is None else loss * share)

    # ---------------------------------------------------------------- what transformers asks of a model

    def generate(self, *args: Any, task_ids: Tensor | None = None, adapter_ids: Any = None, **kwargs: Any) -> Any:
        """Return the base's `generate` (B, S) under the mixtures; sequence routings are kept from the prompt on.

        Args:
            args: as the base's, input ids (B, S) first.
            task_ids: (B,) int64, for routers that need them.
            adapter_ids: the one expert of each prompt, as in `forward`.
            kwargs: as the base's.

        Raises:
            ContextError: a router is not causal, or experts look at later rows, so that cached decoding would differ
                from the full forward; as an assistant, a routing that needs what its target does not hand on; an
                unknown expert, or not one for each prompt.
            ConfigError: a paged cache, where `init_continuous_batching` refuses.
        """
        pinned = self._chosen(adapter_ids, args, kwargs)
        around = sorted({name for name, branch in self.branches() if not branch.bank.rowwise})
        if around:
            raise ContextError(
                f"cannot generate: the experts of {around[0]} (and {len(around) - 1} more) look at the rows around "
                "each row, later ones too, which a step of decoding does not have: they are for encoders."
            )
        wrong = sorted({name for name, branch in self.branches() if not branch.router.causal})
        if wrong and pinned is None and self.context.pinned is None:
            raise ContextError(f"cannot generate: the routing of {wrong[0]} (and {len(wrong) - 1} more) is not causal.")
        self._check_decoding(kwargs)
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        mask = kwargs.get("attention_mask")
        if mask is None and isinstance(inputs, Tensor) and inputs.ndim == 2:
            mask = prompt_attention(inputs, self.generation_config)
        decoder = kwargs.get("decoder_input_ids")
        if decoder is None:
            decoder = next((v.flatten(1)[:, :1] for v in (mask, inputs, *kwargs.values()) if _has_rows(v)), None)
        prompt = {"attention_mask": mask, "decoder_input_ids": decoder}
        batch = describe_batch(prompt, kind=self._kind(), task_ids=task_ids, generating=True, pinned=pinned)
        context = outermost(self.context, batch)
        context.frozen_routings = {}
        preview = self.preview
        with self._undisturbed(1):
            self.scope.enter(self, context)
            try:
                first = preview.before_each_forward() if preview is not None else contextlib.nullcontext()
                with first, handed_on(kwargs.get("assistant_model"), context, self.scope.names):
                    return self.base.generate(*args, **kwargs)  # type: ignore[operator]
            finally:
                self.scope.leave(self)

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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base"], name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self.base),), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def _begin(self) -> None:
        watch(self)
        self.listen()

    # ---------------------------------------------------------------- saving

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Names of the frozen base's tensors: they are not in a checkpoint, and Trainer's resume expects that."""
        return set(self.state_dict()) - set(self.adapter_state_dict())

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """transformers sets this in `post_init`; here it is derived."""

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json and model.safetensors: recipes, routers and experts, not the base. README.md is their card.

        The write is atomic: a kill at any moment leaves the old or the new checkpoint. Of several processes the first
        of each machine writes; a model that FSDP2 or ZeRO-3 has sharded gathers its tensors, and all must call this.

        Args:
            save_directory: made if it does not exist.
            is_main_process: whether this process writes, where that is not for the first of its machine.
            kwargs: `state_dict` may replace this model's, and is whole: then only one process needs to call this;
                `push_to_hub=True` uploads afterwards; others that transformers passes change nothing here.

        Raises:
            CheckpointError: a state_dict was passed that lacks some of the tensors.
        """
        state = kwargs.get("state_dict")
        shared_out = state is None and any(is_sharded(p) for p in self.parameters())
        here = writes() if is_main_process is None else is_main_process
        if not here and not shared_out:
            return
        self.settle()
        with self.scope.turns.beside():
            tensors = self.adapter_tensors()
            if state is not None:
                tensors = chosen_of(state, tensors)
            tensors = {name: whole(tensor).detach() for name, tensor in tensors.items()}
            description = self.describe(state)
        if not here:
            return
        checkpoint.write(Path(save_directory), description, tensors)
        write_card(Path(save_directory), description)
        if kwargs.get("push_to_hub"):
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name))

    @classmethod
    def around(cls, base: nn.Module) -> MoAModel:
        """Return a model around a base, (B, S) -> the base's outputs, with no mixtures yet.

        Raises:
            ConfigError: the base carries mixtures already.
        """
        if any(isinstance(m, Mixture) for m in base.modules()):
            raise ConfigError(
                "this model already carries experts: build on the MoAModel that holds it, or reload the base."
            )
        return model_class(type(base))(base)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        base: nn.Module | None = None,
        *,
        check_base: bool = True,
        is_trainable: bool = True,
        **kwargs: Any,
    ) -> MoAModel:
        """Return the model saved under a path or hub id.

        Folders of MixLoRA (TUDB-Labs' package, MoE-PEFT) and of peft's X-LoRA are read, too, into the recipes
        `mixlora` and `xlora`; saved again, they are checkpoints of moa.

        Args:
            path: folder with model.safetensors, or with adapter_config.json; or a hub id.
            base: the model to put the mixtures into; None loads the one that the checkpoint names.
            check_base: refuse a base whose weights are not those the mixture was trained on.
            is_trainable: False freezes routers, experts and what was trained whole, too. peft's default is False.
            kwargs: for the base's `from_pretrained` (dtype, device_map, …).

        Raises:
            CheckpointError: not such a folder, truncated, another base, or tensors that are missing, unexpected or of
                another shape, grouped by kind; an option of another library that has no counterpart, named.
        """
        return load_host(cls.around, path, base, check_base=check_base, is_trainable=is_trainable, **kwargs)


@functools.cache
def model_class(base_class: type[nn.Module]) -> type[MoAModel]:
    """Return the `MoAModel` class whose forward names the inputs of a base's forward, (B, …), and task_ids.

    Trainer drops the columns that the signature does not name, and looks for labels in it.
    """

    def forward(self: MoAModel, *args: Any, **kwargs: Any) -> Any:
        return MoAModel.forward(self, *args, **kwargs)

    forward.__doc__ = MoAModel.forward.__doc__
    forward.__signature__ = joint_signature(base_class.forward, MoAModel.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "__doc__": MoAModel.__doc__, "__module__": MoAModel.__module__}
    members |= judged_by(base_class, PreTrainedModel)
    members["__qualname__"] = f"MoA{base_class.__name__}"
    return type(base_class.__name__, (MoAModel,), members)  # pipelines, label smoothing and others go by this name


def _empty(base_class: type[nn.Module]) -> MoAModel:
    """Return a model without state, which `pickle` and `copy` fill: classes made at run time have no name to import."""
    cls = model_class(base_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _has_rows(value: Any) -> bool:
    """Whether a value among the inputs of `generate` has an axis of examples, (B, S, …)."""
    return isinstance(value, Tensor) and value.ndim >= 2
