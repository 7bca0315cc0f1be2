"""The tensors of PEFT's adapters beyond LoRA and those of our experts: what each kind calls, turns and shifts.

Layout of PEFT 0.21. `peft_kinds` is the table that uses these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FoldError
from ..experts import ExpertBank

Config = Mapping[str, Any]
Parts = Mapping[str, Tensor]


def straight(*names: str) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., dict[str, Tensor]]]:
    """Return how to read and write parts that are the expert's tensors as they are, "ending=name" each."""
    pairs = dict(pair.split("=") for pair in names)

    def read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
        return {pairs[ending]: value for ending, value in parts.items()}

    def write(bank: ExpertBank, expert: int) -> dict[str, Tensor]:
        known = dict(bank.named_parameters())
        return {ending: known[name][expert].detach() for ending, name in pairs.items() if name in known}

    return read, write


def named(*pairs: str) -> dict[str, str]:
    """Return pairs "a=b" as a -> b; plain strings."""
    return dict(pair.split("=") for pair in pairs)


# ------------------------------------------------------------------------------------------------ (IA)³


def ia3_keywords(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    """Return which layers are scaled on their input (1, i), as the configuration or the shapes say."""
    named = config.get("feedforward_modules") or ()
    if isinstance(named, str):  # a regular expression: the layers whose vector lies along the input
        named = [name for name, parts in layers.items() if parts["ia3_l"].shape[0] == 1]
    return {"feedforward": tuple(sorted(named))}


def ia3_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    """Return v = l - 1 of a vector l, (1, i) or (o, 1)."""
    return {"scale": parts["ia3_l"].flatten() - 1}


def ia3_write(bank: ExpertBank, expert: int) -> dict[str, Tensor]:
    """Return l = 1 + v, (1, i) on an input and (o, 1) on an output."""
    scale: Tensor = 1 + bank.scale[expert].detach()  # type: ignore[index]
    return {"ia3_l": scale.unsqueeze(0) if hasattr(bank, "site") else scale.unsqueeze(1)}


def ia3_config(bank: ExpertBank, model: Any, expert: int) -> dict[str, Any]:
    """Return the names of the layers (i -> o) that are scaled on their input."""
    return {"feedforward_modules": [n for n, branch in model.branches() if hasattr(branch.bank.own(expert)[0], "site")]}


# ------------------------------------------------------------------------------------------------ SHiRA


def shira_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    """Return values (n,) and flat places (n,) of indices (2, n)."""
    rows, columns = parts["shira_indices"].long()
    return {"values": parts["shira_weight"], "places": rows * bank.d_in + columns}


def shira_write(bank: Any, expert: int) -> dict[str, Tensor]:
    """Return values (n,) and indices (2, n) of flat places.

    Raises:
        FoldError: n is not r (o + i).
    """
    places, values = bank.places[expert], bank.values[expert].detach()
    if len(values) % (bank.d_in + bank.d_out):
        raise FoldError(
            f"peft's SHiRA has r (o + i) entries, a multiple of {bank.d_in + bank.d_out}, and this expert has "
            f"{len(values)}: build with rank=… in place of density to export it."
        )
    indices = torch.stack([places // bank.d_in, places % bank.d_in]).int()
    return {"shira_weight": values, "shira_indices": indices}


def shira_config(bank: Any, model: Any, expert: int) -> dict[str, Any]:
    """Return r of n = r (o + i) entries; a plain number."""
    return {"r": bank.values.shape[1] // (bank.d_in + bank.d_out), "mask_type": "random"}


# ------------------------------------------------------------------------------------------------ LoKr, rotations, DoRA


def lokr_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    """Return the factors of a Kronecker product, (o₁, i₁) and the rest; a left one of low rank is multiplied out."""
    left = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    names = {"lokr_w2": "right", "lokr_w2_a": "right_up", "lokr_w2_b": "right_down"}
    return {"left": left, **{names[ending]: value for ending, value in parts.items() if ending in names}}


LOKR_WRITE = straight("lokr_w1=left", "lokr_w2=right", "lokr_w2_a=right_up", "lokr_w2_b=right_down")[1]


def oft_keywords(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    """Return b of b (b - 1) / 2 numbers a block, and how the rotation is formed; plain numbers.

    Raises:
        CheckpointError: blocks of several sizes.
    """
    sizes = {(1 + math.isqrt(1 + 8 * parts["oft_R.weight"].shape[1])) // 2 for parts in layers.values()}
    if len(sizes) > 1:
        raise CheckpointError(
            f"an OFT adapter of {config.get('r')} blocks a layer has blocks of {sorted(sizes)} features: an expert's "
            "blocks are of one size in all layers."
        )
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    terms = 4 if terms == 3 else terms  # peft sums as many for either
    return {"block_size": sizes.pop(), "terms": terms, "share": bool(config.get("block_share"))}


def oft_config(bank: Any, model: Any, expert: int) -> dict[str, Any]:
    """Return the options of a bank's rotations (i / b, b (b - 1) / 2)."""
    share = bank.rotation.shape[1] == 1 and bank.d_in > bank.block_size
    terms = {"use_cayley_neumann": bank.terms > 0, "num_cayley_neumann_terms": bank.terms or 5}
    return {"r": 0, "oft_block_size": bank.block_size, "block_share": share, **terms}


def boft_keywords(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    """Return b and m of rotations (m, i / b, b, b)."""
    n_factors, _, size, _ = next(iter(layers.values()))["boft_R"].shape
    return {"block_size": size, "n_factors": n_factors}


def boft_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    """Return rotations (m, i / b, b, b) and scales (o,) of (o, 1)."""
    return {"rotation": parts["boft_R"], "scale": parts["boft_s"].flatten()}


def boft_write(bank: Any, expert: int) -> dict[str, Tensor]:
    """Return rotations (m, i / b, b, b) and scales (o, 1)."""
    return {"boft_R": bank.rotation[expert].detach(), "boft_s": bank.scale[expert].detach().unsqueeze(1)}


def boft_config(bank: Any, model: Any, expert: int) -> dict[str, Any]:
    """Return the options of a bank's rotations (m, i / b, b, b)."""
    return {"boft_block_size": bank.block_size, "boft_block_num": 0, "boft_n_butterfly_factor": len(bank.orders)}


def dora_read(parts: Parts, bank: ExpertBank) -> dict[str, Tensor]:
    """Return down (r, i), up (r, o) of (o, r), and magnitude (o,)."""
    names = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
    return {names[e]: value.T if names[e] == "up" else value.squeeze() for e, value in parts.items()} | {
        "down": parts["lora_A.weight"]
    }


def dora_write(bank: Any, expert: int) -> dict[str, Tensor]:
    """Return A (r, i), B (o, r) and the magnitude (o,)."""
    down, up, magnitude = (t[expert].detach() for t in (bank.down, bank.up, bank.magnitude))
    return {"lora_A.weight": down, "lora_B.weight": up.T, "lora_magnitude_vector": magnitude}


def rank(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    """Return the rank r; a plain number."""
    return {"rank": config["r"]}


def rank_and_alpha(name: str) -> Callable[[ExpertBank, Any, int], dict[str, Any]]:
    """Return what gives r and alpha = s r of a bank, alpha under a name of its own; plain numbers."""
    return lambda bank, model, expert: {"r": bank.rank, name: bank.scaling * bank.rank}


def seeded(config: Config, layers: Mapping[str, Parts]) -> dict[str, Any]:
    """Return the rank, the seed of the random matrices of any shape, and how they are drawn."""
    flags = {name: bool(config[name]) for name in ("sparse", "very_sparse") if name in config}
    return {"rank": config["r"], "seed": config.get("projection_prng_key", 0), **flags}


def vera_config(bank: ExpertBank, model: Any, expert: int) -> dict[str, Any]:
    """Return the rank r; a plain number."""
    return {"r": bank.rank}
