"""Every option of PEFT's LoRA configuration, and what this version makes of it: one list for all readers.

Layout of PEFT 0.21. A test compares the list with `peft.LoraConfig`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import regex

from ..errors import CheckpointError, MoaWarning, shown
from ..tables import LARGEST

Verdict = Literal["honoured", "converted", "harmless", "refused"]
PATIENCE = 4.0  # seconds for one pattern of a file that somebody else wrote; a plain one takes microseconds


@dataclass(frozen=True)
class Option:
    """What an option does to an adapter.

    Args:
        verdict: "honoured": its value is used; "converted": the adapter is turned into a plain change of the weight;
            "harmless": it does not change what the saved adapter computes; "refused": set, it is an error.
        why: the reason, shown to the user where it is refused.
    """

    verdict: Verdict
    why: str


def verdicts(verdict: Verdict, **options: str) -> dict[str, Option]:
    """Return options, name -> why, that share a verdict; no tensors, so no shapes."""
    return {name: Option(verdict, why) for name, why in options.items()}


OPTIONS: dict[str, Option] = {
    **verdicts(
        "honoured",
        peft_type="LORA, or an error",
        base_model_name_or_path="the deltas' base",
        r="with rank_pattern, the rank that the tensors must have",
        rank_pattern="the first pattern that fits the end of a layer's name",
        lora_alpha="with alpha_pattern, the scale alpha / r",
        alpha_pattern="the first pattern that fits the end of a layer's name",
        use_rslora="the scale is alpha / √r",
        fan_in_fan_out="the base stores its weights (i, o)",
        init_lora_weights="see INITS",
    ),
    **verdicts(
        "converted",
        use_bdlora="block-diagonal factors are written out as matrices",
        use_dora="the rescaled weight minus the base's: dense, so for merging only; needs the base",
        kasa_config="its diagonal goes into a factor, and what it cut off the base is subtracted; needs the base",
        lora_bias="the bias behind the factors, times the scale, is a change of the layer's bias; for merging only",
        modules_to_save="the saved tensors minus the base's: for merging only; needs the base",
        bias="the trained biases minus the base's: for merging only; needs the base",
    ),
    **verdicts(
        "harmless",
        task_type="which class of PEFT wraps the model",
        auto_mapping="which class the base has",
        peft_version="who wrote it",
        revision="of the base on the Hub",
        inference_mode="what is trained",
        runtime_config="where PEFT computes",
        target_modules="the file holds the layers that were adapted",
        exclude_modules="the file holds the layers that were adapted",
        layers_to_transform="the file holds the layers that were adapted",
        layers_pattern="the file holds the layers that were adapted",
        lora_dropout="acts in training only",
        megatron_core="a module's name, used with megatron_config only",
        eva_config="how init_lora_weights='eva' began",
        corda_config="how init_lora_weights='corda' began",
        lora_ga_config="how init_lora_weights='lora_ga' began",
        loftq_config="how init_lora_weights='loftq' began",
        qalora_group_size="of use_qalora only",
        velora_config="compresses what the backward pass keeps, not the output",
        ensure_weight_tying="ties adapters of embeddings, whose own tensors are refused",
    ),
    **verdicts(
        "refused",
        alora_invocation_tokens="an activated LoRA (aLoRA) acts only after given tokens: no constant change",
        use_qalora="QALoRA pools groups of inputs of a GPTQ layer before the factors, whose codes take no change",
        layer_replication="it repeats layers of the base, so its layers are not the base's",
        trainable_token_indices="it replaces rows of the embedding, which is not a linear layer",
        target_parameters="its factors belong to fused expert parameters, not to linear layers",
        arrow_config="it is a router over other adapters: moa.build(model, 'arrow', experts=[…]) takes those",
        monteclora_config="its factors are random variables",
        megatron_config="its layers are Megatron's, split over processes",
    ),
}

# init_lora_weights: where training began, and whether that moved part of the base weight into the factors
INITS: dict[str, Option] = {
    **verdicts(
        "harmless",
        **{"true": "up starts at zero", "false": "both factors are drawn"},
        gaussian="up starts at zero",
        eva="up starts at zero; its ranks are in rank_pattern",
        orthogonal="both factors are drawn, the base is kept",
        mica="down starts at zero, the base is kept",
    ),
    **verdicts(
        "converted",
        pissa="ΔW = s B A minus the base's r largest singular components; needs the base, or the initial adapter",
        olora="ΔW = s B A minus s Q R of the base's first r columns of Q; needs the base, or the initial adapter",
        pissa_niter="began with a random decomposition; needs the initial adapter",
        corda="began with a decomposition by data; needs the initial adapter",
        lora_ga="began with gradients of data; needs the initial adapter",
    ),
    **verdicts(
        "refused", loftq="it replaces the base's weights by quantised ones, and the factors carry the difference"
    ),
}
# what PEFT's LoraConfig holds under a name; a word such as "no" would be taken for true
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(
        ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"),
        ((bool,), "true or false"),
    ),
    **dict.fromkeys(
        ("use_bdlora", "kasa_config", "rank_pattern", "alpha_pattern"),
        ((dict,), "an object"),
    ),
    **dict.fromkeys(("peft_type", "base_model_name_or_path", "task_type", "revision"), ((str,), "text")),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"), ((str, list), "a name or a list of names")
    ),
    "layers_to_transform": ((int, list), "a number or a list of numbers"),
    "lora_dropout": ((int, float), "a number"),
    "inference_mode": ((bool,), "true or false"),
    "modules_to_save": ((list,), "a list of names"),
    "init_lora_weights": ((bool, str), "true, false or a name"),
}
NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
BIASES = ("none", "all", "lora_only")
# mixtures behind a router, which are not one weight change, and what to do with them
ROUTED = {
    "XLORA": "Its experts are the LoRA folders that its config lists under 'adapters': name those, or moa.load it.",
    "MIXLORA": "Its experts are feed-forward blocks behind a gate: no weight change; moa.load reads it as a model.",
    "POLY": "It mixes its experts by task, and its layout is not read.",
}


def is_set(value: Any) -> bool:
    """Tell whether a value of a configuration says something: null, false, "none" and what is empty say nothing."""
    return not (
        value is None or value is False or (isinstance(value, str | list | dict) and value in ("", "none", [], {}))
    )


def check_options(config: Mapping[str, Any], source: str) -> None:
    """Check that a LoRA configuration holds only options whose meaning for the saved tensors is known; no tensors.

    Raises:
        CheckpointError: an option of another type; it is not a LoRA; an option that is refused, or unknown and set
            (null, false and empty are harmless); a rank or an alpha that is not a number. The message names it.
    """
    check_kinds(config, source)
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = f" {ROUTED[kind]}" if isinstance(kind, str) and kind in ROUTED else ""
        raise CheckpointError(f"{source} has peft_type {kind!r}: expected 'LORA'.{hint}")
    check_known(config, OPTIONS, source)
    for key, value in config.items():
        if is_set(value) and OPTIONS[key].verdict == "refused":
            raise CheckpointError(f"{source} sets {key}={value!r}, and {OPTIONS[key].why}: it is refused.")
    init = init_of(config)
    if init not in INITS or INITS[init].verdict == "refused":
        why = INITS[init].why if init in INITS else "this version of moa does not know what it does to the base"
        raise CheckpointError(
            f"{source} sets init_lora_weights={config['init_lora_weights']!r}, and {why}: it is refused."
        )
    if bool(config.get("fan_in_fan_out")) and (init == "olora" or is_set(config.get("kasa_config"))):
        what = "init_lora_weights='olora'" if init == "olora" else "kasa_config"
        raise CheckpointError(f"{source} sets {what} on layers that store weights (i, o), which PEFT does not support.")
    _check_numbers(config, source)


def check_kinds(config: Mapping[str, Any], source: str) -> None:
    """Check that options that are set are of the types that PEFT gives them; no tensors.

    Raises:
        CheckpointError: one is not; it is named.
    """
    for key, (kinds, expected) in KINDS.items():
        value = config.get(key)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        unnamed = key in NAMES and isinstance(value, list) and not all(isinstance(name, str) for name in value)
        if is_set(value) and (wrong or unnamed):
            raise CheckpointError(f"{source}: adapter_config.json has {key}={shown(repr(value))}: expected {expected}.")
    if config.get("bias") not in (None, *BIASES):
        raise CheckpointError(f"{source} has bias={config['bias']!r}: expected {', '.join(BIASES)}.")


def check_known(config: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Check that a configuration sets no option but known ones; null, false and empty values are harmless; no tensors.

    Raises:
        CheckpointError: an option that is unknown and set; it is named.
    """
    for key, value in config.items():
        if key not in known and is_set(value):
            raise CheckpointError(
                f"{source} sets {key}={value!r}, an option that this version of moa does not know (it knows PEFT "
                "0.21's): what it changes would be lost, so it is refused. If it changes nothing in the saved adapter, "
                "take it out of adapter_config.json."
            )


def init_of(config: Mapping[str, Any]) -> str:
    """Return where training began, a name of `INITS` or an unknown one; no tensors."""
    value = config.get("init_lora_weights")
    name = "true" if value is None else str(value).lower()
    return "pissa_niter" if name.startswith("pissa_niter_") else name


def _check_numbers(config: Mapping[str, Any], source: str) -> None:
    ranks = {"r": config.get("r"), **_named("rank_pattern", config, source)}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CheckpointError(
                f"{source}: adapter_config.json has {name}={shown(repr(rank))}: expected a whole number ≥ 1."
            )
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **_named("alpha_pattern", config, source)}.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not 0 <= alpha <= LARGEST:  # NaN is neither
            raise CheckpointError(
                f"{source}: adapter_config.json has {name}={shown(repr(alpha))}: expected a finite number, at least 0."
            )
        if alpha == 0:
            warnings.warn(f"{source} has {name}=0: what it scales counts for nothing.", MoaWarning, stacklevel=4)


def _named(key: str, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{source} has {key}={patterns!r}: expected an object, pattern -> number.")
    return {f"{key}[{pattern!r}]": value for pattern, value in patterns.items()}


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any, source: str) -> Any:
    """Return the value of the first pattern that fits the end of a module's path, as PEFT matches them; no tensors.

    Raises:
        CheckpointError: a pattern that is not a regular expression, or takes seconds on one name.
    """
    for pattern, value in (patterns or {}).items():
        try:
            found = regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATIENCE)
        except TimeoutError:
            raise CheckpointError(
                f"{source}: the pattern {pattern!r} does not come to an end on {module!r}: name the layer plainly."
            ) from None
        except regex.error as error:
            raise CheckpointError(f"{source}: the pattern {pattern!r} is no regular expression: {error}.") from error
        if found:
            return value
    return default


def scale_of(config: Mapping[str, Any], module: str, source: str) -> tuple[int, float]:
    """Return a module's rank and its scale, alpha / r or alpha / √r, as the configuration says them; no tensors.

    Raises:
        CheckpointError: a pattern that cannot be matched.

    Source: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732, for alpha / √r.
    """
    rank = by_pattern(config.get("rank_pattern"), module, config["r"], source)
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"], source)
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
