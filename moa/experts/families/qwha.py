"""Sparse experts in the Walsh-Hadamard domain, for quantised bases. Jeon et al. 2025 (QWHA), arXiv 2509.17428."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import Changes, change_mixture
from ...kernels.units import routed_units
from ...kernels.walsh import kronecker_rows
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import generator
from ..hadamard import hadamard, orders
from ..sparse import EntriesBank, check_density, n_entries, random_places
from ..structured import Tensors

MASKS = ("random", "given")
TRANSFORM = 225  # of a number, in products of a matrix product, with its backward pass: measured on one CPU core


class QWHABank(EntriesBank):
    """E changes of few coefficients over one transform: E_e(x) = s · F_e (H^T x / √i), ΔW_e = s · F_e H^T / √i.

    F_e = scatter(places_e, values_e) is (o, i), and H (i, i) a Hadamard matrix, H H^T = i I, a product of small blocks.
    Where rows choose their experts, x is transformed once for all of them.

    Args:
        d_in: i.
        d_out: o.
        places: (E, n), distinct within an expert.
        stored: the places go into a checkpoint: no seed gives them again.
        options: scaling and dropout as in `ExpertBank`.

    Source: arXiv 2509.17428, §3, and its released code.
    Differs: there ΔW = s F H⁻¹ / √o with s = 4000; here H / √i is orthogonal, so that ‖ΔW‖ is s ‖F‖ on layers
        of any size, and s = 1 is theirs where √(i o) is 4000. Their code forms ΔW in every step.
    """

    def __init__(self, d_in: int, d_out: int, places: Tensor, stored: bool = False, **options: Any) -> None:
        super().__init__(d_in, d_out, places, stored, **options)
        self.n_blocks = len(orders(d_in))
        for number, order in enumerate(orders(d_in)):
            self.register_buffer(f"block_{number}", hadamard(order), persistent=False)

    def transform(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Return H^T x / √i, (*rows, i), of x (*rows, i); or H x / √i, its inverse."""
        return kronecker_rows(x, [getattr(self, f"block_{number}") for number in range(self.n_blocks)], inverse)

    def spectrum(self, tensors: Tensors) -> Tensor:
        """Return s · F (o, i) of one expert's tensors."""
        return self.matrix(tensors) * self.scaling

    def on_spectrum(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return s · F x, (*rows, o), of one expert on rows that are transformed, (*rows, i)."""
        return self.times(x, {**tensors, "values": tensors["values"] * self.scaling})

    def change(self, tensors: Tensors) -> Tensor:
        """Return ΔW (o, i) of one expert."""
        return self.transform(self.spectrum(tensors), inverse=True)

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of x (*rows, i), without ΔW."""
        return self.on_spectrum(self.transform(x), tensors)

    def spectra(self, x: Tensor) -> Changes:
        """Return what the kernel needs on rows that are transformed, (*rows, i)."""
        known = self.changes(x)
        apply = None if known.apply is None else self.on_spectrum
        known = dataclasses.replace(known, form=self.spectrum, apply=apply)
        return self.by_entries(known, x, self.scaling)

    def is_one_weight(self, x: Tensor, routing: Routing) -> bool:
        """Return whether all rows of x (*rows, i) share a routing, and are so many that forming ΔW (o, i) costs less.

        The other way transforms the n rows in place of E o rows, and takes a second product of n o i with the base's.
        """
        n_rows, formed = x.shape[:-1].numel(), self.n_experts * self.d_out
        return not routed_units(x, routing.weights) and n_rows * (self.d_out + TRANSFORM) > formed * TRANSFORM

    def mix_changes(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e ΔW_e x, (*rows, o), of x (*rows, i), which is transformed once."""
        if self.is_one_weight(x, routing):
            return super().mix_changes(x, routing)
        x = self.transform(x)
        return change_mixture(x, routing.weights, routing.indices, self.spectra(x))

    @property
    def starts(self) -> tuple[str, ...]:
        """Where the coefficients (E, n) can start: nowhere else where a seed must give their places again."""
        return () if "places" in self._non_persistent_buffers_set else ("qwha",)

    @torch.no_grad()
    def begin_at(self, method: str, start: Tensor) -> None:
        """Let all experts start at coefficients: a sparse tensor (o, i) of n entries, F H^T / √i being the change."""
        start = start.coalesce()
        rows, columns = start.indices()
        self.places.copy_(rows * self.d_in + columns)
        self.values.copy_(start.values() / self.scaling)


@register_expert("qwha", "Jeon et al. 2025, arXiv 2509.17428")
@dataclass(frozen=True, kw_only=True)
class QWHA(Family):
    """A few Walsh-Hadamard coefficients of the change, wherever they are: high rank, also over a quantised base.

    Args:
        density: share of the o · i coefficients that each expert trains; 0 is rank · (o + i) of them, as many as a LoRA
            of that rank has.
        mask: "random" from the seed, or "given": chosen by whoever sets them, such as
            `moa.initialize(model, data, "qwha", original=…)`, which restores what quantising the base lost, and stored.
        scale: s, on an orthogonal transform.
        seed: of the random places; every layer and expert draws its own.

    Raises:
        ConfigError: an unknown mask, a density outside [0, 1], a scale that is not above 0, more coefficients than
            there are, or a layer of i inputs for which there is no Hadamard matrix; the nearest are named.

    Differs: the released code draws the same places in every layer of one shape, and stores them.
    """

    uses = ("rank", "dropout")

    density: float = 0.0
    mask: Literal["random", "given"] = "random"
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ConfigError(f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}.")
        check_density(self.density)
        if self.scale <= 0:
            raise ConfigError(f"scale must be above 0, got {self.scale}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with values and places (E, n).

        Raises:
            ConfigError: more coefficients than there are, or no Hadamard matrix.
        """
        try:
            orders(site.d_in)
        except ConfigError as error:
            raise ConfigError(
                f"{site.name}: QWHA transforms its {site.d_in} inputs. {error} Leave the layer out of targets."
            ) from error
        count, draw = n_entries(site, self.density, options["rank"]), generator(self.seed, site.name)
        places = torch.stack([random_places(site.d_out * site.d_in, count, draw) for _ in range(n_experts)])
        own = {**options, "scaling": self.scale}
        return QWHABank(site.d_in, site.d_out, places, self.mask == "given", **own)
