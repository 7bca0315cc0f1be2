"""Experts of several families or ranks in one bank: member banks, among which a routing is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..delta import Delta
from ..errors import ConfigError
from ..kernels.units import routed_units, spread_over
from ..types import Routing
from .bank import ExpertBank
from .factored import FactoredBank


class MixedBank(ExpertBank):
    """E experts, each one expert of a member bank: the routing is split, and each member gets what chose it.

    A member sees as many rows as slots chose one of its experts, so that the cost grows with K and not with E. Dropout
    acts once, here, and not in the members.

    Args:
        members: banks of the same i and o, their experts numbered one after the other.
        order: (E,) for each expert of this bank its number among those.
        dropout: probability on x in training.
        engine: kernel engine by name, as the members have it.

    Raises:
        ConfigError: a member mixes its experts' parameters, or needs its own router.
    """

    fixed_size: ClassVar[str | None] = (
        "its experts are of several kinds or ranks, and an expert's number says which; build a model of another "
        "n_experts, with one entry for each in expert=[…] or rank=[…]"
    )

    place: Tensor

    def __init__(
        self, members: Sequence[ExpertBank], order: Sequence[int], *, dropout: float = 0.0, engine: str | None = None
    ) -> None:
        first = members[0]
        rank = max(member.rank for member in members)
        super().__init__(first.d_in, first.d_out, len(order), rank=rank, dropout=dropout, engine=engine)
        for member in members:
            if member.mixes != "outputs" or member.carries_input:
                what = "carry the row in their weight" if member.carries_input else "are mixed by their parameters"
                raise ConfigError(
                    f"{type(member).__name__} experts {what}, which experts of another kind beside them do not: they "
                    "cannot be in a bank of several families."
                )
        self.members = nn.ModuleList(members)
        self.order = tuple(order)
        self._number()

    def _number(self) -> None:
        sizes = [member.n_experts for member in self.banks]
        owners = [(m, e) for m, size in enumerate(sizes) for e in range(size)]
        self.owners = [owners[number] for number in self.order]  # expert -> (member, its number there)
        self.register_buffer("place", torch.tensor(self.owners).T.contiguous(), persistent=False)  # (2, E)

    @property
    def banks(self) -> list[ExpertBank]:
        """The member banks, (*rows, i) -> (*rows, o)."""
        return list(self.members)  # type: ignore[arg-type]

    def own(self, expert: int) -> tuple[ExpertBank, int]:
        """Return the member bank, (*rows, i) -> (*rows, o), of an expert and its number there."""
        member, number = self.owners[expert]
        return self.banks[member], number

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether all members return zeros (*rows, o) at first."""
        return all(member.zero_at_init for member in self.banks)

    @property
    def whole(self) -> bool:  # type: ignore[override]
        """Whether an expert of any member is a whole weight (o, i)."""
        return any(member.whole for member in self.banks)

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        """Whether no member looks beyond a row (i,)."""
        return all(member.rowwise for member in self.banks)

    def reset_parameters(self) -> None:
        """Draw the members' parameters anew, e.g. down (E, r, i)."""
        for member in self.banks:
            member.reset_parameters()

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's output on x (*rows, i), (*rows, o)."""
        member, number = self.own(expert)
        return member.expert_forward(x, number)

    def delta(self, expert: int) -> Delta:
        """Return the weight change (o, i) that one expert equals."""
        member, number = self.own(expert)
        return member.delta(number)

    def constants(self) -> Tensor | None:
        """Return what each expert adds, (E, o), zeros for members that add nothing; None where none of them does."""
        found = [member.constants() for member in self.banks]
        some = next((one for one in found if one is not None), None)
        if some is None:
            return None
        zeros = [some.new_zeros(member.n_experts, self.d_out) for member in self.banks]
        return torch.cat([z if c is None else c for c, z in zip(found, zeros, strict=True)])[list(self.order)]

    def read(self, expert: int, change: Delta) -> None:
        """Make one expert a weight change (o, i) that exists already."""
        member, number = self.own(expert)
        member.read(number, change)

    def stack(self, n_matrices: int) -> None:
        """Become the experts of N matrices (o, i): expert n · E + e is the e-th on matrix n, of e's member."""
        owners = [(m, n * self.banks[m].n_experts + e) for n in range(n_matrices) for m, e in self.owners]
        for member in self.banks:
            member.stack(n_matrices)
        starts = [0]
        for member in self.banks:
            starts.append(starts[-1] + member.n_experts)
        self.order = tuple(starts[m] + e for m, e in owners)
        self.n_experts = len(self.order)
        self._number()

    def why_not_stacked(self) -> str | None:
        """Return why a member's experts cannot belong to one of several matrices (o, i), or None."""
        return next((why for member in self.banks if (why := member.why_not_stacked()) is not None), None)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i), without the constants."""
        x = F.dropout(x, self.dropout, self.training)
        y = x.new_zeros(*x.shape[:-1], self.d_out)
        for number, member in enumerate(self.banks):
            if routing.indices is None:
                own = sorted((e, at) for at, (m, e) in enumerate(self.owners) if m == number)
                weights = routing.weights[..., [at for _, at in own]]  # (*rows, E_m)
                y = y + member(x, Routing(weights, None, member.n_experts)).to(y.dtype)
            elif member.rowwise:
                y = y + self._by_slots(x, routing, number)
            else:
                y = y + self._by_experts(x, routing, number)
        return y

    def _by_slots(self, x: Tensor, routing: Routing, member: int) -> Tensor:
        """Return what one member adds, (*rows, o): it sees the units of rows once for each slot that chose it."""
        bank, (owner, number) = self.banks[member], self.place
        assert routing.indices is not None
        units = routed_units(x, routing.weights)
        rest = x.shape[len(units) : -1]
        weights, indices = (spread_over(t, units, x.ndim - 1) for t in (routing.weights, routing.indices))  # (N, K)
        at, slots = (owner[indices] == member).nonzero(as_tuple=True)  # (n,) each
        one = [1] * len(rest)
        chosen = Routing(
            weights[at, slots].view(-1, *one, 1), number[indices[at, slots]].view(-1, *one, 1), bank.n_experts
        )
        split = x.reshape(math.prod(units), *rest, x.shape[-1])  # (N, *rest, i)
        out = bank(split[at], chosen)  # (n, *rest, o)
        y = x.new_zeros(*split.shape[:-1], self.d_out).index_add(0, at, out.to(x.dtype))
        return y.view(*x.shape[:-1], self.d_out)

    def _by_experts(self, x: Tensor, routing: Routing, member: int) -> Tensor:
        """Return what one member adds, (*rows, o), by the definition: its experts look at the rows around each row."""
        weights, chosen = routing.dense(), routing.selected()  # (*rows, E)
        y = x.new_zeros(*x.shape[:-1], self.d_out)
        for expert, (owner, number) in enumerate(self.owners):
            if owner == member:
                out = self.banks[member].expert_forward(x, number)
                y = y + torch.where(chosen[..., expert, None], out * weights[..., expert, None].to(out.dtype), 0)
        return y

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, order={self.order}"


class MixedFactorsBank(MixedBank, FactoredBank):
    """The same where all members are low-rank factors: padded to the largest rank they are one bank on the kernels."""

    per_expert = ()
    forward = FactoredBank.forward
    fused = FactoredBank.fused

    @staticmethod
    def fits(members: Sequence[ExpertBank]) -> bool:
        """Tell whether banks, (*rows, i) -> (*rows, o), are their factors and nothing else."""
        return all(isinstance(m, FactoredBank) and type(m).forward is FactoredBank.forward for m in members)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o) with zeros beyond an expert's rank, each scale multiplied into up."""
        downs, ups = [], []
        for member in self.banks:
            found = member.factors()
            assert found is not None
            beyond = (0, 0, 0, self.rank - member.rank)
            downs.append(F.pad(found[0], beyond))
            ups.append(F.pad(found[1] * member.scaling, beyond))
        down, up = torch.cat(downs), torch.cat(ups)
        if self.order == tuple(range(self.n_experts)):
            return down, up
        order = torch.tensor(self.order, device=down.device)
        return down.index_select(0, order), up.index_select(0, order)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's output on x (*rows, i), (*rows, o)."""
        return MixedBank.expert_forward(self, x, expert)

    def delta(self, expert: int) -> Delta:
        """Return the weight change (o, i) of one expert, of its own rank."""
        return MixedBank.delta(self, expert)
