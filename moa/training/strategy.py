"""A strategy is a row in a table: how a mixture is trained, with its own keywords. `@register_strategy` adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..tables import check_numbers, put

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer

    from ..model.moa_model import MoAModel


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a model is trained, where Trainer's own way is not wanted; its fields are the user's keywords.

    Attributes:
        brings: it makes the optimizer, so that `optim` of TrainingArguments is not looked at.
    """

    brings: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(self)

    def check(self, model: MoAModel) -> None:
        """Refuse a model that cannot be trained so, whatever the shapes; `optimizer` may refuse it, too.

        Raises:
            ConfigError: it cannot.
        """

    def optimizer(self, model: MoAModel, arguments: Any) -> Optimizer | None:
        """Return the optimizer of a model; None leaves it to Trainer.

        Args:
            model: whose trained parameters, of any shape, it steps.
            arguments: TrainingArguments; learning_rate, weight_decay and those of Adam are read.
        """
        return None

    def callbacks(self) -> list[Any]:
        """Return fresh callbacks for Trainer."""
        return []

    def finish(self, model: MoAModel, folder: Path) -> None:
        """Write what it has learned beside the experts, e.g. scales (o, 1), into the folder of a run that is done."""


STRATEGIES: dict[str, type[Strategy]] = {}


def register_strategy(name: str) -> Callable[[type[Strategy]], type[Strategy]]:
    """Return a decorator that puts a class into the table.

    Args:
        name: by which a configuration asks for it.
    """

    def decorate(cls: type[Strategy]) -> type[Strategy]:
        put(STRATEGIES, name, cls, "strategy")
        return cls

    return decorate
