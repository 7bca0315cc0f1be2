"""One quantised base, several precisions: a set of experts for each, and of each block's one in a step.

One QuantLLM for ALL: Yi et al. 2025, ACL, arXiv 2405.20202.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..formats.checkpoint import fill
from ..formats.precision_folders import set_folder
from ..model.moa_model import MoAModel
from .lisa import block_of

KEPT = "moa_precision_sets"  # in the optimizer's state


class PrecisionSets:
    """Models of one recipe on one base in several precisions, trained together, each block in one of them a step.

    Before the first training forward of a step every block's precision is drawn, and `model` runs with those blocks'
    frozen layers and experts; experts of another set get no gradient and do not move. After the optimizer's step, and
    whenever `model` is not training, it is the widest model by itself. The optimizer's state holds the other sets and
    what is drawn next, so that a Trainer's checkpoint holds all, and its run goes on from there.

    Args:
        models: by bits a weight, each (B, S) -> outputs; what is not adapted is the same in all of them.
        optimizer: made over `parameters(models)`.
        balanced: draw the average precision evenly (see `draw`); else each block by itself.
        seed: of what is drawn; every process draws the same.

    Attributes:
        model: the widest, the one to train.
        drawn: bits of each block in this step.

    Raises:
        ConfigError: fewer than two models, recipes or layers that differ, experts that layers share, or a base's
            tensor outside the adapted layers that differs.

    Source: arXiv 2405.20202, §3.
    Differs: the quantised weights are those of the given models, by any library; blocks are drawn, not each matrix.
    """

    def __init__(
        self,
        models: Mapping[int, MoAModel],
        optimizer: torch.optim.Optimizer,
        *,
        balanced: bool = True,
        seed: int = 0,
    ) -> None:
        self.models = {bits: models[bits] for bits in sorted(models)}
        self.bits, self.balanced, self.seed = list(self.models), balanced, seed
        _check(self.models)
        self.model = self.models[self.bits[-1]]
        self._own = {bits: model.mixtures() for bits, model in self.models.items()}
        self.blocks = list(dict.fromkeys(block_of(name) for name in self._own[self.bits[-1]]))
        self.drawn: dict[str, int] = {}
        self.steps = 0
        self._trained = parameters(self.models)
        _share_the_rest(self.models)
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._put_into),
            optimizer.register_load_state_dict_pre_hook(self._take_from),
        ]

    def save(self, folder: str | Path) -> None:
        """Write each set as a checkpoint, OUT/4-bit and so on; `moa.load(OUT, base=base)` takes the base's own.

        Raises:
            CheckpointError: see `MoAModel.save_pretrained`.
        """
        self._plug({})
        for bits, model in self.models.items():
            model.save_pretrained(set_folder(folder, bits))

    def close(self) -> None:
        """Hang on nothing any longer; each model has its own layers (*rows, i) -> (*rows, o)."""
        self._plug({})
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, *_: Any) -> None:
        if not model.training:
            self._plug({})
            return
        if not self.drawn:
            for parameter in self._trained:  # Trainer clears those of `model` only
                parameter.grad = None
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
            bits = draw(len(self.blocks), self.bits, rng, balanced=self.balanced)
            self.drawn = dict(zip(self.blocks, bits, strict=True))
        self._plug(self.drawn)

    def _after_step(self, *_: Any) -> None:
        """Give each model its own layers back before routers take their step, and a Trainer saves."""
        self._plug({})
        self.drawn = {}
        self.steps += 1

    def _put_into(self, _: Any, state: dict[str, Any]) -> None:
        """Put what a checkpoint of `model` does not hold into the optimizer's state."""
        others = {bits: self.models[bits].adapter_state_dict() for bits in self.bits[:-1]}
        state[KEPT] = {"steps": self.steps, "sets": others}

    def _take_from(self, _: Any, state: Mapping[str, Any]) -> None:
        """Take the other sets and the step from an optimizer's state that is about to be loaded."""
        kept = state.get(KEPT)
        if kept is None or list(kept["sets"]) != self.bits[:-1]:
            found = None if kept is None else list(kept["sets"])
            raise CheckpointError(
                f"the optimizer's state has to hold sets of experts for {self.bits[:-1]} bits, and has {found}: go on "
                "from a checkpoint of a run with the same PrecisionSets, made before its training began."
            )
        for bits, tensors in kept["sets"].items():
            fill(self.models[bits].adapter_state_dict(), tensors, Path(f"the set of {bits} bits"))
        self.steps = kept["steps"]

    def _plug(self, drawn: Mapping[str, int]) -> None:
        """Put the layers of the drawn precisions into the model; those of a block that is not drawn are its own."""
        with self.model.scope.turns.alone():
            for name in self._own[self.bits[-1]]:
                bits = drawn.get(block_of(name), self.bits[-1])
                mixture = self._own[bits][name]
                mixture.scope = self.model.scope if drawn else self.models[bits].scope
                self.model.base.set_submodule(name, mixture)
                mixture.train(self.model.training)


def parameters(models: Mapping[int, MoAModel]) -> list[nn.Parameter]:
    """Return what is trained in all models, tensors of any shape: for the optimizer."""
    found = (p for bits in sorted(models) for p in models[bits].parameters() if p.requires_grad)
    return list({id(p): p for p in found}.values())


def draw(n_blocks: int, bits: Sequence[int], rng: torch.Generator, *, balanced: bool = True) -> list[int]:
    """Return a precision for each block.

    With p(b) ∝ 1 for each block the average of many blocks is nearly always the middle, and the narrow and the wide
    configurations are hardly trained. Balanced: the average u is drawn evenly between the least and the most bits,
    and the blocks from p(b) ∝ exp(θ b), with θ such that E[b] = u.

    Args:
        n_blocks: how many.
        bits: to choose from, ascending.
        rng: draws.
        balanced: else p(b) ∝ 1.

    Source: arXiv 2405.20202, §3.3: sampling rates that balance what configurations of unequal average get.
    Differs: the paper moves its rates along the run; here every step has all averages, by the least informative rates.
    """
    levels = torch.tensor(bits, dtype=torch.float64)
    rates = torch.ones_like(levels)
    if balanced:
        mean = levels[0] + (levels[-1] - levels[0]) * torch.rand((), generator=rng, dtype=torch.float64)
        rates = tilted(levels, float(mean))
    chosen = torch.multinomial(rates, n_blocks, replacement=True, generator=rng)
    return [bits[n] for n in chosen.tolist()]


def tilted(levels: Tensor, mean: float) -> Tensor:
    """Return p (n,) ∝ exp(θ levels) (n,) whose expectation is a mean between the least and the greatest level."""
    low, high = -200.0, 200.0  # e^±200 is one level only
    for _ in range(60):
        middle = (low + high) / 2
        rates = torch.softmax(middle * levels, -1)
        low, high = (middle, high) if float(rates @ levels) < mean else (low, middle)
    return torch.softmax((low + high) / 2 * levels, -1)


def _check(models: Mapping[int, MoAModel]) -> None:
    if len(models) < 2:
        raise ConfigError(f"sets of adapters by precision need models of two precisions, got {sorted(models)}.")
    first, *others = models.items()
    for bits, model in models.items():
        if len(model.shared_by_layers) or model.streams is not None:
            raise ConfigError(f"the model of {bits} bits has experts or streams that layers share: each needs its own.")
    for bits, model in others:
        rows = [[({**recipe.to_dict()}, names) for recipe, names in m.recipes] for m in (first[1], model)]
        if rows[0] != rows[1]:
            raise ConfigError(
                f"the models of {first[0]} and {bits} bits have other recipes or layers: build them alike."
            )


def _share_the_rest(models: Mapping[int, MoAModel]) -> None:
    """Check that what is not adapted is equal, tensor by tensor (any shape), and keep one of each."""
    *others, (_, widest) = models.items()
    kept = _outside(widest)
    for bits, model in others:
        for name, tensor in _outside(model).items():
            if name not in kept or kept[name].shape != tensor.shape or not torch.equal(kept[name], tensor):
                raise ConfigError(
                    f"{name} of the base of {bits} bits is not that of the widest: adapt its layer, or leave it as it "
                    "is in all of them."
                )
            tensor.data = kept[name].data


def _outside(model: MoAModel) -> dict[str, Tensor]:
    inside = {id(t) for m in model.mixtures().values() for t in (*m.parameters(), *m.buffers())}
    tensors = {**dict(model.base.named_parameters()), **dict(model.base.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in inside}
