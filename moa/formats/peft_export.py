"""An expert of a mixture, or what one task gets, written as PEFT's LoRA folder."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..delta import Delta, LowRank
from ..errors import ConfigError, FoldError
from ..experts import ExpertBank
from ..layers import as_factors, is_conv1d
from ..mixture import Branch, ExpertsMixture, Mixture
from ..mixture.change import Change, check_expert, factor_change, mixed, number_in, single
from .atomic import staged
from .card import model_card
from .named_deltas import check_tensors
from .peft_kinds import KINDS, Kind
from .peft_native import native_config, shared_tensors, write_native
from .peft_parameters import stacked_factors
from .sharded import writes_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# end of a base's class name -> peft's name for what it does, and what peft's class for it then passes to the base
TASK_TYPES = {
    "ForCausalLM": ("CAUSAL_LM", {"input_ids"}),
    "LMHeadModel": ("CAUSAL_LM", {"input_ids"}),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", {"input_ids", "decoder_input_ids"}),
}


def export_expert(
    model: Any, expert: int, folder: str | Path, *, overwrite: bool = True, as_lora: bool = False
) -> Path:
    """Write one expert as a PEFT folder that peft loads by itself, with a model card, and return its path.

    A family that peft has (see `KINDS`) is written as its own kind, number by number; every other as a LoRA.

    Its logits are those of the model with that expert pinned (`MoAModel.pin_expert`). Modules trained whole go along,
    and so does the one expert of a layer that has no other.
    Where the base is a class of moa around a transformers model (task heads on an encoder), the adapter is for the
    model inside, and the heads lie beside it in heads.safetensors.

    Args:
        model: a `MoAModel` whose experts are of one family that peft has, or low-rank changes (o, i) of any family,
            behind any router.
        expert: which of 0 … E - 1.
        folder: made if it does not exist; it appears whole or not at all. Of several processes the first of each
            machine writes it.
        overwrite: replace an adapter that moa wrote there.
        as_lora: write a LoRA, also where peft has the family, if its experts are low-rank changes.

    Raises:
        ConfigError: no such expert.
        CheckpointError: the folder holds what moa did not write, e.g. the base, or cannot be written; or other
            processes hold parts of the model.
        FoldError: experts that are not low-rank changes, or add a constant, or of several families, or at a place where
            peft's are not; the layer is named.
        NumericsError: a tensor of the expert holds NaN or infinity; it is named, and nothing is written.
    """
    check_expert(expert, (recipe.n_experts for recipe, _ in model.recipes))
    said = f"Expert {expert} of a mixture of adapters made by moa."
    kind = None if as_lora else _kind_of(model, expert)
    return _export(model, lambda mixture: _of_expert(mixture, expert), folder, said, overwrite, expert, kind)


def export_task(model: Any, task: int, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write what the inputs of one task get as a PEFT LoRA folder, with a model card, and return its path.

    Its logits are those of the model with that task's id on every example: an engine with LoRA per request serves a
    model that routes by task, or whose routing is constant, as one adapter for each task.

    Args:
        model: a `MoAModel` whose routing is constant for a task, over low-rank changes (o, i).
        task: its id.
        folder: made if it does not exist.
        overwrite: allow replacing a folder that moa wrote.

    Raises:
        ConfigError: the model has no mixtures.
        FoldError: a routing that depends on the input, or experts that are not low-rank changes; the layer is named.
        NumericsError: a tensor holds NaN or infinity; it is named, and nothing is written.
    """

    def of_task(mixture: Mixture) -> Delta:
        def mean(branch: Branch) -> Change:
            routing = branch.router.constant(task)
            if routing is None:
                raise FoldError(
                    f"{mixture.name}: the routing of {type(branch.router).__name__} depends on the input, or does not "
                    f"know task {task}: no one adapter equals it."
                )
            return mixed(branch.bank, routing.dense())

        return factor_change(mixture, mean)

    return _export(model, of_task, folder, f"Task {task} of a mixture of adapters made by moa.", overwrite)


def tasks_of(model: Any) -> range:
    """Return the ids of the tasks that a model routes by, a single 0 where its routing is constant; no tensors.

    Raises:
        FoldError: its routing depends on the input.
    """
    found = range(1)
    for name, branch in model.branches():
        known = getattr(branch.router, "tasks", None)
        if known is not None:
            found = known
        elif branch.router.constant() is None:
            raise FoldError(f"{name}: the routing of {type(branch.router).__name__} depends on the input.")
    return found


def _export(
    model: Any,
    change_of: Callable[[Mixture], Delta],
    folder: str | Path,
    said: str,
    overwrite: bool,
    expert: int | None = None,
    kind: Kind | None = None,
) -> Path:
    """Write each layer's change (o, i), or an expert of a kind that peft has, as a PEFT folder; return its path."""
    target, here = Path(folder), writes_whole(model)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    fused: dict[str, int] = {}  # by tensor of the base's fused experts
    transposed = False
    prefix = getattr(model.base, "exported_body", "")
    body = model.base.get_submodule(prefix)
    for full, mixture in model.mixtures().items():
        name = full.removeprefix(f"{prefix}.") if prefix else full
        if prefix and name == full:
            raise FoldError(f"{full} lies outside {prefix}, which is what a LoRA folder of this model is for.")
        if kind is not None and expert is not None:
            own = write_native(*_only_bank(mixture, kind, expert), kind)
            tensors |= {f"base_model.model.{name}.{ending}": value for ending, value in own.items()}
            ranks[name], transposed = 0, transposed or is_conv1d(mixture.base)
            continue
        if isinstance(mixture, ExpertsMixture):
            if expert is None:
                raise FoldError(f"{full} holds a base's fused experts, whose change for a task no LoRA folder holds.")
            written, rank = stacked_factors(mixture, expert)
            tensors |= {f"base_model.model.{name}.{key}": factor for key, factor in written.items()}
            fused |= {f"{name}.{part.weight}": rank for part in mixture.slices()}
            continue
        change = _as_low_rank(mixture, change_of(mixture))
        for letter, factor in zip("AB", as_factors(mixture.base, change.down, change.up.T), strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = factor.cpu().contiguous()
        ranks[name] = change.rank
        transposed |= is_conv1d(mixture.base)
    if not tensors:
        raise ConfigError("this model has no mixtures to export.")
    heads = {
        f"{head}.{key}": value.detach().cpu().contiguous()
        for head in model.modules_to_save
        for key, value in model.base.get_submodule(head).state_dict().items()
    }
    if not prefix:
        tensors |= {f"base_model.model.{key}": value for key, value in heads.items()}
    base = getattr(body, "name_or_path", None) or None
    task_type = _task_type(body)
    names = sorted(ranks)
    endings = tuple(f".{name}" for name in names)  # peft takes a listed name for an ending, a string for a whole name
    alike = any(n.endswith(endings) for n, _ in body.named_modules() if n not in ranks)
    every = ranks | fused
    rank = max(set(every.values()), key=list(every.values()).count)
    others = {re.escape(n): r for n, r in every.items() if r != rank}
    lora = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_parameters": sorted(fused) or None,
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    config = {
        "peft_type": "LORA" if kind is None else kind.peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "target_modules": "|".join(map(re.escape, names)) if alike else names,
        "modules_to_save": None if prefix else list(model.modules_to_save) or None,
        "inference_mode": True,
        **(lora if kind is None or expert is None else native_config(model, kind, transposed, expert)),
    }
    if kind is not None and expert is not None:
        tensors |= shared_tensors(model, kind, expert)
    check_tensors({**tensors, **heads}, f"{target} was not written")
    if not here:
        return target
    with staged(target, overwrite=overwrite) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if prefix and heads:
            save_file(heads, partial / "heads.safetensors", metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(model_card(base, said, task_type), encoding="utf-8")
    return target


def _task_type(body: Any) -> str | None:
    """Return peft's name for what a base does, or None where peft's class for it passes what the base does not take.

    Whisper listens and has no input_ids; a decoder that also sees pictures has no decoder_input_ids.
    """
    takes = inspect.signature(type(body).forward).parameters
    for end, (kind, passed) in TASK_TYPES.items():
        if type(body).__name__.endswith(end) and passed <= takes.keys():
            return kind
    return None


def _kind_of(model: Any, expert: int) -> Kind | None:
    """Return the kind of adapter that peft has for the family of a model's expert, or None.

    Raises:
        FoldError: some layers have experts of such a family and others do not.
    """
    families = {recipe.family.of(expert if expert < recipe.n_experts else 0).name for recipe, _ in model.recipes}
    kinds = {KINDS[name].peft_type for name in families if name in KINDS}
    if kinds and len(families) > 1:
        raise FoldError(
            f"this model has experts of the families {', '.join(sorted(families))}, and a PEFT folder holds one kind: "
            "pass as_lora=True, where all of them are low-rank changes."
        )
    return KINDS[families.pop()] if kinds else None


def _only_bank(mixture: Mixture, kind: Kind, expert: int) -> tuple[ExpertBank, int]:
    """Return the bank (*rows, i) -> (*rows, o) of a layer that peft's kind of adapter can stand for, and its expert.

    Raises:
        FoldError: it has several, or one at another place.
        ConfigError: no such expert.
    """
    (branch, *more) = mixture.branches
    assert isinstance(branch, Branch)
    fits = branch.tap == "input" or kind.family == "ia3"
    if more or not fits or isinstance(mixture, ExpertsMixture) or mixture.why_not_fold is not None:
        raise FoldError(
            f"{mixture.name}: a {kind.peft_type} adapter of peft stands on the input of a linear layer, one for each, "
            "and these experts do not."
        )
    return branch.bank.own(number_in(branch.bank, expert))


def _of_expert(mixture: Mixture, expert: int) -> Delta:
    return factor_change(mixture, lambda branch: single(branch.bank, expert))


def _as_low_rank(mixture: Mixture, change: Delta) -> LowRank:
    """Return a layer's change (o, i) as factors.

    Raises:
        FoldError: it is not low-rank.
    """
    if not isinstance(change, LowRank):
        raise FoldError(
            f"{mixture.name}: its experts are {type(change).__name__.lower()} changes, which a LoRA folder has no "
            "place for: fold the mixture into its base, or squeeze it to a rank with moa.distill."
        )
    return change
