"""PEFT's adapters beyond LoRA, a row for each: which family reads them, what each option means, what each tensor is.

Layout of PEFT 0.21. A test compares the options of every row with peft's own configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..experts import ExpertBank
from . import peft_tensors
from .peft_options import OPTIONS, Option, verdicts
from .peft_tensors import Config, Parts


@dataclass(frozen=True)
class Kind:
    """A kind of adapter that peft has.

    Args:
        peft_type: of its configuration.
        family: that reads it.
        options: every option of peft's configuration.
        parts: ending of a tensor's name -> name of the expert's own tensor, (E, …) stacked.
        keywords: configuration and the tensors (of any shape) by layer -> keywords of the family and of the recipe.
        read: parts of one layer, the bank, the configuration -> the expert's tensors, by name.
        write: bank and expert -> tensors by their ending.
        config: bank, model and expert -> the options that say what the tensors are.
        scaled: the tensor that takes up what an adapter's own scale is over the bank's; "" where there is no scale.
        alpha: name of the option that is the scale times r.
        bases: ending of a random matrix that all layers share -> its name in `Frozen`.
    """

    peft_type: str
    family: str
    options: Mapping[str, Option]
    parts: Mapping[str, str]
    keywords: Callable[[Config, Mapping[str, Parts]], dict[str, Any]]
    config: Callable[[ExpertBank, Any, int], dict[str, Any]]
    read: Callable[[Parts, ExpertBank], dict[str, Tensor]]
    write: Callable[[ExpertBank, int], dict[str, Tensor]]
    scaled: str = ""
    alpha: str = ""
    bases: Mapping[str, str] | None = None


_COMMON = {
    name: OPTIONS[name]
    for name in ("peft_type", "base_model_name_or_path", "task_type", "auto_mapping", "peft_version", "revision")
} | {name: OPTIONS[name] for name in ("inference_mode", "target_modules")}
_LAYERS = {name: OPTIONS[name] for name in ("exclude_modules", "layers_to_transform", "layers_pattern")}
_WHOLE = verdicts("refused", modules_to_save="a module trained whole is not a part of an expert")
_BIAS = verdicts("refused", bias="a trained bias of the base is not a part of an expert")
_TRANSPOSED = verdicts("harmless", fan_in_fan_out="how the base stores its weights, which the base says itself")
_START = verdicts("harmless", init_weights="where training began")


def _options(*tables: Mapping[str, Option], honoured: str = "", harmless: str = "") -> dict[str, Option]:
    out = {name: option for table in (_COMMON, _WHOLE, *tables) for name, option in table.items()}
    out |= {name: Option("honoured", "says what the tensors are") for name in honoured.split()}
    return out | {name: Option("harmless", "acts in training only") for name in harmless.split()}


def _kind(peft_type: str, family: str, *parts: str, **rest: Any) -> Kind:
    read, write = peft_tensors.straight(*parts)
    return Kind(peft_type, family, parts=peft_tensors.named(*parts), **{"read": read, "write": write, **rest})


_LOHA = ("hada_w1_a=left_up", "hada_w1_b=left_down", "hada_w2_a=right_up", "hada_w2_b=right_down")
_LOKR = ("lokr_w1=left", "lokr_w1_a=", "lokr_w1_b=", "lokr_w2=right", "lokr_w2_a=right_up", "lokr_w2_b=right_down")
_LYCORIS = "r alpha rank_pattern alpha_pattern"
_DROPS = "rank_dropout module_dropout"
_CONV = verdicts("harmless", use_effective_conv2d="of convolutions, whose tensors are refused")

KINDS: dict[str, Kind] = {
    kind.family: kind
    for kind in (
        _kind(
            "IA3",
            "ia3",
            "ia3_l=scale",
            options=_options(
                {"exclude_modules": OPTIONS["exclude_modules"]},
                _TRANSPOSED,
                verdicts("harmless", init_ia3_weights="where training began"),
                honoured="feedforward_modules",
            ),
            keywords=peft_tensors.ia3_keywords,
            config=peft_tensors.ia3_config,
            read=peft_tensors.ia3_read,
            write=peft_tensors.ia3_write,
        ),
        _kind(
            "VERA",
            "vera",
            "vera_lambda_b=outer",
            "vera_lambda_d=inner",
            options=_options(
                {name: _LAYERS[name] for name in ("layers_to_transform", "layers_pattern")},
                _TRANSPOSED,
                _START,
                _BIAS,
                verdicts("harmless", d_initial="where training began"),
                honoured="r projection_prng_key save_projection",
                harmless="vera_dropout",
            ),
            keywords=peft_tensors.seeded,
            config=peft_tensors.vera_config,
            bases={"vera_A": "down", "vera_B": "up"},
        ),
        _kind(
            "SHIRA",
            "shira",
            "shira_weight=values",
            "shira_indices=places",
            options=_options(
                _TRANSPOSED,
                _START,
                verdicts("harmless", mask_type="the file holds the places"),
                honoured="r random_seed",
            ),
            keywords=lambda config, layers: {"rank": config["r"], "mask": "given"},
            config=peft_tensors.shira_config,
            read=peft_tensors.shira_read,
            write=peft_tensors.shira_write,
        ),
        _kind(
            "LOKR",
            "lokr",
            *_LOKR,
            options=_options(
                _LAYERS,
                _START,
                _CONV,
                honoured=f"{_LYCORIS} decompose_both decompose_factor",
                harmless=f"{_DROPS} rank_dropout_scale",
            ),
            keywords=lambda config, layers: {"rank": config["r"], "factor": config.get("decompose_factor", -1)},
            config=lambda bank, model, expert: {
                "r": bank.rank,
                "alpha": bank.scaling * bank.rank,
                "decompose_factor": model.recipes[0][0].family.of(expert).factor,
            },
            read=peft_tensors.lokr_read,
            write=peft_tensors.LOKR_WRITE,
            scaled="left",
            alpha="alpha",
        ),
        _kind(
            "LOHA",
            "loha",
            *_LOHA,
            options=_options(_LAYERS, _START, _CONV, honoured=_LYCORIS, harmless=_DROPS),
            keywords=peft_tensors.rank,
            config=peft_tensors.rank_and_alpha("alpha"),
            scaled="left_up",
            alpha="alpha",
        ),
        _kind(
            "RANDLORA",
            "randlora",
            "randlora_lambda=inner",
            "randlora_gamma=outer",
            options=_options(
                {name: _LAYERS[name] for name in ("layers_to_transform", "layers_pattern")},
                _TRANSPOSED,
                _START,
                _BIAS,
                honoured="r randlora_alpha projection_prng_key save_projection sparse very_sparse",
                harmless="randlora_dropout",
            ),
            keywords=peft_tensors.seeded,
            config=peft_tensors.rank_and_alpha("randlora_alpha"),
            scaled="inner",
            alpha="randlora_alpha",
            bases={"randlora_A": "down", "randlora_B": "up"},
        ),
        _kind(
            "OFT",
            "oft",
            "oft_R.weight=rotation",
            options=_options(
                _LAYERS,
                _TRANSPOSED,
                _START,
                _BIAS,
                verdicts(
                    "refused",
                    coft="a constrained rotation is projected in every forward, which an expert's is not",
                ),
                verdicts("harmless", eps="of coft only"),
                honoured="r oft_block_size block_share use_cayley_neumann num_cayley_neumann_terms",
                harmless="module_dropout",
            ),
            keywords=peft_tensors.oft_keywords,
            config=peft_tensors.oft_config,
        ),
        _kind(
            "BOFT",
            "boft",
            "boft_R=rotation",
            "boft_s=scale",
            options=_options(
                _LAYERS,
                _TRANSPOSED,
                _START,
                _BIAS,
                honoured="boft_block_size boft_block_num boft_n_butterfly_factor",
                harmless="boft_dropout",
            ),
            keywords=peft_tensors.boft_keywords,
            config=peft_tensors.boft_config,
            read=peft_tensors.boft_read,
            write=peft_tensors.boft_write,
        ),
        _kind(
            "LORA",
            "dora",
            "lora_A.weight=down",
            "lora_B.weight=up",
            "lora_magnitude_vector=magnitude",
            options=OPTIONS,
            keywords=peft_tensors.rank,
            config=lambda bank, model, expert: {
                "r": bank.rank,
                "lora_alpha": bank.scaling * bank.rank,
                "use_dora": True,
            },
            read=peft_tensors.dora_read,
            write=peft_tensors.dora_write,
            scaled="up",
            alpha="lora_alpha",
        ),
    )
}
