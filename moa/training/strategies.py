"""The strategies: how a mixture is trained, by the name and the keywords of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, unknown_name
from ..tables import check_numbers, check_types
from . import start_strategies  # noqa: F401  which fills the table, too
from .strategy import STRATEGIES, Strategy, register_strategy

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer

    from ..model.moa_model import MoAModel


def make_strategy(name: str, **options: Any) -> Strategy:
    """Return a strategy, every keyword of it checked; nothing heavy is imported.

    Args:
        name: of the table.
        options: its keywords.

    Raises:
        ConfigError: a name or keyword that does not exist, with the nearest one, or a value that is not fit for it.
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", name, STRATEGIES))
    cls = STRATEGIES[name]
    known = [field.name for field in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            raise ConfigError(unknown_name("keyword", key, known, f"strategy {name!r}"))
    check_types(cls, options)
    return cls(**options)


def check_strategy(values: Mapping[str, Any], training: Mapping[str, Any]) -> Strategy:
    """Return the strategy that a configuration asks for.

    Args:
        values: `name` and keywords.
        training: keywords of TrainingArguments beside it.

    Raises:
        ConfigError: as `make_strategy`, values without a name, or training arguments that contradict it.
    """
    if "name" not in values:
        raise ConfigError(f"strategy has no name: choose one of {', '.join(STRATEGIES)}.")
    try:
        made = make_strategy(**values)
    except ConfigError as error:
        raise ConfigError(f"strategy: {error}") from error
    name = values["name"]
    if made.brings and "optim" in training:
        raise ConfigError(f"training.optim has no effect under strategy {name!r}, which is an optimizer: leave it out.")
    for engine in ("fsdp", "deepspeed"):
        if training.get(engine):
            raise ConfigError(
                f"strategy {name!r} steps whole parameters, and training.{engine} shards them: leave one out."
            )
    return made


@register_strategy("lora-pro")
@dataclass(frozen=True, kw_only=True)
class LoRAProStrategy(Strategy):
    """LoRA-Pro, `moa.training.lora_pro`.

    Args:
        mode: "sgd", or "adam" with moments of each expert's whole weight.
    """

    mode: Literal["sgd", "adam"] = "sgd"

    brings = True

    def __post_init__(self) -> None:
        if self.mode not in ("sgd", "adam"):
            raise ConfigError(unknown_name("mode", self.mode, ("sgd", "adam"), "strategy 'lora-pro'"))

    def optimizer(self, model: MoAModel, arguments: Any) -> Optimizer:
        """Return LoRA-Pro over the experts' pairs (r, i), (r, o), and AdamW over the rest."""
        from .lora_pro import LoRAPro

        return LoRAPro(model, mode=self.mode, **adam_options(arguments))


@register_strategy("lisa")
@dataclass(frozen=True, kw_only=True)
class LisaStrategy(Strategy):
    """LISA, `moa.training.lisa`.

    Args:
        n_active: layers' blocks, or experts, that train at a time.
        every: optimizer steps in an interval.
        over: "layers" or "experts".
        state: of the optimizer for what stops training, "keep" or "drop".
        seed: of the choice.
    """

    n_active: int = 2
    every: int = 20
    over: Literal["layers", "experts"] = "layers"
    state: Literal["keep", "drop"] = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("seed",))
        from .lisa import check_lisa

        check_lisa(self.n_active, self.every, self.over, self.state)

    def callbacks(self) -> list[Any]:
        """Return one fresh `LisaCallback`."""
        from .lisa_callback import LisaCallback

        return [LisaCallback(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})]


@register_strategy("squeeze")
@dataclass(frozen=True, kw_only=True)
class SqueezeStrategy(Strategy):
    """LoRA-Squeeze, `moa.training.squeezing`: the recipe's rank is the first, lowered in stages.

    Args:
        ranks: of the stages, falling; the last is that of the trained experts.
        every: optimizer steps before each.
    """

    ranks: tuple[int, ...] = ()
    every: int = 100

    def __post_init__(self) -> None:
        check_numbers(self)
        from .squeezing import check_stages

        check_stages(self.ranks, self.every)

    def check(self, model: MoAModel) -> None:
        """Refuse experts that do not begin above the first rank, or have no factors (E, r, i), (E, r, o)."""
        from .squeezing import check_begins_above

        check_begins_above(model, self.ranks)

    def callbacks(self) -> list[Any]:
        """Return one fresh `SqueezeCallback`."""
        from .squeeze_callback import SqueezeCallback

        return [SqueezeCallback(self.ranks, self.every)]


@register_strategy("mosa")
@dataclass(frozen=True, kw_only=True)
class MoSAStrategy(Strategy):
    """MoSA, `moa.training.mosa`.

    Args:
        n: copies of each expert.
        by: what deals their entries out, "entries", "rows" or "columns".
        shared_down: down is one for all copies.
        merge: "average" or "joint".
        consistency: weight of the divergence between two forwards.
        seed: of masks and draws.
    """

    n: int = 4
    by: Literal["entries", "rows", "columns"] = "entries"
    shared_down: bool = False
    merge: Literal["average", "joint"] = "average"
    consistency: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("seed",))
        from .mosa import check_mosa

        check_mosa(self.n, self.by, self.merge, self.consistency)

    def check(self, model: MoAModel) -> None:
        """Refuse experts without factors (E, r, i), (E, r, o), and a consistency of outputs that are numbers."""
        from .mosa import MoSA

        MoSA(model, **dataclasses.asdict(self)).close()

    def callbacks(self) -> list[Any]:
        """Return one fresh `MoSACallback`."""
        from .mosa_callback import MoSACallback

        return [MoSACallback(**dataclasses.asdict(self))]


@register_strategy("galore")
@dataclass(frozen=True, kw_only=True)
class GaLoreStrategy(Strategy):
    """GaLore, `moa.training.galore`, by galore-torch's AdamW.

    Args:
        rank: r of the projections.
        every: steps after which they are taken anew.
        scale: of the projected steps.
        projection: "std", "reverse_std", "right", "left" or "full".
    """

    rank: int = 128
    every: int = 200
    scale: float = 0.25
    projection: Literal["std", "reverse_std", "right", "left", "full"] = "std"

    brings = True

    def __post_init__(self) -> None:
        check_numbers(self)
        from .galore import check_galore

        check_galore(self.rank, self.every, self.scale, self.projection)

    def optimizer(self, model: MoAModel, arguments: Any) -> Optimizer:
        """Return galore-torch's AdamW, which projects matrices (m, n) above the rank."""
        from .galore import galore_adamw

        return galore_adamw(model, **dataclasses.asdict(self), **adam_options(arguments))


@register_strategy("quantisation_aware")
@dataclass(frozen=True, kw_only=True)
class QuantisationAwareStrategy(Strategy):
    """EfficientDM's quantisation-aware LoRA, `moa.training.quantisation_aware`; the rest by AdamW.

    Args:
        bits: of a code, 2 to 8.
        share: of a layer's mean scale, which is its experts' learning rate.
        scale_lr: of the scales; 0 leaves them as the weight gives them.
    """

    bits: int = 4
    share: float = 1 / 2500
    scale_lr: float = 1e-6

    brings = True

    def __post_init__(self) -> None:
        check_numbers(self)
        from .quantisation_aware import check_rates

        check_rates(self.bits, self.share, self.scale_lr)

    def check(self, model: MoAModel) -> None:
        """Refuse layers (i -> o) without one weight to round."""
        from .quantisation_aware import scaled_groups

        scaled_groups(model, 1.0, self.bits)

    def optimizer(self, model: MoAModel, arguments: Any) -> Optimizer:
        """Return AdamW over scales (o, 1), experts and the rest, each at its learning rate."""
        from torch.optim import AdamW

        from .quantisation_aware import learn_scales, scaled_groups

        if self.scale_lr:
            learn_scales(model, self.bits)
        groups = scaled_groups(model, arguments.learning_rate, self.bits, self.share, self.scale_lr)
        return AdamW(groups, **adam_options(arguments))

    def callbacks(self) -> list[Any]:
        """Return one fresh `QuantisationAwareCallback`."""
        from .quantisation_callback import QuantisationAwareCallback

        return [QuantisationAwareCallback(self.bits, learned=bool(self.scale_lr))]

    def finish(self, model: MoAModel, folder: Path) -> None:
        """Write scales.safetensors, (o, 1) a layer, where they were learned."""
        from .quantisation_aware import write_scales

        if self.scale_lr:
            write_scales(model, folder / "scales.safetensors")


def adam_options(arguments: Any) -> dict[str, Any]:
    """Return lr, betas, eps and weight_decay, scalars, as TrainingArguments give them."""
    return {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
    }
