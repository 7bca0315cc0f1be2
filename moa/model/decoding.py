"""Ways to decode that are loops of somebody else's: which mixtures stand continuous batching, and which can assist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..errors import ConfigError, ContextError
from ..types import Context, Pinned
from .host import Host

Beyond = Literal["streams", "task", "preview", "sequence"]


def looks_beyond_rows(model: Host) -> Iterator[tuple[Beyond, str]]:
    """Yield (kind, sentence) for what a model looks at besides each row (i,) by itself."""
    if model.streams is not None:
        yield "streams", f"its base runs in {model.streams.n} streams that read each other"
        return
    for name, branch in model.branches():
        router = branch.router
        if not branch.bank.rowwise:
            yield "sequence", f"{name}: {type(branch.bank).__name__} experts look at the rows around each row"
        if router.rowwise:
            continue
        who = f"{name}: {type(router).__name__} looks at"
        if router.constant(0) is not None and router.constant() is None:
            yield "task", f"{who} the task of a request"
        elif router.needs_preview:
            yield "preview", f"{who} a first pass of the base, which is a second model"
        else:
            yield "sequence", f"{who} a whole sequence, and a step of such a loop holds parts of it"


class Decoding(Host):
    """A host that says which loops of transformers give its requests what they get by themselves."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's manager of many requests (S,), as transformers does.

        Raises:
            ConfigError: the routing is not one of each row by itself; inside `disable_adapter`, `pin_expert`, `folded`
                or `tracing`, which hold in their own thread, and the manager runs in another.
        """
        self._check_batched()
        return self.base.init_continuous_batching(*args, **kwargs)  # type: ignore[operator]

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Return a context with the base's manager of many requests (S,); raises as `init_continuous_batching`."""
        self._check_batched()
        return self.base.continuous_batching_context_manager(*args, **kwargs)  # type: ignore[operator]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's answers to many requests, each of token ids (S,); raises as `init_continuous_batching`."""
        self._check_batched()
        return self.base.generate_batch(*args, **kwargs)  # type: ignore[operator]

    def _check_batched(self) -> None:
        for kind, reason in looks_beyond_rows(self):
            how = "merge_and_unload(task_id) for one task first, or use generate" if kind == "task" else "use generate"
            raise ConfigError(f"continuous batching cannot run this model. {reason}: {how}.")
        context = self.context
        if not context.enabled or context.pinned is not None or context.trace is not None:
            raise ConfigError(
                "continuous batching runs in a thread of its own, which does not see what holds in this one: call it "
                "outside of disable_adapter, pin_expert, folded and tracing, or use generate."
            )

    def _check_decoding(self, options: dict[str, Any]) -> None:
        """Check that the loop that `generate` is asked for, or is called from, gives what one by one gives.

        Raises:
            ConfigError: `cache_implementation="paged"`, as `init_continuous_batching`.
            ContextError: an assistant's routing needs what its target does not hand on.
        """
        if options.get("cache_implementation") == "paged":
            self._check_batched()
        if not getattr(options.get("generation_config"), "is_assistant", False) or self.context.pinned is not None:
            return
        for kind, reason in looks_beyond_rows(self):
            if kind == "task" and self.context.task_ids is None:
                raise ContextError(
                    f"this mixture cannot assist. {reason}, of which a target that is not a mixture tells nothing: "
                    "take merge_and_unload(task_id) of a copy as the assistant, or the mixture as the target."
                )
            if kind == "sequence":
                raise ContextError(
                    f"this mixture cannot assist. {reason}: "
                    "build it with granularity='token', or take it as the target."
                )


@contextlib.contextmanager
def handed_on(assistant: Any, target: Context, names: Sequence[str]) -> Iterator[None]:
    """Let a mixture that assists another inside the block route by the other's tasks (B,), or use its chosen experts.

    They are known by their names; an assistant that does not have all of them decides by itself, as its proposals need
    not be the target's.

    Args:
        assistant: of any kind.
        target: the context of the mixture that is assisted.
        names: of its experts.
    """
    if not isinstance(assistant, Host):
        yield
        return
    context = assistant.context
    before = context.task_ids, context.pinned
    if target.task_ids is not None:
        context.task_ids = target.task_ids
    if target.pinned is not None:
        context.pinned = _known_to(assistant, target.pinned, names) or context.pinned
    try:
        yield
    finally:
        context.task_ids, context.pinned = before


def _known_to(assistant: Host, pinned: Pinned, names: Sequence[str]) -> Pinned | None:
    """Return the experts (1,) or (B,) of the same names in another model, or None where it lacks one of them."""
    known = list(assistant.scope.names)
    wanted = [None if e < 0 else names[e] if e < len(names) else str(e) for e in pinned.experts.tolist()]
    if not all(name is None or name in known for name in wanted):
        return None
    return Pinned.of([-1 if name is None else known.index(name) for name in wanted])
