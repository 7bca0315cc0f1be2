"""Launches of this room's kernels: as Triton launches, or straight to the kernel that it compiled before.

Triton binds, specialises and hashes some twenty arguments at every launch. What it looks at is little: of a tensor the
dtype and whether it begins at a multiple of 16 bytes, of a whole number whether it is 1 or divided by 16, the values of
constants and options, the device. A launch that is like an earlier one in all of these goes to that one's compiled
kernel. Where Triton does more at a launch, it launches: with a profiler's hooks, in its interpreter, on AMD devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Whether launches go straight to compiled kernels. Nothing was measured on a device yet: the page of `experiments.gpu`
# says which value is faster there, and whether both give the same bits.
DIRECT = False
# Of triton, whose `JITFunction.run` and `CompiledKernel.run` were read: other versions promise nothing of them.
VERSIONS = ("3.6", "3.9")
_KEPT = 1024  # compiled kernels that a launcher remembers: a stride that changes from call to call fills no memory
_ABSENT = object()


class Launcher:
    """A kernel of this room, launched as Triton's own: ``kernel[grid](*arguments, **constants_and_options)``.

    Args:
        kernel: what `triton.jit` returns. By place come pointers, named ``…_ptr``, and then numbers; behind them and by
            name the constants.

    Raises:
        TypeError: its parameters are in another order, or one has a default.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.why_not = why_not(kernel)
        self._known: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        params = kernel.params if self.why_not is None else []
        given = [param for param in params if not param.is_constexpr]
        pointers = [param for param in given if param.name.endswith("_ptr")]
        constants = [param for param in params if param.is_constexpr]
        if params != [*pointers, *given[len(pointers) :], *constants] or any(param.has_default for param in params):
            raise TypeError(
                f"{kernel.fn.__name__}: a kernel that is launched directly takes pointers (…_ptr), then numbers, then "
                f"constants, without defaults, not {', '.join(param.name for param in params)}."
            )
        self._given, self._pointers = len(given), len(pointers)
        self._numbers = [param.num for param in given[len(pointers) :] if not param.do_not_specialize]
        self._counts = [param.num for param in given[len(pointers) :] if param.do_not_specialize]
        self._constants = [param.name for param in constants]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return what launches the kernel on a grid of up to three axes."""
        return partial(self._direct, grid) if DIRECT and self.why_not is None else self.kernel[grid]

    def _direct(self, grid: tuple[int, ...], /, *arguments: Any, **named: Any) -> None:
        """Launch what an earlier launch compiled that was alike; where there was none, or more is to do, as Triton."""
        if len(arguments) != self._given or not unwatched(self.kernel):
            self.kernel[grid](*arguments, **named)
            return
        active = driver.active
        device = active.get_current_device()
        key = self.key(device, arguments, named)
        known = self._known.get(key)
        if known is None:
            compiled = self.kernel[grid](*arguments, **named)
            if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
                if len(self._known) >= _KEPT:
                    self.forget()
                self._known[key] = compiled, tuple([named[name] for name in self._constants])
            return
        compiled, constants = known
        x, y, z = (*grid, 1, 1)[:3]
        # In the place of None: what the hooks before and behind a launch are told, and these. There are none.
        compiled.run(
            x, y, z, active.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *constants,
        )  # fmt: skip

    def forget(self) -> None:
        """Forget what was compiled, as after another driver has become active."""
        self._known.clear()

    def key(self, device: int, arguments: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
        """Return a tuple that differs wherever Triton compiles another kernel."""
        values = [*[arguments[n] for n in self._numbers], *named.values()]
        return (
            device,
            *[p if p is None else (p.dtype, p.data_ptr() % 16) for p in arguments[: self._pointers]],
            # Of a count nothing matters but how many bits its type has: 32, or 64 with or without a sign.
            *[v >> 31 if type(v) is int else type(v) for v in [arguments[n] for n in self._counts]],
            *named,
            *values,
            *map(type, values),  # 1, 1.0 and True are equal
        )


def launched(**options: Any) -> Callable[[Callable[..., Any]], Launcher]:
    """Return a decorator as `triton.jit` with these options, for kernels that are launched through `Launcher`."""
    return lambda function: Launcher(triton.jit(**options)(function))


def why_not(kernel: Any) -> str | None:
    """Return why a kernel is never launched directly, None where it can be."""
    if not isinstance(kernel, JITFunction):
        return "Triton's interpreter runs it"
    if not triton.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        return f"it is known how triton {', '.join(VERSIONS)} launches, not how {triton.__version__} does"
    return None


def unwatched(kernel: Any) -> bool:
    """Return whether Triton would only launch: nobody is to be told, nothing is instrumented, no global has changed."""
    runtime = knobs.runtime
    before, behind = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (
        getattr(before, "calls", before)  # a chain of hooks, which may be empty; one hook; or None
        or getattr(behind, "calls", behind)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or kernel.debug
        or kernel.pre_run_hooks
        or (kernel.used_global_vals and _changed(kernel.used_global_vals))
    )


def _changed(used: dict[tuple[str, int], tuple[Any, dict[str, Any]]]) -> bool:
    return any(where.get(name, _ABSENT) != value for (name, _), (value, where) in used.items())
