"""The layer: a frozen base and branches that add to it. It names no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..compat import is_watched
from ..errors import ConfigError, ShapeError
from ..experts import ExpertBank
from ..layers import as_weight, is_conv1d, is_dense, matrix, patches
from ..routers import Router
from ..rows import example_rows
from ..types import Context, Routing, Scope
from .uncalled import shown

SIZES = {"nx", "nf", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"}
FEATURES = {"in_features": ("nx", "in_channels", "infeatures"), "out_features": ("nf", "out_channels", "outfeatures")}


class Branch(nn.Module):
    """A router, a bank, and where they tap the layer: its input x (*rows, i) or its base's output y0 (*rows, o).

    Raises:
        ConfigError: an unknown tap, or experts that are whole weights behind a router that decides row by row.
    """

    def __init__(self, router: Router, bank: ExpertBank, tap: Literal["input", "output"] = "input") -> None:
        super().__init__()
        if tap not in ("input", "output"):
            raise ConfigError(f"tap must be 'input' or 'output', got {tap!r}.")
        if bank.whole and router.per_row:
            raise ConfigError(
                f"{type(bank).__name__} experts are whole weights of their layer, and {type(router).__name__} decides "
                "row by row: every row would need a product with its own weight. Choose a routing that is constant, or "
                "by task or example, e.g. 'fixed', 'moelora', or 'remix' with granularity='sequence'."
            )
        self.router, self.bank, self.tap = router, bank, tap


class Mixture(nn.Module):
    """y0 = base(x); y = y0 + Σ bank(x or y0, router(x or y0, context)).

    Args:
        base: the frozen layer, (*rows, i) -> (*rows, o).
        branches: what is added.
        scope: gives it the context of what runs; shared by all mixtures of one model.
        name: dotted path of the layer, for traces and messages.

    Attributes:
        why_not_fold: None where a static routing makes it one weight, else the reason.
    """

    why_not_fold: str | None = None

    def __init__(self, base: nn.Module, branches: list[Branch], scope: Scope, name: str) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleList(branches)
        self.scope = scope
        self.name = name

    @property
    def context(self) -> Context:
        """The context of what runs in this thread."""
        return self.scope.current()

    @property
    def weight(self) -> Any:
        """The base's weight (o, i): some models look at its dtype or device. PyTorch's quantised layers unpack it.

        Raises:
            ConfigError: later, where a forward multiplies by it in place of calling this layer.
        """
        weight: Any = self.base.weight
        return shown(weight if isinstance(weight, Tensor) else weight(), self.name)

    @property
    def bias(self) -> Any:
        """The base's bias (o,) or None."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor | None) else bias()

    @property
    def decided_at(self) -> str:
        """Name of the layer whose router decides for this one, on its rows (*rows, i): its own, outside blocks."""
        return self.name

    def __getattr__(self, name: str) -> Any:
        """Return what others read of the base's sizes; `in_features` and `out_features` of every layer, as in peft."""
        if name not in SIZES and name not in FEATURES:
            return super().__getattr__(name)
        base = super().__getattr__("base")
        words = (name, *FEATURES.get(name, ()))
        return getattr(base, next((word for word in words if hasattr(base, word)), name))

    def route(self, branch: Branch, x: Tensor, context: Context) -> Routing:
        """Return the branch's routing of x (*rows, i), and record it if a trace is open."""
        routing: Routing
        if context.pinned is not None:
            routing = branch.router.pinned(x, context.pinned)
        else:
            routing = branch.router(x, context)
            if context.trace is not None:
                self._record(routing, x, branch.router, context)
        if context.ranks is None:
            return routing
        return routing.at(example_rows(context.ranks, x, "ranks", context.images).unsqueeze(-1))

    def _record(self, routing: Routing, x: Tensor, router: Router, context: Context) -> None:
        assert context.trace is not None
        context.trace.add(self, routing, context.mask_for(x), router, context.n_streams)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (*rows, o) for x (*rows, i)."""
        # What is read at every call is read where modules keep it: as an attribute it costs a Python call each time.
        context, modules = self.scope.current(), self._modules
        base: Any = modules["base"]
        branches: Any = modules["branches"]
        if not context.enabled:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if len(branches._modules) == 1 and (context.pinned is None or not context.pinned.has_base):
            (branch,) = branches._modules.values()
            fits = branch.tap == "input" and branch._modules["bank"].rowwise
            plain = plain_weight(base) if fits else None
            if plain is not None:
                return self._add_linear(branch, x, *plain, context)
        base_out = base(x, *args, **kwargs)
        if not isinstance(base_out, Tensor):
            raise ShapeError(
                f"{self.name}: a {type(base).__name__} returns a {type(base_out).__name__}; a mixture adds to one "
                "tensor (*rows, o). Choose the linear layers inside it as targets."
            )
        self.check_differentiable(x, base_out)
        return self.add(x, base_out)

    def kept(self, y: Tensor, y0: Tensor) -> Tensor:
        """Return y (*rows, …) with y0, the base's output, in examples for which the batch names no expert."""
        pinned = self.context.pinned
        return y if pinned is None else pinned.keep_base(y, y0)

    def _add_linear(self, branch: Branch, x: Tensor, weight: Tensor, bias: Tensor | None, context: Context) -> Tensor:
        """Return base and branch together (*rows, o), with the routing in the same step where both sides can."""
        router: Any = branch._modules["router"]
        bank: Any = branch._modules["bank"]
        told = context.pinned is not None or context.ranks is not None
        gate, fused = None if told else router.gate(), bank.fused
        found = None if gate is None else fused.add_gated(x, gate, weight, bias)
        if found is None:
            routing = self.route(branch, x, context)
            y = fused.add_linear(x, routing, weight, bias)
        else:
            y, routing = found
            if context.trace is not None:
                self._record(routing, x, router, context)
        return add_constants(y, bank, routing)

    def check_differentiable(self, x: Tensor, y0: Tensor) -> None:
        """Check that a gradient goes through the base from y0 (*rows, o) to x (*rows, i), if training needs it.

        Raises:
            ConfigError: it does not, as in layers quantised for inference: the layers before it would not learn.
        """
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled() and x.requires_grad):
            return
        if y0.grad_fn is None or "NotImplemented" in y0.grad_fn.name():  # PyTorch's mark of an op without a gradient
            kind = type(self.base)
            raise ConfigError(
                f"{self.name}: no gradient goes through a {kind.__module__}.{kind.__name__}, so what is trained before "
                "it would learn nothing. Train on the base before it was quantised for inference, or quantise it by a "
                "library whose layers are differentiable."
            )

    def add(self, x: Tensor, y0: Tensor) -> Tensor:
        """Return y0 (*rows, o) and what the branches add to it for x (*rows, i)."""
        y, context = y0, self.scope.current()
        for branch in self.branches:
            assert isinstance(branch, Branch)
            source = x if branch.tap == "input" else y0
            routing = self.route(branch, source, context)
            seen = self.seen_by(branch.bank, source)
            y = add_constants(y + branch.bank(seen, routing).to(y.dtype), branch.bank, routing)
        return y if context.pinned is None else context.pinned.keep_base(y, y0)

    def seen_by(self, bank: ExpertBank, x: Tensor) -> Tensor:
        """Return x (*rows, i), the rows of padding zero where experts look at the rows around them."""
        mask = None if bank.rowwise else self.context.mask_for(x)
        return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)

    def slices(self) -> list[Slice]:
        """Return the parameters of the base that the branches change, (o, i) or several such in one tensor."""
        return [Slice("weight", "bias", [self])]

    def stored(self, part: Slice, changes: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """Return the changes (o, i) and (o,) or None of a part's layers as the base stores them, by parameter."""
        change, shift = changes[0]
        return {part.weight: as_weight(self.base, change)} | ({} if shift is None else {part.bias: shift})

    def is_dense(self) -> bool:
        """Return whether the base holds its weights (o, i) as floats, and has them at hand."""
        weight = matrix(self.base)
        return weight is not None and not weight.is_meta

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"name={self.name!r}"


@dataclass(frozen=True)
class Slice:
    """A parameter of a base and what changes it.

    Args:
        weight: the parameter's name in the base.
        bias: the name of the bias beside it, which may not exist.
        layers: one for each matrix (o, i) in it, with the branches that change this one.
    """

    weight: str
    bias: str
    layers: list[Mixture]


class BlockMixture(Mixture):
    """The same after a block: y0 is the block's output (B, S, d), or the first of a tuple; what follows it passes."""

    why_not_fold = "it adds to the output of a whole block, which has no one weight"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, its hidden state (B, S, d) with what the branches add."""
        out = self.base(*args, **kwargs)
        if not self.context.enabled:
            return out
        hidden = out if isinstance(out, Tensor) else out[0]
        if not isinstance(hidden, Tensor):
            raise ShapeError(
                f"{self.name}: a {type(self.base).__name__} returns a {type(hidden).__name__} first; experts after a "
                "block need one whose output is, or begins with, a tensor (B, S, d)."
            )
        y = self.add(hidden, hidden)
        return y if isinstance(out, Tensor) else (y, *out[1:])

    def __getattr__(self, name: str) -> Any:
        """Return what models read of a block, such as its kind of attention; no tensors of a shape of its own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class ConvMixture(Mixture):
    """The same on a convolution: rows are its places, x's features the patches under its kernel.

    Every router and bank works here as on a linear layer, and a static mixture folds exactly, because a convolution is
    a linear layer on patches. Routers see one row per place, (B, L, C · kernel).

    The patches are a copy of x, kernel / stride² times its size (1 for a patch embedding, 9 for 3 × 3 at stride 1),
    which training keeps for the backward pass. A convolution of rank r in their place would avoid the copy, but every
    family would need a second forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (B, o, *places) for x (B, C, *size)."""
        base_out: Tensor = self.base(x, *args, **kwargs)
        if not self.context.enabled:
            return base_out
        self.check_differentiable(x, base_out)
        return self.add(patches(self.base, x), base_out.flatten(2).mT).mT.reshape(base_out.shape)


def add_constants(y: Tensor, bank: ExpertBank, routing: Routing) -> Tensor:
    """Return y (*rows, o) with the constants of its experts, weighted by a routing: this is the only place they enter.

    Args:
        y: with the bank's mixture in it.
        bank: whose `constants` are (E, o), or None.
        routing: whose rows broadcast against y's.
    """
    constants = bank.constants()  # (E, o)
    return y if constants is None else y + routing.dense().to(y.dtype) @ constants.to(y.dtype)


def plain_weight(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return (weight (o, i), bias (o,) or None) of a frozen dense linear, or None for any other base.

    A quantised, hooked, offloaded or trainable base is not plain: it runs its own forward.
    """
    if type(base) is not nn.Linear and not is_conv1d(base):
        return None
    if is_watched(base) or "forward" in vars(base):  # replaced on the instance, as accelerate does to move weights
        return None
    parameters: Any = base._parameters  # reading them as attributes of a module costs a Python call each
    weight = parameters.get("weight")
    if not is_dense(weight) or weight.requires_grad:
        return None
    return weight if type(base) is nn.Linear else weight.T, parameters.get("bias")
