"""What is trained whole beside the experts, and the values with which it came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..errors import ConfigError


class Whole:
    """Modules of a base that are trained whole, e.g. a head (d -> C), and a copy of each as it came.

    Args:
        base: holds them.
        name: dotted path of one of them.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        self.module = base.get_submodule(name)
        self.base, self.name = base, name
        self.flags = [(p, p.requires_grad) for p in self.module.parameters()]
        self.came = [(t, t.detach().clone()) for t in (*self.module.parameters(), *self.module.buffers())]
        self.module.requires_grad_(True)

    def restore(self) -> None:
        """Give the base its module back, with its tensors (any shape) as they came."""
        self._put(self.module)
        for tensor, value in self.came:
            tensor.data = value.to(tensor)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def as_it_came(self) -> Iterator[None]:
        """Run with the module as it came inside the block; its trained tensors (any shape) are back afterwards."""
        now = self.base.get_submodule(self.name)
        trained: list[tuple[Tensor, Tensor]] = [(tensor, tensor.data) for tensor, _ in self.came]
        self._put(self.module)
        for tensor, value in self.came:
            tensor.data = value.to(tensor)
        try:
            yield
        finally:
            for tensor, value in trained:
                tensor.data = value
            self._put(now)

    def _put(self, module: nn.Module) -> None:
        parent, _, child = self.name.rpartition(".")
        setattr(self.base.get_submodule(parent), child, module)


def whole_names(base: nn.Module, name: str) -> list[str]:
    """Return the dotted paths of a base's modules (*rows, d) -> (*rows, C) that a name means.

    Args:
        base: holds them.
        name: a dotted path, or the end of some, as in peft.

    Raises:
        ConfigError: the base has no such module.
    """
    paths = [path for path, _ in base.named_modules()]
    found = [name] if name in paths[1:] else [path for path in paths if path.endswith(f".{name}")]
    if not found:
        raise ConfigError(f"modules_to_save names {name!r}, which {type(base).__name__} does not have.")
    return found


@contextlib.contextmanager
def as_they_came(modules: Sequence[Whole]) -> Iterator[None]:
    """Run with modules that are trained whole as they came, each (*rows, d) -> (*rows, C), inside the block."""
    with contextlib.ExitStack() as stack:
        for whole in modules:
            stack.enter_context(whole.as_it_came())
        yield
