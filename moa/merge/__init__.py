"""Merging deltas offline: read them, merge them by a named method, write the result.

Works on plain mappings name -> tensor; knows no model and no router.
"""

from ..delta import Delta, Dense, LowRank, low_rank
from ..formats.named_deltas import Deltas, deltas
from ..formats.peft_folder import peft_deltas, read_peft
from ..formats.tensor_files import Checkpoint, difference, read_difference
from .average import average_factors, model_stock, slerp
from .codec import Coded, code_book, coded_bytes, encode, quantize
from .compose import Squeezed, squeeze, stack
from .data_aware import AdaMerged, adamerge, fisher, gram, regmean
from .elect import Elected, emr
from .fly import FlyStack, fly_shared, fly_stack
from .methods import METHODS
from .run import merge, merge_lazily
from .split import average_copies, join_masked, partition_masks, recompose
from .subspace import isotropic, knots, principal_subspace, project_out, task_singular_vectors
from .write import write_checkpoint, write_peft

__all__ = [
    "METHODS",
    "AdaMerged",
    "Checkpoint",
    "Coded",
    "Delta",
    "Deltas",
    "Dense",
    "Elected",
    "FlyStack",
    "LowRank",
    "Squeezed",
    "adamerge",
    "average_copies",
    "average_factors",
    "code_book",
    "coded_bytes",
    "deltas",
    "difference",
    "emr",
    "encode",
    "fisher",
    "fly_shared",
    "fly_stack",
    "gram",
    "isotropic",
    "join_masked",
    "knots",
    "low_rank",
    "merge",
    "merge_lazily",
    "model_stock",
    "partition_masks",
    "peft_deltas",
    "principal_subspace",
    "project_out",
    "quantize",
    "read_difference",
    "read_peft",
    "recompose",
    "regmean",
    "slerp",
    "squeeze",
    "stack",
    "task_singular_vectors",
    "write_checkpoint",
    "write_peft",
]
