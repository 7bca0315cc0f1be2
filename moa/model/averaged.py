"""Whether processes that train one model learn together, or each by itself and in silence."""

from __future__ import annotations

from torch import distributed, nn

from ..errors import ContextError
from ..formats.sharded import is_sharded


def check_averaged(model: nn.Module) -> None:
    """Refuse to learn in several processes by themselves, from rows (B, S) of their own.

    accelerate marks a model that it prepared for evaluation as it marks one for training, and puts DDP around neither
    afterwards: `trainer.evaluate()` before `trainer.train()` would train as many models as there are processes.

    Raises:
        ContextError: the model was prepared for evaluation, and nothing averages its gradients.
    """
    if not vars(model).get("_is_accelerate_prepared") or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1 and not any(is_sharded(p) for p in model.parameters()):
        raise ContextError(
            "this model was prepared for evaluation, and nothing averages its gradients over the processes: accelerate "
            "wraps a model that it has prepared no second time. Evaluate after training, or run "
            "`del model._is_accelerate_prepared` before trainer.train()."
        )
