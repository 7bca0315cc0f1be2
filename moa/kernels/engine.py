"""What an engine is: the operands that it is given, what it returns, and the table of those that are known.

An engine is a module (or any object) with the functions of `Engine`. Another package adds one by a single call:

    register_engine("mine", "mypackage.mine", devices=("cuda",), package="mypackage")

Its module is imported when the engine is first used or asked about.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..errors import BackendError, unknown_name
from .dtypes import cast_all

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Ability = Literal["slots", "few_rows", "routed"]


class Operands(NamedTuple):
    """What one mixture is formed of: y = Σ_j weights_j · (x a[e_j]ᵀ) b[e_j] (+ x baseᵀ + bias), rows flat.

    Args:
        x: (T, i). In a backward pass None, unless a gradient of a is asked for.
        a: (E, r, i) down factors.
        b: (E, r, o) up factors, stored transposed: concatenations over experts are views of both.
        weights: (T, K); rows may be broadcast with stride 0. Where one is 0 its expert is not active on the row.
        indices: (T, K) int64 expert of each slot, repeated ones add; None means all of them, K = E.
        base: (o, i) weight of the frozen linear beneath, or None.
        bias: (o,) of the frozen linear, or None. It is there in forward passes only.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor
    indices: Tensor | None
    base: Tensor | None = None
    bias: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Operands:
        """Return these operands in one dtype, but for the weights and indices, which keep their own."""
        values = (self.x, self.a, self.b, self.base, self.bias)
        for value in values:
            if value is not None and value.dtype != dtype:
                x, a, b, base, bias = cast_all(dtype, *values)
                return Operands(x, a, b, self.weights, self.indices, base, bias)
        return self


class Engine(Protocol):
    """What every engine has. Operands arrive in one dtype, on one device, checked."""

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """Return y (T, o), new, and the hidden values x a[e_j]ᵀ of the slots (T, K, r), which backward is given."""

    def backward(self, grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]) -> Gradients:
        """Return the gradients of x, a, b and weights, None for each that `needs` does not ask for.

        Args:
            grad: (T, o) gradient of y, contiguous.
            operands: those of the forward pass, without the bias.
            hidden: (T, K, r) of the forward pass; None unless a gradient of b or the weights is asked for.
            needs: whether each of x, a, b, weights needs its gradient.
        """

    def why_not(self) -> str | None:
        """Return why the engine cannot run here, one sentence with what to install, or None if it can."""


class SlotEngine(Protocol):
    """The ability "slots": the two halves of a mixture apart, for `grouped_linear` and `grouped_sum`."""

    def slot_products(self, x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
        """Return x[t] factors[e]ᵀ of each slot, (T, K, p), for x (T, i), factors (E, p, i) and e = indices[t, j]."""

    def slot_gradients(
        self, grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: Sequence[bool]
    ) -> list[Tensor]:
        """Return the gradients of x and factors that `needs` asks for, from that of `slot_products`, (T, K, p)."""


class FewRowsEngine(Protocol):
    """The ability "few_rows": a way with fewer calls on a CPU, up to FEW_ROWS rows, where calls are what costs."""

    FEW_ROWS: int

    def few_rows(self, operands: Operands, scaling: float, dtype: torch.dtype) -> Tensor:
        """Return y (*rows, o) in x's dtype, its mixture times scaling and formed in a dtype, by ops with gradients.

        Rows need not be flat: x is (*rows, i), and weights and indices broadcast against its rows.

        Raises:
            IndexError, RuntimeError: an index names no expert, or rows do not fit; they are not checked before.
        """


class RoutedEngine(Protocol):
    """The ability "routed": the router's logits ride in the experts' pass over x, for `gated_linear`."""

    def routed(
        self,
        x: Tensor,
        gate: Tensor,
        a: Tensor,
        b: Tensor,
        k: int,
        scaling: float,
        base: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """Return y (T, o), logits (T, E), weights and indices (T, K) and hidden (T, K, r), or None: not for these rows.

        The routing is the softmax over the k largest logits x gateᵀ, the gate (E, i); y's weights are it times scaling.
        """


# What a module has to hold beside `Engine` for an ability. One whose 16-bit products on a CPU are PyTorch's own may say
# PLAIN = True: it is then given fp32 where the hardware has no such products.
_ABILITIES: dict[Ability, tuple[str, ...]] = {
    "slots": ("slot_products", "slot_gradients"),
    "few_rows": ("FEW_ROWS", "few_rows"),
    "routed": ("routed",),
}


@dataclass(frozen=True)
class _Row:
    module: str
    devices: tuple[str, ...] | None
    package: str | None


_ROWS: dict[str, _Row] = {}


def register_engine(name: str, module: str, devices: Sequence[str] | None = None, package: str | None = None) -> None:
    """Make an engine known by name, for `engine=` everywhere; nothing is imported yet.

    Args:
        name: that users give.
        module: dotted path of the module that holds the functions of `Engine`.
        devices: types of device it runs on, as ("cuda",); None means every one that PyTorch runs on.
        package: the package that has to be installed for it, or None.

    Raises:
        BackendError: another engine has that name, or PyTorch knows no such device.
    """
    for device in devices or ():
        try:
            torch.device(device)
        except RuntimeError as error:
            raise BackendError(f"engine {name!r}: there is no such device {device!r}: {error}") from error
    row = _Row(module, None if devices is None else tuple(devices), package)
    if _ROWS.setdefault(name, row) != row:
        raise BackendError(f"engine {name!r} is {_ROWS[name].module} already: register {module} by another name.")


def engines() -> dict[str, str | None]:
    """Return every engine's name with None if it can run here, else the reason why not and what to install.

    Returns:
        One entry for each engine; a reason is one sentence.
    """
    return {name: why_not(name) for name in _ROWS}


def get_engine(name: str, device: str | None = None, ability: Ability | None = None) -> Any:
    """Return the module that implements an engine.

    Args:
        name: one of `engines()`.
        device: type of the device that the operands are on; None: not known.
        ability: what it has to have beside a whole mixture.

    Raises:
        BackendError: the name is not known, the engine cannot run here or on that device, or it has not the ability.
    """
    if name not in _ROWS:
        raise BackendError(unknown_name("engine", name, _ROWS, "moa.kernels"))
    reason = why_not(name)
    if reason is not None:
        raise BackendError(f"engine {name!r} cannot run here: {reason}")
    devices = _ROWS[name].devices
    if device is not None and devices is not None and device not in devices:
        raise BackendError(
            f"engine {name!r} runs on {', '.join(devices)}, and the operands are on {device}: move them, or use "
            "engine 'concat'."
        )
    if ability is not None and ability not in abilities(name):
        able = [other for other, reason in engines().items() if reason is None and ability in abilities(other)]
        raise BackendError(
            f"engine {name!r} runs whole mixtures only: it has not the ability {ability!r}, as {', '.join(able)} have."
        )
    return _module(name)


@functools.cache
def why_not(name: str) -> str | None:
    """Return why an engine that is known cannot run here, or None if it can."""
    row = _ROWS[name]
    if row.package is not None and importlib.util.find_spec(row.package) is None:
        return f"it needs the package {row.package}, which is not installed: pip install {row.package}."
    if row.devices is not None and not any(map(_is_here, row.devices)):
        return f"it needs a {' or '.join(row.devices).upper()} device, and torch sees none."
    try:
        module = _module(name)
    except ImportError as error:
        return f"its module {row.module} cannot be imported: {error}."
    missing = [function for function in ("forward", "backward", "why_not") if not hasattr(module, function)]
    if missing:
        return f"its module {row.module} has no {' and no '.join(missing)}: see moa.kernels.engine.Engine."
    return module.why_not()


@functools.cache
def abilities(name: str) -> frozenset[Ability]:
    """Return what an engine that can run here has beside a whole mixture."""
    module = _module(name)
    return frozenset(a for a, functions in _ABILITIES.items() if all(hasattr(module, f) for f in functions))


def has_slots(name: str | None) -> bool:
    """Return whether `grouped_linear` and `grouped_sum` run by an engine; None, where the sizes choose, always does.

    Raises:
        BackendError: the name is not known, or the engine cannot run here.
    """
    if name is None:
        return True
    get_engine(name)
    return "slots" in abilities(name)


@functools.cache
def _module(name: str) -> Engine:
    return cast(Engine, importlib.import_module(_ROWS[name].module))


def _is_here(device: str) -> bool:
    module = getattr(torch, device, None)
    return device == "cpu" or (module is not None and module.is_available())
