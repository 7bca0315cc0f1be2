"""The host of mixtures: puts recipes into a base, looks at them, takes them out again. It knows no framework."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..folding.save import check_folds
from ..folding.weights import fold
from ..formats import checkpoint
from ..mixture import (
    Branch,
    Mixture,
    all_sites,
    block_sites,
    inject,
    named_sites,
    placement,
    summary,
    take_out,
)
from ..mixture.preview import Preview
from ..mixture.streams import Streams
from ..objective import exchange
from ..objective.trace import Trace
from ..offload import check_trainable
from ..recipes import Recipe
from ..recipes.lent import mixtures_with
from ..recipes.origins import origins
from .adapt import adapted, optimizer_groups
from .beginning import Beginning
from .chosen import common_names
from .entries import close_entries, open_entries
from .room import check_room
from .running import hold_still, warn_of_moved
from .switched import Switched
from .turns import alone, outside
from .whole import Whole, whole_names


class Host(Switched, Beginning):
    """What `MoAModel` does with the mixtures in its base, whatever the base is.

    Attributes:
        base: the model that holds the mixtures.
        scope: gives them the context of the forward that runs.
        recipes: (recipe, names of its layers), in the order in which they were built.
        modules_to_save: names of the base's modules that are trained and saved whole.
        whole: those modules, and copies of them as they came.
        shared_by_layers: what the layers of a recipe have together, by the recipe's number and who calls it.
        streams: in which the base runs, for recipes that have several; None for one.
        samples: M, forwards per training step, the most that any recipe asks for, and two where they have to agree.
        consistency: weight of how far the outputs of a step's forwards are apart, in the training loss; 0 for none.
        buffers_that_came: a few values of each of the base's buffers as they came, by name, see `running.marks`.
        preview: what runs only the base first, (B, S, d), where a router looks at that.
    """

    recipes: list[tuple[Recipe, list[str]]]
    modules_to_save: list[str]
    shared_by_layers: nn.ModuleDict
    streams: Streams | None
    samples: int = 1
    consistency: float = 0.0
    preview: Preview | None = None
    buffers_that_came: dict[str, list[float]]
    _entered_inside: Callable[[Any, Trace], None]

    @outside
    def add_recipe(self, recipe: Recipe, sites: Sequence[str] | None = None) -> list[str]:
        """Put a recipe's mixtures into the base and return their names.

        Args:
            recipe: the row of the table.
            sites: names of the layers, each (*rows, i) -> (*rows, o); None takes the recipe's targets.

        Raises:
            ConfigError: no layer matches, or one of them carries experts already; inside of a block, see
                `check_outside`.
        """
        recipe = recipe.for_base(self.base)
        free = block_sites if recipe.where == "block" else all_sites
        chosen = recipe.sites(self.base) if sites is None else named_sites(self.base, free(self.base), sites)
        chosen = [s for s in chosen if not any(_inside(s.name, head) for head in self.modules_to_save)]
        check_room(recipe, chosen, self.scope)
        shared = recipe.shared(chosen)
        if shared:
            owned = nn.ModuleDict(shared).to(*placement(chosen[0].module)).train(self.training)
            self.shared_by_layers[str(len(self.recipes))] = owned
        mixtures = mixtures_with(recipe, chosen, shared, self.scope)
        if not recipe.train_experts:
            if "experts" in shared:
                shared["experts"].requires_grad_(False)
            for branch in (branch for mixture in mixtures for branch in mixture.branches):
                branch.bank.requires_grad_(False)
        inject(self.base, chosen, mixtures)
        names = [s.name for s in chosen]
        streams = recipe.streams(self.base, names, self.scope)
        if streams is not None:
            if self.streams is not None:
                streams.remove()
                raise ConfigError("this model runs in streams already: it cannot get a second recipe of them.")
            self.streams = streams.to(*placement(chosen[0].module)).train(self.training)
        open_entries(self.base, self.scope, self._kind(), self._entered_inside)
        if self.streams is not None:
            self.streams.fold_last()
        self.recipes.append((recipe, names))
        self.routers_changed()
        return names

    def _kind(self) -> str:
        """Return "decoder", "encoder-decoder" or "encoder", by which labels and prompts are read."""
        raise NotImplementedError

    @outside
    def train_whole(self, names: Sequence[str]) -> None:
        """Train modules of the base whole, and save them whole, e.g. a head (d -> C).

        Args:
            names: dotted paths, or ends of them.

        Raises:
            ConfigError: the base has no module of such a name; inside of a block, see `check_outside`.
        """
        given = [names] if isinstance(names, str) else names
        for name in [path for one in given for path in whole_names(self.base, one)]:
            if name not in self.modules_to_save:
                self.whole.append(Whole(self.base, name))
                self.modules_to_save.append(name)
        check_trainable(self.base)
        hold_still(self.base, [whole.module for whole in self.whole])

    @alone
    def routers_changed(self) -> None:
        """Look again at what the routers ask of a forward on x (*rows, i): finding them costs it milliseconds."""
        super().routers_changed()
        self.scope.names = common_names([recipe.names for recipe, _ in self.recipes])
        routers = [branch.router for _, branch in self.branches()]
        self.samples = max([1 + bool(self.consistency), *(router.samples for router in routers)])
        looking = any(router.needs_preview for router in routers)
        self.preview = Preview(self.base, self.scope) if looking else None

    def mixtures(self) -> dict[str, Mixture]:
        """Return the mixtures by the name of their layer, each (*rows, i) -> (*rows, o), in order."""
        return {m.name: m for m in self.base.modules() if isinstance(m, Mixture)}

    def branches(self) -> Iterator[tuple[str, Branch]]:
        """Yield (layer name, branch) for every branch, each on rows (*rows, i)."""
        for name, mixture in self.mixtures().items():
            for branch in mixture.branches:
                assert isinstance(branch, Branch)
                yield name, branch

    def named_routers(self) -> list[tuple[str, nn.Module]]:
        """Return the routers and what they share, of weights (E, i) and the like, by the name of their layer."""
        return [(name, part) for name, branch in self.branches() for part in (branch.router, *branch.router.lent())]

    @alone
    def experts_changed(self) -> None:
        """Tell the routers that route by their experts to look at them again, down (E, r, i) and up (E, r, o).

        `build` does it for adapters that it reads in; call it after training experts behind such a router.
        """
        for _, branch in self.branches():
            factors = branch.bank.factors()
            if factors is not None:
                branch.router.experts_changed(*factors)
        mixtures = self.mixtures()
        for recipe, names in self.recipes:
            recipe.experts_changed([mixtures[name] for name in names])

    def shared_of(self, number: int | str) -> dict[str, nn.Module]:
        """Return what the layers (*rows, i) -> (*rows, o) of one recipe share, by who calls it."""
        owned: Any = dict(self.shared_by_layers.items()).get(str(number), {})
        return dict(owned.items())

    def optimizer_step_done(self) -> None:
        """Let every router take its step; called after each step of an optimizer that trains this model."""
        super().optimizer_step_done()
        for part in self._counting():
            step: Any = getattr(part, "step", None)
            if step is not None:
                step()

    def exchange_counts(self) -> None:
        """Add up over the processes what routers have counted, (E,) each, in one collective; called in all of them."""
        if not exchange.is_shared():
            return  # routers keep their own until the step
        counting = (part for part in self._counting() if hasattr(part, "take_counts"))
        new = [(part, counts) for part in counting if (counts := part.take_counts()) is not None]
        totals = exchange.over_processes([counts for _, counts in new], "this step of an optimizer")
        for (part, _), total in zip(new, totals, strict=True):
            part.give_counts(total)

    def _counting(self) -> Iterator[Any]:
        for _, branch in self.branches():
            yield branch.router
        for number in self.shared_by_layers:
            yield from self.shared_of(number).values()

    @contextlib.contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Record the routings of the forwards inside, training or not: `with model.tracing() as trace: model(...)`."""
        trace, context = Trace(), self.context
        before, context.trace = context.trace, trace
        trace.task_ids = context.task_ids
        try:
            yield trace
        finally:
            context.trace = before

    def adapted_summary(self) -> str:
        """Return one line on the layers (*rows, i) -> (*rows, o) that carry experts, and on what does not."""
        return summary(self.base)

    @outside
    def merge_and_unload(self, task_id: int | None = None) -> nn.Module:
        """Fold every mixture into its layer and return the base, as peft's method of this name.

        Args:
            task_id: fold what this task's inputs get, where routers look at the task.

        Raises:
            FoldError: a mixture has no exact weight; the layer and the reason are named, and nothing was changed.
            NumericsError: an expert, or a module trained whole, holds NaN or infinity; the tensor is named.
            ConfigError: inside of a block that runs on them, see `check_outside`.
        """
        check_folds(self, task_id)
        for mixture in self.mixtures().values():
            fold(mixture, task_id)
        return self._without_mixtures()

    @outside
    def unload(self) -> nn.Module:
        """Take the mixtures out and return the base as it came, what was trained whole included.

        Raises:
            ConfigError: inside of a block that runs on them, see `check_outside`.
        """
        for whole in reversed(self.whole):
            whole.restore()
        self.whole.clear()
        self.modules_to_save.clear()
        return self._without_mixtures()

    def _without_mixtures(self) -> nn.Module:
        close_entries(self.base)
        take_out(self.base)
        if self.streams is not None:
            self.streams.remove()
            self.streams = None
        self.recipes.clear()
        self.shared_by_layers.clear()
        self.routers_changed()
        return self.base.train(self.base.training)

    @outside
    def adapt(self, new_task: int = 0, mode: str = "full", *, collapse: bool = False) -> None:
        """Make this trained model ready to learn one new task from its experts; see `moa.model.adapt.adapted`.

        Args:
            new_task: the id that the new task's examples carry in task_ids.
            mode: "full", "z" (only the new task's routing) or "mu" (the experts under equal weights).
            collapse: with "mu", one LoRA in place of the experts, their mean.

        Raises:
            ConfigError: a recipe that does not route by task, or an unknown mode; inside of a block, see
                `check_outside`.
        """
        self.recipes = adapted(self.recipes, self.mixtures(), new_task, mode, collapse=collapse)

    def optimizer_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return an optimizer's parameter groups; routers that have a learning rate of their own get it.

        Args:
            lr: of everything else.
            weight_decay: of everything else.
        """
        return optimizer_groups(self.parameters(), [b.router for _, b in self.branches()], lr, weight_decay)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: routers, experts, streams and the modules trained whole, by their name.

        A layer that several parents share has one entry, under its first name; what layers share is its owner's.
        """
        return {name: tensor.detach() for name, tensor in self.adapter_tensors().items()}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return the same, of any shape, with parameters themselves, which know where their other parts are."""
        whole = {"streams", "shared_by_layers", *(f"base.{name}" for name in self.modules_to_save)}
        chosen: dict[str, Tensor] = {}
        for name, module in self.named_modules(remove_duplicate=False):  # the base's own tensors are not even read
            if name in whole:
                chosen |= module.state_dict(prefix=f"{name}.", keep_vars=True)
            elif isinstance(module, Mixture):
                chosen |= module.branches.state_dict(prefix=f"{name}.branches.", keep_vars=True)
        first = {id(v): k for k, v in reversed(chosen.items())}
        return {k: v for k, v in chosen.items() if first[id(v)] == k}

    def describe(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Return what rebuilds this model: base, recipes, layers; plain JSON values.

        Args:
            gathered: name -> whole tensor (any shape) of this model, where a sharded one's were gathered already.

        Raises:
            ConfigError: inside `folded`, where the base is not the frozen one.
        """
        self._check_not_folded("saving")
        checkpoint.warn_of_unsaved(self.base, self.modules_to_save)
        warn_of_moved(self.buffers_that_came, self.base, [whole.module for whole in self.whole])
        config: Any = getattr(self.base, "config", None)
        if not hasattr(config, "to_dict"):  # a plain module's own affair
            config = None
        of_base = None if gathered is None else {k.removeprefix("base."): v for k, v in gathered.items()}
        return {
            "base": {
                "class": type(self.base).__name__,
                "name_or_path": str(getattr(self.base, "name_or_path", "")),
                "config": checkpoint.plain_config(config.to_dict()) if config is not None else None,
                "fingerprint": checkpoint.fingerprint(self.base, self.modules_to_save, gathered=of_base),
            },
            "recipes": [{**recipe.to_dict(), "sites": names} for recipe, names in self.recipes],
            "modules_to_save": self.modules_to_save,
            "origins": {name: module for recipe, _ in self.recipes for name, module in origins(recipe).items()},
        }


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
