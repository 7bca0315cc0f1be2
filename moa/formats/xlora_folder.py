"""peft's X-LoRA checkpoint layout into the recipe `xlora`. Buehler and Buehler 2024, arXiv 2402.07148; PEFT 0.21."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, shown
from ..mixture import Branch
from ..recipes import make_recipe
from .foreign import CONFIG, Foreign, check_fields, check_numbers_of, read_foreign
from .named_deltas import Deltas, deltas
from .peft_experts import expert_changes, largest_rank, load_experts
from .peft_options import check_known

CLASSIFIER = re.compile(r"(?:base_model\.)?internal_xlora_classifier\.layers\.(?:(\d+)\.)?(weight|bias)")
FACTOR = re.compile(r"\.lora_[AB]\.weight$")
# options of peft's XLoraConfig: those of the classifier, and those that say nothing of the outputs
OPTIONS = (
    *("adapters", "enable_softmax", "enable_softmax_topk", "layerwise_scalings", "xlora_depth", "xlora_size"),
    *("xlora_dropout_p", "use_trainable_adapters", "softmax_temperature", "top_k_lora", "scaling_pass_value"),
    *("global_scaling_weight", "hidden_size", "base_model_name_or_path", "peft_type"),
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
)
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters"), (bool,)),
    **dict.fromkeys(("xlora_depth", "xlora_size", "top_k_lora", "hidden_size"), (int,)),
    **dict.fromkeys(("xlora_dropout_p", "softmax_temperature", "scaling_pass_value"), (int, float)),
    "global_scaling_weight": (int, float),
    "adapters": (dict,),
}
PREFIXES = ("base_model.lora_model.model.", "base_model.model.")


def adopt_xlora(model: Any, found: Foreign) -> None:
    """Put an X-LoRA checkpoint into a model; its outputs are then those of peft's X-LoRA.

    The adapters are the numbered folders beside the classifier, as peft saves them, or else the folders that the
    configuration names. The experts stay frozen unless use_trainable_adapters is set.

    Args:
        model: with no mixtures, on the base of the checkpoint.
        found: the folder.

    Raises:
        CheckpointError: an option that the recipe does not have; a classifier or an adapter that is missing, not
            complete or of another shape.

    Source: PEFT 0.21, tuners/xlora.
    Differs: PEFT 0.21.2 saves with a filter that mistakes a layer index for an adapter index. Of
        its folders, this reader puts the classifier together again. Their adapters are not complete: frozen ones are
        read from the folders that the configuration names, trained ones are refused. With layerwise_scalings each layer
        gets a classifier of its own, inner layers copied, so they are equal until trained further.
    """
    config = found.config
    _check(found)
    folders = _adapter_folders(found)
    adapters = [_adapter(found, folder, len(folders)) for folder in folders]
    layers = sorted({name for adapter in adapters for name in adapter})
    stack = _checked_classifier(found)  # before anything of the sizes that the configuration claims is made
    raw = not config.get("enable_softmax", True)
    depth = config.get("xlora_depth", 1)
    inner = {"width": config.get("xlora_size", 2048), "classifier_dropout": config.get("xlora_dropout_p", 0.2)}
    try:
        recipe = make_recipe(
            "xlora",
            n_experts=len(adapters),
            k=config.get("top_k_lora") or 0,
            rank=largest_rank(adapters),
            layerwise=config.get("layerwise_scalings", False),
            depth=depth,
            **(inner if depth > 1 else {}),
            temperature=1.0 if raw else config.get("softmax_temperature", 1.0),  # peft divides only in the softmax
            score="raw" if raw else "softmax",
            renormalize=config.get("enable_softmax_topk", False),
            targets=tuple(layers),
            train_experts=config.get("use_trainable_adapters", False),
        )
        names = model.add_recipe(recipe, layers)
    except ConfigError as error:
        raise CheckpointError(f"{found.path} does not become an xlora recipe on this base: {error}") from error
    load_experts(model.mixtures(), names, adapters)
    _fill_classifier(model, found, folders, stack)


def _check(found: Foreign) -> None:
    config = found.config
    check_known(config, OPTIONS, str(found.path))
    check_fields(found, FIELDS)
    check_numbers_of(found)
    depth = config.get("xlora_depth") or 1
    if depth > len(found.tensors) + len(config.get("adapters") or ()):
        raise CheckpointError(
            f"{found.path} has xlora_depth={depth}, and {len(found.tensors)} tensors of a classifier."
        )
    if config.get("scaling_pass_value"):
        raise CheckpointError(
            f"{found.path} sets scaling_pass_value={config['scaling_pass_value']}: the recipe's first pass runs the "
            "base without adapters, which is 0."
        )
    if config.get("enable_softmax_topk") and not config.get("top_k_lora"):
        raise CheckpointError(
            f"{found.path} sets enable_softmax_topk without top_k_lora: a second softmax over all experts is not what "
            "the recipe does; set top_k_lora."
        )
    names = config.get("adapters")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or not names:
        raise CheckpointError(
            f"{found.path} names adapters {names!r}: expected '0', '1', …, the names under which peft saves them and "
            "which keep their order."
        )
    for number, name in names.items():
        if not isinstance(name, str) or not name or "\0" in name or len(name) > 4000:
            raise CheckpointError(f"{found.path} names adapter {number} {shown(repr(name))}: expected a folder.")


def _adapter_folders(found: Foreign) -> list[Path]:
    """Return the adapters' folders in order: those beside the classifier, or those the configuration names."""
    named = found.config["adapters"]
    out = []
    for number in range(len(named)):
        beside, original = found.path / str(number), Path(named[str(number)])
        usable = (beside / CONFIG).is_file() and not (len(named) > 1 and _torn(read_foreign(beside)))
        if not usable and found.config.get("use_trainable_adapters"):
            raise CheckpointError(f"{beside} does not hold all of trained adapter {number}: what was trained is lost.")
        if not usable and not (original / CONFIG).is_file():
            raise CheckpointError(
                f"{found.path}: adapter {number} is not complete in {beside} (PEFT 0.21 saves it so), and {original}, "
                f"which it was made from, is not there: put that adapter's folder in the place of {beside}, or at "
                f"{original}."
            )
        out.append(beside if usable else original)
    return out


def _torn(adapter: Foreign) -> bool:
    """Tell whether an adapter was saved by PEFT 0.21's filter: it then holds weights of the base, too."""
    return any(key.startswith(PREFIXES[0]) and not FACTOR.search(key) for key in adapter.tensors)


def _adapter(found: Foreign, folder: Path, n_experts: int) -> Deltas:
    """Return one adapter's changes (o, i), which do not depend on how the base stores its weights.

    An adapter that moved the base is refused: PEFT would move it once for each, under all of them.
    """
    adapter = read_foreign(folder)
    torn = n_experts == 1 and _torn(adapter)  # one adapter has no other to be taken for
    tensors = {}
    for key, tensor in adapter.tensors.items():
        if CLASSIFIER.fullmatch(key) or (torn and not FACTOR.search(key)):
            continue
        name = key
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        tensors[f"{PREFIXES[1]}{name}"] = tensor
    changes = expert_changes(Foreign(folder, adapter.config, tensors), base=None)
    weight = float(found.config.get("global_scaling_weight", 1.0))
    return deltas({name: delta.scaled(weight) for name, delta in changes.items()}, str(folder))


def _classifier(found: Foreign) -> dict[int, dict[str, Tensor]]:
    """Return the classifier's linear layers by their place in peft's stack: weight (o, i) and bias (o,)."""
    out: dict[int, dict[str, Tensor]] = {}
    for key, tensor in found.tensors.items():
        match = CLASSIFIER.fullmatch(key)
        if match is None or match[1] is None:
            raise CheckpointError(f"{found.path} holds {key!r}, which is no tensor of an X-LoRA classifier.")
        out.setdefault(int(match[1]), {})[match[2]] = tensor
    for number in range(len(found.config["adapters"])):  # PEFT 0.21 puts layer j into folder j, without its number
        beside = found.path / str(number)
        if number in out or not (beside / CONFIG).is_file():
            continue
        for key, tensor in read_foreign(beside).tensors.items():
            match = CLASSIFIER.fullmatch(key)
            if match is not None and match[1] is None:
                out.setdefault(number, {})[match[2]] = tensor
    return out


def _checked_classifier(found: Foreign) -> dict[int, dict[str, Tensor]]:
    """Return the classifier's layers, all that the configuration says, of the width that it says."""
    config, stack = found.config, _classifier(found)
    step = 3 if config.get("xlora_dropout_p", 0.2) > 0 else 2  # linear, ReLU and, where there is any, dropout
    wanted = [step * number for number in range(config.get("xlora_depth", 1))]
    flat = [part for row in stack.values() for name, part in row.items() if part.ndim != (2 if name == "weight" else 1)]
    if flat:
        raise CheckpointError(f"{found.path}: the classifier holds {tuple(flat[0].shape)}: not a linear layer's.")
    missing = [place for place in wanted if set(stack.get(place, ())) != {"weight", "bias"}]
    if missing or len(stack) > len(wanted):
        raise CheckpointError(
            f"{found.path}: the classifier has layers {sorted(stack)}, expected {wanted}, weight and bias each."
        )
    inner = [len(stack[place]["bias"]) for place in wanted[:-1]]
    if any(width != (config.get("xlora_size") or 2048) for width in inner):
        raise CheckpointError(f"{found.path} has xlora_size={config.get('xlora_size')}, and inner layers of {inner}.")
    return stack


@torch.no_grad()
def _fill_classifier(model: Any, found: Foreign, folders: list[Path], stack: dict[int, dict[str, Tensor]]) -> None:
    """Copy the checked layers of a classifier, weight (o, i) and bias (o,), into the routers."""
    config = found.config
    wanted = sorted(stack)
    deciding = [branch.router for branch in _branches(model) if branch.router.needs_preview]
    classifiers = list({id(router.classifier): router.classifier for router in deciding}.values())
    n = len(folders)
    for number, classifier in enumerate(classifiers):
        for place, layer in zip(wanted, classifier.layers, strict=True):
            weight, bias = stack[place]["weight"], stack[place]["bias"]
            if place == wanted[-1] and config.get("layerwise_scalings"):
                weight, bias = weight[number * n : number * n + n], bias[number * n : number * n + n]
            assert isinstance(layer, torch.nn.Linear)
            if weight.shape != layer.weight.shape or bias.shape != layer.bias.shape:
                raise CheckpointError(
                    f"{found.path}: layer {place} of the classifier is {tuple(weight.shape)}, expected "
                    f"{tuple(layer.weight.shape)}: another base, or other adapters."
                )
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    last = stack[wanted[-1]]["bias"].shape[0]
    expected = n * (len(classifiers) if config.get("layerwise_scalings") else 1)
    if last != expected:
        raise CheckpointError(f"{found.path}: the classifier scores {last} places, these adapters have {expected}.")


def _branches(model: Any) -> list[Any]:
    return [branch for _, branch in model.branches() if isinstance(branch, Branch)]
