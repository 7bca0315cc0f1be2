"""The keywords that say on which layers of a base a recipe's experts sit."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from torch import nn

from ..mixture import Narrowing, Site, find_blocks, find_sites, find_sublayers


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Where the experts sit.

    Args:
        targets: "all-linear", "ffn", "attention", "moe-experts", a tuple of name endings, or a regex on the whole name;
            the last two find convolutions too.
        exclude: layers, or modules around them such as a tower, that get no experts: name endings, or a regex on the
            whole name.
        layers: numbers of the blocks whose layers get experts, as in the layers' names; None is all.
        layers_pattern: names of the lists of blocks that `layers` counts, where there are several kinds.

    Raises:
        ConfigError: a value of another type, no or negative layers, or a pattern without layers.
    """

    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, Set):  # the keys of a mapping too
                object.__setattr__(self, name, tuple(sorted(value)))
            elif isinstance(value, Iterable) and not isinstance(value, str | tuple):
                object.__setattr__(self, name, tuple(value))
        if self.exclude is None:  # as in peft's configurations
            object.__setattr__(self, "exclude", ())
        self._narrowing()

    def _narrowing(self) -> Narrowing:
        return Narrowing(self.exclude, self.layers, self.layers_pattern)

    def sites_at(self, base: nn.Module, where: str = "input") -> list[Site]:
        """Return the layers of a base, (*rows, i) -> (*rows, o), that get experts, or the blocks; in order.

        Args:
            base: any module.
            where: "block" for blocks; "sequential" for the last layer of each sub-layer, "parallel" for its first and
                last in turn.

        Raises:
            ConfigError: there are none, or a keyword names what the base does not have.
        """
        if where in ("sequential", "parallel"):
            pairs = find_sublayers(base, self.targets, self._narrowing())
            return [site for pair in pairs for site in (pair if where == "parallel" else pair[1:])]
        find = find_blocks if where == "block" else find_sites
        return find(base, self.targets, self._narrowing())
