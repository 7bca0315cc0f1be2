"""`MoAModel`: a frozen base with mixtures inside, which trains, saves and generates as a transformers model does."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import PreTrainedConfig, PreTrainedModel

from . import checkpoint
from .errors import ConfigError, ContextError
from .fold import fold, folded_delta
from .inputs import as_masks, first_position, prompt_attention, prompt_mask
from .mixture import Branch, Mixture
from .objective import Objective
from .recipes import Recipe
from .sites import find_sites, inject
from .trace import Trace
from .types import Context


class MoAModel(PreTrainedModel):
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
        self.objective = Objective()
        self.last_losses: dict[str, Tensor] = {}
        self._in_closure = False
        self.observers: list[Callable[[list[Trace]], None]] = []
        self.loss_type = getattr(base, "loss_type", None)
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self._hf_peft_config_loaded = bool(getattr(base, "is_quantized", False))
        base.requires_grad_(False)
        _stepped_models.add(self)

    # ---------------------------------------------------------------- building

    def add_recipe(self, recipe: Recipe, sites: Sequence[str] | None = None) -> list[str]:
        """Put a recipe's mixtures into the base and return their names.

        Args:
            recipe: the row of the table.
            sites: names of the layers, each (*rows, i) -> (*rows, o); None takes the recipe's targets.

        Raises:
            ConfigError: no layer matches, or one of them carries experts already.
        """
        if sites is None:
            chosen = find_sites(self.base, recipe.targets)
        else:
            by_name = {s.name: s for s in find_sites(self.base, ".*")}
            missing = [name for name in sites if name not in by_name]
            if missing:
                raise ConfigError(f"no free linear layer named {', '.join(missing)} in {type(self.base).__name__}.")
            chosen = [by_name[name] for name in sites]
        chosen = [s for s in chosen if not any(_inside(s.name, head) for head in self.modules_to_save)]
        side = _encoder_modules(self.base)
        for context, part in (
            (self.context, [s for s in chosen if id(s.module) not in side]),
            (self.encoder_context, [s for s in chosen if id(s.module) in side]),
        ):
            if part:
                inject(self.base, recipe, context, part)
        names = [s.name for s in chosen]
        self.recipes.append((recipe, names))
        return names

    def mixtures(self) -> dict[str, Mixture]:
        """Return the mixtures by the name of their layer, each (*rows, i) -> (*rows, o), in order."""
        return {m.name: m for m in self.base.modules() if isinstance(m, Mixture)}

    def branches(self) -> Iterator[tuple[str, Branch]]:
        """Yield (layer name, branch) for every branch, each on rows (*rows, i)."""
        for name, mixture in self.mixtures().items():
            for branch in mixture.branches:
                assert isinstance(branch, Branch)
                yield name, branch

    # ---------------------------------------------------------------- running

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
        self._set_context(task_ids, routing_mask, labels, args, kwargs)
        if labels is not None:
            kwargs["labels"] = labels
        if task_ids is not None and "task_ids" in inspect.signature(self.base.forward).parameters:
            kwargs["task_ids"] = task_ids

        def run() -> tuple[Any, Tensor | None]:
            outputs = self.base(*args, **kwargs)
            return outputs, _loss_of(outputs) if labels is not None else None

        if self.training and torch.is_grad_enabled() and not self._in_closure:
            outputs, loss = self._train_forward(run, labels)
        else:
            outputs, loss = run()
        share = self.objective.share(labels, num_items_in_batch, self._shifts())
        return outputs if loss is None else _with_loss(outputs, loss if share is None else loss * share)

    def _train_forward(self, run: Callable[[], tuple[Any, Tensor | None]], labels: Any) -> tuple[Any, Tensor | None]:
        """Run every selection and return the first's outputs with the whole training loss ()."""
        samples = self.samples
        if samples > 1 and labels is None:
            raise ContextError(
                "a sampling recipe learns from the loss of several selections, and this training forward has no "
                "loss: pass labels, or compute your loss inside model.routed_loss(lambda: ...)."
            )
        passes, traces = [], []
        for _ in range(samples):
            with self.tracing() as trace:
                passes.append(run())
            traces.append(trace)
        losses = [loss for _, loss in passes if loss is not None]
        if not losses:
            self._notice(traces)
            return passes[0]
        examples = None
        if samples > 1:
            logits = [getattr(outputs, "logits", None) for outputs, _ in passes]
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
        self.objective.diagnose(total, traces, labels, self._decodes())
        self._notice(traces)
        return total

    @property
    def samples(self) -> int:
        """M: forwards per training step, the most that any recipe asks for."""
        return max((branch.router.samples for _, branch in self.branches()), default=1)

    def _shifts(self) -> bool:
        """Whether Trainer leaves the first label of a row out of its count: the share must follow its rule."""
        return self.loss_type == "ForCausalLM" and not getattr(self.config, "is_encoder_decoder", False)

    def _decodes(self) -> bool:
        """Whether the base is a decoder alone, whose prompt ends where the labels begin."""
        return self.can_generate() and not getattr(self.config, "is_encoder_decoder", False)

    def _notice(self, traces: list[Trace]) -> None:
        for trace in traces:
            for record in trace:
                record.router.observe(record.routing, record.mask)  # type: ignore[operator]
        for observer in self.observers:
            observer(traces)

    def _set_context(
        self,
        task_ids: Tensor | None,
        routing_mask: Tensor | None,
        labels: Any,
        args: tuple[Any, ...],
        inputs: dict[str, Any],
    ) -> None:
        attention = as_masks(inputs.get("attention_mask"))
        context, encoder = self.context, self.encoder_context
        if task_ids is not None:
            context.task_ids = encoder.task_ids = task_ids
        encoder.masks = encoder.routing_masks = attention
        context.masks = context.routing_masks = attention
        token_labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
        if getattr(self.config, "is_encoder_decoder", False):
            decoder = inputs.get("decoder_input_ids", token_labels)
            own = as_masks(inputs.get("decoder_attention_mask"))
            if not own and token_labels is not None:
                own = (token_labels != -100,)
            context.masks = (*own, *attention)
            if decoder is not None:  # the decoder may look at its first position alone: the rest is its answer
                context.routing_masks = (first_position(decoder), *attention)
        elif token_labels is not None and self._decodes():
            context.routing_masks = (prompt_mask(token_labels, attention[0] if attention else None),)
        if routing_mask is not None:
            context.routing_masks = as_masks(routing_mask)

    # ---------------------------------------------------------------- looking

    @contextlib.contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Record the routings of the forwards inside, training or not: `with model.tracing() as trace: model(...)`."""
        trace, before = Trace(), self.context.trace
        self.context.trace = self.encoder_context.trace = trace
        try:
            yield trace
        finally:
            self.context.trace = self.encoder_context.trace = before

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the frozen base alone inside the block."""
        before = self.context.enabled
        self.context.enabled = self.encoder_context.enabled = False
        try:
            yield
        finally:
            self.context.enabled = self.encoder_context.enabled = before

    @contextlib.contextmanager
    def pin_expert(self, expert: int) -> Iterator[None]:
        """Use one expert with weight 1 in every layer inside the block, in place of the routers.

        Raises:
            ConfigError: at the first layer that has no such expert.
        """
        before = self.context.pinned
        self.context.pinned = self.encoder_context.pinned = expert
        try:
            yield
        finally:
            self.context.pinned = self.encoder_context.pinned = before

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters, counted once each."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad), sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print trainable and all parameters in one line, as peft does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

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
        self._set_context(task_ids, None, None, args, {"attention_mask": mask, "decoder_input_ids": decoder})
        self.context.frozen_routings = {}
        self.encoder_context.frozen_routings = {}
        try:
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

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether the base can checkpoint its blocks."""
        return bool(getattr(self._modules.get("base"), "supports_gradient_checkpointing", False))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Checkpoint the base's blocks, as transformers does; non-reentrant unless asked otherwise.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint`, e.g. {"use_reentrant": False}.

        Raises:
            ConfigError: reentrant mode with a router that learns from a loss of its own (it would get no gradient).
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            needy = [n for n, b in self.branches() if b.router.stochastic or b.router.loss_weights]
            if needy:
                raise ConfigError(
                    f"reentrant gradient checkpointing cuts the gradient of the routers' own losses ({needy[0]}, …): "
                    "use gradient_checkpointing_kwargs={'use_reentrant': False}, or a recipe without such losses."
                )
            self.base.enable_input_require_grads()  # type: ignore[operator]
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        """Stop checkpointing the base's blocks."""
        self.base.gradient_checkpointing_disable()  # type: ignore[operator]

    def enable_input_require_grads(self) -> None:
        """Make the output of the input embeddings, (B, S, d), require a gradient, as reentrant checkpointing needs."""
        self.base.enable_input_require_grads()  # type: ignore[operator]

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

    def get_base_model(self) -> nn.Module:
        """Return the wrapped model, mixtures inside."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base"], name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _stepped_models.add(self)

    def optimizer_step_done(self) -> None:
        """Let every router take its step; called by a hook after an optimizer that holds this model's parameters."""
        for _, branch in self.branches():
            branch.router.step()

    # ---------------------------------------------------------------- folding

    def merge_and_unload(self) -> nn.Module:
        """Fold every mixture into its layer and return the base, as peft's method of this name.

        Raises:
            FoldError: a mixture has no exact weight; the layer and the reason are named, and nothing was changed.
        """
        mixtures = self.mixtures()
        for mixture in mixtures.values():
            folded_delta(mixture)
        for mixture in mixtures.values():
            fold(mixture)
        return self.unload()

    def unload(self) -> nn.Module:
        """Take the mixtures out and return the base with its own layers, their weights untouched."""
        for path, module in list(self.base.named_modules(remove_duplicate=False)):
            if isinstance(module, Mixture):
                parent, _, child = path.rpartition(".")
                setattr(self.base.get_submodule(parent), child, module.base)
        self.recipes.clear()
        return self.base

    # ---------------------------------------------------------------- saving

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Names of the frozen base's tensors: they are not in a checkpoint, and Trainer's resume expects that."""
        return set(self.state_dict()) - set(self.adapter_state_dict())

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """transformers sets this in `post_init`; here it is derived."""

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: routers, experts and the modules trained whole, by their name."""
        heads = tuple(f"base.{name}." for name in self.modules_to_save)
        return {k: v for k, v in self.state_dict().items() if ".branches." in k or (heads and k.startswith(heads))}

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

    def describe(self) -> dict[str, Any]:
        """Return what rebuilds this model: base, recipes, layers; plain JSON values."""
        config = getattr(self.base, "config", None)
        is_hf = isinstance(config, PreTrainedConfig)
        return {
            "base": {
                "class": type(self.base).__name__,
                "name_or_path": getattr(self.base, "name_or_path", "") if is_hf else "",
                "config": checkpoint.plain_config(config.to_dict()) if is_hf else None,
                "fingerprint": checkpoint.fingerprint(self.base),
            },
            "recipes": [{**recipe.to_dict(), "layers": names} for recipe, names in self.recipes],
            "modules_to_save": self.modules_to_save,
        }

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> MoAModel:  # type: ignore[override]
        """Return `moa.load(path)`."""
        from .build import load

        return load(path, *args, **kwargs)


_stepped_models: weakref.WeakSet[MoAModel] = weakref.WeakSet()


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Give the routers of every model whose parameters this optimizer holds their step.

    A hook on the optimizer is the one place that sees real steps alone: not micro-batches, not skipped fp16 steps.
    """
    held: set[int] | None = None
    for model in list(_stepped_models):
        first = next((p for p in model.parameters() if p.requires_grad), None)
        if first is None:
            continue
        if held is None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(first) in held:
            model.optimizer_step_done()


register_optimizer_step_post_hook(_after_optimizer_step)


@functools.cache
def model_class(base_class: type[nn.Module]) -> type[MoAModel]:
    """Return the `MoAModel` class whose forward names the inputs of a base's forward, and task_ids.

    Trainer drops the columns that the signature does not name, and looks for labels in it.
    """
    own = inspect.signature(MoAModel.forward).parameters
    extra = [own[name] for name in ("task_ids", "routing_mask", "num_items_in_batch")]
    kept = [
        p for name, p in inspect.signature(base_class.forward).parameters.items() if name not in own or name == "self"
    ]
    if "labels" in inspect.signature(base_class.forward).parameters:
        extra.insert(0, own["labels"])
    kinds = inspect.Parameter
    named = [p for p in kept if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.VAR_POSITIONAL)]
    rest = [p for p in kept if p.kind is kinds.KEYWORD_ONLY]
    forward = types.FunctionType(
        MoAModel.forward.__code__, MoAModel.forward.__globals__, "forward", None, MoAModel.forward.__closure__
    )
    forward.__kwdefaults__ = MoAModel.forward.__kwdefaults__
    forward.__doc__ = MoAModel.forward.__doc__
    forward.__signature__ = inspect.Signature([*named, *rest, *extra, own["kwargs"]])  # type: ignore[attr-defined]
    members = {"forward": forward, "__doc__": MoAModel.__doc__, "__module__": __name__}
    return type(f"MoA{base_class.__name__}", (MoAModel,), members)


def _encoder_modules(base: nn.Module) -> set[int]:
    """Return the ids of the modules below the encoder of an encoder-decoder, empty for other models."""
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return set()
    encoder = base.get_encoder()  # type: ignore[operator]
    return {id(m) for m in encoder.modules()} if isinstance(encoder, nn.Module) else set()


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _loss_of(outputs: Any) -> Tensor | None:
    if isinstance(outputs, dict):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple) and outputs else None
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    if isinstance(outputs, dict):
        outputs["loss"] = loss
        return outputs
    return (loss, *outputs[1:])
