"""A mixture that was trained on a pruned base, on the full one: its rows and columns go back to where they came from.

Zhang et al. 2025 (LoRAM), arXiv 2502.13533.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..experts import ExpertBank
from ..formats import checkpoint
from ..mixture import Branch, Mixture
from ..model.load import add_described
from ..model.moa_model import MoAModel
from ..model.pruned import Cut, cuts, kept_of
from ..model.rollback import all_or_nothing

FILLS = ("zero", "normal")


def recover(
    mixture: MoAModel | str | Path,
    base: nn.Module,
    *,
    fill: Literal["zero", "normal"] = "zero",
    seed: int = 0,
    check_base: bool = True,
) -> MoAModel:
    """Return a mixture trained on a pruned base as an ordinary one on the full base.

    Of q, k, v, gate and up the rows of B go to the kept outputs, of o and down the columns of A to the kept inputs, of
    all experts; what a router reads of a pruned input goes there, too. Elsewhere there is 0, so that ΔW is the trained
    one on what was kept and 0 on the rest. Other tensors are copied.

    Args:
        mixture: of experts made of rows and columns (`lora`, `shared`, `affine`, `dylora`, `bottleneck`, `loha`, …), on
            a base from `moa.prune`; or its checkpoint, whose base is not loaded then.
        base: the full one, which may be quantised, its layers (*rows, i) -> (*rows, o); changed in place.
        fill: "zero", or "normal": the columns of A of removed inputs are drawn from N(0, 1 / r), which the full model
            reads from the start.
        seed: of the draw.
        check_base: refuse a base that does not have the pruned one's weights where they were kept.

    Raises:
        ConfigError: the mixture's base was not pruned, the full one is, or its heads and channels do not fit; experts
            that are not rows and columns of the weight, named. The base is as it was.
        CheckpointError: no checkpoint there, or another base. The base is as it was.
    Source: arXiv 2502.13533, §2.3 and appendix (zeroA, normA).
    """
    if fill not in FILLS:
        raise ConfigError(unknown_name("fill", fill, FILLS, "moa.recover"))
    if isinstance(mixture, MoAModel):
        source = "this mixture"
        if mixture.base is base:
            raise ConfigError("the base given is the pruned one that carries the mixture: give the full one.")
        mixture.settle()
        description, tensors = mixture.describe(), mixture.adapter_state_dict()
    else:
        folder = checkpoint.locate(checkpoint.of_run(mixture))
        source = str(folder)
        description, tensors = checkpoint.read_mixture(folder)
    kept = kept_of(description["base"]["config"] or {})
    if kept is None:
        raise ConfigError(f"{source} was not trained on a base from moa.prune: there is nothing to recover.")
    if kept_of(getattr(base, "config", None)) is not None:
        raise ConfigError(f"the base given is pruned itself: give the full one, of which {source} saw a part.")
    found = cuts(base, kept)
    if check_base:
        checkpoint.check_fingerprint(description["base"], base, source, lambda name, w: _as_pruned(found, name, w))
    with all_or_nothing(base):
        out = MoAModel.around(base)
        add_described(out, description, source)
        rng = torch.Generator().manual_seed(seed) if fill == "normal" else None
        tensors = dict(tensors)
        for layer, cut in found.items():
            module = base.get_submodule(layer)
            if isinstance(module, Mixture):
                for number, branch in enumerate(module.branches):
                    assert isinstance(branch, Branch)
                    _scatter(branch, f"{layer}.branches.{number}", cut, tensors, rng)
        checkpoint.fill(out.adapter_state_dict(), tensors, Path(source))
    return out.eval()


def _as_pruned(found: Mapping[str, Cut], name: str, weight: Tensor) -> Tensor:
    """Return what a pruned base has of a weight (o, i) of the full one."""
    layer, _, own = name.rpartition(".")
    cut = found.get(layer)
    return weight if cut is None or own != "weight" else cut.narrow(weight, cut.axis)


def _scatter(branch: Branch, name: str, cut: Cut, tensors: dict[str, Tensor], rng: torch.Generator | None) -> None:
    """Put those of a checkpoint's tensors that belong to one branch into the full layer's shapes.

    Args:
        branch: fresh, on the full layer (*rows, i) -> (*rows, o).
        name: of the branch in the base.
        cut: what was kept of the layer.
        tensors: name -> tensor of any shape, changed.
        rng: for the columns of A of removed inputs; None leaves them 0.
    """
    reads = "out" if branch.tap == "output" else "in"
    pruned = {"in": (reads == "out") == (cut.axis == 0), "out": cut.axis == 0}
    for path, module in branch.named_modules():
        bank = module if isinstance(module, ExpertBank) else None
        if bank is not None and not bank.axes and not any(isinstance(m, ExpertBank) for m in [*bank.modules()][1:]):
            raise ConfigError(
                f"{name}: {type(bank).__name__} experts are a family whose tensors are not rows and columns of the "
                "weight: they cannot go from a pruned layer to the full one. Those of 'lora' can."
            )
        saved = module.state_dict()
        for leaf, full in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            side = "in" if bank is None else bank.axes.get(leaf)
            changes = any(pruned.values()) if side is None else pruned[side]
            if leaf not in saved:
                if changes and cut.n in full.shape:
                    raise ConfigError(
                        f"{name}: {leaf} {tuple(full.shape)} of {type(module).__name__} is made anew from the size of "
                        "its layer, which was another one in training: it cannot be recovered."
                    )
                continue
            key = ".".join(("base", name, *path.split(".") * bool(path), leaf))
            given = tensors.get(key)
            if given is None or given.shape == full.shape or given.ndim != full.ndim:
                continue  # what is missing or does not fit is said when the model is filled
            axes = [axis for axis in range(full.ndim) if given.shape[axis] != full.shape[axis]]
            if len(axes) > 1 or (given.shape[axes[0]], full.shape[axes[0]]) != (len(cut.at), cut.n):
                continue
            if side is None or not changes:
                raise ConfigError(f"{name}: {leaf} of {type(module).__name__} is no row or column of the weight.")
            wide = torch.zeros(full.shape, dtype=given.dtype)
            if rng is not None and bank is not None and side == "in":
                wide.copy_(torch.randn(full.shape, generator=rng) / bank.rank**0.5)
            tensors[key] = wide.index_copy(axes[0], cut.at, given.cpu())
