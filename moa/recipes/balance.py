"""What recipes share whose gates learn to balance their load by a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..errors import ConfigError, unknown_name
from .recipe import Recipe

Over = Literal["layers", "model"]


@dataclass(frozen=True, kw_only=True)
class BalancedRecipe(Recipe):
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

    def losses(self, **others: float) -> dict[str, float]:
        """Return the coefficients of a gate's losses by name, the balance loss and others."""
        return {"balance" if self.balance_over == "layers" else "model_balance": self.balance, **others}
