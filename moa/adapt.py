"""Few-shot adaptation of a trained model to a new task, and the parameter groups that training by task wants."""

from __future__ import annotations

from typing import Any

from torch import nn

from .host import Host
from .recipes import Site
from .sites import placement


def adapt(model: Host, new_task: int = 0, mode: str = "full", *, collapse: bool = False) -> None:
    """Make a trained model ready to learn one new task from its skills; the model is changed in place.

    The task table is replaced by a fresh row for the new task alone; the experts are kept.

    Args:
        model: with recipes that route by task.
        new_task: the id that the new task's examples carry in task_ids.
        mode: "full" trains the new row and the experts, "z" the row alone, "mu" the experts under equal weights.
        collapse: with "mu", replace the experts of a layer by one LoRA, their mean.

    Raises:
        ConfigError: a recipe that does not route by task, an unknown mode, collapse in another mode; nothing is
            changed then.
    Source: Caccia et al. 2023, arXiv 2211.03831, §4.
    Differs: in mode "mu" the released code keeps all experts; with collapse=True one LoRA is trained, which starts at
        the same function and, by each expert's share 1/E of the gradient, wants a learning rate of its own.
    """
    planned = [(recipe.adapted(new_task, mode, collapse), recipe, names) for recipe, names in model.recipes]
    mixtures = model.mixtures()
    for number, (new, old, names) in enumerate(planned):
        for name in names:
            mixture = mixtures[name]
            before: list[Any] = list(mixture.branches)
            bank = before[0].bank
            branches = new.build(Site(name, mixture.base, bank.d_in, bank.d_out))
            old.carry_over(before, branches)
            mixture.branches = nn.ModuleList(branches).to(*placement(mixture.base)).train(mixture.training)
        model.recipes[number] = (new, names)


def optimizer_groups(model: Host, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: routers that have a learning rate of their own get it.

    `Trainer(…, optimizers=(torch.optim.AdamW(model.optimizer_groups(1e-3)), None))` keeps the stock Trainer; its
    schedule scales every group alike.

    Args:
        model: whose trainable parameters are grouped, each once.
        lr: of everything else.
        weight_decay: of everything else; routers with their own rate get none.
    """
    own: dict[float, dict[int, nn.Parameter]] = {}
    for _, branch in model.branches():
        if branch.router.learning_rate is not None:
            group = own.setdefault(branch.router.learning_rate, {})
            group.update({id(p): p for p in branch.router.parameters() if p.requires_grad})
    taken = {key for group in own.values() for key in group}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}] if rest else []
    groups += [{"params": list(g.values()), "lr": rate, "weight_decay": 0.0} for rate, g in own.items() if g]
    return groups
