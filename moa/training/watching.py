"""What passes through adapted layers while the base runs without its experts: their inputs and outputs, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..layers import is_convolution, patches
from ..mixture import Mixture

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

Watch = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def base_watched(model: MoAModel, layers: Mapping[str, Mixture], watch: Watch) -> Iterator[None]:
    """Run the base alone inside the block, in evaluation mode and with nothing trained, and look at some layers.

    Args:
        model: as it was before and after.
        layers: that are looked at.
        watch: called with a layer's name, its input x (*rows, i) and its output (*rows, o), for a convolution as they
            are outside it; what it returns takes the output's place.
    """
    was = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        for name, mixture in layers.items():
            hook = _hook(name, watch)
            stack.callback(mixture.register_forward_hook(hook).remove)
        try:
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            with model.disable_adapter():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, mode in was:
                module.training = mode


def _hook(name: str, watch: Watch) -> Callable[..., Any]:
    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return watch(name, inputs[0], output)

    return hook


def rows_in(mixture: Mixture, x: Tensor) -> Tensor:
    """Return a layer's input x as rows (T, i) that its weight (o, i) multiplies; those of padding are left out."""
    rows = patches(mixture.base, x) if is_convolution(mixture.base) else x
    mask = mixture.context.mask_for(rows)
    return rows[mask] if mask is not None else rows.flatten(0, -2)


def rows_out(mixture: Mixture, y: Tensor) -> Tensor:
    """Return what has the shape of a layer's output as rows (T, o), padding included."""
    return (y.flatten(2).mT if is_convolution(mixture.base) else y).flatten(0, -2)
