"""A PEFT LoRA folder read as deltas: what it means is honoured, or refused by name. The only reader of the format.

LoRA (Hu et al. 2021, arXiv 2106.09685); layout of PEFT 0.21. What is refused and why: `peft_options`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank, low_rank, work_dtype
from ..errors import CheckpointError
from ..experts.starts import STARTS
from .foreign import read_foreign
from .named_deltas import Deltas, listed
from .peft_options import INITS, check_options, init_of, is_set, scale_of
from .peft_start import Base, base_of_files, dora, kasa, less, taken
from .tensor_files import dtype_of

PREFIX = "base_model.model."
COPY = ".base_layer.weight"  # PEFT writes an adapted head or embedding whole beside its factors
# what belongs to a layer's adapter: ending of its key -> the part it is
PARTS = {
    r"\.lora_A(?:\.default)?\.weight": "A",
    r"\.lora_B(?:\.default)?\.weight": "B",
    r"\.lora_B(?:\.default)?\.bias": "bias",
    r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?": "magnitude",
    r"\.lora_diag(?:\.default)?": "diagonal",
    r"\.lora_velora_embed(?:\.default)?": "velora",
}
KEY = re.compile("(.+?)(?:" + "|".join(f"({ending})" for ending in PARTS) + ")")
# the options without which PEFT writes no such part
OPTION_OF = {"bias": "lora_bias", "magnitude": "use_dora", "diagonal": "kasa_config", "velora": "velora_config"}


def read_peft(
    path: str | Path, base: str | Path | Mapping[str, Tensor] | None = None, initial: str | Path | None = None
) -> Deltas:
    """Return the deltas of a PEFT LoRA folder, ΔW = scale · B A with scale = alpha / r, or alpha / √r for rsLoRA.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors (or .bin, read as tensors only).
        base: the base model's folder or state dict. It is needed for PiSSA, OLoRA, KaSA, DoRA, trained
            biases and modules saved whole, which are changes relative to it.
        initial: the folder of the same adapter before training, which holds what PiSSA, OLoRA, CorDA or LoRA-GA moved
            from the base into the factors.

    Returns:
        Deltas named as the base names its weights ("….q_proj.weight"): low-rank ones, down (r, i), up (o, r) with the
        scale, rank_pattern and alpha_pattern included; dense ones for convolutions, DoRA, biases and whole modules.
        float32, or float64 if the file is. `base` is the id written in the config. With fan_in_fan_out they are as
        such a base stores its weights, (i, o): the factors change places.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, is not a LoRA, uses an option that is not a change of
            the weights or that is unknown (each refused by name), needs the base and has none, or its ranks are not
            those of its config.
        ShapeError: factors do not fit together.

    Source: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732, for the scale of rsLoRA.
    Differs: over a base of half precision PEFT rounds what PiSSA, OLoRA or KaSA leave of the weight to that precision;
        here nothing is rounded before the merge.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: expected a PEFT LoRA folder (adapter_config.json inside).")
    found = read_foreign(folder)
    start = read_foreign(Path(initial)).tensors if initial is not None else None
    return peft_deltas(found.tensors, found.config, source=str(folder), base=base, initial=start)


def peft_deltas(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    source: str = "adapter",
    base: str | Path | Mapping[str, Tensor] | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Deltas:
    """Return the deltas of a PEFT LoRA state dict and its config: see `read_peft`.

    Args:
        tensors: "base_model.model.<module>.lora_A.weight" (r, i) and "….lora_B.weight" (o, r), convolutions with more
            axes.
        config: the object of adapter_config.json.
        source: name used in errors.
        base: the base's folder or state dict.
        initial: the tensors before training.

    Returns:
        Lazy deltas in the shape of the base's weights.

    Raises:
        CheckpointError: not a LoRA that is a change of weights, or a rank differs from the config's.
        ShapeError: factors do not fit together.
    """
    transposed = bool(config.get("fan_in_fan_out"))
    known = base_of_files(base, transposed) if base is not None else None
    lora = Lora(tensors, config, source, known, initial)

    def load(name: str) -> Delta:
        if name in lora.whole:
            return lora.difference(name)
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            return lora.bias(module)
        delta, kernel = lora.delta(module), lora.kernel(module)
        if kernel:
            return Dense(delta.dense().reshape(-1, *kernel))  # (o, C, *kernel)
        if not transposed:
            return delta
        return LowRank(delta.up.T, delta.down.T) if isinstance(delta, LowRank) else Dense(delta.dense().T)

    names = [f"{module}.weight" for module in lora.parts]
    names += [f"{module}.bias" for module, parts in lora.parts.items() if "bias" in parts]
    return Deltas([*names, *lora.whole], load, source, config.get("base_model_name_or_path") or None, transposed)


@dataclass(frozen=True)
class Lora:
    """A checked LoRA adapter: its layers' changes as rows see them, whatever way the base stores its weights.

    Args:
        tensors: the file's, factors (r, i) and (o, r).
        config: the object of adapter_config.json.
        source: name used in errors.
        base: the base's weights, where they are known.
        initial: the file's tensors before training, where they are known.

    Raises:
        CheckpointError: see `read_peft`.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    source: str
    base: Base | None = None
    initial: Mapping[str, Tensor] | None = None
    parts: dict[str, dict[str, str]] = field(default_factory=dict, init=False)  # module -> part -> key
    whole: dict[str, str] = field(default_factory=dict, init=False)  # name -> key of a tensor saved whole

    def __post_init__(self) -> None:
        check_options(self.config, self.source)
        for key in self.tensors:
            self._sort(key)
        self._check_parts()
        self._check_start()
        for module in self.parts:
            self._check_rank(module)
        for name in list(self.whole):
            if self._is_the_bases(name):
                del self.whole[name]

    def _sort(self, key: str) -> None:
        if "lora_embedding_" in key:
            raise CheckpointError(
                f"{self.source} holds {key!r}: LoRA on an embedding is not a change of a linear layer, and is refused; "
                "take the difference of two full checkpoints."
            )
        match = KEY.fullmatch(key)
        if match is None:
            self.whole[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = key
            return
        part = list(PARTS.values())[next(i for i, ending in enumerate(match.groups()[1:]) if ending is not None)]
        option = OPTION_OF.get(part)
        if option is not None and not is_set(self.config.get(option)):
            raise CheckpointError(f"{self.source} holds {key!r}, and its config does not set {option}: it is refused.")
        self.parts.setdefault(match[1].removeprefix(PREFIX), {})[part] = key

    def _check_parts(self) -> None:
        needed = {"A", "B"} | {part for part, o in OPTION_OF.items() if part != "velora" and is_set(self.config.get(o))}
        for module, parts in self.parts.items():
            if missing := sorted(needed - set(parts)):
                said = f", though it sets {OPTION_OF[missing[0]]}" if missing[0] in OPTION_OF else ""
                raise CheckpointError(
                    f"{self.source} holds only {', '.join(sorted(parts))} of {module!r} and no {' or '.join(missing)}"
                    f"{said}: it is incomplete."
                )
            for key in parts.values():
                self._check_floating(key)
        if not self.parts:
            raise CheckpointError(f"{self.source} holds no LoRA factors.")

    def _check_start(self) -> None:
        """Check that what this adapter's meaning depends on is there."""
        init = init_of(self.config)
        if self.initial is not None:
            lost = [p[k] for p in self.parts.values() for k in "AB" if p[k] not in self.initial]
            if lost:
                raise CheckpointError(f"the initial adapter of {self.source} does not hold {listed(lost)}.")
        elif INITS[init].verdict == "converted" and (self.base is None or init not in STARTS):
            ways = "pass initial=, the folder of the adapter before training"
            ways += ", or base=" if init in STARTS else ""
            raise CheckpointError(
                f"{self.source} sets init_lora_weights={self.config['init_lora_weights']!r}, which moves part of the "
                f"base into the factors ({INITS[init].why}): {ways}, to moa.merge.read_peft, or save it with PEFT's "
                "path_initial_model_for_weight_conversion."
            )
        for option in ("use_dora", "kasa_config"):
            if is_set(self.config.get(option)) and self.base is None:
                raise CheckpointError(
                    f"{self.source} sets {option}={self.config[option]!r}, and what it changes depends on the base: "
                    "pass base= to moa.merge.read_peft."
                )

    def _check_rank(self, module: str) -> None:
        expected, _ = scale_of(self.config, module, self.source)
        down, up = (self._shape(self.parts[module][part]) for part in "AB")
        if len(down) < 2 or len(up) < 2:
            raise CheckpointError(f"{module!r} in {self.source} has factors {down} and {up}: expected matrices.")
        rank = down[0]
        if rank != expected:
            raise CheckpointError(
                f"{module!r} in {self.source} has rank {rank}, its config says {expected} (r or rank_pattern): the "
                "scale alpha / r would be wrong; correct adapter_config.json."
            )

    def _is_the_bases(self, name: str) -> bool:
        """Tell whether a tensor saved whole is only a copy of the base's; a changed one needs the base to be read."""
        key = self.whole[name]
        copy = key.endswith(COPY) and name.removesuffix(".weight") in self.parts
        if self.base is None or name not in self.base.tensors:
            if copy:
                return True  # under a LoRA layer the weight is frozen
            reason = "the base has no such tensor" if self.base is not None else "without base= its change is not known"
            trained = [o for o in ("modules_to_save", "bias") if is_set(self.config.get(o))]
            said = f" (it sets {', '.join(f'{o}={self.config[o]!r}' for o in trained)})" if trained else ""
            raise CheckpointError(
                f"{self.source} holds {key!r}, a tensor saved whole and no LoRA factor{said}: {reason}, and the "
                "adapter is refused."
            )
        own = self.base.tensors[name]
        if own.is_floating_point():
            self._check_floating(key)
        same = own.shape == self.tensors[key].shape and torch.equal(own.cpu(), self.tensors[key].to(own.dtype).cpu())
        if not same and (copy or own.shape != self.tensors[key].shape):
            raise CheckpointError(
                f"{self.source} holds {key!r}, {tuple(self.tensors[key].shape)}, which is not the base's, "
                f"{tuple(own.shape)}: another base, or one whose vocabulary was resized."
            )
        return same

    def _check_floating(self, key: str) -> None:
        if not (dtype := dtype_of(self.tensors, key)).is_floating_point:
            raise CheckpointError(f"{self.source} holds {key!r} as {dtype}: expected floating numbers.")

    def _shape(self, key: str) -> tuple[int, ...]:
        """Return one tensor's shape, from the file's header where the mapping knows it."""
        known = getattr(self.tensors, "shapes", None)
        return tuple(known[key] if known is not None else self.tensors[key].shape)

    def kernel(self, module: str) -> tuple[int, ...]:
        """Return (C, *kernel) of a convolution's factor, () of a linear layer's."""
        shape = self._shape(self.parts[module]["A"])
        return shape[1:] if len(shape) > 2 else ()

    def _change(self, module: str, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return scale · B A (o, i) of one layer's factors, block-diagonal ones written out."""
        parts = self.parts[module]
        down, up = tensors[parts["A"]].flatten(1), tensors[parts["B"]].flatten(1)
        blocks = self.config.get("use_bdlora") or {}
        if any(pattern in module for pattern in blocks.get("target_modules_bd_a") or ()):
            down = torch.block_diag(*down.chunk(blocks["nblocks"]))
        if any(pattern in module for pattern in blocks.get("target_modules_bd_b") or ()):
            up = torch.block_diag(*up.chunk(blocks["nblocks"]))
        if "diagonal" in parts:
            up = up * self.tensors[parts["diagonal"]].to(up)
        return low_rank(down, up, scale_of(self.config, module, self.source)[1], where=module)

    def delta(self, module: str) -> Delta:
        """Return a layer's change (o, i) as rows see it: `LowRank`, or `Dense` with DoRA.

        Raises:
            CheckpointError: the base has no dense weight of a layer whose change depends on it.
            ShapeError: factors do not fit together.
        """
        change: Delta = self._change(module, self.tensors)
        init = init_of(self.config)
        rank, scale = scale_of(self.config, module, self.source)
        if INITS[init].verdict == "converted":
            if self.initial is not None:
                change = less(change, self._change(module, self.initial))
            else:
                change = less(change, taken(init, self._weight(module, f"init_lora_weights={init!r}"), rank, scale))
        if "diagonal" in self.parts[module]:
            change = less(change, kasa(self._weight(module, "kasa_config"), rank))
        if "magnitude" not in self.parts[module]:
            return change
        return dora(self._weight(module, "use_dora"), change, self.tensors[self.parts[module]["magnitude"]])

    def _weight(self, module: str, option: str) -> Tensor:
        assert self.base is not None
        return self.base.weight(module, f"{self.source} sets {option}, which takes its meaning from the base")

    def bias(self, module: str) -> Dense:
        """Return the change (o,) of a layer's bias."""
        bias = self.tensors[self.parts[module]["bias"]]
        return Dense(bias.to(work_dtype(bias.dtype)) * scale_of(self.config, module, self.source)[1])

    def difference(self, name: str) -> Dense:
        """Return what a tensor saved whole, of any shape, adds to the base's."""
        assert self.base is not None
        new, old = self.tensors[self.whole[name]], self.base.tensors[name]
        dtype = work_dtype(torch.promote_types(new.dtype, old.dtype))
        return Dense(new.to(dtype) - old.to(new.device, dtype))
