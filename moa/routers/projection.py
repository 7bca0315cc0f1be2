"""A frozen sparse projection that is its own router. FlyLoRA, arXiv 2510.08396."""

from __future__ import annotations

import zlib
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..kernels import exact_linear
from ..types import Context, Pinned, Routing
from .balanced import BalancedRouter

Choice = Literal["magnitude", "signed", "shifted"]


class ProjectionRouter(BalancedRouter):
    """Projects the row onto E frozen sparse directions, keeps the k largest, weights them by their signed projection.

    y = A x;  chosen = top-k of |y_e| + d_e;  weight_e = y_e

    | choice | the k largest of | where |
    |---|---|---|
    | "magnitude" | abs(y) + d | the paper's text, and monotone in d |
    | "signed" | y + d | eq. 10, and the released fork of peft that the experiments ran |
    | "shifted" | abs(y + d) | the released flylora.py |

    | buffer | shape | start |
    |---|---|---|
    | projection (A) | (E, i), not saved | exactly `nonzeros` entries per row from N(0, 1/E²), drawn from the seed |
    | selection_bias (d) | (E,) fp32 | zero; moved by ±bias_rate once per optimizer step |

    It has no trainable parameter. The gradient goes through y to the row x; the backward pass keeps y, not x.

    Args:
        d_in: i.
        n_experts: E, the rank of the whole layer.
        k: K.
        nonzeros: p, entries per direction; None is i · k / E, the paper's density.
        seed: of this layer's projection; the same seed gives the same one on every machine.
        bias_rate: u; 0 for no bias.
        choice: what the bias is added to, see the table.

    Raises:
        ConfigError: bad k, nonzeros outside 1 … d_in, or an unknown choice.
    Source: arXiv 2510.08396, eq. 7-11.
    Differs: paper and released code have three rules; the default follows the paper's text. With "shifted", raising d
        of an idle direction lowers |y + d| where y < 0, so that balancing may push the wrong way. Every rule moves d
        by u · sign(mean(c) − c), as released, but once per optimizer step, on the counts of all its micro-batches
        without padding: the released fork moves d on every forward, evaluation and recompute included, flylora.py on
        every training forward. (Its first version compared the counts with k/E, a frequency, so that d only fell.)
        The released fork cuts the gradient to x at A; here it is kept.
    """

    fixed_size = "its experts are the ranks of one LoRA, drawn together"
    projection: Tensor

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        k: int,
        *,
        nonzeros: int | None = None,
        seed: int = 0,
        bias_rate: float = 1e-3,
        choice: Choice = "magnitude",
    ) -> None:
        super().__init__(d_in, n_experts, k, bias_rate)
        check_choice(choice)
        self.choice = choice
        self.nonzeros = max(1, d_in * k // n_experts) if nonzeros is None else nonzeros
        self.seed = seed
        self.register_buffer("projection", sparse_projection(n_experts, d_in, self.nonzeros, seed), persistent=False)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): signed weights and indices (*rows, K)."""
        y = exact_linear(x, self.projection)  # (*rows, E)
        indices = self._reach(y.detach()).topk(self.k, -1).indices  # (*rows, K)
        return Routing(y.gather(-1, indices), indices, self.n_experts, y, y.abs())

    def _reach(self, y: Tensor) -> Tensor:
        """Return what the k largest are chosen of, (*rows, E)."""
        bias = 0 if self.selection_bias is None else self.selection_bias
        if self.choice == "shifted":
            return (y + bias).abs()
        return (y if self.choice == "signed" else y.abs()) + bias

    def pinned(self, x: Tensor, pinned: Pinned) -> Routing:
        """Return the routing that uses only one expert on a row of x (*rows, i), its own product as weight (*rows, 1).

        Raises:
            ConfigError: an expert is above n_experts - 1.
            ShapeError: the rows of x are not a multiple of the number of examples.
        """
        only = super().pinned(x, pinned)
        assert only.indices is not None
        y = exact_linear(x, self.projection)  # (*rows, E)
        indices = only.indices.expand(*y.shape[:-1], 1)
        return Routing(y.gather(-1, indices), indices, self.n_experts)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}, seed={self.seed}"


def check_choice(choice: str) -> None:
    """Check that there is a rule of this name.

    Raises:
        ConfigError: there is none.
    """
    if choice not in get_args(Choice):
        raise ConfigError(unknown_name("choice", choice, get_args(Choice)))


def sparse_projection(n_rows: int, d_in: int, nonzeros: int, seed: int) -> Tensor:
    """Return the frozen projection (n_rows, i), fp32: `nonzeros` entries per row at random places, N(0, 1/n_rows²).

    Args:
        n_rows: E.
        d_in: i.
        nonzeros: p, exactly so many entries of each row are drawn.
        seed: the same seed gives the same matrix.

    Raises:
        ConfigError: nonzeros outside 1 … d_in.
    Source: arXiv 2510.08396, eq. 7.
    """
    check_nonzeros(nonzeros, d_in)
    # NumPy promises that this stream never changes, PyTorch does not; checkpoints hold only the seed.
    rng = np.random.RandomState(seed)
    places = rng.random_sample((n_rows, d_in)).argsort(1, kind="stable")[:, :nonzeros]  # (E, p)
    values = rng.standard_normal((n_rows, nonzeros)) / n_rows  # (E, p)
    dense = np.zeros((n_rows, d_in), dtype=np.float32)
    # a drawn 0 would leave a direction with fewer entries than promised
    np.put_along_axis(dense, places, np.where(values == 0, 1 / n_rows, values).astype(np.float32), 1)
    return torch.from_numpy(dense)


def check_nonzeros(nonzeros: int, d_in: int | None = None) -> None:
    """Check the entries of a direction (i,); d_in is None where the layer is not known yet.

    Raises:
        ConfigError: outside 1 … d_in.
    """
    if nonzeros < 1 or (d_in is not None and nonzeros > d_in):
        limit = "" if d_in is None else f"={d_in}"
        raise ConfigError(f"nonzeros must be in 1 … d_in{limit}, got {nonzeros}.")


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of one layer's projection: another for every layer name, the same in every process."""
    return zlib.crc32(f"{seed}:{name}".encode())
