"""Gates that look at a whole sequence, for encoders: expert choice and soft slots. Decoding with them is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..experts import SlotBank
from ..mixture import Branch, Site
from ..routers import ExpertChoiceRouter, SoftRouter
from ..routers.choice import check_capacity, check_slots
from .recipe import Recipe, register_recipe


@register_recipe("expert_choice", "Zhou et al. 2022, arXiv 2202.09368")
@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Recipe):
    """Each expert takes its best rows of every example: an even load without a loss.

    Args:
        capacity: experts per row on average.

    Source: arXiv 2202.09368, eq. 1-3; see `ExpertChoiceRouter` for what differs.
    """

    unused: ClassVar[Mapping[str, str]] = {"k": "each expert takes capacity · n / E of the n rows"}

    capacity: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_capacity(self.capacity)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: experts that choose among the rows of x (B, S, i)."""
        return [Branch(ExpertChoiceRouter(site.d_in, self.n_experts, capacity=self.capacity), self.bank(site))]


@register_recipe("soft", "Puigcerver et al. 2023, arXiv 2308.00951")
@dataclass(frozen=True, kw_only=True)
class Soft(Recipe):
    """Every expert works on a few soft mixtures of an example's rows.

    Args:
        n_slots: p, mixtures per expert. The paper has about as many slots as rows.

    Source: arXiv 2308.00951, §2.1.
    Differs: the experts are adapters beside a frozen layer, not whole blocks.
    """

    unused: ClassVar[Mapping[str, str]] = {"k": "every expert works on slots, which mix all rows"}

    n_slots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_slots(self.n_slots)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: soft slots over the rows of x (B, S, i)."""
        return [Branch(SoftRouter(site.d_in, self.n_experts, n_slots=self.n_slots), SlotBank(self.bank(site)))]
