"""Leave out some of the layers that targets name: by a module around them, or by the number of their block."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError
from ..layers import Site, features


@dataclass(frozen=True)
class Narrowing:
    """Which of the layers that targets name get experts.

    Args:
        exclude: a list of name endings or a regex on the whole name, of layers and of modules around them: "vision"
            in a list leaves out a tower of that name.
        layers: numbers of the blocks whose layers are kept, counted as in the layers' names; None keeps all. A block's
            number is the first one in a name.
        layers_pattern: names of the lists of blocks that `layers` counts, one or several, each a regex: "layers" where
            "h" or "blocks" are counted apart.

    Raises:
        ConfigError: a value of another type, negative or empty layers, or a pattern without layers.
    Differs: peft's `exclude_modules` sees a layer's own name only, and its `layers_to_transform` wants a module's name
        before the list of blocks and refuses targets that are a string.
    """

    exclude: str | tuple[str, ...] = ()
    layers: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("exclude", "layers_pattern"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else [] if value is None else value
            if not isinstance(texts, (list, tuple)) or not all(text and isinstance(text, str) for text in texts):
                raise ConfigError(f"{name} must be text or a list of texts, got {value!r}.")
        known = self.layers is None or isinstance(self.layers, int | tuple)
        counted = known and all(type(number) is int and number >= 0 for number in self.numbers)
        if not counted or self.layers == ():
            raise ConfigError(f"layers must be a block's number from 0 or a list of them, got {self.layers!r}.")
        if self.layers_pattern and self.layers is None:
            raise ConfigError(f"layers_pattern={self.layers_pattern!r} changes nothing: it needs layers.")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The blocks kept, as a list."""
        if self.layers is None:
            return ()
        return (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)

    def of(self, model: nn.Module, sites: Sequence[Site]) -> list[Site]:
        """Return the sites (*rows, i) -> (*rows, o) that stay, in order.

        Args:
            model: that they are in.
            sites: layers or blocks that targets name.

        Raises:
            ConfigError: a name in `exclude` that no module has, a block that none of the sites is in, or nothing stays.
        """
        kept = list(sites)
        wanted = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        for text in wanted:
            named = {name for name, _ in model.named_modules() if name and self._excludes(name, text)}
            if not named:
                raise ConfigError(_no_module(model, text, listed=not isinstance(self.exclude, str)))
            kept = [site for site in kept if not named & set(_around(site.name))]
        if sites and not kept:
            raise ConfigError(f"exclude={self.exclude!r} leaves none of the {len(sites)} layers that the targets name.")
        if self.layers is None:
            return kept
        numbers = {site.name: self._number(site) for site in kept}
        found = sorted({number for number in numbers.values() if number is not None})
        missing = [number for number in self.numbers if number not in found]
        if missing:
            where = f" of {self.layers_pattern!r}" if self.layers_pattern else ""
            there = f"in blocks numbered {_ranges(found)}" if found else "in no numbered block"
            raise ConfigError(
                f"layers={self.layers!r}: the layers that the targets name are {there}{where}; "
                f"{', '.join(map(str, missing))} is not among them."
            )
        return [site for site in kept if numbers[site.name] in self.numbers]

    def _excludes(self, name: str, text: str) -> bool:
        return bool(pattern("exclude", text).fullmatch(name)) if isinstance(self.exclude, str) else ends_in(name, text)

    def _number(self, site: Site) -> int | None:
        """Return the number of the block that a site is in, or is."""
        path = site.name if features(site.module) is None else site.name.rpartition(".")[0]
        if not self.layers_pattern:
            return next((int(part) for part in path.split(".") if part.isdigit()), None)
        for text in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern:
            found = pattern("layers_pattern", rf"(?:^|.*?\.)(?:{text})\.(?P<number>\d+)(?:\.|$)").match(path)
            if found:
                return int(found["number"])
        return None


def ends_in(name: str, target: str) -> bool:
    """Tell whether a dotted name is target or ends in it; no tensors, so no shapes."""
    return name == target or name.endswith(f".{target}")


def pattern(keyword: str, text: str) -> re.Pattern[str]:
    """Return a keyword's regex; no tensors, so no shapes.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{keyword}={text!r} is not a regular expression: {error}.") from error


def _around(name: str) -> list[str]:
    """Return a dotted name and those of all modules around it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _no_module(model: nn.Module, text: str, *, listed: bool) -> str:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    near = difflib.get_close_matches(text.rpartition(".")[2], sorted(n for n in names if n and not n.isdigit()), n=3)
    hint = f" Near: {', '.join(near)}." if near else ""
    how = "" if listed else " A string is a regex on the whole name; a list holds name endings."
    return f"exclude={text!r} matches no module of {type(model).__name__}.{hint}{how}"


def _ranges(numbers: list[int]) -> str:
    """Return numbers in order as text, runs of them as "0 to 3"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
