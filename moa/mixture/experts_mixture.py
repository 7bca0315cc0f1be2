"""Adapters on the fused experts of a base that is itself a mixture: a change of each expert's matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import is_watched
from ..delta import Delta
from ..errors import ConfigError, FoldError
from ..experts import ExpertBank
from ..layers import Site
from ..types import Routing, Scope
from .blocks import Block, FollowRouter
from .fused_layouts import Layout, Rows, layout_of
from .mixture import Branch, Mixture, Slice, add_constants
from .uncalled import shown


class ExpertsMixture(Mixture):
    """y = the base's experts, each matrix W_n of them replaced, row by row, by W_n + Σ_e w_e Δ_{e,n}.

    The base's router decides which experts n a token goes to, as it always does; the adapters' router decides, on the
    token, the weights w of the adapters, once for the first and the last matrices. A bank holds N · E experts, number
    n · E + e for adapter e on matrix n, so that a row's routing is that of its token with N added to its indices.

    Args:
        base: fused experts of a known layout.
        branches: those of the first tensor, then as many of the last, which follow them.
        scope: shared by all mixtures of the model.
        name: dotted path of the module.
    """

    def __init__(self, base: nn.Module, branches: list[Branch], scope: Scope, name: str) -> None:
        super().__init__(base, branches, scope, name)
        layout = layout_of(base)
        assert layout is not None
        self.layout: Layout = layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, (T, d) for tokens (T, d)."""
        if not self.context.enabled:
            return self.base(*args, **kwargs)
        if is_watched(self.base) or "forward" in vars(self.base):
            raise ConfigError(
                f"{self.name}: something else runs this {type(self.base).__name__} (a hook, an offloaded weight), and "
                "experts on fused tensors replace its forward: keep these weights on their device, without hooks."
            )
        layout, base = self.layout, self.base
        rows = layout.rows(base, *args, **kwargs)
        context = self.context
        tokens = context.in_examples(rows.tokens)
        leaders, followers = self._halves()
        routings = [self._on_rows(self.route(branch, tokens, context), tokens, rows) for branch in leaders]
        kept = self._without_expert(tokens, rows)
        opened = self._changed(layout.up, rows.x, rows, leaders, routings, kept)
        closed = self._changed(layout.down, layout.between(base, opened), rows, followers, routings, kept)
        return layout.together(base, closed, rows)

    def _halves(self) -> tuple[list[Branch], list[Branch]]:
        """Return the branches of the first matrices and of the last."""
        branches: list[Branch] = list(self.branches)  # type: ignore[arg-type]
        half = len(branches) // 2
        return branches[:half], branches[half:]

    def _changed(
        self,
        name: str,
        x: Tensor,
        rows: Rows,
        branches: list[Branch],
        routings: list[Routing],
        kept: Tensor | None,
    ) -> Tensor:
        """Return the products of x (R, i) with one tensor's matrices and what the adapters add, (R, o)."""
        y = y0 = self.layout.product(self.base, name, x, rows.expert)
        for branch, routing in zip(branches, routings, strict=True):
            y = add_constants(y + branch.bank(x, routing).to(y.dtype), branch.bank, routing)
        return y if kept is None else torch.where(kept, y0, y)

    def _without_expert(self, tokens: Tensor, rows: Rows) -> Tensor | None:
        """Return which of the base's rows stay as they are (R, 1): those of examples for which no expert is named."""
        pinned = self.context.pinned
        if pinned is None or not pinned.has_base:
            return None
        lead = tokens.shape[:-1]
        number = pinned.rows(tokens).expand(lead).reshape(-1)[rows.token]  # (R,)
        return (number < 0).unsqueeze(-1)

    def _on_rows(self, routing: Routing, tokens: Tensor, rows: Rows) -> Routing:
        """Return a routing of tokens (*rows, d) as one of the base's rows, over the N · E experts of a bank."""
        lead, weights, indices = tokens.shape[:-1], routing.weights, routing.indices
        heads = weights.shape[-2:-1] if weights.ndim > tokens.ndim else ()
        if indices is None:
            indices = torch.arange(routing.n_experts, device=tokens.device)
        full = (*lead, *heads, routing.k)
        weights = weights.expand(full).reshape(-1, *heads, routing.k)[rows.token]  # (R, K)
        indices = indices.expand(full).reshape(-1, *heads, routing.k)[rows.token]
        expert = rows.expert.view(-1, *([1] * (weights.ndim - 1)))
        n_matrices = self.layout.size(self.base, self.layout.up)[0]
        return Routing(weights, expert * routing.n_experts + indices, n_matrices * routing.n_experts)

    def slices(self) -> list[Slice]:
        """Return the two tensors and, for each, its matrices as layers of their own, N of them."""
        found: list[Slice] = []
        leaders, followers = self._halves()
        for name, branches in ((self.layout.up, leaders), (self.layout.down, followers)):
            n_matrices = self.layout.size(self.base, name)[0]
            layers = [
                Mixture(self.base, _of_matrix(branches, leaders, number, n_matrices), self.scope, f"{self.name}.{name}")
                for number in range(n_matrices)
            ]
            found.append(Slice(name, f"{name}_bias", layers))
        return found

    def stored(self, part: Slice, changes: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """Return the changes (o, i) and (o,) or None of a tensor's matrices, stacked as the base stores them.

        Raises:
            FoldError: the adapters add a constant, and the base's experts have no bias.
        """
        found = {part.weight: self.layout.stored(torch.stack([change for change, _ in changes]))}
        shifts = [shift for _, shift in changes if shift is not None]
        if shifts and not self.layout.biased:
            raise FoldError(
                f"{self.name}: its adapters add a constant to every row, and a {type(self.base).__name__} has no bias "
                "to fold it into."
            )
        return found | ({part.bias: torch.stack(shifts)} if shifts else {})

    def is_dense(self) -> bool:
        """Return whether the base holds its tensors (N, o, i) as floats."""
        return layout_of(self.base) is not None

    def __getattr__(self, name: str) -> Any:
        """Return what models read of the module; its tensors (N, o, i) notice when something multiplies by them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("base"), name)
            return shown(value, self.name) if isinstance(value, nn.Parameter) else value


class MatrixBank(ExpertBank):
    """The E experts of a bank of N · E that change one of its N matrices.

    Args:
        inner: the bank.
        number: which matrix.
        n_matrices: N.
    """

    def __init__(self, inner: ExpertBank, number: int, n_matrices: int) -> None:
        super().__init__(inner.d_in, inner.d_out, inner.n_experts // n_matrices)
        self.inner, self.first = inner, number * self.n_experts

    @property
    def mixes(self) -> Any:  # type: ignore[override]
        """What the inner bank mixes, of experts (E, …)."""
        return self.inner.mixes

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's output on x (*rows, i), (*rows, o)."""
        return self.inner.expert_forward(x, self.first + expert)

    def delta(self, expert: int) -> Delta:
        """Return the weight change (o, i) that one expert equals."""
        return self.inner.delta(self.first + expert)

    def constants(self) -> Tensor | None:
        """Return what each expert adds, (E, o), or None."""
        constants = self.inner.constants()
        return None if constants is None else constants[self.first : self.first + self.n_experts]

    def mixed_delta(self, weights: Tensor) -> Delta:
        """Return the weight change (o, i) of weights (E,) or (H, E)."""
        if self.inner.mixes == "outputs":
            return super().mixed_delta(weights)
        full = weights.new_zeros(*weights.shape[:-1], self.inner.n_experts)
        full[..., self.first : self.first + self.n_experts] = weights
        return self.inner.mixed_delta(full)


def _of_matrix(branches: list[Branch], leaders: list[Branch], number: int, n_matrices: int) -> list[Branch]:
    """Return branches of only one matrix (o, i), each with the router that decides for it."""
    pairs = zip(branches, leaders, strict=True)
    return [Branch(leader.router, MatrixBank(branch.bank, number, n_matrices)) for branch, leader in pairs]


def matrix_sites(site: Site) -> list[tuple[Site, int]]:
    """Return, for each tensor of a site's fused experts, its matrices' site (*rows, i) -> (*rows, o) and how many.

    A layer that holds one weight has none.

    Raises:
        ConfigError: the family shares tensors over layers, whose sizes are not those of the matrices inside.
    """
    layout = layout_of(site.module)
    if layout is None:
        return []
    if "experts" in site.shared:
        raise ConfigError(
            f"{site.name}: fused experts cannot carry adapters that share tensors over their layers, as these do: "
            "choose another family, e.g. expert='lora'."
        )
    found = []
    for name in (layout.up, layout.down):
        n_matrices, d_in, d_out = layout.size(site.module, name)
        found.append((Site(f"{site.name}.{name}", site.module, d_in, d_out, site.shared), n_matrices))
    return found


def experts_branches(parts: list[tuple[list[Branch], int]], name: str) -> list[Branch]:
    """Return the branches of fused experts, made of those for one matrix (o, i) of each tensor.

    Args:
        parts: (branches, N) of each tensor, the first one's routers deciding.
        name: dotted path of the module, for messages.

    Raises:
        ConfigError: branches that cannot change a matrix of which each row sees another one.
    """
    out: list[Branch] = []
    leaders = parts[0][0]
    for branches, n_matrices in parts:
        for branch, leader in zip(branches, leaders, strict=True):
            why = branch.bank.why_not_stacked()
            if branch.tap != "input":
                why = "a branch on a layer's output has no place inside the base's experts"
            if why is not None:
                raise ConfigError(f"{name}: fused experts cannot carry these adapters: {why}. Choose another recipe.")
            branch.bank.stack(n_matrices)
            if branch is not leader:
                branch.router = FollowRouter(branch.bank.d_in, leader.router, Block(name))
            out.append(branch)
    return out
