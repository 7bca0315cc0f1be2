"""The bank contract: a bank is, by definition, the mixture of its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..delta import Delta, LowRank, total
from ..errors import ConfigError, FoldError
from ..types import Routing
from .fused import Fused

Axes = Mapping[str, Literal["in", "out"]]


class ExpertBank(nn.Module):
    """E experts of one family on one layer: `(x (*rows, i), routing) -> (*rows, o)`.

    A family writes its parameters and up to five methods: `reset_parameters`, `expert_forward`, and where it has them
    `delta`, `constants` and a faster `forward`. What the kernels offer for it is one optional object, `fused`.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        rank: r of each expert; families without a rank do not look at it.
        scaling: s on every expert's output.
        dropout: probability on x in training.
        engine: kernel engine by name; None lets the dispatcher choose.

    Attributes:
        mixes: "outputs" (Σ w_e E_e(x)) or "parameters" (the expert made of Σ w_e θ_e).
        zero_at_init: a fresh bank returns exactly zero.
        equal_at_init: fresh experts are equal, so only unequal routing weights can break the symmetry.
        per_expert: names of the parameters and buffers whose first axis is the experts.
        whole: an expert is a whole weight of its layer, so the rows of an example must share one routing.
        rowwise: an expert's output on a row is a function of that row alone; False where it looks at the rows around
            it, which are then (B, S, i), those of padding zero.
        fixed_size: why it has as many experts as it was built for; None where another number makes another bank.
        carries_input: the routing's weight of an expert already holds its product with x; the expert is a vector.
        averages: an expert is linear in what is trained, so that the mean of states is the mean of changes.
        axes: name of a tensor -> whose features one of its axes has, "in" (d_in) or "out" (d_out), where an expert is
            made of rows and columns of its layer: of features that are zero in all of them it neither reads nor writes.

    Raises:
        ConfigError: rank < 1 or dropout outside [0, 1).
    """

    mixes: ClassVar[Literal["outputs", "parameters"]] = "outputs"
    zero_at_init: ClassVar[bool] = True
    equal_at_init: ClassVar[bool] = False
    per_expert: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    carries_input: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    axes: ClassVar[Axes] = {}
    fixed_size: ClassVar[str | None] = None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_experts: int,
        *,
        rank: int = 8,
        scaling: float = 1.0,
        dropout: float = 0.0,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank must be at least 1, got {rank}.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {dropout}.")
        self.d_in, self.d_out, self.n_experts = d_in, d_out, n_experts
        self.rank, self.scaling, self.dropout, self.engine = rank, scaling, dropout, engine

    # ---------------------------------------------------------------- what a family writes

    def reset_parameters(self) -> None:
        """Draw the parameters anew; each family's table gives the shapes, e.g. (E, r, i)."""
        raise NotImplementedError

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's output on x (*rows, i), (*rows, o), without its constant."""
        raise NotImplementedError

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), without the constants: the definition, one expert at a time.

        Here an expert that a row did not choose cannot reach it, not even with parameters that are NaN. A family's own
        forward and the engines that run all experts in one product multiply them by 0, which spreads their NaN.
        """
        weights, chosen = routing.dense(), routing.selected()  # (*rows, E)
        y = x.new_zeros(*x.shape[:-1], self.d_out)
        for expert in range(self.n_experts):
            out = self.expert_forward(x, expert)  # (*rows, o)
            weighted = out * weights[..., expert, None].to(out.dtype)
            y = y + torch.where(chosen[..., expert, None], weighted, 0)
        return y

    def delta(self, expert: int) -> Delta:
        """Return the weight change (o, i) that one expert equals, its constant aside.

        Raises:
            FoldError: the family is not linear in x.
        """
        raise FoldError(f"{type(self).__name__} experts are not a weight change: they cannot be folded or exported.")

    def constants(self) -> Tensor | None:
        """Return what each expert adds whatever x is, (E, o), or None; the mixture adds them, and only it."""
        return None

    # ---------------------------------------------------------------- what follows from it

    @property
    def fused(self) -> Fused:
        """What the kernels offer for this family, on rows (*rows, i); by default its parts, one after the other."""
        return Fused(self)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return the experts' factors down (E, r, i) and up (E, r, o) where each is s · up_e^T down_e, else None."""
        return None

    def own(self, expert: int) -> tuple[ExpertBank, int]:
        """Return the bank, (*rows, i) -> (*rows, o), that holds an expert, and its number there."""
        return self, expert

    def mixed_delta(self, weights: Tensor) -> Delta:
        """Return the weight change (o, i) of a routing that is the same on every row.

        Args:
            weights: (E,), or (H, E) where heads have weights of their own.

        Raises:
            FoldError: the family is not a weight change.
        """
        deltas = [self.delta(expert) for expert in range(self.n_experts)]
        dtype = torch.promote_types(deltas[0].dtype, weights.dtype)
        return total([d.to(dtype).scaled(w) for d, w in zip(deltas, weights.tolist(), strict=True)])

    def stack(self, n_matrices: int) -> None:
        """Become the experts of N matrices (o, i) in place of one: expert n · E + e is the e-th on matrix n."""
        for name in self.per_expert:
            tensor = getattr(self, name)
            grown = tensor.detach().repeat(n_matrices, *([1] * (tensor.ndim - 1)))  # (N · E, …)
            if isinstance(tensor, nn.Parameter):
                grown = nn.Parameter(grown, requires_grad=tensor.requires_grad)
            setattr(self, name, grown)
        self.n_experts *= n_matrices
        with torch.no_grad():
            self.reset_parameters()

    def why_not_stacked(self) -> str | None:
        """Return why these experts cannot belong to one of several matrices (o, i), row by row, or None."""
        if self.carries_input:
            return "their router multiplies a layer's own input, and each matrix has another one"
        return None

    def read(self, expert: int, change: Delta) -> None:
        """Make one expert a weight change (o, i) that exists already.

        Raises:
            ConfigError: experts of this family cannot hold it.
        """
        kind = "low-rank" if isinstance(change, LowRank) else type(change).__name__.lower()
        raise ConfigError(
            f"{type(self).__name__} experts cannot hold a {kind} change: choose expert='lora' and a recipe that mixes "
            "outputs, e.g. 'topk', 'dense', 'remix', 'xlora' or 'arrow'."
        )

    @property
    def starts(self) -> tuple[str, ...]:
        """Names of the starts from data, of any shape, that `begin_at` knows; see `moa.initialize`."""
        return ()

    def begin_at(self, method: str, start: Tensor) -> None:
        """Start at what data said, of a shape that is the method's own, e.g. (o, i); only for methods in `starts`.

        Raises:
            ConfigError: these experts cannot hold it.
        """
        raise ConfigError(f"{type(self).__name__} experts do not start by {method!r}.")

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"d_in={self.d_in}, d_out={self.d_out}, n_experts={self.n_experts}"
