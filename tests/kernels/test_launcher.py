"""The direct way to compiled kernels against Triton's own launches, without a GPU: same kernel, same arguments.

Run: pytest tests/kernels/test_launcher.py; `make gpu-rehearsal` runs it with the versions of the GPU machine as well.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from experiments.gpu import launching, numerics
from experiments.gpu.launching import Launch, direct, launchers, launches_of, loading, modules, unasked, unload
from experiments.gpu.pretended import Rehearsal
from experiments.gpu.shapes import Shape
from moa.kernels.reference import low_rank_mixture_reference
from moa.kernels.triton import launcher
from moa.kernels.triton.launcher import Launcher, launched

LAUNCHERS = launchers()
each_kernel = pytest.mark.parametrize("name", LAUNCHERS)
# Few rows and many, sizes that no block divides, all experts, rows that are apart, a count and a stride of 1.
SHAPES = (
    (Shape(1, 256, 512), torch.bfloat16),
    (Shape(333, 523, 111, 5, 3, 3), torch.float16),
    (Shape(512, 256, 256, strided=True), torch.float32),
    (Shape(700, 256, 512, k=None), torch.bfloat16),
    (Shape(5, 40, 72, 1, 1, 1), torch.float32),
    (Shape(64, 256, 256, 4, 12), torch.float16),
)


def all_launches() -> dict[str, list[Launch]]:
    """Return the launches of all shapes by the name of their kernel."""
    found = defaultdict(list)
    for launch in (launch for shape, dtype in SHAPES for launch in launches_of(shape, dtype)):
        found[launch.kernel.fn.__name__].append(launch)
    return found


LAUNCHES = all_launches()


@pytest.fixture
def driver():
    """A driver of a GPU that is not there: it keeps what kernels are launched with."""
    given = []
    with loading(90, lambda *all_of: given.append(all_of)) as driver:
        driver.given = given
        yield driver


@pytest.fixture
def uncompiled(driver, monkeypatch):
    """That driver, and in the compiler's place what makes a kernel for each of Triton's keys."""

    def make(self, key, signature, device, *rest):
        kernel = object.__new__(CompiledKernel)
        target, active = GPUTarget(driver.backend, driver.arch, 32), triton.runtime.driver.active
        own = {"name": "made", "src": None, "metadata": SimpleNamespace(target=target), "module": object()}
        handed = {"function": object(), "packed_metadata": object(), "_run": active.launch, "_module_pid": None}
        kernel.__dict__.update(own | handed)
        self.device_caches[device][0][key] = kernel
        return kernel

    driver.backend = "cuda"
    monkeypatch.setattr(JITFunction, "_do_compile", make)
    return driver


def go(launch: Launch, driver: Any, way: bool) -> tuple[Any, ...]:
    """Launch, as Triton or directly, and return what the driver was given."""
    driver.given.clear()
    with direct(way):
        LAUNCHERS[launch.kernel.fn.__name__][launch.grid](*launch.arguments, **launch.named)
    (given,) = driver.given
    return given


def asked(launch: Launch, driver: Any) -> bool:
    """Return whether Triton was asked for a launch where the direct way is on."""
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
        go(launch, driver, True)
    return run.called


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return whether two launches hand over the same; the hooks and what they are told, at 6 to 8, aside."""
    pairs = zip((*one[:6], *one[9:]), (*other[:6], *other[9:]), strict=True)
    return len(one) == len(other) and all(
        mine is theirs or (type(mine) is type(theirs) and not isinstance(mine, Tensor) and mine == theirs)
        for mine, theirs in pairs
    )


def test_every_kernel_of_the_room_is_launched_this_way():
    kernels = {n for m in modules() for n, v in vars(m).items() if isinstance(v, JITFunction | Launcher)}
    assert {name for name in kernels if name.endswith("_kernel")} == set(LAUNCHERS) == set(LAUNCHES)
    assert {one.why_not for one in LAUNCHERS.values()} == {None}, "read how this version of triton launches"
    assert not launcher.DIRECT, "nothing was measured on a device yet"


@each_kernel
def test_the_direct_way_hands_over_what_triton_does(name, uncompiled):
    driver = uncompiled
    assert len(LAUNCHES[name]) >= 3
    for launch in LAUNCHES[name]:
        go(launch, driver, True)  # the first of its kind, which compiles
        driver.stream += 7
        expected = go(launch, driver, False)
        assert not asked(launch, driver)
        given = go(launch, driver, True)
        assert same(given, expected), launch
        assert given[:4] == (*(*launch.grid, 1, 1)[:3], driver.stream) and given[6:9] == (None, None, None)
        for n in {*range(6), *range(9, len(given))}:  # whatever else were handed over is seen
            other = given[n].clone() if isinstance(given[n], Tensor) else object()
            assert not same((*given[:n], other, *given[n + 1 :]), expected)


@pytest.mark.parametrize("name", ["add_splits_kernel", "combine_kernel"])
def test_a_kernel_that_was_compiled_goes_the_direct_way(name, driver):
    launch = LAUNCHES[name][0]
    first, second = go(launch, driver, True), go(launch, driver, True)
    assert same(first, second) and not asked(launch, driver)
    expected = go(launch, driver, False)
    assert same(second, expected)
    (compiled,) = launch.kernel.device_caches[driver.get_current_device()][0].values()
    assert second[4:6] == (compiled.function, compiled.packed_metadata) and compiled.asm["cubin"]


POINTERS = [
    torch.zeros(64, dtype=dtype)[first:]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64)
    for first in (0, 1, 8)
]
NUMBERS = (
    0,
    1,
    2,
    15,
    16,
    17,
    32,
    -16,
    -1,
    2**31 - 1,
    2**31,
    2**31 + 16,
    -(2**31),
    2**63,
    True,
    False,
    1.0,
    16.0,
    None,
)
CONSTANTS = (1, True, 1.0, 0, False, 2, 16, "ieee", "tf32", None)


def drawn(launch: Launch, rng: random.Random) -> tuple[list[Any], dict[str, Any]]:
    """Return what a launch was given, but for up to three arguments, constants and options."""
    arguments, named = list(launch.arguments), dict(launch.named)
    for n in rng.choices(range(len(arguments)), k=rng.randrange(3)):
        pool = [*POINTERS, None] if launch.kernel.params[n].name.endswith("_ptr") else NUMBERS
        arguments[n] = rng.choice(pool)
    if rng.random() < 0.3:
        named[rng.choice(list(named))] = rng.choice(CONSTANTS)
    return arguments, named


def tritons_key(kernel: Any, device: int, arguments: list[Any], named: dict[str, Any]) -> str:
    """Return what Triton keeps compiled kernels by, 1 and True told apart."""
    _, specialisation, options = kernel.device_caches[device][-1](*arguments, **named)
    return f"{specialisation} {options}"


def conflicts(name: str, device: int, blunt: Callable[..., Any] | None = None, draws: int = 250) -> tuple[int, int]:
    """Return how many of our keys stand for several of Triton's, and how often one of ours was drawn again.

    Args:
        name: of the kernel.
        device: of the driver.
        blunt: makes arguments alike that are not.
        draws: from each launch.
    """
    rng, one = random.Random(name), LAUNCHERS[name]
    found: dict[Any, set[str]] = defaultdict(set)
    for launch in LAUNCHES[name]:
        for _ in range(draws):
            arguments, named = drawn(launch, rng)
            theirs = tritons_key(one.kernel, device, arguments, named)
            found[one.key(device, *(blunt(one, arguments, named) if blunt else (arguments, named)))].add(theirs)
    return sum(len(theirs) > 1 for theirs in found.values()), draws * len(LAUNCHES[name]) - len(found)


@each_kernel
def test_launches_with_one_key_are_one_kernel_to_triton(name, driver):
    wrong, again = conflicts(name, driver.get_current_device())
    assert wrong == 0 and again > 50


def blunted(of_arguments=lambda one, n, v: v, of_named=lambda key, v: v):
    """Return what makes arguments alike that are not."""

    def blunt(one: Launcher, arguments: list[Any], named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        left = [of_arguments(one.kernel.params[n], n, value) for n, value in enumerate(arguments)]
        return left, {key: of_named(key, value) for key, value in named.items()}

    return blunt


BLUNT = {
    "dtypes": blunted(lambda p, n, v: v.view(torch.uint8) if isinstance(v, Tensor) and v.is_contiguous() else v),
    "alignment": blunted(lambda p, n, v: POINTERS[0].to(v.dtype) if isinstance(v, Tensor) else v),
    "None": blunted(lambda p, n, v: POINTERS[0] if v is None and p.name.endswith("_ptr") else v),
    "16 and 1": blunted(lambda p, n, v: v if isinstance(v, Tensor) or v is None or p.do_not_specialize else 5),
    "bits of counts": blunted(lambda p, n, v: 5 if p.do_not_specialize and type(v) is int else v),
    "types of numbers": blunted(lambda p, n, v: int(v) if isinstance(v, bool | float) else v),
    "types of constants": blunted(of_named=lambda key, v: int(v) if isinstance(v, bool | float) else v),
    "constants": blunted(of_named=lambda key, v: 5 if key.isupper() else v),
    "options": blunted(of_named=lambda key, v: 4 if key == "num_warps" else v),
}


@pytest.mark.parametrize("part", BLUNT)
def test_every_part_of_the_key_is_needed(part, driver):
    assert any(conflicts(name, driver.get_current_device(), BLUNT[part], draws=60)[0] for name in LAUNCHERS)


@each_kernel
def test_other_row_counts_are_the_same_kernel(name, uncompiled):
    """As `do_not_specialize` says; kernels without row counts have none to change."""
    (launch, *_), one = LAUNCHES[name], LAUNCHERS[name]
    counts = [param.num for param in one.kernel.params if param.do_not_specialize]
    go(launch, uncompiled, True)
    for n in counts:
        arguments = list(launch.arguments)
        arguments[n] += 16 * 10_001
        assert not asked(Launch(launch.kernel, launch.grid, tuple(arguments), launch.named), uncompiled)
    assert counts or name.startswith(("grouped", "combine", "add_chunks"))


def test_a_stride_that_always_changes_fills_no_memory(uncompiled, monkeypatch):
    monkeypatch.setattr(launcher, "_KEPT", 8)
    launch, one = LAUNCHES["shrink_kernel"][0], LAUNCHERS["shrink_kernel"]
    for stride in range(40, 60):
        arguments = (*launch.arguments[:8], stride, *launch.arguments[9:])
        go(Launch(launch.kernel, launch.grid, arguments, launch.named), uncompiled, True)
        assert len(one._known) <= 8


def test_another_device_has_kernels_of_its_own(uncompiled):
    launch = LAUNCHES["expand_kernel"][0]
    first = go(launch, uncompiled, True)
    with mock.patch.object(type(uncompiled), "get_current_device", lambda self: 2000):
        other = go(launch, uncompiled, True)
        launch.kernel.device_caches.pop(2000)
    assert first[4] is not other[4] and go(launch, uncompiled, True)[4] is first[4]


def test_other_backends_are_left_to_triton(uncompiled):
    """An AMD GPU's kernels depend on how large a tensor's memory is."""
    uncompiled.backend = "hip"
    launch = LAUNCHES["expand_kernel"][0]
    go(launch, uncompiled, True)
    assert asked(launch, uncompiled)


def test_both_ways_are_timed(uncompiled, monkeypatch):
    monkeypatch.setattr(launching, "ROUNDS", 1)
    monkeypatch.setattr(launching, "CALLS", 2)
    times = launching.compared(90)
    assert set(times) == set(LAUNCHERS)
    assert all(set(way) == {"triton", "direct"} and min(way.values()) > 0 for way in times.values())


def test_a_launch_that_triton_is_asked_for_is_seen(uncompiled):
    launch = LAUNCHES["expand_kernel"][0]
    with unasked(), pytest.raises(AssertionError, match="Triton was asked to launch expand_kernel"):
        go(launch, uncompiled, True)
    go(launch, uncompiled, True)
    with unasked():
        go(launch, uncompiled, True)
        with pytest.raises(AssertionError, match="Triton was asked"):
            go(launch, uncompiled, False)


@pytest.mark.parametrize("check", ["calls", "graphs"])
@pytest.mark.parametrize("worth", [0.0, 0.02])
def test_other_values_of_direct_launches_are_seen(check, worth, monkeypatch):
    """The GPU's numerics, on a CPU, with an engine whose values depend on the way, or do not."""

    def mixture(x, a, b, weights, indices, engine):
        return low_rank_mixture_reference(x, a, b, weights, indices) * (1 + worth * launcher.DIRECT)

    def layer(x, base, bias, *rest, engine):
        return mixture(x, *rest, engine=engine)

    monkeypatch.setattr(numerics, "low_rank_mixture", mixture)
    monkeypatch.setattr(numerics, "mixture_linear", layer)
    if check == "calls":
        found = numerics.launched(Rehearsal(), "triton_concat", Shape(16, 64, 64))
        assert found["other bits"] == (["y", "grad_x", "grad_a", "grad_b", "grad_weights"] if worth else [])
    else:
        found = numerics.replayed(Rehearsal(), "triton_concat", 16, False, way=True)
    assert found["holds"] == (not worth)


def hook(*args: Any, **kwargs: Any) -> None:
    """Be told, and do nothing."""


HOOKED = {
    "a hook before": lambda patch: patch.setattr(knobs.runtime.launch_enter_hook, "calls", [hook]),
    "a hook behind": lambda patch: patch.setattr(knobs.runtime.launch_exit_hook, "calls", [hook]),
    "one hook, not in a chain": lambda patch: patch.setattr(knobs.runtime, "launch_enter_hook", hook),
    "the kernel's own": lambda patch: patch.setattr(LAUNCHERS["expand_kernel"].kernel, "pre_run_hooks", [hook]),
    "stages": lambda patch: patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *a: ("key", "hash")),
    "debug": lambda patch: patch.setattr(knobs.runtime, "debug", True),
    "the kernel's debug": lambda patch: patch.setattr(LAUNCHERS["expand_kernel"].kernel, "debug", True),
}


@pytest.mark.parametrize("what", HOOKED)
def test_who_is_to_be_told_of_launches_is_told(what, uncompiled, monkeypatch):
    launch = LAUNCHES["expand_kernel"][0]
    go(launch, uncompiled, True)
    assert not asked(launch, uncompiled)
    with monkeypatch.context() as patch:
        HOOKED[what](patch)
        assert asked(launch, uncompiled)
        given = go(launch, uncompiled, True)
        assert given[6:9] != (None, None, None)
    assert not asked(launch, uncompiled)


def settings() -> dict[str, tuple[Any, str]]:
    """Return Triton's settings that can be switched, by their full names."""
    spaces = {"runtime": knobs.runtime, "compilation": knobs.compilation, "nvidia": knobs.nvidia}
    names = [(s, space, n) for s, space in spaces.items() for n in type(space).__annotations__]
    return {f"{s}.{n}": (space, n) for s, space, n in names if getattr(space, n) in (False, "", None)}


@pytest.mark.parametrize("setting", settings())
def test_a_setting_that_makes_other_kernels_is_left_to_triton(setting, uncompiled, monkeypatch):
    space, name = settings()[setting]
    launch = LAUNCHES["expand_kernel"][0]
    go(launch, uncompiled, True)
    cache = launch.kernel.device_caches[uncompiled.get_current_device()][0]
    before = len(cache)
    value = {False: True, "": "fpsan"}.get(getattr(space, name), lambda *a, **k: ("key", "hash"))
    monkeypatch.setattr(knobs, "propagate_env", False)
    with monkeypatch.context() as patch:
        patch.setitem(space.__dict__, name, value)
        go(launch, uncompiled, False)
        if len(cache) > before and setting != "compilation.fpsan_homomorphic_casts":  # see the test below
            assert asked(launch, uncompiled)
    assert not asked(launch, uncompiled)


def test_settings_that_make_other_kernels_are_known(uncompiled, monkeypatch):
    """The test above would see nothing if a switched setting did not reach Triton's key."""
    launch = LAUNCHES["expand_kernel"][0]
    go(launch, uncompiled, True)
    monkeypatch.setitem(knobs.compilation.__dict__, "instrumentation_mode", "fpsan")
    go(launch, uncompiled, False)
    assert len(launch.kernel.device_caches[uncompiled.get_current_device()][0]) == 2


@pytest.mark.skipif(not hasattr(knobs.compilation, "fpsan_homomorphic_casts"), reason="this triton has it not")
def test_how_casts_are_instrumented_changes_nothing_where_nothing_is(driver, monkeypatch):
    """It is in Triton's key, is read from the environment, which takes time, and needs `instrumentation_mode`."""
    launch, codes = LAUNCHES["add_splits_kernel"][0], []
    for value in (False, True):
        monkeypatch.setitem(knobs.compilation.__dict__, "fpsan_homomorphic_casts", value)
        kernel = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.named)
        codes.append((kernel.hash, kernel.asm["ptx"]))
    assert codes[0][0] != codes[1][0] and codes[0][1] == codes[1][1]


SCALE = tl.constexpr(2)


@launched()
def scaled_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = 2 x."""
    places = tl.arange(0, BLOCK)
    tl.store(out_ptr + places, tl.load(x_ptr + places, mask=places < n) * SCALE, mask=places < n)


def test_a_global_that_changed_is_named_by_triton(driver, monkeypatch):
    x, out = torch.ones(16), torch.empty(16)
    with direct(True):
        scaled_kernel[(1,)](x, out, 16, BLOCK=16, enable_fp_fusion=True)
        scaled_kernel[(1,)](x, out, 16, BLOCK=16, enable_fp_fusion=True)
        assert len(driver.given) == 2
        monkeypatch.setitem(globals(), "SCALE", tl.constexpr(3))
        with pytest.raises(RuntimeError, match="SCALE has changed"):
            scaled_kernel[(1,)](x, out, 16, BLOCK=16, enable_fp_fusion=True)
    unload(scaled_kernel, driver.get_current_device())


def test_a_wrong_number_of_arguments_is_an_error_of_triton(uncompiled):
    launch, one = LAUNCHES["expand_kernel"][0], LAUNCHERS["expand_kernel"]
    go(launch, uncompiled, True)
    for arguments in (launch.arguments[:-1], (*launch.arguments, 1)):
        with direct(True), pytest.raises(TypeError):
            one[launch.grid](*arguments, **launch.named)


def test_the_interpreter_and_versions_nobody_read_are_left_to_triton(monkeypatch):
    kernel = LAUNCHERS["expand_kernel"].kernel
    assert launcher.why_not(InterpretedFunction(kernel.fn)) == "Triton's interpreter runs it"
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    assert launcher.why_not(kernel) is None
    monkeypatch.setattr(triton, "__version__", "3.60.0")
    one = Launcher(kernel)
    assert one.why_not == "it is known how triton 3.6, 3.9 launches, not how 3.60.0 does"
    ran = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **named: ran.append((grid, args, named)))
    with direct(True):
        assert not isinstance(one[(3,)], partial)
        one[(3,)](1, K=2)
    assert ran == [((3,), (1,), {"K": 2})]


def test_parameters_in_another_order_are_refused():
    def number_first(n, x_ptr, K: tl.constexpr):
        pass

    def constant_first(x_ptr, K: tl.constexpr, n):
        pass

    def default(x_ptr, n, K: tl.constexpr = 2):
        pass

    for function in (number_first, constant_first, default):
        with pytest.raises(TypeError, match=f"{function.__name__}: a kernel that is launched directly takes pointers"):
            launched()(function)
