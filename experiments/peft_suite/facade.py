"""The names that PEFT's tests use, with a mixture of moa behind them. What moa does not have makes a test not apply.

The facade translates words (keywords, file names, the text of a warning) and adds no ability: what a PEFT model can do
and a mixture cannot is `absent`, with the concept's name, and is counted as such.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, NumericsError
from moa.mixture import Mixture

RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"n_experts": 3, "k": 2},
    "remix": {"n_experts": 3, "k": 2},
    "flylora": {"k": 2},
    "dense": {"n_experts": 3},
    "mixlora": {"n_experts": 3, "k": 2},
    "poly": {"n_experts": 3, "n_tasks": 2},
    "hydra": {},
    "fixed": {"n_experts": 3},
}
FILES = {"model.safetensors": "adapter_model.safetensors", "config.json": "adapter_config.json"}
OF_THE_RECIPE = "not for this recipe"
NAN = "NaNs detected in the merged weights. The adapter default seems to be broken"
# fields of peft's LoraConfig that say nothing to a mixture, or what moa finds by itself
SILENT = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "fan_in_fan_out", "init_lora_weights", "megatron_core", "runtime_config", "loftq_config"),
    *("qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "use_rslora"),
}
PASSED_ON = {
    *("target_modules", "exclude_modules", "r", "lora_alpha", "lora_dropout", "layers_to_transform"),
    *("layers_pattern", "modules_to_save"),
}
trained_whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Standing:
    """What stands in for PEFT during a run.

    Attributes:
        recipe: the name of moa's recipe.
        models: how many mixtures the test that runs has built.
    """

    recipe = ""
    models = 0


def absent(concept: str) -> NoReturn:
    """End a test that needs a concept which moa does not have."""
    pytest.skip(f"absent: {concept}")


class ModulesToSaveWrapper(type):
    """The class of what is trained whole: moa trains the module itself, without a wrapper."""

    def __instancecheck__(cls, module: object) -> bool:
        return module in trained_whole


class TrainedWhole(metaclass=ModulesToSaveWrapper):
    """PEFT's ModulesToSaveWrapper."""


class PeftModel:
    """PEFT's methods on a `MoAModel`; it stands first among the bases of the model's class.

    Attributes:
        prefix: part of the name of every parameter of an adapter.
        peft_config: PEFT's configuration by the adapter's name.
    """

    prefix = ".branches."

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the mixture saved in a folder, in a model."""
        kwargs = {k: v for k, v in kwargs.items() if (k, v) != ("device_map", {"": "cpu"})}
        if kwargs.pop("torch_device", "cpu") != "cpu" or kwargs:
            absent(f"from_pretrained({', '.join(sorted(kwargs))})")
        folder = Path(model_id)
        as_ours = folder / "as_ours"
        as_ours.mkdir(exist_ok=True)
        for ours, theirs in FILES.items():
            shutil.copyfile(folder / theirs, as_ours / ours)
        out = moa.load(
            as_ours, base=model, check_base=False, is_trainable=is_trainable
        )  # as PEFT does not check either
        shutil.rmtree(as_ours)
        return dressed(out, None, adapter_name)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save by moa, and give the files PEFT's names."""
        if kwargs.pop("safe_serialization", True) is False:
            absent(".bin files")
        for name in ("selected_adapters", "save_embedding_layers"):
            if kwargs.pop(name, None) not in (None, "auto"):
                absent(f"save_pretrained({name})")
        folder = Path(save_directory)
        super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
        for ours, theirs in FILES.items():
            (folder / ours).replace(folder / theirs)
        name = str(getattr(self.base, "name_or_path", ""))  # type: ignore[attr-defined]
        config, card = folder / FILES["config.json"], folder / "README.md"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
        text = card.read_text().replace("library_name: moa", "library_name: peft")
        # a MoAModel has a configuration around any module, and the tests then ask for the base's name
        card.write_text(text if name else text.replace("\n---\n", '\nbase_model: ""\n---\n', 1))

    # ---------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: Any = None, safe_merge: bool = False) -> None:
        """Fold for good until `unmerge_adapter`: moa's block, entered."""
        if adapter_names is not None:
            absent("several named adapters")
        self._check_folds()
        stack = contextlib.ExitStack()
        with in_peft_words():
            stack.enter_context(self.folded(**self._task()))  # type: ignore[attr-defined]
        self.__dict__["_merged"] = stack

    def unmerge_adapter(self) -> None:
        """Leave moa's block."""
        self.__dict__.pop("_merged").close()

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None) -> Any:
        """Fold for good and return the base."""
        if adapter_names is not None:
            absent("several named adapters")
        self._check_folds()
        with in_peft_words():
            return super().merge_and_unload(**self._task())  # type: ignore[misc]

    def _check_folds(self) -> None:
        recipe = moa.RECIPES[Standing.recipe]()
        if recipe.folds == "never":
            absent(f"{OF_THE_RECIPE}: its routing is by row, so no one weight equals it")

    def _task(self) -> dict[str, int]:
        return {"task_id": 0} if Standing.recipe == "poly" else {}

    # ---------------------------------------------------------------- forwards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; recipes by task get task 0, which PEFT's tests know nothing of."""
        return super().__call__(*args, **self._tasks_of(args, kwargs), **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model where a test calls this, not the model: task 0, too."""
        kwargs = {**self._tasks_of(args, kwargs), **kwargs}
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, task 0."""
        return super().generate(*args, **self._tasks_of(args, kwargs), **kwargs)  # type: ignore[misc]

    def _tasks_of(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        if Standing.recipe != "poly":
            return {}
        return {"task_ids": torch.zeros(1, dtype=torch.int64)}  # of all: some of these models fold examples together

    # ---------------------------------------------------------------- names

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield parameters; what is trained whole has PEFT's word in its name."""
        heads = tuple(f"base.{name}." for name in self.modules_to_save)  # type: ignore[attr-defined]
        for name, parameter in super().named_parameters(*args, **kwargs):  # type: ignore[misc]
            yield ("modules_to_save." * name.startswith(heads)) + name, parameter

    def get_base_model(self) -> nn.Module:
        """Return the model that holds the mixtures."""
        return self.base  # type: ignore[attr-defined,no-any-return]

    @property
    def base_model(self) -> Any:
        """What PEFT calls so: it holds the base as `.model`."""
        return Tuner(self)

    @property
    def active_adapters(self) -> list[str]:
        """The one adapter's name."""
        return list(self.peft_config)  # type: ignore[attr-defined]

    @property
    def active_adapter(self) -> str:
        """The one adapter's name."""
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> Any:
        """PEFT's configuration."""
        return self.peft_config[self.active_adapter]  # type: ignore[attr-defined]

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Let the embeddings' output require a gradient, as PEFT does."""
        self.enable_input_require_grads()  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return _undressed, (type(self.base),), self.__dict__  # type: ignore[attr-defined]


class Tuner:
    """What PEFT calls `base_model`: the base is its `.model`.

    Args:
        host: the facade.
    """

    def __init__(self, host: Any) -> None:
        self.model, self.prefix, self.peft_config = host.base, host.prefix, host.peft_config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def set_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        absent("several named adapters")


def _absent_method(concept: str) -> Any:
    return lambda *_, **__: absent(concept)


for concept, names in {
    "several named adapters": (
        *("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "add_weighted_adapter", "set_requires_grad"),
    ),
    "a switch for each layer": ("disable_adapter_layers", "enable_adapter_layers"),
    "layer status": ("get_layer_status", "get_model_status"),
    "conversion of other adapters to LoRA": ("supports_lora_conversion",),
}.items():
    for name in names:
        setattr(PeftModel, name, _absent_method(concept))


@contextlib.contextmanager
def in_peft_words() -> Any:
    """Say what moa says about weights that are not finite in PEFT's words."""
    try:
        yield
    except NumericsError as error:
        raise ValueError(NAN) from error


def dressed(model: Any, config: Any, adapter_name: str) -> Any:
    """Return a `MoAModel` as a `PeftModel`."""
    model.__class__ = _class(type(model))
    model.__dict__["peft_config"] = {adapter_name: config}
    trained_whole.update(whole.module for whole in model.whole)
    return model


def _class(ours: type) -> type:
    return type(ours.__name__, (PeftModel, ours), {})


def _undressed(base_class: type[nn.Module]) -> Any:
    cls = _class(moa.model.moa_model.model_class(base_class))
    return cls.__new__(cls)


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    **kwargs: Any,
) -> Any:
    """Return a model with the recipe's mixture where a LoRA configuration would put adapters."""
    if type(peft_config) is not LoraConfig:
        absent(f"PEFT's own kind {type(peft_config).__name__}")
    if mixed or kwargs:
        absent("mixed adapters" if mixed else f"get_peft_model({', '.join(sorted(kwargs))})")
    if peft_config._custom_modules:
        absent("layers of the user's own in PEFT's table")
    if not hasattr(model, "config"):
        peft_config.base_model_name_or_path = None
    options = translated(peft_config, model)
    check_layers(model, options.get("target_modules"))
    try:
        out = moa.build(model, Standing.recipe, **RECIPES[Standing.recipe], **options)
    except ConfigError as error:
        if Standing.recipe == "mixlora" and "targets" in str(error):
            absent(f"{OF_THE_RECIPE}: a base without feed-forward blocks, which it is for")
        raise
    if peft_config.init_lora_weights is False:
        draw_all(out)
    if not autocast_adapter_dtype:
        out.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    Standing.models += 1
    return dressed(out, peft_config, adapter_name)


def unknown_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options of a LoRA configuration that moa's recipes have no word for."""
    known = SILENT | PASSED_ON | {"bias"} | ({"init_lora_weights"} & options.keys())
    return sorted(name for name, value in options.items() if value and name not in known)


def translated(config: Any, model: Any) -> dict[str, Any]:
    """Return moa's keywords for what a LoRA configuration sets."""
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in SILENT or not value or value == default:
            continue
        if field.name not in PASSED_ON and (field.name, value) != ("bias", "none"):
            absent(f"LoRA's option {field.name}")
        options[field.name] = sorted(value) if isinstance(value, set) else value
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        absent(f"init_lora_weights={config.init_lora_weights!r}")
    if "target_modules" not in options and Standing.recipe != "mixlora":
        options["target_modules"] = sorted(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type])
    if Standing.recipe == "mixlora" and "target_modules" not in options and hasattr(model, "config"):  # and its blocks
        own = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
        options["target_modules"] = [*sorted(own), "ffn"]
    for name in ("r", "lora_alpha", "lora_dropout"):
        options.setdefault(name, getattr(config, name))
    if config.use_rslora:
        options["lora_alpha"] *= config.r**0.5
    return options


def check_layers(model: nn.Module, targets: Any) -> None:
    """End a test that puts adapters on layers of a kind that moa adapts nowhere."""
    if not targets:
        return
    pattern = targets if isinstance(targets, str) else r"(.*\.)?(" + "|".join(map(re.escape, targets)) + ")"
    for name, module in model.named_modules():
        if not re.fullmatch(pattern, name):
            continue
        if isinstance(module, nn.Embedding | nn.MultiheadAttention):
            absent(f"experts on an {'embedding' if isinstance(module, nn.Embedding) else 'nn.MultiheadAttention'}")
        if getattr(module, "groups", 1) > 1:
            absent("experts on a convolution in groups")


def draw_all(model: Any) -> None:
    """Draw what starts at zero, as PEFT's init_lora_weights=False does: the mixture is not the identity."""
    for _, branch in model.branches():
        for parameter in branch.bank.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.kaiming_uniform_(parameter, a=5**0.5)


def names_for_tests() -> dict[str, dict[str, Any]]:
    """Return what takes the place of PEFT's own names, by module."""
    helper = "state-dict helpers"
    return {
        "peft": {
            "get_peft_model": get_peft_model,
            "PeftModel": PeftModel,
            "get_peft_model_state_dict": lambda model, **_: model.adapter_state_dict(),
            "set_peft_model_state_dict": _absent_method(helper),
            "get_base_model_state_dict": _absent_method(helper),
            "set_base_model_state_dict": _absent_method(helper),
            "inject_adapter_in_model": _absent_method("injection without a wrapper"),
            "convert_to_lora": _absent_method("conversion of other adapters to LoRA"),
        },
        "peft.tuners.tuners_utils": {"BaseTunerLayer": Mixture},
        "peft.utils": {"ModulesToSaveWrapper": TrainedWhole},
        "peft.utils.other": {"ModulesToSaveWrapper": TrainedWhole},
    }
