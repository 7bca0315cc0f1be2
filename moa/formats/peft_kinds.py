"""PEFT's adapters beyond LoRA, a row for each: which family reads them, what each option means, what each tensor is.

Layout of PEFT 0.21. A test compares the options of every row with peft's own configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FoldError
from ..experts import ExpertBank
from .peft_options import OPTIONS, Option, _all

Config = Mapping[str, Any]
Parts = Mapping[str, Tensor]


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
        config: bank -> the options that say what the tensors are.
        scaled: the tensor that takes up what an adapter's own scale is over the bank's; "" where there is no scale.
        alpha: name of the option that is the scale times r.
        bases: ending of a random matrix that all layers share -> its name in `Frozen`.
    """

    peft_type: str
    family: str
    options: Mapping[str, Option]
    parts: Mapping[str, str]
    keywords: Callable[[Config, Mapping[str, Parts]], dict[str, Any]]
    config: Callable[[ExpertBank, Any], dict[str, Any]]
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
_WHOLE = _all("refused", modules_to_save="a module trained whole is not a part of an expert")
_BIAS = _all("refused", bias="a trained bias of the base is not a part of an expert")
_TRANSPOSED = _all("harmless", fan_in_fan_out="how the base stores its weights, which the base says itself")
_START = _all("harmless", init_weights="where training began")


def _options(*tables: Mapping[str, Option], honoured: str = "", harmless: str = "") -> dict[str, Option]:
    out = {name: option for table in (_COMMON, _WHOLE, *tables) for name, option in table.items()}
    out |= {name: Option("honoured", "says what the tensors are") for name in honoured.split()}
    return out | {name: Option("harmless", "acts in training only") for name in harmless.split()}


def _straight(*names: str) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, Tensor]]]:
    """Return how to read and write parts that are the expert's tensors as they are, "ending=name" each."""
    pairs = dict(pair.split("=") for pair in names)

    def read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
        return {pairs[ending]: value for ending, value in parts.items()}

    def write(bank: ExpertBank, expert: int) -> dict[str, Tensor]:
        known = dict(bank.named_parameters())
        return {ending: known[name][expert].detach() for ending, name in pairs.items() if name in known}

    return read, write


def _named(*pairs: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in pairs)


# ------------------------------------------------------------------------------------------------ (IA)³


def _ia3_keywords(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    named = config.get("feedforward_modules") or ()
    if isinstance(named, str):  # a regular expression: the layers whose vector lies along the input
        named = [name for name, parts in layers.items() if parts["ia3_l"].shape[0] == 1]
    return {"feedforward": tuple(sorted(named))}


def _ia3_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    return {"scale": parts["ia3_l"].flatten() - 1}


def _ia3_write(bank: ExpertBank, expert: int) -> dict[str, Tensor]:
    scale: Tensor = 1 + bank.scale[expert].detach()  # type: ignore[index]
    return {"ia3_l": scale.unsqueeze(0) if hasattr(bank, "site") else scale.unsqueeze(1)}


def _ia3_config(bank: ExpertBank, model: Any) -> dict[str, Any]:
    return {"feedforward_modules": [n for n, branch in model.branches() if hasattr(branch.bank, "site")]}


# ------------------------------------------------------------------------------------------------ SHiRA


def _shira_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    rows, columns = parts["shira_indices"].long()
    return {"values": parts["shira_weight"], "places": rows * bank.d_in + columns}


def _shira_write(bank: Any, expert: int) -> dict[str, Tensor]:
    places, values = bank.places[expert], bank.values[expert].detach()
    if len(values) % (bank.d_in + bank.d_out):
        raise FoldError(
            f"peft's SHiRA has r (o + i) entries, a multiple of {bank.d_in + bank.d_out}, and this expert has "
            f"{len(values)}: build with rank=… in place of density to export it."
        )
    indices = torch.stack([places // bank.d_in, places % bank.d_in]).int()
    return {"shira_weight": values, "shira_indices": indices}


def _shira_config(bank: Any, model: Any) -> dict[str, Any]:
    return {"r": bank.values.shape[1] // (bank.d_in + bank.d_out), "mask_type": "random"}


# ------------------------------------------------------------------------------------------------ LoKr, rotations, DoRA


def _lokr_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    names = {"lokr_w2": "right", "lokr_w2_a": "right_up", "lokr_w2_b": "right_down"}
    return {"left": left, **{names[ending]: value for ending, value in parts.items() if ending in names}}


_LOKR_WRITE = _straight("lokr_w1=left", "lokr_w2=right", "lokr_w2_a=right_up", "lokr_w2_b=right_down")[1]


def _oft_keywords(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    sizes = {(1 + math.isqrt(1 + 8 * parts["oft_R.weight"].shape[1])) // 2 for parts in layers.values()}
    if len(sizes) > 1:
        raise CheckpointError(
            f"an OFT adapter of {config.get('r')} blocks a layer has blocks of {sorted(sizes)} features: an expert's "
            "blocks are of one size in all layers."
        )
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    terms = 4 if terms == 3 else terms  # peft sums as many for either
    return {"block_size": sizes.pop(), "terms": terms, "share": bool(config.get("block_share"))}


def _oft_config(bank: Any, model: Any) -> dict[str, Any]:
    share = bank.rotation.shape[1] == 1 and bank.d_in > bank.block_size
    terms = {"use_cayley_neumann": bank.terms > 0, "num_cayley_neumann_terms": bank.terms or 5}
    return {"r": 0, "oft_block_size": bank.block_size, "block_share": share, **terms}


def _boft_keywords(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    n_factors, _, size, _ = next(iter(layers.values()))["boft_R"].shape
    return {"block_size": size, "n_factors": n_factors}


def _boft_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    return {"rotation": parts["boft_R"], "scale": parts["boft_s"].flatten()}


def _boft_write(bank: Any, expert: int) -> dict[str, Tensor]:
    return {"boft_R": bank.rotation[expert].detach(), "boft_s": bank.scale[expert].detach().unsqueeze(1)}


def _boft_config(bank: Any, model: Any) -> dict[str, Any]:
    return {"boft_block_size": bank.block_size, "boft_block_num": 0, "boft_n_butterfly_factor": len(bank.orders)}


def _dora_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    names = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
    return {names[e]: value.T if names[e] == "up" else value.squeeze() for e, value in parts.items()} | {
        "down": parts["lora_A.weight"]
    }


def _dora_write(bank: Any, expert: int) -> dict[str, Tensor]:
    down, up, magnitude = (t[expert].detach() for t in (bank.down, bank.up, bank.magnitude))
    return {"lora_A.weight": down, "lora_B.weight": up.T, "lora_magnitude_vector": magnitude}


def _rank(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    return {"rank": config["r"]}


def _rank_and_alpha(name: str) -> Callable[[ExpertBank, Any], dict[str, Any]]:
    return lambda bank, model: {"r": bank.rank, name: bank.scaling * bank.rank}


def _seeded(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    flags = {name: bool(config[name]) for name in ("sparse", "very_sparse") if name in config}
    return {"rank": config["r"], "seed": config.get("projection_prng_key", 0), **flags}


def _vera_config(bank: ExpertBank, model: Any) -> dict[str, Any]:
    return {"r": bank.rank}


def _kind(peft_type: str, family: str, *parts: str, **rest: Any) -> Kind:
    read, write = _straight(*parts)
    return Kind(peft_type, family, parts=_named(*parts), **{"read": read, "write": write, **rest})


_LOHA = ("hada_w1_a=left_up", "hada_w1_b=left_down", "hada_w2_a=right_up", "hada_w2_b=right_down")
_LOKR = ("lokr_w1=left", "lokr_w1_a=", "lokr_w1_b=", "lokr_w2=right", "lokr_w2_a=right_up", "lokr_w2_b=right_down")
_LYCORIS = "r alpha rank_pattern alpha_pattern"
_DROPS = "rank_dropout module_dropout"
_CONV = _all("harmless", use_effective_conv2d="of convolutions, whose tensors are refused")

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
                _all("harmless", init_ia3_weights="where training began"),
                honoured="feedforward_modules",
            ),
            keywords=_ia3_keywords,
            config=_ia3_config,
            read=_ia3_read,
            write=_ia3_write,
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
                _all("harmless", d_initial="where training began"),
                honoured="r projection_prng_key save_projection",
                harmless="vera_dropout",
            ),
            keywords=_seeded,
            config=_vera_config,
            bases={"vera_A": "down", "vera_B": "up"},
        ),
        _kind(
            "SHIRA",
            "shira",
            "shira_weight=values",
            "shira_indices=places",
            options=_options(
                _TRANSPOSED, _START, _all("harmless", mask_type="the file holds the places"), honoured="r random_seed"
            ),
            keywords=lambda config, layers: {"rank": config["r"], "mask": "given"},
            config=_shira_config,
            read=_shira_read,
            write=_shira_write,
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
            config=lambda bank, model: {
                "r": bank.rank,
                "alpha": bank.scaling * bank.rank,
                "decompose_factor": model.recipes[0][0].family.factor,
            },
            read=_lokr_read,
            write=_LOKR_WRITE,
            scaled="left",
            alpha="alpha",
        ),
        _kind(
            "LOHA",
            "loha",
            *_LOHA,
            options=_options(_LAYERS, _START, _CONV, honoured=_LYCORIS, harmless=_DROPS),
            keywords=_rank,
            config=_rank_and_alpha("alpha"),
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
            keywords=_seeded,
            config=_rank_and_alpha("randlora_alpha"),
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
                _all(
                    "refused",
                    coft="a constrained rotation is projected in every forward, which an expert's is not",
                ),
                _all("harmless", eps="of coft only"),
                honoured="r oft_block_size block_share use_cayley_neumann num_cayley_neumann_terms",
                harmless="module_dropout",
            ),
            keywords=_oft_keywords,
            config=_oft_config,
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
            keywords=_boft_keywords,
            config=_boft_config,
            read=_boft_read,
            write=_boft_write,
        ),
        _kind(
            "LORA",
            "dora",
            "lora_A.weight=down",
            "lora_B.weight=up",
            "lora_magnitude_vector=magnitude",
            options=OPTIONS,
            keywords=_rank,
            config=lambda bank, model: {
                "r": bank.rank,
                "lora_alpha": bank.scaling * bank.rank,
                "use_dora": True,
            },
            read=_dora_read,
            write=_dora_write,
            scaled="up",
            alpha="lora_alpha",
        ),
    )
}
