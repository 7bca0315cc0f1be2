"""What recipes share whose gates learn by losses of their own, such as one that balances their load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, get_args

from ..errors import ConfigError, unknown_name
from ..routers import Router
from .recipe import Recipe

Over = Literal["layers", "model"]
Rows = Literal["global", "process"]
R = TypeVar("R", bound=Router)


@dataclass(frozen=True, kw_only=True)
class LossRecipe(Recipe):
    """A recipe whose gates have losses.

    Args:
        losses_over: "global" takes the losses of the gates over the batch of all processes, "process" over each
            process's rows by themselves, without an exchange: for processes that train models of their own, or that run
            unequally many batches.

    Raises:
        ConfigError: an unknown losses_over, or one where no gate has a loss.
    Differs: most trainers, transformers' Mixtral among them, have "process": the mean over processes of losses that
        are not means over rows. With it, training depends on how many processes there are.
    """

    losses_over: Rows = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losses_over not in get_args(Rows):
            raise ConfigError(unknown_name("losses_over", self.losses_over, get_args(Rows)))
        if not any(self.losses().values()):
            self.check_unused("a loss of the gates with a coefficient above 0", "losses_over")

    def losses(self) -> dict[str, float]:
        """Return the coefficients of a gate's losses by name, see `moa.objective.losses.LOSSES`; no tensors."""
        raise NotImplementedError

    def learning(self, router: R) -> R:
        """Return a router of rows (*rows, i) with the losses of this recipe."""
        router.loss_weights = {name: coefficient for name, coefficient in self.losses().items() if coefficient}
        router.losses_over = self.losses_over
        return router


@dataclass(frozen=True, kw_only=True)
class BalancedRecipe(LossRecipe):
    """A recipe with a balance loss.

    Args:
        balance: coefficient of the balance loss, of which 1 is the least in either form.
        balance_over: "layers" is the mean over layers of each layer's own loss; "model" is one loss on the rows of all
            layers together, expert e of one layer counted with expert e of every other.

    Raises:
        ConfigError: an unknown balance_over.
    Source: Fedus et al. 2021 (Switch), arXiv 2101.03961, eq. 4: the loss is added for each layer.
    Differs: transformers' Mixtral (and MixLoRA's code after it) has "model", times k. It is not the default, because
        experts of one number in different layers have nothing in common: two layers that each use another half of
        their experts are even to it, and "layers" is twice its least.
    """

    coefficients: ClassVar[tuple[str, ...]] = ("balance",)

    balance: float = 0.01
    balance_over: Over = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance_over not in get_args(Over):
            raise ConfigError(unknown_name("balance_over", self.balance_over, get_args(Over)))

    def losses(self) -> dict[str, float]:
        """Return the coefficient of the balance loss, a number, under the name of its form."""
        return {"balance" if self.balance_over == "layers" else "model_balance": self.balance}
