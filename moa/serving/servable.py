"""Whether a model can be served by an engine that lays the rows of all requests side by side, and if not, what can."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ConfigError
from ..mixture import BlockMixture, ConvMixture, ExpertsMixture
from ..model.decoding import looks_beyond_rows
from ..model.host import Host

BY_TASK = "export one LoRA for each task (moa export --to peft-tasks) and let the engine choose it per request"
DISTIL = "distil it into one adapter (moa distill), or serve it by `moa generate`"


def reasons(model: Host) -> Iterator[str]:
    """Yield why a model's mixtures are not a function of each row (i,) by itself, with the next best thing."""
    if model.modules_to_save:
        yield f"it has modules that were trained whole ({', '.join(model.modules_to_save)}): save them into the base"
    for name, mixture in model.mixtures().items():
        if isinstance(mixture, BlockMixture):
            yield f"{name}: its experts sit after a whole block, which the engine fuses with the next norm: {DISTIL}"
        if isinstance(mixture, ConvMixture):
            yield f"{name}: it sits on a convolution: fold it or {DISTIL}"
        if isinstance(mixture, ExpertsMixture):
            yield f"{name}: it sits on the base's own fused experts, which the engine replaces by a kernel: {DISTIL}"
    for kind, reason in looks_beyond_rows(model):
        yield f"{reason}: {BY_TASK if kind == 'task' else DISTIL}"


def check_servable(model: Host) -> None:
    """Check that every mixture routes each row (i,) by itself.

    Raises:
        ConfigError: one does not; the layer, the reason and the next best thing are named.
    """
    if not model.mixtures():
        raise ConfigError("this model has no mixtures: serve its base as it is.")
    for reason in reasons(model):
        raise ConfigError(f"an engine with continuous batching cannot serve this model. {reason}.")
