"""MixLoRA's checkpoint layout, as TUDB-Labs' mixlora and MoE-PEFT write it, into the recipe `mixlora`.

Li et al. 2024, arXiv 2404.15159.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..delta import Dense, low_rank
from ..errors import CheckpointError, ConfigError
from ..experts import ExpertBank
from ..mixture import Branch, Mixture, linear_sites
from ..recipes import make_recipe
from .foreign import Foreign, check_fields, check_numbers_of, refuse

LAYER = r"mixlora\.layers\.(?P<layer>\d+)\."
FACTOR = r"\.lora_(?P<factor>[AB])\.weight"
# today's names, and those of files from before the package's legacy_weights_convertor
GATES = (rf"{LAYER}mlp\.moe_gate\.weight", rf"{LAYER}gate\.weight")
EXPERTS = (
    rf"{LAYER}mlp\.(?P<linear>\w+)\.experts\.(?P<expert>\d+){FACTOR}",
    rf"{LAYER}experts\.(?P<expert>\d+)\.(?P<linear>\w+){FACTOR}",
)
PLAIN = rf"{LAYER}self_attn\.(?P<linear>\w+){FACTOR}"
OLD_LINEARS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
STRATEGIES = ("mixlora", "mixtral")  # two names of the same top-k softmax gate
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_experts", "top_k", "r"), (int,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "jitter_noise", "router_aux_loss_coef"), (int, float)),
    **dict.fromkeys(("use_rslora", "router_loss"), (bool,)),
    **dict.fromkeys(("routing_strategy", "act_fn"), (str,)),
    "expert_lora": (dict,),
}
REFUSED = {
    "use_dora": "DoRA rescales the whole weight, which the recipe's experts do not",
    "bias": "the layout's experts have no trained biases",
}
Pairs = dict[tuple[str, int], tuple[Tensor, Tensor]]  # (place, e.g. "3.mlp.up_proj", expert) -> A (r, i), B (o, r)


def adopt_mixlora(model: Any, found: Foreign) -> None:
    """Put a MixLoRA checkpoint into a model; its outputs are then those of the paper's block.

    Honoured: num_experts, top_k, r, lora_alpha, use_rslora, lora_dropout, jitter_noise, router_aux_loss_coef,
    router_loss, expert_lora (the experts' own r, lora_alpha, use_rslora). A linear of a block that has no experts in
    the file gets zero ones, which changes nothing.

    Args:
        model: with no mixtures, on the base of the checkpoint.
        found: the folder.

    Raises:
        CheckpointError: another routing strategy, DoRA, another activation than the base's; factors or a gate that
            are missing, not known or of another shape; layers that the base does not have.

    Source: arXiv 2404.15159; layout of github.com/TUDB-Labs/MixLoRA, mixlora/model.py.
    Differs: that package applies jitter_noise when it generates, too, and reads the experts' scale from the outer
        r and lora_alpha although it parses expert_lora; here jitter is for training and expert_lora counts.
    """
    _check(model, found)
    check_numbers_of(found)
    gates, experts, plain = _sorted(found)
    names = _names(model, found, [*(place for place, _ in experts), *(place for place, _ in plain)], gates)
    (rank, scale), (plain_rank, plain_scale) = _size(found, "expert_lora"), _size(found, "")
    config, k = found.config, _given(found, "top_k", 2)
    balance = _given(found, "router_aux_loss_coef", 0.001) * k if _given(found, "router_loss", True) else 0.0
    try:
        recipe = make_recipe(
            "mixlora",
            n_experts=config["num_experts"],
            k=k,
            rank=max(rank, plain_rank) if plain else rank,
            alpha=scale * (max(rank, plain_rank) if plain else rank),
            dropout=_given(found, "lora_dropout", 0.0),
            balance=balance,
            balance_over="model",
            jitter=_given(found, "jitter_noise", 0.0),
            targets=tuple(names.values()),
        )
        model.add_recipe(recipe, list(names.values()))
    except ConfigError as error:
        raise CheckpointError(f"{found.path} does not become a mixlora recipe on this base: {error}") from error
    mixtures = model.mixtures()
    for place, name in names.items():
        bank = _bank(mixtures[name])
        for e in range(bank.n_experts):
            where = f"{found.path}: {name}, expert {e}"
            if (place, e) in experts:
                _fill(bank, e, *experts[place, e], rank, scale, where)
            elif (place, e) in plain:
                _fill(bank, e, *plain[place, e], plain_rank, plain_scale, where)
            else:
                bank.read(e, Dense(torch.zeros(bank.d_out, bank.d_in)).zeros())
    _fill_gates(found, mixtures, names, gates)


def _check(model: Any, found: Foreign) -> None:
    check_fields(found, FIELDS)
    check_fields(Foreign(found.path, found.config.get("expert_lora") or {}, {}), FIELDS)
    config = {**found.config, "bias": found.config.get("bias") not in (None, "none")}
    refuse(Foreign(found.path, config, {}), REFUSED)
    strategy = found.config.get("routing_strategy")
    if strategy not in STRATEGIES:
        raise CheckpointError(
            f"{found.path} has routing_strategy {strategy!r}: the recipe's gate is the top-k one, "
            f"{' or '.join(map(repr, STRATEGIES))}."
        )
    for key in ("num_experts", "r", "lora_alpha"):
        if not isinstance(found.config.get(key), int):
            raise CheckpointError(f"{found.path} has {key}={found.config.get(key)!r}: expected a whole number.")
    act = found.config.get("act_fn")
    base_config = getattr(model.base, "config", None)
    own = getattr(base_config, "hidden_act", getattr(base_config, "hidden_activation", None))
    if act is not None and act != own:
        raise CheckpointError(
            f"{found.path} sets act_fn={act!r}, and the base's blocks have {own!r}: the recipe keeps the base's."
        )


def _sorted(found: Foreign) -> tuple[dict[int, Tensor], Pairs, Pairs]:
    """Return the gates by layer, and the factors (A, B) of experts and of plain LoRAs by (place, expert)."""
    gates: dict[int, Tensor] = {}
    parts: dict[bool, dict[tuple[str, int], dict[str, Tensor]]] = {True: {}, False: {}}
    for key, tensor in found.tensors.items():
        gate = next((m for m in (re.fullmatch(p, key) for p in GATES) if m), None)
        match = next((m for m in (re.fullmatch(p, key) for p in (*EXPERTS, PLAIN)) if m), None)
        if gate is not None:
            gates[int(gate["layer"])] = tensor
        elif match is None:
            raise CheckpointError(f"{found.path} holds {key!r}, which is no tensor of the MixLoRA layout.")
        else:
            expert = match.groupdict().get("expert")
            linear = OLD_LINEARS.get(match["linear"], match["linear"])
            block = "self_attn" if expert is None else "mlp"
            place = f"{match['layer']}.{block}.{linear}", int(expert or 0)
            parts[expert is not None].setdefault(place, {})[match["factor"]] = tensor
    for own in parts.values():
        for place, factors in own.items():
            if set(factors) != {"A", "B"}:
                raise CheckpointError(f"{found.path}: {place} has only factor {', '.join(factors)}: incomplete.")
    pairs: list[Pairs] = [{place: (f["A"], f["B"]) for place, f in own.items()} for own in (parts[True], parts[False])]
    if not gates or not pairs[0]:
        raise CheckpointError(f"{found.path} holds {len(gates)} gates and {len(pairs[0])} experts: expected both.")
    _check_sizes(found, gates, pairs)
    wrong = [place for place in pairs[0] if place[1] >= found.config["num_experts"]]
    if wrong:
        raise CheckpointError(
            f"{found.path} holds expert {wrong[0][1]} of {wrong[0][0]}, and num_experts={found.config['num_experts']}."
        )
    return gates, pairs[0], pairs[1]


def _given(found: Foreign, key: str, default: Any) -> Any:
    """Return a value of the configuration, or the default where it is missing or null."""
    value = found.config.get(key)
    return default if value is None else value


def _check_sizes(found: Foreign, gates: dict[int, Tensor], pairs: list[Pairs]) -> None:
    """Check what the configuration says of sizes against the tensors, before anything of such a size is made."""
    n_experts = found.config["num_experts"]
    for layer, gate in gates.items():
        if gate.ndim != 2 or len(gate) < n_experts:
            raise CheckpointError(
                f"{found.path}: the gate of layer {layer} is {tuple(gate.shape)}, expected "
                f"{(n_experts, *gate.shape[1:])} by num_experts."
            )
    for own, inner in zip(pairs, ("expert_lora", ""), strict=True):
        rank, _ = _size(found, inner)
        for (place, _), (a, b) in own.items():
            if a.ndim != 2 or b.ndim != 2 or len(a) != rank:
                raise CheckpointError(
                    f"{found.path}: the factors of {place} are {tuple(a.shape)} and {tuple(b.shape)}, expected "
                    f"{(rank, *a.shape[1:])} and {(*b.shape[:1], rank)} by r."
                )


def _names(model: Any, found: Foreign, places: list[str], gates: dict[int, Tensor]) -> dict[str, str]:
    """Return place -> name of the base's layer: those in the file, and every linear of a block that has a gate."""
    sites = linear_sites(model.base)
    out: dict[str, str] = {}
    for site in sites:
        match = re.fullmatch(r"(?:.*\.)?layers\.((\d+)\.(self_attn|mlp)\.\w+)", site.name)
        if match and (match[1] in places or (match[3] == "mlp" and int(match[2]) in gates)):
            if match[1] in out:
                raise CheckpointError(
                    f"{found.path}: both {out[match[1]]} and {site.name} of this base could be its {match[1]}."
                )
            out[match[1]] = site.name
    missing = sorted({place for place in places if place not in out})
    if missing:
        raise CheckpointError(
            f"{found.path} adapts layers.{missing[0]} and {len(missing) - 1} more, which this "
            f"{type(model.base).__name__} does not have."
        )
    return out


def _size(found: Foreign, inner: str) -> tuple[int, float]:
    """Return rank and scale of the configuration, or of an inner one that overrides it."""
    config = {**found.config, **((found.config.get(inner) if inner else None) or {})}
    if not config["r"]:
        raise CheckpointError(f"{found.path} has r=0: expected a whole number of at least 1.")
    return config["r"], config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1.0)


def _bank(mixture: Mixture) -> ExpertBank:
    branch = mixture.branches[0]
    assert isinstance(branch, Branch)
    return branch.bank


def _fill(bank: ExpertBank, e: int, a: Tensor, b: Tensor, rank: int, scale: float, where: str) -> None:
    """Write factors (r, i) and (o, r) as expert e, the rest of a larger rank zero, the scale folded into up."""
    if a.shape != (rank, bank.d_in) or b.shape != (bank.d_out, rank):
        raise CheckpointError(
            f"{where}: the factors are {tuple(a.shape)} and {tuple(b.shape)}, expected {(rank, bank.d_in)} and "
            f"{(bank.d_out, rank)}: made for another base, or r in the configuration is not that of the file."
        )
    bank.read(e, low_rank(a.double(), b.double(), scale, where))  # rounded once, to the type of the bank


@torch.no_grad()
def _fill_gates(found: Foreign, mixtures: dict[str, Mixture], names: dict[str, str], gates: dict[int, Tensor]) -> None:
    filled = set()
    for place, name in names.items():
        branch = mixtures[name].branches[0]
        assert isinstance(branch, Branch)
        own = dict(branch.router.named_parameters()).get("weight")  # the first layer's gate; the others follow it
        if own is not None:
            layer = int(place.split(".")[0])
            if layer not in gates:
                raise CheckpointError(f"{found.path} has experts in layer {layer}, and no gate for it.")
            if gates[layer].shape != own.shape:
                raise CheckpointError(
                    f"{found.path}: the gate of layer {layer} is {tuple(gates[layer].shape)}, expected "
                    f"{tuple(own.shape)}."
                )
            own.copy_(gates[layer])
            filled.add(layer)
    lost = sorted(set(gates) - filled)
    if lost:
        raise CheckpointError(
            f"{found.path}: the gate of layer {lost[0]} found no feed-forward block (layers d -> f, then f -> d) in "
            "this base."
        )
