"""At which rank elastic experts act: for a whole model, for a block of code, or for each example of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..experts.families.dylora import DyLoRABank, Elastic
from ..mixture import ExpertsMixture
from ..mixture.blocks import BlockLayer
from .host import Host


def set_rank(model: Host, rank: int | None) -> None:
    """Let a model's elastic experts act at a rank b from now on in evaluation, and be exported and folded at it.

    The products are of that rank. A checkpoint keeps all R components, and not the choice.

    Args:
        model: with experts of an elastic family, (E, R, …).
        rank: b; None is all of them.

    Raises:
        ConfigError: a recipe's experts are not elastic, or b is outside 1 … R.
    """
    with model.scope.turns.alone():
        for elastic in _elastic(model, [] if rank is None else [rank]):
            elastic.chosen = rank


@contextlib.contextmanager
def at_rank(model: Host, ranks: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Let elastic experts act at a rank inside the block, in this thread: one for all examples, or one for each.

    Args:
        model: with experts of an elastic family, (E, R, …).
        ranks: b, or B of them.

    Raises:
        ConfigError: a recipe's experts are not elastic, a rank is outside 1 … R, or experts are whole blocks, slots or
            the base's own.
    """
    wanted = torch.as_tensor(ranks).reshape(-1)
    if wanted.is_floating_point() or not wanted.numel():
        raise ConfigError(f"ranks must be whole numbers, one or one for each example, got {ranks!r}.")
    _elastic(model, wanted.tolist())
    for name, mixture in model.mixtures().items():
        banks = [branch.bank for branch in mixture.branches]
        if isinstance(mixture, BlockLayer | ExpertsMixture) or not all(isinstance(bank, DyLoRABank) for bank in banks):
            raise ConfigError(
                f"{name}: its routing is not one of each row and layer by itself, so it cannot carry ranks: choose one "
                "for all of them with set_rank."
            )
    with model._set("at_rank", "ranks", wanted):
        yield


def _elastic(model: Host, ranks: Sequence[int]) -> list[Elastic]:
    """Return what the experts of each recipe share, after a look at the ranks that are asked for."""
    found: list[Elastic] = []
    for number, (recipe, _) in enumerate(model.recipes):
        shared = model.shared_of(number).get("experts")
        if not isinstance(shared, Elastic):
            raise ConfigError(
                f"experts of the family {recipe.family.name!r} have one rank: build with expert='dylora' to choose it."
            )
        wrong = [rank for rank in ranks if not 1 <= rank <= shared.highest]
        if wrong:
            raise ConfigError(f"rank {wrong[0]} is outside 1 to {shared.highest}, the components that experts have.")
        found.append(shared)
    return found
