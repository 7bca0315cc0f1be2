"""What transformers judges a model's class by: a `MoAModel` answers with its base's class, of which it is a wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn

from .host import Host
from .turns import alone

# what a class says of itself and not of its base: its names in files, and what `MoAModel` derives from the instance
OWN = {
    "config_class",
    "_auto_class",
    "base_model_prefix",
    "supports_gradient_checkpointing",
    "_tied_weights_keys",
    "_keys_to_ignore_on_save",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
}


class Judged(Host):
    """A host that has its base's implementations of attention and of fused experts, chosen and checked by the base."""

    def _check_and_adjust_attn_implementation(self, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the configuration says: the base was built with it, and shares the configuration."""
        return implementation

    def _check_and_adjust_experts_implementation(self, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the configuration says, as above."""
        return implementation

    @alone
    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the base's implementation of attention (B, S, d), as transformers does."""
        self.base.set_attn_implementation(*args, **kwargs)  # type: ignore[operator]

    @alone
    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the base's implementation of its own fused experts (E, o, i), as transformers does."""
        self.base.set_experts_implementation(*args, **kwargs)  # type: ignore[operator]


def judged_by(base_class: type[nn.Module], framework: type[nn.Module]) -> dict[str, Any]:
    """Return the members that make a wrapper class say of itself what a base's class (B, …) says.

    Args:
        base_class: the class of the base.
        framework: `PreTrainedModel`, whose plain attributes are what is looked at; a base of another kind has none.
    """
    if not issubclass(base_class, framework):
        return {}
    plain = [name for name, value in vars(framework).items() if _is_plain(name, value) and name not in OWN]
    members: dict[str, Any] = {name: getattr(base_class, name) for name in plain}
    for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):  # these read the class's source
        if hasattr(base_class, name):
            members[name] = getattr(base_class, name)
    return members


def _is_plain(name: str, value: Any) -> bool:
    described = hasattr(type(value), "__get__")  # methods and properties
    return not described and not name.startswith("__") and not name.endswith("_cached_value") and name != "_abc_impl"
