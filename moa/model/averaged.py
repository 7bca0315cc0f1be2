"""Engines that train one model in several processes: what they need of it, and what nobody averages."""

from __future__ import annotations

from collections.abc import Iterator

from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import ConfigError, ContextError
from ..formats.sharded import is_sharded
from ..mixture import Mixture


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


def ready_for_engine(model: nn.Module) -> None:
    """Let DeepSpeed's ZeRO-3 gather all parameters that a mixture reads in its forward on x (*rows, i), as it starts.

    It gathers those of a module for that module's own forward, and a mixture reads its router's, its experts' and its
    layer's together, and those that layers share.

    Raises:
        ConfigError: units of FSDP that cannot be, see `check_units`.
    """
    check_units(model)
    if not any(hasattr(p, "ds_tensor") for p in model.parameters()):
        return
    from deepspeed.runtime.zero import register_external_parameter

    for mixture in (m for m in model.modules() if isinstance(m, Mixture)):
        lent = (value for part in mixture.modules() for value in vars(part).values() if isinstance(value, nn.Module))
        for parameter in {p for part in (mixture, *lent) for p in part.parameters()}:
            register_external_parameter(mixture, parameter)


def check_units(model: nn.Module) -> None:
    """Refuse FSDP units that torch would refuse in the middle of a forward on x (*rows, i), in words of its own.

    Raises:
        ConfigError: a unit begins inside a mixture, which reads its router, its experts and its layer together; or what
            a unit trains has several dtypes.
    """
    units = {module: name for name, module in model.named_modules() if _is_unit(module)}
    for name, mixture in ((n, m) for n, m in model.named_modules() if isinstance(m, Mixture) and units):
        inside = next((units[part] for part in mixture.branches.modules() if part in units), None)
        if inside is not None:
            raise ConfigError(
                f"fully_shard was called on {inside}, a part of the mixture {name}, which reads them all together: "
                "call it on the block around the mixture, or on the mixture."
            )
    for unit, name in units.items():
        trained = {p.dtype: n for n, p in _of_unit(unit) if p.requires_grad}
        if len(trained) > 1:
            found = ", ".join(f"{n} in {dtype}" for dtype, n in trained.items())
            raise ConfigError(
                f"the FSDP unit {name or type(model).__name__} trains parameters of several dtypes, e.g. {found}: "
                "cast them to one with .to(dtype) before fully_shard."
            )


def _is_unit(module: object) -> bool:
    return isinstance(module, FSDPModule)


def _of_unit(unit: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a unit, of any shape, that no unit inside it has."""
    yield from unit.named_parameters(recurse=False)
    for child_name, child in unit.named_children():
        if not _is_unit(child):
            yield from ((f"{child_name}.{name}", parameter) for name, parameter in _of_unit(child))
