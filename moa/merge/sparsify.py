"""Which entries of a delta are kept: magnitude, random (DARE), by rank in the row (DELLA), the middle (breadcrumbs).

TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), DELLA (arXiv 2406.11617), Model Breadcrumbs (arXiv 2312.06795).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

# Below this sum of magnitudes mergekit does not rescale, and by its definition neither do we.
MIN_L1 = 1e-7


def check_density(density: float, where: str) -> None:
    """Check that a kept fraction is in (0, 1].

    Raises:
        ConfigError: it is not.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"{where}: density is {density}, expected the kept fraction, in (0, 1].")


def generator_for(seed: int, index: int, name: str) -> torch.Generator:
    """Return a CPU generator of its own for one tensor of one adapter.

    Masks then depend on neither the order of the tensors nor the number of adapters, and a mask can be drawn again.

    Args:
        seed: the merge's seed.
        index: position of the adapter.
        name: the tensor's name.

    Returns:
        A seeded generator; the global one is not touched.
    """
    digest = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def kth_largest(magnitude: Tensor, k: int) -> Tensor:
    """Return the k-th largest entry, exactly.

    Args:
        magnitude: any shape, at least k entries.
        k: 1 … numel.

    Returns:
        A scalar tensor () of the same type.
    """
    flat = magnitude.reshape(-1)
    rank = flat.numel() - k
    if flat.device.type == "cpu":
        # numpy's partition is about ten times as fast as torch.topk here, and gives the same number.
        return torch.from_numpy(np.partition(flat.numpy(), rank))[rank].clone()
    return flat.kthvalue(rank + 1).values


def top_mask(magnitude: Tensor, k: int) -> Tensor:
    """Return which entries are the k largest: exactly k, the first in row order where several are equal.

    Args:
        magnitude: any shape, non-negative.
        k: 0 … numel.

    Returns:
        Bool mask of the same shape with k entries True.
    """
    if k <= 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    if k >= magnitude.numel():
        return torch.ones_like(magnitude, dtype=torch.bool)
    threshold = kth_largest(magnitude, k)
    mask = magnitude >= threshold
    surplus = int(mask.sum()) - k
    if surplus:
        equal = (magnitude == threshold).reshape(-1).nonzero().squeeze(1)
        mask.view(-1)[equal[len(equal) - surplus :]] = False
    return mask


def keep_largest(delta: Tensor, density: float, *, least: int = 0) -> Tensor:
    """Return the delta with all but its ⌊density · n⌋ largest magnitudes zeroed.

    Args:
        delta: any shape, n entries.
        density: kept fraction, (0, 1].
        least: keep at least so many, where there are so many.

    Returns:
        A new tensor of the same shape.

    Raises:
        ConfigError: the density is outside (0, 1].

    Source: Yadav et al. 2023, arXiv 2306.01708, Algorithm 1 (trim), here per tensor.
    Differs: mergekit keeps at least one entry; `merge` asks for it by definition="mergekit".
    """
    check_density(density, "keep_largest")
    k = max(int(density * delta.numel()), min(least, delta.numel()))
    magnitude = delta.abs()
    if 0 < k < delta.numel():
        kept = keep_above(delta, float(kth_largest(magnitude, k)))
        if int(torch.count_nonzero(kept)) == k:
            return kept
    # Nothing, all, equal magnitudes at the threshold, or zeros kept: the mask counts exactly.
    return delta * top_mask(magnitude, k)


def keep_above(delta: Tensor, threshold: float) -> Tensor:
    """Return the delta with every magnitude below a threshold zeroed; equal ones stay.

    Args:
        delta: any shape.
        threshold: ≥ 0, for example `moa.merge.select.model_threshold`'s.

    Returns:
        A new tensor of the same shape.
    """
    if threshold <= 0:
        return delta.clone()
    # hardshrink keeps |x| > λ, ten times as fast as a mask: λ is the number just below the threshold.
    below = torch.nextafter(torch.tensor(threshold, dtype=delta.dtype), torch.tensor(0.0, dtype=delta.dtype))
    return torch.nn.functional.hardshrink(delta, float(below))


def drop_random(
    delta: Tensor, density: float, generator: torch.Generator, *, definition: str = "paper", rescale: bool = True
) -> Tensor:
    """Return the delta with entries dropped at random and the kept ones rescaled.

    paper: δ̂ = m ⊙ δ / (1 - p), m ~ Bernoulli(1 - p), density = 1 - p, so that E[δ̂] = δ;
    mergekit: δ̂ = m ⊙ δ · ‖δ‖₁ / ‖m ⊙ δ‖₁, so that the sum of magnitudes is the same for every m.

    Args:
        delta: any shape.
        density: probability of keeping an entry, (0, 1].
        generator: CPU generator the mask is drawn from, so that it is the same on every device.
        definition: whose rescaling, "paper" or "mergekit".
        rescale: False keeps the values.

    Returns:
        A new tensor of the same shape.

    Raises:
        ConfigError: the density is outside (0, 1].

    Source: Yu et al. 2023, arXiv 2311.03099 (drop and rescale); mergekit's dare_linear and dare_ties.
    Differs: mergekit draws from torch's global stream; here every tensor of every adapter has a generator of its own.
    """
    check_density(density, "drop_random")
    kept = delta * draw_mask(density, delta, generator)
    if not rescale:
        return kept
    return same_l1(kept, delta) if definition == "mergekit" else kept / density


def same_l1(kept: Tensor, delta: Tensor) -> Tensor:
    """Return what is left of a delta, scaled so that its magnitudes sum to what they did before.

    Args:
        kept: of delta's shape.
        delta: any shape.

    Returns:
        kept · ‖δ‖₁ / ‖kept‖₁ of the same shape; `kept` itself where either sum is below 1e-7.

    Source: mergekit's `rescale`.
    """
    before, after = (float(t.abs().sum(dtype=torch.float64)) for t in (delta, kept))
    return kept * (before / after) if min(before, after) >= MIN_L1 else kept


def draw_mask(probability: Tensor | float, delta: Tensor, generator: torch.Generator) -> Tensor:
    """Return which entries are kept, each with its probability.

    Args:
        probability: one for all entries, or of delta's shape on CPU; in [0, 1].
        delta: any shape.
        generator: CPU generator.

    Returns:
        Bool mask of delta's shape, on its device: the same for every type of delta.
    """
    # Half the time of torch.bernoulli, with the same distribution. Draws of another type would be another stream.
    draws = torch.rand(delta.shape, generator=generator, dtype=torch.float32)
    limit = probability.float() if isinstance(probability, Tensor) else probability
    return (draws < limit).to(delta.device)


def keep_probabilities(delta: Tensor, density: float, epsilon: float, definition: str) -> Tensor:
    """Return DELLA's probability of keeping each entry: the larger in its row, the likelier.

    With r_j = 0 … n - 1 the rank of entry j in its row of n, 0 the largest:
    paper: 1 - p_j, p_j = (p - ε/2) + ε r_j / n, p = 1 - density;
    mergekit: from density + ε (largest) down to density - ε (smallest), linear in r_j; 1 if the density is 1.

    Args:
        delta: (o, i) or any shape. A row runs along the last axis; by mergekit's definition along axis 1, which is
            another one where there are three axes or more.
        density: mean kept fraction.
        epsilon: spread of the probabilities; the whole width in the paper's definition, half of it in mergekit's.
        definition: "paper" or "mergekit".

    Returns:
        Probabilities of the same shape, on CPU.

    Raises:
        ConfigError: a probability would leave (0, 1].

    Source: Deep et al. 2024, arXiv 2406.11617 (MagPrune); mergekit's guide to merge methods (della).
    Differs: the two definitions give ε another meaning and the paper's lowest probability is one step of ε/n above
        the end of its range; both are kept, named. A row of one entry is kept with probability `density` by
        mergekit's definition; mergekit itself divides 0 by 0 there and stops.
    """
    if definition == "mergekit" and density == 1:
        return torch.ones(delta.shape, dtype=delta.dtype)
    magnitude = delta.abs().reshape(delta.shape or (1,))
    axis = 1 if definition == "mergekit" and magnitude.ndim > 1 else -1
    magnitude = magnitude.movedim(axis, -1)
    n = max(magnitude.shape[-1], 1)
    rank = torch.arange(n, dtype=torch.float64)
    if definition == "paper":
        low, high = density - epsilon / 2, density + epsilon / 2
        kept = 1 - ((1 - density) - epsilon / 2 + epsilon * rank / n)
    else:
        low, high = density - epsilon, density + epsilon
        kept = high - 2 * epsilon * rank / (n - 1) if n > 1 else torch.full((1,), density, dtype=torch.float64)
    if epsilon < 0 or low <= 0 or high > 1:
        raise ConfigError(
            f"della: density {density} and epsilon {epsilon} give keep probabilities from {low:g} to {high:g} "
            f"(definition {definition!r}); they must stay in (0, 1]: lower epsilon."
        )
    order = _row_order(magnitude.reshape(-1, n).cpu())
    placed = torch.empty(order.shape, dtype=delta.dtype).scatter_(-1, order, kept.to(delta.dtype).expand_as(order))
    return placed.reshape(magnitude.shape).movedim(-1, axis).reshape(delta.shape)


def _row_order(magnitude: Tensor) -> Tensor:
    """Return the places (rows, n) of each row's entries, the largest first; equal ones keep their order."""
    if magnitude.dtype != torch.float32:
        return magnitude.argsort(dim=-1, descending=True, stable=True)
    # A non-negative float sorts as its bits. With the place below them, one plain sort of integers is a stable one, and
    # numpy's takes less than half the time of torch's stable sort.
    bits = magnitude.contiguous().view(torch.int32).numpy().astype(np.int64)
    keys = ((2**31 - 1 - bits) << 32) | np.arange(magnitude.shape[-1])
    keys.sort(axis=-1)
    return torch.from_numpy(keys & (2**32 - 1))


def drop_by_rank(
    delta: Tensor,
    density: float,
    epsilon: float,
    generator: torch.Generator,
    *,
    definition: str = "paper",
    rescale: bool = True,
) -> Tensor:
    """Return the delta with entries dropped at random, small ones sooner, and the kept ones rescaled.

    paper: δ̂_j = m_j δ_j / (1 - p_j), m_j ~ Bernoulli(1 - p_j), p_j by rank in the row: see `keep_probabilities`;
    mergekit: δ̂ = m ⊙ δ · ‖δ‖₁ / ‖m ⊙ δ‖₁.

    Args:
        delta: (o, i) or any shape.
        density: mean kept fraction.
        epsilon: spread of the probabilities.
        generator: CPU generator of the mask.
        definition: whose probabilities and rescaling, "paper" or "mergekit".
        rescale: False keeps the values.

    Returns:
        A new tensor of the same shape.

    Raises:
        ConfigError: the density is outside (0, 1], or a probability would leave (0, 1].

    Source: Deep et al. 2024, arXiv 2406.11617 (MagPrune); mergekit's della and della_linear.
    """
    check_density(density, "drop_by_rank")
    probability = keep_probabilities(delta, density, epsilon, definition)
    kept = delta * draw_mask(probability, delta, generator)
    if not rescale:
        return kept
    return same_l1(kept, delta) if definition == "mergekit" else kept / probability.to(delta.device)


def keep_middle(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Return the delta without its largest γ and its smallest 1 - density - γ of entries by magnitude.

    Args:
        delta: any shape, n entries.
        density: kept fraction, (0, 1].
        gamma: fraction of the largest magnitudes dropped; if 1 - density is less, only that much is dropped.

    Returns:
        A new tensor of the same shape with about density · n entries kept.

    Raises:
        ConfigError: the density is outside (0, 1] or gamma outside [0, 1).

    Source: Davari and Belilovsky 2023, arXiv 2312.06795.
    Differs: the paper gives the two tails; density and gamma say the same, as in mergekit's guide. mergekit before
        0.1.5 drops the whole tensor where γ · n is below 1; here, as in 0.1.5, only no outlier is dropped.
    """
    check_density(density, "keep_middle")
    if not 0 <= gamma < 1:
        raise ConfigError(f"breadcrumbs: gamma is {gamma}, expected a fraction in [0, 1).")
    n = delta.numel()
    kept = int(density * n)
    top = min(int(gamma * n), n - kept)
    magnitude = delta.abs()
    return delta * (top_mask(magnitude, top + kept) & ~top_mask(magnitude, top))
