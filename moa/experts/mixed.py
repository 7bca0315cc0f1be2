"""Experts of several families, or of several ranks, behind one router: what a recipe's lists mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigError
from ..layers import Site
from ..tables import COMMON
from .bank import ExpertBank
from .family import Family, family_class, make_family
from .mixed_bank import MixedBank, MixedFactorsBank

T = TypeVar("T")
Kinds = str | Family | Sequence[str | Family | Mapping[str, Any]] | Mapping[str, int]  # what `expert` may be


@dataclass(frozen=True, kw_only=True)
class Mixed(Family):
    """Experts of several families or ranks in one bank; a recipe makes it of `expert=[…]` and `rank=[…]`.

    Experts of one family, its keywords and its rank are together in one member bank.

    Args:
        families: one for each expert.

    Raises:
        ConfigError: families that have no place in common.
    """

    families: tuple[Family, ...] = ()

    def __post_init__(self) -> None:
        places = [place for place in self.families[0].places if all(place in f.places for f in self.families)]
        if not places:
            said = (f"{name!r} on {' or '.join(where)}" for name, where in {f.name: f.places for f in self}.items())
            raise ConfigError(
                f"the experts of one bank sit at one place, and these have none in common: {'; '.join(said)}. Choose "
                "other families, or give router= a list of recipes, one for each place."
            )
        uses = [word for word in COMMON if any(word in f.uses for f in self.families)]
        object.__setattr__(self, "name", " + ".join(dict.fromkeys(f.name for f in self.families)))
        object.__setattr__(self, "places", tuple(places))
        object.__setattr__(self, "uses", tuple(uses))

    def __iter__(self) -> Any:
        return iter(self.families)

    def of(self, expert: int) -> Family:
        """Return the family of an expert; no tensors, so no shapes."""
        return self.families[expert]

    def described(self) -> Any:
        """Return one name for each expert, with the family's keywords where it has some; plain values."""
        return [{"family": f.name, **f.keywords()} if f.keywords() else f.name for f in self.families]

    def keywords(self) -> dict[str, Any]:
        """Return nothing: the families' own keywords stand in `described`; no tensors, so no shapes."""
        return {}

    def place_of(self, name: str, place: str) -> str:
        """Return where the experts of one layer (i -> o) sit.

        Raises:
            ConfigError: families that sit on it at different places.
        """
        found = {f.place_of(name, place): f.name for f in self.families}
        if len(found) > 1:
            said = ", ".join(f"{family!r} on its {where}" for where, family in found.items())
            raise ConfigError(f"{name}: the experts of one bank sit at one place, and here they would be {said}.")
        return next(iter(found))

    def _members(self, each: Sequence[Mapping[str, Any]]) -> list[tuple[Family, Mapping[str, Any], list[int]]]:
        """Return family, options and experts of each member bank."""
        found: list[tuple[Family, Mapping[str, Any], list[int]]] = []
        for expert, (family, options) in enumerate(zip(self.families, each, strict=True)):
            alike = (n for f, o, n in found if f == family and ("rank" not in f.uses or o == options))
            numbers = next(alike, None)
            if numbers is None:
                found.append((family, options, [expert]))
            else:
                numbers.append(expert)
        return found

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module | None:
        """Return what the members share over all layers (*rows, i) -> (*rows, o), or None.

        Args:
            sites: all layers of the recipe, in order.
            options: "each", the options of every expert.
        """
        found = {
            str(number): made
            for number, (family, own, _) in enumerate(self._members(options["each"]))
            if (made := family.shared(sites, **own)) is not None
        }
        return SharedByMembers(found) if found else None

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank, (*rows, i) -> (*rows, o), for a site.

        Args:
            site: its layer, sizes and weight (o, i).
            n_experts: E.
            shared: what `shared` made, or None.
            options: "each", the options of every expert.

        Raises:
            ConfigError: another number of experts than there are families.
        """
        each = options["each"]
        if n_experts != len(self.families):
            raise ConfigError(
                f"{site.name}: this layer has {n_experts} experts, and there are kinds for {len(self.families)}: "
                "choose targets whose layers all get the mixture."
            )
        owned = dict(shared.named_children()) if shared is not None else {}
        members, numbers = [], []
        for number, (family, own, experts) in enumerate(self._members(each)):
            inner = owned.get(str(number))
            where = dataclasses.replace(site, shared={} if inner is None else {"experts": inner})
            members.append(family.build(where, len(experts), inner, **{**own, "dropout": 0.0}))
            numbers += experts
        order = sorted(range(n_experts), key=numbers.__getitem__)
        kind = MixedFactorsBank if MixedFactorsBank.fits(members) else MixedBank
        return kind(members, order, dropout=each[0]["dropout"], engine=each[0]["engine"])


class SharedByMembers(nn.ModuleDict):
    """What the member banks share over all layers, each its own, by the member's number; no tensors of its own."""

    def step(self) -> None:
        """Let each of them take its step, (…) to (…), after a step of the optimizer."""
        for module in self.values():
            step: Any = getattr(module, "step", None)
            if step is not None:
                step()


def in_turn(name: str, values: Sequence[T], n_experts: int) -> tuple[T, ...]:
    """Return one value for each expert of a list that is gone through in turn; no tensors, so no shapes.

    Raises:
        ConfigError: an empty list, or one whose length does not divide E; the nearest E that it divides is named.
    """
    size = len(values)
    if size == 0 or n_experts % size:
        near = sorted({max(1, n_experts // size) * size, (n_experts // size + 1) * size}) if size else []
        fits = f" {size} values fit n_experts={' or '.join(map(str, near))}." if near else ""
        raise ConfigError(
            f"{name} is a list of {size} values, which {n_experts} experts take in turn: its length must divide their "
            f"number.{fits}"
        )
    return tuple(values) * (n_experts // size)


def kinds(expert: Any) -> tuple[Any, ...] | None:
    """Return the names of a list or of counts, one for each expert or fewer, or None for a single one; plain values.

    Raises:
        ConfigError: neither a name, nor a list, nor counts of at least 1.
    """
    if isinstance(expert, str | Family):
        return None
    if isinstance(expert, Mapping):
        wrong = [n for n in expert.values() if not isinstance(n, int) or isinstance(n, bool) or n < 1]
        if not expert or wrong or not all(isinstance(name, str) for name in expert):
            raise ConfigError(
                f"expert must say how many experts a family has, {{'lora': 4, 'shira': 4}}, got {expert!r}."
            )
        return tuple(name for name, count in expert.items() for _ in range(count))
    if not isinstance(expert, Sequence) or not expert:
        raise ConfigError(f"expert must be the name of a family, a list of names, or counts, got {expert!r}.")
    return tuple(expert)


def kind_of(one: Any, own: Mapping[str, Any]) -> tuple[Family, set[str]]:
    """Return the family of one entry of a list, and which of the given keywords it took; no tensors, so no shapes.

    Args:
        one: a name, a family, or {"family": name, keyword: value}.
        own: keywords that stand beside the recipe's, for every family that has them.

    Raises:
        ConfigError: an unknown name or keyword, or a value out of range.
    """
    if isinstance(one, Family):
        return one, set()
    row = dict(one) if isinstance(one, Mapping) else {"family": one}
    name = row.pop("family", None)
    if not isinstance(name, str):
        raise ConfigError(f"an entry of expert must be a name, or {{'family': name, keyword: value}}, got {one!r}.")
    known = {field.name for field in dataclasses.fields(family_class(name))}
    given = {key: value for key, value in own.items() if key in known}
    return make_family(name, {**given, **row}), set(given)


def families_of(expert: Any) -> list[type[Family]]:
    """Return the classes of the families that `expert` names; no tensors, so no shapes.

    Raises:
        ConfigError: an unknown name, or none.
    """
    entries = kinds(expert)
    found = []
    for one in (expert,) if entries is None else entries:
        name = one.get("family") if isinstance(one, Mapping) else one
        found.append(type(name) if isinstance(name, Family) else family_class(str(name)))
    return list(dict.fromkeys(found))


def names_in(expert: Any) -> list[str]:
    """Return the names of families, each once, in what a file says `expert` is; plain values."""
    entries = expert if isinstance(expert, Sequence) and not isinstance(expert, str) else [expert]
    return list(dict.fromkeys(str(one.get("family") if isinstance(one, Mapping) else one) for one in entries))
