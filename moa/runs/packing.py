"""Several rows in one sequence, for a language model: positions start anew at each row, and nothing crosses its edges.

transformers' attention (eager, SDPA, FlashAttention) keeps rows apart by their positions where a batch has no mask and
no cache, see `find_packed_sequence_indices` in its `masking_utils`. So a batch of packed rows is one sequence without
padding, as its `DataCollatorWithFlattening` makes it.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.decoding import looks_beyond_rows
from ..model.moa_model import MoAModel
from ..objective.losses import LOSSES
from .encode import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

PROBED = 6  # tokens of each row of the probe


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return numbers of rows in bins of at most size tokens: the longest rows first, each where least room is left.

    Args:
        lengths: tokens of each row, at most size.
        size: tokens of a bin.
    """
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[row], -1))
        left, number = room.pop(at) if at < len(room) else (size, len(filled))
        if number == len(filled):
            filled.append([])
        filled[number].append(row)
        bisect.insort(room, (left - lengths[row], number))
    return filled


def packed(rows: Dataset, size: int) -> Dataset:
    """Return the rows of a data set packed: input_ids, labels and position_ids of at most size tokens each.

    The first label of a row is left out, since the token before it is another row's.

    Args:
        rows: with input_ids and labels.
        size: tokens at most; no row is longer.
    """
    from datasets import Dataset

    ids, labels = list(rows["input_ids"]), list(rows["labels"])
    made = bins([len(row) for row in ids], size)
    return Dataset.from_dict(
        {
            "input_ids": [list(chain(*(ids[i] for i in own))) for own in made],
            "labels": [list(chain(*([IGNORED, *labels[i][1:]] for i in own))) for own in made],
            "position_ids": [list(chain(*(range(len(ids[i])) for i in own))) for own in made],
        }
    )


def flattened(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return packed rows as one batch (1, S) without padding, and without a cache, with which they would mix."""
    columns = {name: list(chain(*(row[name] for row in rows))) for name in ("input_ids", "labels", "position_ids")}
    return {**{name: torch.tensor([values]) for name, values in columns.items()}, "use_cache": False}


def check_packing(model: MoAModel) -> None:
    """Check that a model gives each of several packed rows what it gives the row by itself.

    Raises:
        ConfigError: a recipe that looks at a task, a sequence or the rows around, or that compares whole rows; a base
            that takes no positions or in which something crosses from row to row.
    """
    beyond = next(_of_examples(model), None)
    if beyond is not None:
        raise ConfigError(f"packing: true lays rows side by side, and {beyond}: set packing: false.")
    name = type(model.base).__name__
    taken = inspect.signature(model.base.forward).parameters
    if not {"position_ids", "use_cache"} <= set(taken):
        raise ConfigError(
            f"packing: true needs a base that takes position_ids, and {name} does not: set packing: false."
        )
    if _crosses(model):
        raise ConfigError(
            f"packing: true needs a base whose rows do not see each other, and in {name} "
            f"(attn_implementation={getattr(model.config, '_attn_implementation', None)!r}) the second of two rows "
            "changes with the first: set packing: false."
        )


def _of_examples(model: MoAModel) -> Iterator[str]:
    """Yield what of a model's recipes asks which tokens are of one example."""
    for _, sentence in looks_beyond_rows(model):
        yield sentence.partition(", ")[0]  # what follows is about decoding
    for name, branch in model.branches():
        router = branch.router
        who = type(router).__name__
        if router.samples > 1:
            yield f"{name}: {who} compares what {router.samples} selections do on each row"
        for loss, weight in router.loss_weights.items():
            if weight and loss in LOSSES and LOSSES[loss].of_examples:
                yield f"{name}: the {loss} loss of {who} compares rows"


@torch.no_grad()
def _crosses(model: MoAModel) -> bool:
    """Tell whether the second of two packed rows depends on the first, by changing it."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(PROBED, device=model.device) % vocabulary
    positions = torch.arange(PROBED, device=model.device).repeat(2)[None]
    was = model.training
    model.eval()

    def second(first: Tensor) -> Tensor:
        ids = torch.cat([first, tokens])[None]
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits[0, PROBED:].float()

    try:
        one, other = second(tokens), second((tokens.flip(0) + 1) % vocabulary)
    finally:
        model.train(was)
    # in attention that is kept apart nothing arrives at all; rounding is left to kernels that group rows of a batch
    return bool((one - other).abs().max() > 1e-3 * one.std())
