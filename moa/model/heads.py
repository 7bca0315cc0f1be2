"""One pretrained encoder with one head per task, for classes or numbers; and how a checkpoint's base is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..errors import CheckpointError, ConfigError, ContextError, MoaError, unknown_name
from ..offload import check_device_map
from .pruned import Kept, check_prunable, cuts, kept_of, read_pruned, shrink
from .task_heads import IGNORED, TaskHeads, label_losses

POOLINGS = ("mean", "cls", "last")


class MultiTaskConfig(PreTrainedConfig):
    """What rebuilds a `MultiTaskForSequenceClassification`.

    Args:
        encoder: the encoder's own configuration as plain values, its model_type included.
        encoder_name_or_path: where the encoder came from, "" for one made in memory.
        labels: task name -> the names of its classes, or of its numbers; the order of tasks is the order of task ids.
        pooling: "mean" over real tokens, "cls" (the first real token) or "last" (the last real token).
        regressions: names of the tasks whose head gives numbers.
        one_head: all tasks share one head, and with it their labels; else each has its own.
        kwargs: as for every configuration.

    Raises:
        ConfigError: an unknown pooling, a regression that is not a task, a classification with less than two classes,
            one head for tasks whose labels differ.
    """

    model_type = "multi_task_classifier"

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        encoder_name_or_path: str = "",
        labels: Mapping[str, Sequence[str]] | None = None,
        pooling: str = "mean",
        regressions: Sequence[str] = (),
        one_head: bool = False,
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ConfigError(unknown_name("pooling", pooling, POOLINGS))
        self.encoder = dict(encoder or {})
        self.encoder_name_or_path = encoder_name_or_path
        self.labels = {task: list(names) for task, names in (labels or {}).items()}
        self.pooling = pooling
        self.regressions = list(regressions)
        for task in self.regressions:
            if task not in self.labels:
                raise ConfigError(unknown_name("task", task, self.labels, "regressions"))
        few = {task: names for task, names in self.labels.items() if len(names) < 2 and task not in self.regressions}
        if few:
            raise ConfigError(f"each task that classifies needs at least 2 classes, got {few}.")
        self.one_head = one_head
        if one_head and len({(task in self.regressions, tuple(names)) for task, names in self.labels.items()}) > 1:
            listing = "; ".join(f"{task}: {', '.join(names)}" for task, names in self.labels.items())
            raise ConfigError(f"one_head: all tasks need the same labels in the same order, got {listing}.")
        super().__init__(**kwargs)


class MultiTaskForSequenceClassification(PreTrainedModel):
    """Any transformers encoder, pooled, under one linear head per task.

    logits_b = W[task_b] pool(encoder(x_b)) + b[task_b];  loss = mean over labels of cross-entropy or squared error
    with one_head W[0] and b[0] are those of every task

    The encoder is `.encoder` (the base model prefix), so `moa.build` puts experts into it and trains and saves the
    heads whole. An unused pooler of the encoder is dropped.

    Args:
        config: tasks, pooling, the encoder's configuration.
        encoder: a loaded encoder; None makes one with fresh weights, as `from_pretrained` needs.

    Raises:
        ConfigError: an encoder-decoder, or no task.
    """

    config_class = MultiTaskConfig
    base_model_prefix = "encoder"
    exported_body = "encoder"  # an adapter is for it, as `AutoModel` loads it; this class is moa's own
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MultiTaskConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if encoder is None:
            values = dict(config.encoder)
            encoder = AutoModel.from_config(transformers.AutoConfig.for_model(values.pop("model_type"), **values))
            shrink(encoder, kept_of(values) or {})
        else:
            for module in encoder.modules():  # its weights are there: post_init must not draw them anew
                module._is_hf_initialized = True  # type: ignore[assignment]
        if getattr(encoder.config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{type(encoder).__name__} is an encoder-decoder, which has no one sequence of hidden states to pool: "
                "use an encoder or a decoder, or a generation task."
            )
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler = None
        self.encoder = encoder
        counts = [len(names) for names in config.labels.values()]
        self.heads = TaskHeads(encoder.config.hidden_size, counts[:1] if config.one_head else counts)
        self.heads.to(dtype=torch.promote_types(encoder.dtype, torch.float32))
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | Path,
        labels: Mapping[str, Sequence[str]],
        pooling: str = "mean",
        regressions: Sequence[str] = (),
        one_head: bool = False,
        **kwargs: Any,
    ) -> MultiTaskForSequenceClassification:
        """Return a model with a pretrained encoder and fresh heads.

        Args:
            name_or_path: hub id or folder of the encoder.
            labels: task name -> the names of its classes, or of its numbers.
            pooling: "mean", "cls" or "last".
            regressions: names of the tasks whose head gives numbers.
            one_head: all tasks share one head.
            kwargs: for the encoder's `from_pretrained` (dtype, …).

        Raises:
            OSError: no such encoder.
            ConfigError: see the class.
        """
        encoder = pretrained(AutoModel, name_or_path, **kwargs)
        return cls.around(encoder, labels, pooling, regressions, one_head)

    @classmethod
    def around(
        cls,
        encoder: PreTrainedModel,
        labels: Mapping[str, Sequence[str]],
        pooling: str = "mean",
        regressions: Sequence[str] = (),
        one_head: bool = False,
    ) -> MultiTaskForSequenceClassification:
        """Return a model with fresh heads on an encoder that is in memory; its output is (B, S, d)."""
        values = encoder.config.to_dict()
        # a model read from GGUF carries this although its weights are dense
        values.pop("quantization_config", None)
        name = encoder.name_or_path or ""
        config = MultiTaskConfig(values, name, labels, pooling, regressions, one_head, dtype=encoder.dtype)
        config.name_or_path = name
        return cls(config, encoder)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TaskHeads):
            module.reset_parameters()

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return one vector per example, (B, d), of hidden states (B, S, d) under a mask (B, S); padding is ignored."""
        real = torch.ones(hidden.shape[:2], device=hidden.device) if attention_mask is None else attention_mask
        if self.config.pooling == "mean":
            weight = real.to(hidden.dtype).unsqueeze(-1)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        first, last = real.argmax(1), real.shape[1] - 1 - real.flip(1).argmax(1)
        at = first if self.config.pooling == "cls" else last
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), at]

    def features(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the pooled features (B, d) of token ids (B, S)."""
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        hidden = self.encoder(attention_mask=attention_mask, **kwargs).last_hidden_state
        return self.pool(hidden, attention_mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits (B, C), and with labels the mean over them () of cross-entropy or squared error.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S), 1 on real tokens.
            token_type_ids: (B, S), for encoders that have segments.
            task_ids: (B,) int64, which task each example is of.
            labels: (B,) or (B, L): the class in its own task, or the numbers; -100 is left out.
            num_items_in_batch: labels of the whole accumulated batch, as Trainer passes it: the loss is then their
                sum divided by this number.
            kwargs: for the encoder.

        Raises:
            ContextError: task ids are missing or out of range, or a class that is not a whole number.
            ShapeError: more labels than the largest head has outputs.
        """
        task_ids = self._checked(task_ids)
        if labels is not None:
            self._check_classes(labels, task_ids)
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        heads = torch.zeros_like(task_ids) if self.config.one_head else task_ids
        logits = self.heads(self.features(input_ids, attention_mask, **kwargs), heads)
        loss = None
        if labels is not None:
            losses = label_losses(logits, labels, self.gives_numbers(task_ids))
            loss = losses.sum() / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _check_classes(self, labels: Tensor, task_ids: Tensor) -> None:
        if not labels.is_floating_point() or torch.compiler.is_compiling():
            return
        first = labels if labels.ndim == 1 else labels[:, 0]
        wrong = (first != first.round()) & ~self.gives_numbers(task_ids)
        if bool(wrong.any()):
            task = list(self.config.labels)[int(task_ids[wrong][0])]
            raise ContextError(
                f"a label of task {task!r} is {float(first[wrong][0])}, and its head gives classes: name the task in "
                "regressions, or pass class numbers."
            )

    def gives_numbers(self, task_ids: Tensor) -> Tensor:
        """Return for tasks (B,) whether their head gives numbers, (B,) bool."""
        rows = [task in self.config.regressions for task in self.config.labels]
        return torch.tensor(rows, device=task_ids.device)[task_ids]

    def _checked(self, task_ids: Tensor | None) -> Tensor:
        names = list(self.config.labels)
        span = f"0 to {len(names) - 1} ({', '.join(names)})"
        if task_ids is None:
            raise ContextError(
                f"this model knows {len(names)} tasks and got no task ids: pass task_ids=(B,) with values {span}, or "
                "keep a task_ids column in the data set."
            )
        if not torch.compiler.is_compiling() and bool(((task_ids < 0) | (task_ids >= len(names))).any()):
            low, high = int(task_ids.min()), int(task_ids.max())
            raise ContextError(f"task ids must be {span}, got values from {low} to {high}.")
        return task_ids


def pretrained(cls: Any, name_or_path: str | Path, kept: Kept | None = None, **kwargs: Any) -> Any:
    """Return a class's model of a folder, (B, S) -> its outputs; a pruned one where the folder holds that.

    Args:
        cls: a class of transformers, automatic ones included.
        name_or_path: folder or hub id.
        kept: what to keep of the model where the folder holds the full one; None keeps all.
        kwargs: for `from_pretrained`.

    Raises:
        OSError: no such model.
        ConfigError: the indices do not fit it, it is pruned in another way, or it is quantised and full.
    """
    asked = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs}
    values = PreTrainedConfig.get_config_dict(name_or_path, **asked)[0]
    there = kept_of(values)
    if there is None:
        model = cls.from_pretrained(name_or_path, **kwargs)
        if kept:
            check_prunable(model, cuts(model, kept))
            shrink(model, kept)
        return model
    if kept is not None and kept != there:
        raise ConfigError(f"{name_or_path} is pruned in another way than the base that this was made on.")
    if hasattr(cls, "from_config"):  # an automatic class, which says by the configuration what it makes
        with torch.device("meta"):
            cls = type(cls.from_config(transformers.AutoConfig.from_pretrained(name_or_path, **asked)))
    return read_pruned(cls, name_or_path, **kwargs)


def load_base(row: Mapping[str, Any], folder: Path, kwargs: Mapping[str, Any]) -> nn.Module:
    """Return the base model that a checkpoint names.

    Args:
        row: the checkpoint's "base" entry: class, name_or_path, config.
        folder: of the checkpoint, named in errors.
        kwargs: for `from_pretrained`; dtype is the stored one unless given.

    Raises:
        CheckpointError: no name was stored, the class is not known, or nothing can be loaded from there.
        ConfigError: a device map that names a device which is not there.
    """
    check_device_map(kwargs.get("device_map"))
    name, class_name, config = row["name_or_path"], row["class"], row["config"] or {}
    advice = "Pass load(path, base=model)."
    if not name:
        raise CheckpointError(f"{folder} names no base to load ({class_name} was made in memory). {advice}")
    kwargs = {"dtype" if key == "torch_dtype" else key: value for key, value in kwargs.items()}  # its older word
    options = {"dtype": config["dtype"], **kwargs} if config.get("dtype") else dict(kwargs)
    if "id2label" in config and not {"id2label", "num_labels", "config"} & kwargs.keys():
        names = {int(number): label for number, label in config["id2label"].items()}  # JSON has text for keys
        options |= {"id2label": names, "label2id": {label: number for number, label in names.items()}}
    try:
        if class_name == MultiTaskForSequenceClassification.__name__:
            if name != config["encoder_name_or_path"]:  # it was saved whole, heads included
                return MultiTaskForSequenceClassification.from_pretrained(name, **options)
            heads = config["labels"], config["pooling"], config.get("regressions", ()), config.get("one_head", False)
            encoder = pretrained(AutoModel, name, kept_of(config), **options)
            return MultiTaskForSequenceClassification.around(encoder, *heads)
        cls = getattr(transformers, class_name, None)
        if not hasattr(cls, "from_pretrained"):
            raise CheckpointError(f"{folder} was made on a {class_name}, which transformers does not have. {advice}")
        return pretrained(cls, name, kept_of(config), **options)
    except (OSError, ValueError, RuntimeError) as error:  # no such place, no such model, weights of other shapes
        if isinstance(error, MoaError):
            raise
        raise CheckpointError(f"the base of {folder}, {name!r}, cannot be loaded: {error} {advice}") from error
