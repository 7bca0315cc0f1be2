"""The `megablocks` engine: that package's grouped GEMM as the grouped product, where it is installed.

Gale et al. 2022, arXiv 2211.15841. The package needs CUDA and pins its torch; it is never required.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..errors import BackendError
from .grouped import grouped_backward, grouped_forward


class MegablocksProduct:
    """`GroupedProduct` by `grouped_gemm.backend.gmm`, which megablocks uses on its grouped path: bf16 on CUDA."""

    def rows(self, values: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
        """Return values[g] factors[g] (N, q)."""
        return self._gmm(values, factors.contiguous(), offsets, trans_a=False)

    def gram(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """Return left[g]ᵀ right[g] (E, p, q)."""
        out = self._gmm(left, right, offsets, trans_a=True)
        # Products of empty groups may be left unwritten.
        return out.masked_fill((offsets.diff() == 0)[:, None, None], 0)

    @staticmethod
    def _gmm(left: Tensor, right: Tensor, offsets: Tensor, trans_a: bool) -> Tensor:
        from megablocks import grouped_gemm_util

        check(left)
        # The grouped GEMM reads its batch sizes on the host: this engine syncs, and cannot be captured in a graph.
        sizes = offsets.diff().cpu()
        return grouped_gemm_util.backend.gmm(left.contiguous(), right.contiguous(), sizes, trans_a=trans_a)


def check(values: Tensor) -> None:
    """Raise BackendError unless the grouped GEMM takes tensors like `values`."""
    if values.dtype != torch.bfloat16 or not values.is_cuda:
        raise BackendError(
            f"megablocks' grouped GEMM runs in bf16 on CUDA, got {values.dtype} on {values.device}: cast, or use "
            "engine 'concat'."
        )


def why_not() -> str | None:
    """Return why the engine cannot run here, or None if it can."""
    try:
        from megablocks import grouped_gemm_util
    except ImportError as error:
        return f"megablocks cannot be imported ({error}): install a build that matches torch {torch.__version__}."
    if not grouped_gemm_util.grouped_gemm_is_available():
        return "megablocks finds no grouped_gemm: pip install 'megablocks[gg]'."
    return None


forward = partial(grouped_forward, MegablocksProduct())
backward = partial(grouped_backward, MegablocksProduct())
