"""What acts on the base of a `MoAModel`, and what transformers' models have that makes no sense on one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ConfigError
from .as_it_came import Reference
from .host import Host
from .turns import alone, outside


class OnBase(Host):
    """A host whose setters are its base's; those of every module, too, wait for the forwards of other threads."""

    def get_base_model(self) -> nn.Module:
        """Return the wrapped model, mixtures inside."""
        return self.base

    def reference(self) -> Reference:
        """Return the base as it came, (B, …) -> its outputs, as a model of its own that shares all of its tensors.

        For preference training: `DPOTrainer(model, ref_model=model.reference(), …)`.
        """
        return Reference(self)

    def get_input_embeddings(self) -> Any:
        """Return the base's input embeddings, (V, d)."""
        return self.base.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> Any:
        """Return the base's output embeddings, (V, d), or None."""
        return self.base.get_output_embeddings()  # type: ignore[operator]

    @outside
    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the base other input embeddings, (V, d)."""
        self.base.set_input_embeddings(value)  # type: ignore[operator]

    @outside
    def set_output_embeddings(self, value: nn.Module) -> None:
        """Give the base other output embeddings, (V, d)."""
        self.base.set_output_embeddings(value)  # type: ignore[operator]

    @outside
    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the base's embeddings to (V', d), tied or not; return the input embeddings, frozen as before."""
        before = [e.weight.requires_grad for e in (self.get_input_embeddings(), self.get_output_embeddings()) if e]
        resized = self.base.resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]
        ends = [e for e in (self.get_input_embeddings(), self.get_output_embeddings()) if e]
        for end, flag in zip(ends, before, strict=True):
            end.requires_grad_(flag)
        return resized

    @property
    def base_model(self) -> Any:
        """The base's headless body, whose output has last_hidden_state (B, S, d)."""
        return getattr(self.base, "base_model", self.base)

    def _supports_logits_to_keep(self) -> bool:
        return bool(self.base._supports_logits_to_keep())  # type: ignore[operator]

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        own = name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if base is not None and name in base._modules and not own:
            setattr(base, name, value)  # a module that reading finds in the base
        else:
            super().__setattr__(name, value)

    @alone
    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the base's weights."""
        if hasattr(self.base, "tie_weights"):
            self.base.tie_weights(*args, **kwargs)  # type: ignore[operator]


def _alone(name: str) -> Callable[..., Any]:
    """Return a module's own method that waits for the forwards of other threads."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: OnBase, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(OnBase, self), name)(*args, **kwargs)

    return alone(method)


for _name in ("_apply", "apply", "load_state_dict", "requires_grad_", "set_submodule"):  # `to` and its like `_apply`
    setattr(OnBase, _name, _alone(_name))


def _refused(name: str) -> Callable[..., Any]:
    """Return a method that says what to use in the place of transformers' own, which knows PEFT's adapters only."""

    def method(self: OnBase, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"{name} is for PEFT adapters on a plain transformers model: use moa.build(model, …) to add experts, "
            "experts=[…] for adapters that exist, moa.load to read a mixture, disable_adapter() to switch it off."
        )

    method.__name__, method.__doc__ = name, f"Refuse transformers' `{name}`; adapters come from `moa.build`."
    return method


for _name in (
    "add_adapter",
    "load_adapter",
    "set_adapter",
    "delete_adapter",
    "enable_adapters",
    "disable_adapters",
    "active_adapters",
    "get_adapter_state_dict",
):
    setattr(OnBase, _name, _refused(_name))
