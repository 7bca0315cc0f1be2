"""Weights as they were before a base was quantised, by the names of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import ConfigError
from ..formats.tensor_files import Checkpoint
from ..layers import Site, features, is_conv1d

Original = nn.Module | Mapping[str, Tensor] | str | Path


class Originals:
    """The weights of the model that a base was quantised from, read one at a time.

    A layer is found by its name, also where one of the two models stands inside another: "encoder.layer.0.query" is
    "bert.encoder.layer.0.query".

    Args:
        original: that model; its tensors by name, "encoder.layer.0.query.weight" and so on; or a folder or file of
            safetensors.

    Raises:
        CheckpointError: a folder or file that cannot be read.
    """

    def __init__(self, original: Original) -> None:
        self.held: Mapping[str, Tensor | nn.Module]
        if isinstance(original, nn.Module):
            layers = original.named_modules()
            self.held = {f"{name}.weight": module for name, module in layers if features(module) is not None}
        else:
            self.held = original if isinstance(original, Mapping) else Checkpoint(original)

    def key(self, layer: str) -> str:
        """Return under which name a layer's weight is held; no tensors, so no shapes.

        Raises:
            ConfigError: under none, or under several.
        """
        wanted = f"{layer}.weight"
        if wanted in self.held:
            return wanted
        found = [key for key in self.held if key.endswith(f".{wanted}") or wanted.endswith(f".{key}")]
        if len(found) == 1:
            return found[0]
        said = f"{found[0]} and {found[1]} could both be it" if found else "there is none among them"
        raise ConfigError(
            f"{layer}: the original weights hold no one {wanted}: {said}. Give the model that the base was quantised "
            "from, or leave the layer out of targets."
        )

    def weight(self, site: Site) -> Tensor:
        """Return the original weight W0 (o, i) of a layer.

        Raises:
            ConfigError: it is not there, has another shape, or has no values.
        """
        held = self.held[self.key(site.name)]
        if isinstance(held, nn.Module):
            weight = Site(site.name, held, site.d_in, site.d_out).weight()
        else:
            weight = held.T if is_conv1d(site.module) else held.flatten(1)
        if weight.shape != (site.d_out, site.d_in):
            raise ConfigError(
                f"{site.name}: its original weight is {tuple(weight.shape)} and the layer is "
                f"({site.d_out}, {site.d_in}): these are weights of another model."
            )
        if weight.is_meta:
            raise ConfigError(f"{site.name}: its original weight is on the meta device: load the original first.")
        return weight.detach()
