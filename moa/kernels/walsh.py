"""Products with a Kronecker product of small matrices, factor by factor: the fast Walsh-Hadamard transform."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def kronecker_rows(x: Tensor, blocks: Sequence[Tensor], transposed: bool = False) -> Tensor:
    """Return x H / √n of H = B₁ ⊗ … ⊗ B_m, (*rows, n), or x H^T / √n; nothing of x is kept for the backward pass.

    A block of b rows costs n b multiplications a row of x, so H₂ ⊗ … ⊗ H₂ takes 2 n log₂ n of them in log₂ n steps.
    Blocks of up to 64 take log₆₄ n steps, each a matrix product: on a CPU core a quarter to a half of the time.

    Args:
        x: (*rows, n). It is scaled first, so that no sum is larger than ‖x‖ where H / √n is orthogonal.
        blocks: (b, b) each, in x's dtype or another; n is the product of their sizes.
        transposed: by H^T.
    """
    n, right = x.shape[-1], 1
    y = x * n**-0.5
    for block in reversed(blocks):
        b = block.shape[0]
        factor = block.to(y.dtype) if transposed else block.to(y.dtype).T  # what a column is multiplied by
        y = y.reshape(-1, b) @ factor.T if right == 1 else factor @ y.reshape(-1, b, right)
        right *= b
    return y.reshape(x.shape)
