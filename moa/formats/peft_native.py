"""PEFT folders of families beyond LoRA made the experts of a mixture, each number as the folder holds it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, FoldError, NumericsError
from ..experts import SlotBank, make_family
from ..layers import Site
from ..mixture import Branch, Mixture
from .foreign import Foreign, read_foreign
from .named_deltas import listed
from .peft_experts import largest_rank, load_experts, read_adapters
from .peft_folder import PREFIX
from .peft_kinds import KINDS, Kind
from .peft_options import INITS, check_known, check_options, init_of, is_set, scale_of
from .peft_parameters import layers_of

Mixtures = Mapping[str, Mixture]
PLACES = "shira_indices"  # the one part of whole numbers
VERSION = "0.21.2"  # of PEFT, whose layout is written: it reads rotations by it


@dataclass(frozen=True)
class Given:
    """Adapters that a user has, on their way to being experts.

    Args:
        keywords: of the recipe and its family, which the adapters decide.
        layers: names of the layers (i -> o) that they adapt.
        fill: mixtures by name, the names to fill, and the first expert's number -> nothing; see `load_experts`.
    """

    keywords: dict[str, Any]
    layers: list[str]
    fill: Callable[..., None]


def read_given(paths: Sequence[str | Path], model: nn.Module, expert: str | None = None) -> Given:
    """Return the adapters of PEFT folders of one kind, on their way to being experts.

    Args:
        paths: folders, one per expert.
        model: the base, with weights (o, i).
        expert: the family that was asked for; "dora" reads a LoRA folder with use_dora as it is.

    Raises:
        ConfigError: no path given, or a family that does not read these folders.
        CheckpointError: a folder that cannot be read, of another kind than the first, with an option that has no
            counterpart (named), or incomplete.
        NumericsError: NaN or infinity in a tensor.
    """
    if not paths:
        raise ConfigError("experts=[] names no adapter folder.")
    found = [read_foreign(Path(path)) for path in paths]
    types = {kind.peft_type: kind for kind in KINDS.values() if kind.family != "dora"}
    kinds = [KINDS["dora"] if f.kind == "LORA" and expert == "dora" else types.get(f.kind) for f in found]
    if kinds[0] is None or any(kind is not kinds[0] for kind in kinds):
        other = next((f for f, kind in zip(found, kinds, strict=True) if kind is not kinds[0]), None)
        if other is not None:
            raise CheckpointError(
                f"{other.path} is a {other.kind} adapter and {found[0].path} a {found[0].kind} one: the experts of one "
                "bank are of one kind."
            )
        adapters = read_adapters(paths, model)
        keywords: dict[str, Any] = {"n_experts": len(adapters), "rank": largest_rank(adapters)}
        layers = sorted(set(layers_of({name for adapter in adapters for name in adapter}, model).values()))
        return Given(keywords, layers, functools.partial(load_experts, adapters=adapters))
    kind = kinds[0]
    read = [NativeAdapter(f, kind) for f in found]
    keywords = {"n_experts": len(read), "expert": kind.family, **read[0].keywords()}
    for one in read[1:]:
        for name, value in one.keywords().items():
            if keywords[name] != value:
                raise CheckpointError(
                    f"{one.source} has {name}={value!r}, and {read[0].source} {keywords[name]!r}: the experts of one "
                    "bank share it."
                )
    layers = sorted({name for one in read for name in one.layers})
    return Given(keywords, layers, functools.partial(fill_native, adapters=read))


class NativeAdapter:
    """A checked adapter of a kind beyond LoRA: its layers' tensors.

    Args:
        found: the folder.
        kind: the row that reads it.

    Raises:
        CheckpointError: see `read_given`; or whole numbers where floating ones belong, or the other way round.
        NumericsError: NaN or infinity in a tensor.
    """

    def __init__(self, found: Foreign, kind: Kind) -> None:
        self.source, self.config, self.kind = str(found.path), found.config, kind
        self._check_options()
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.bases: dict[str, Tensor] = {}
        pattern = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, kind.parts))})(?:\.default)?(?:\.weight)?")
        for key in found.tensors:
            name, value = key.removeprefix(PREFIX), found.tensors[key]
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise NumericsError(f"{key!r} in {self.source} holds NaN or infinity.")
            if value.is_floating_point() == (PLACES in key):
                wanted = "whole" if PLACES in key else "floating"
                raise CheckpointError(f"{self.source} holds {key!r} as {value.dtype}: expected {wanted} numbers.")
            base = next((b for b in kind.bases or () if re.fullmatch(rf"(.+\.)?{b}(\.default)?", key)), None)
            match = pattern.fullmatch(name)
            if base is not None:
                self.bases[(kind.bases or {})[base]] = value
            elif match is not None:
                self.layers.setdefault(match[1], {})[match[2]] = value
            else:
                raise CheckpointError(
                    f"{self.source} holds {key!r}, which is not a part of a {kind.peft_type} expert of a linear layer: "
                    "it is refused."
                )
        if not self.layers:
            raise CheckpointError(f"{self.source} holds no tensors of a {kind.peft_type} adapter.")

    def _check_options(self) -> None:
        if self.kind.peft_type == "LORA":
            check_options(self.config, self.source)
            init = init_of(self.config)
            if not self.config.get("use_dora") or INITS[init].verdict != "harmless":
                raise CheckpointError(
                    f"{self.source} sets use_dora={self.config.get('use_dora')!r} and init_lora_weights={init!r}: "
                    "expert='dora' reads DoRA adapters that left the base as it is."
                )
            for name in ("modules_to_save", "lora_bias", "kasa_config", "use_bdlora"):
                if is_set(self.config.get(name)):
                    raise CheckpointError(f"{self.source} sets {name}: it has no place in an expert, and is refused.")
            return
        check_known(self.config, self.kind.options, self.source)
        for key, number in (("r", int), (self.kind.alpha, (int, float))):
            value = self.config.get(key)
            if key and key in self.kind.options and (isinstance(value, bool) or not isinstance(value, number)):
                raise CheckpointError(f"{self.source} has {key}={value!r}: expected a number.")
        for key, value in self.config.items():
            if is_set(value) and key in self.kind.options and self.kind.options[key].verdict == "refused":
                raise CheckpointError(
                    f"{self.source} sets {key}={value!r}, and {self.kind.options[key].why}: it is refused."
                )

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of the family and the recipe; plain values."""
        own = self.kind.keywords(self.config, self.layers)
        if self.bases and not self._seeded(own):
            own["save_bases"] = True
        return own

    def _seeded(self, own: Mapping[str, Any]) -> bool:
        """Tell whether the random matrices in the file are those that the seed gives here."""
        down, up = self.bases["down"], self.bases["up"]
        options = {name: value for name, value in own.items() if name != "rank"}
        widest = Site("", nn.Identity(), down.shape[-1], up.shape[0])
        drawn: Any = make_family(self.kind.family, options).shared([widest], rank=own["rank"])
        return all(torch.equal(getattr(drawn, name), value.float()) for name, value in self.bases.items())

    def scale(self, name: str) -> float:
        """Return the adapter's own scale in one layer; a plain number."""
        patterns = {key: self.config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora")}
        same = {"r": self.config["r"], "lora_alpha": self.config[self.kind.alpha], **patterns}
        return scale_of(same, name, self.source)[1]


@torch.no_grad()
def fill_native(mixtures: Mixtures, names: Sequence[str], adapters: Sequence[NativeAdapter], first: int = 0) -> None:
    """Make adapter e expert e of the named mixtures; a layer that it does not adapt keeps a zero expert.

    Args:
        mixtures: name -> mixture, with banks (*rows, i) -> (*rows, o) of the adapters' family.
        names: the layers to fill.
        adapters: E of them.
        first: number of the first expert to fill; those before it stay as they are.

    Raises:
        ConfigError: a recipe that does not have as many experts as there are adapters.
        CheckpointError: a tensor of another shape than its layer's.
    """
    for name in names:
        branch = mixtures[name].branches[0]
        assert isinstance(branch, Branch)
        bank: Any = branch.bank
        if isinstance(bank, SlotBank) or bank.n_experts != first + len(adapters) or len(mixtures[name].branches) > 1:
            raise ConfigError(
                f"{name} has {bank.n_experts} expert(s) in a {type(bank).__name__} of this recipe, and {len(adapters)} "
                "adapters were given: choose another, e.g. 'topk', 'dense' or 'remix'."
            )
        own = {**dict(bank.named_parameters()), **dict(bank.named_buffers())}
        for e, adapter in enumerate(adapters, first):
            for key, value in adapter.bases.items():
                _copy(getattr(bank.bases, key), value, f"{adapter.source}: the shared {key}")
            parts = adapter.layers.get(name)
            if parts is None:
                continue
            try:
                read = adapter.kind.read(parts, bank)
            except (KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"{adapter.source}: {name} has only {listed(sorted(parts))}: it is incomplete ({error})."
                ) from error
            expected = {key for key in bank.per_expert if key in own}
            if set(read) != expected:
                raise CheckpointError(
                    f"{adapter.source}: {name} gives {listed(sorted(read))}, and its expert has "
                    f"{listed(sorted(expected))}: another rank or factor than the configuration says."
                )
            for key, value in read.items():
                if key == adapter.kind.scaled:
                    value = value * (adapter.scale(name) / bank.scaling)
                _copy(own[key][e], value, f"{adapter.source}: {key} of {name}")


def _copy(target: Tensor, value: Tensor, what: str) -> None:
    if target.shape != value.shape:
        raise CheckpointError(
            f"{what} is {tuple(value.shape)}, the layer's is {tuple(target.shape)}: this adapter was made for another "
            "base, or with another rank there."
        )
    target.copy_(value)


def write_native(bank: Any, expert: int, kind: Kind) -> dict[str, Tensor]:
    """Return one expert's tensors as peft stores them, by the ending of their name, of any shape."""
    return {ending: value.cpu().contiguous() for ending, value in kind.write(bank, expert).items()}


def native_config(model: Any, kind: Kind, transposed: bool, expert: int) -> dict[str, Any]:
    """Return the options that say what the tensors of a model's experts are; plain values.

    Args:
        model: a `MoAModel`, whose expert is of the kind's family.
        kind: of the folder.
        transposed: some of the base's layers store their weights (i, o).
        expert: which one is written.

    Raises:
        FoldError: the layers differ in an option, of which a folder has one.
    """
    family = model.recipes[0][0].family.of(expert)
    found = [kind.config(branch.bank.own(expert)[0], model, expert) for _, branch in model.branches()]
    for (name, _), one in zip(model.branches(), found, strict=True):
        if one != found[0]:
            raise FoldError(
                f"{name}: its experts have {one}, those before it {found[0]}: a PEFT folder has one of each."
            )
    options = {"fan_in_fan_out": transposed} if "fan_in_fan_out" in kind.options else {}
    if kind.bases:
        flags = {name: getattr(family, name) for name in ("sparse", "very_sparse") if hasattr(family, name)}
        options |= {"projection_prng_key": family.seed, "save_projection": family.save_bases, **flags}
    return {"peft_version": VERSION, **options, **found[0]}


def shared_tensors(model: Any, kind: Kind, expert: int) -> dict[str, Tensor]:
    """Return the random matrices, of any shape, by peft's names, where they are stored and not drawn from the seed."""
    if not kind.bases or not model.recipes[0][0].family.of(expert).save_bases:
        return {}
    bank: Any = next(branch.bank.own(expert)[0] for _, branch in model.branches())
    return {f"base_model.{theirs}": getattr(bank.bases, ours).cpu().contiguous() for theirs, ours in kind.bases.items()}
