"""The fused experts of a base that is itself a mixture of experts: tensors of 3 axes, one matrix an expert."""

from __future__ import annotations

from torch import Tensor, nn

from .mixture import Mixture


def fused_experts(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (name, tensor (N, o, i) or (N, i, o)) of the base's own fused experts that carry no adapters, in order.

    They are told by their axes and by "expert" in the name of the module that holds them, or of its class.

    Args:
        model: any module.
    """
    found: list[tuple[str, Tensor]] = []
    adapted = {id(m.base) for m in model.modules() if isinstance(m, Mixture)}
    for path, module in model.named_modules():
        if isinstance(module, Mixture) or id(module) in adapted or ".branches." in path:
            continue
        if "expert" not in path.lower() and "expert" not in type(module).__name__.lower():
            continue
        own = module.named_parameters(path, recurse=False)
        found += [(name, p) for name, p in own if p.ndim == 3 and min(p.shape) > 1]
    return found
