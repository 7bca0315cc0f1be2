"""Few-shot adaptation of a trained model to a new task, and the parameter groups that training by task wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..mixture import ExpertsMixture, Mixture, Site, placement
from ..recipes import Recipe
from ..routers import Router


def adapted(
    recipes: Sequence[tuple[Recipe, list[str]]],
    mixtures: Mapping[str, Mixture],
    new_task: int = 0,
    mode: str = "full",
    *,
    collapse: bool = False,
) -> list[tuple[Recipe, list[str]]]:
    """Make trained mixtures ready to learn one new task from their skills, in place, and return their new recipes.

    The task table is replaced by a fresh row for only the new task; the experts are kept.

    Args:
        recipes: (recipe, names of its layers), which route by task.
        mixtures: by the name of their layer, each (*rows, i) -> (*rows, o).
        new_task: the id that the new task's examples carry in task_ids.
        mode: "full" trains the new row and the experts, "z" only the row, "mu" the experts under equal weights.
        collapse: with "mu", replace the experts of a layer by one LoRA, their mean.

    Raises:
        ConfigError: a recipe that does not route by task, an unknown mode, collapse in another mode or on fused
            experts; nothing is changed then.
    Source: Caccia et al. 2023, arXiv 2211.03831, §4.
    Differs: in mode "mu" the released code keeps all experts; with collapse=True one LoRA is trained, which starts at
        the same function and, by each expert's share 1/E of the gradient, wants a learning rate of its own.
    """
    planned = [(recipe.adapted(new_task, mode, collapse), recipe, names) for recipe, names in recipes]
    fused = [name for _, _, names in planned for name in names if isinstance(mixtures[name], ExpertsMixture)]
    if collapse and fused:
        raise ConfigError(
            f"collapse=True replaces experts by one LoRA, and {fused[0]} carries them on fused experts, each "
            "matrix its own: use collapse=False."
        )
    for new, old, names in planned:
        for name in names:
            mixture = mixtures[name]
            before: list[Any] = list(mixture.branches)
            bank = before[0].bank
            branches = new.branches(Site(name, mixture.base, bank.d_in, bank.d_out))
            old.carry_over(before, branches)
            mixture.branches = nn.ModuleList(branches).to(*placement(mixture.base)).train(mixture.training)
    return [(new, names) for new, _, names in planned]


def optimizer_groups(
    parameters: Iterable[nn.Parameter], routers: Iterable[Router], lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: routers that have a learning rate of their own get it.

    `Trainer(…, optimizers=(torch.optim.AdamW(model.optimizer_groups(1e-3)), None))` keeps the stock Trainer; its
    schedule scales every group alike.

    Args:
        parameters: of a model; the trainable ones are grouped, each once.
        routers: of the model.
        lr: of everything else.
        weight_decay: of everything else; routers with their own rate get none.
    """
    own: dict[float, dict[int, nn.Parameter]] = {}
    for router in routers:
        if router.learning_rate is not None:
            group = own.setdefault(router.learning_rate, {})
            group.update({id(p): p for p in router.learned() if p.requires_grad})
    taken = {key for group in own.values() for key in group}
    rest = [p for p in parameters if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}] if rest else []
    groups += [{"params": list(g.values()), "lr": rate, "weight_decay": 0.0} for rate, g in own.items() if g]
    return groups
