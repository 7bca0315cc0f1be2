"""PEFT's LoRA folders: read as experts, written from experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..delta import LowRank
from ..errors import CheckpointError, ConfigError, FoldError
from ..experts import LoRABank
from ..layers import as_factors, is_conv1d
from ..mixture import Branch, Mixture
from ..mixture.change import factor_change, single
from .atomic import replacing
from .card import model_card

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# end of a base's class name -> peft's name for what it does, where that changes nothing but peft's class
TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter as PEFT stores it.

    Args:
        path: its folder.
        layers: layer name -> (A (r, i), B (o, r), scale).
    """

    path: Path
    layers: dict[str, tuple[Tensor, Tensor, float]]

    @property
    def max_rank(self) -> int:
        """The largest r over its layers."""
        return max(a.shape[0] for a, _, _ in self.layers.values())


def read_adapters(paths: Sequence[str | Path]) -> list[Adapter]:
    """Return the adapters in PEFT LoRA folders, with rank_pattern, alpha_pattern and rsLoRA honoured.

    Args:
        paths: folders, one per expert; factors are A (r, i) and B (o, r).

    Raises:
        ConfigError: no path given.
        CheckpointError: a folder that is no PEFT LoRA adapter, or uses a feature that is not a plain low-rank delta
            (DoRA, biases, modules_to_save), which is named.
    """
    if not paths:
        raise ConfigError("experts=[] names no adapter folder.")
    return [_read(Path(path)) for path in paths]


def _read(folder: Path) -> Adapter:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a PEFT adapter folder: it has no {name}.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    _refuse(config, folder)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{folder} holds {key}, which is not a LoRA factor of a linear layer: not supported.")
        factors.setdefault(match["layer"], {})[match["factor"]] = tensor.flatten(1)  # a convolution's has more axes
    layers = {}
    for layer, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{folder}: {layer} has only factor {', '.join(pair)}: the file is incomplete.")
        rank = pair["A"].shape[0]
        alpha = _pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        layers[layer] = (pair["A"], pair["B"], float(scale))
    return Adapter(folder, layers)


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} is a {config.get('peft_type')} adapter: only LORA adapters become experts.")
    for feature in (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
    ):
        if config.get(feature):
            raise CheckpointError(f"{folder} uses {feature}={config[feature]!r}, which is not a low-rank delta.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{folder} trains biases (bias={config['bias']!r}), which are not a low-rank delta.")


def _pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, as peft reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


@torch.no_grad()
def load_experts(mixtures: Mapping[str, Mixture], names: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Make adapter e expert e of the named mixtures; a layer it does not adapt keeps a zero expert.

    Each adapter's own scale goes into its up factor, so that experts of unequal rank and alpha share one bank scale.

    Args:
        mixtures: name -> mixture, with banks of down (E, r, i) and up (E, r, o).
        names: the layers to fill.
        adapters: E of them.

    Raises:
        ConfigError: a recipe whose experts are no LoRAs, or not as many as there are adapters.
        CheckpointError: a factor of another shape than its layer: an adapter for another base.
    """
    for name in names:
        branch = mixtures[name].branches[0]
        assert isinstance(branch, Branch)
        bank = branch.bank
        if not isinstance(bank, LoRABank):
            raise ConfigError(
                f"experts=[…] are LoRA adapters whose outputs are mixed, this recipe's experts are "
                f"{type(bank).__name__}: choose another, e.g. 'topk', 'dense', 'remix', 'xlora' or 'arrow'."
            )
        if bank.n_experts != len(adapters):
            raise ConfigError(
                f"{name} has {bank.n_experts} expert(s) in this recipe, and {len(adapters)} adapters were given: give "
                "adapters of the layers that it routes alone, or choose another, e.g. 'topk', 'dense' or 'xlora'."
            )
        for e, adapter in enumerate(adapters):
            bank.down[e].zero_()
            bank.up[e].zero_()
            if name not in adapter.layers:
                continue
            a, b, scale = adapter.layers[name]
            rank = a.shape[0]
            if a.shape[1] != bank.d_in or b.shape[0] != bank.d_out or b.shape[1] != rank:
                raise CheckpointError(
                    f"{adapter.path}: the factors of {name} are {tuple(a.shape)} and {tuple(b.shape)}, the layer is "
                    f"{bank.d_in} -> {bank.d_out}: this adapter was made for another base."
                )
            bank.down[e, :rank] = a.to(bank.down)
            bank.up[e, :rank] = b.T.to(bank.up) * (scale / bank.scaling)


def export_expert(model: Any, expert: int, folder: str | Path) -> Path:
    """Write one expert as a PEFT LoRA folder that peft loads alone, with a model card, and return its path.

    Its logits are those of the model with that expert pinned (`MoAModel.pin_expert`). Modules trained whole go along.

    Args:
        model: a `MoAModel` whose experts are low-rank changes (o, i): of any family, behind any router.
        expert: which of 0 … E - 1.
        folder: made if it does not exist.

    Raises:
        ConfigError: no such expert.
        FoldError: experts that are not low-rank changes, or add a constant; the layer is named.
    """
    target = Path(folder)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    transposed = False
    for name, mixture in model.mixtures().items():
        change = _as_low_rank(mixture, expert)
        for letter, factor in zip("AB", as_factors(mixture.base, change.down, change.up.T), strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = factor.cpu().contiguous()
        ranks[name], alphas[name] = change.rank, change.rank
        transposed |= is_conv1d(mixture.base)
    if not tensors:
        raise ConfigError("this model has no mixtures to export.")
    for head in model.modules_to_save:
        for key, value in model.base.get_submodule(head).state_dict().items():
            tensors[f"base_model.model.{head}.{key}"] = value.detach().cpu().contiguous()
    base = getattr(model.base, "name_or_path", None) or None
    task_type = next((kind for end, kind in TASK_TYPES.items() if type(model.base).__name__.endswith(end)), None)
    names = sorted(ranks)
    endings = tuple(f".{name}" for name in names)  # peft takes a listed name for an ending, a string for a whole name
    alike = any(n.endswith(endings) for n, _ in model.base.named_modules() if n not in ranks)
    rank, alpha = max(set(ranks.values()), key=list(ranks.values()).count), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "target_modules": "|".join(map(re.escape, names)) if alike else names,
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": list(model.modules_to_save) or None,
        "inference_mode": True,
    }
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(target / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    with replacing(target / "README.md") as temporary:
        temporary.write_text(model_card(base, f"Expert {expert} of a mixture of adapters made by moa.", task_type))
    return target


def _as_low_rank(mixture: Mixture, expert: int) -> LowRank:
    """Return one expert's change (o, i) as factors.

    Raises:
        FoldError: it is not one.
    """
    change = factor_change(mixture, lambda branch: single(branch.bank, expert))
    if not isinstance(change, LowRank):
        raise FoldError(
            f"{mixture.name}: its experts are {type(change).__name__.lower()} changes, which a LoRA folder has no "
            "place for: fold the mixture into its base, or squeeze it to a rank with moa.distill."
        )
    return change
