"""The names of PyTorch that are not public: each in one function, so that a release that moves one is mended here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, …) is active."""
    return torch._C._are_functorch_transforms_active()


def is_autocast() -> bool:
    """Return whether autocast is on for some device, in less time than it takes to ask for one by its name."""
    return torch._C._is_any_autocast_enabled()


def softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """Return the gradient of the logits (*rows, E), from that of their softmax over the last axis, and the softmax."""
    return torch._softmax_backward_data(grad, output, -1, output.dtype)


def has_native_matmul(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of a 16-bit dtype in hardware; others emulate, slowly."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_captured(value: Tensor) -> bool:
    """Return whether a value, of any shape, is one of a graph that is being captured: nothing may wait for it."""
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


def next_node() -> int:
    """Return the number that autograd gives to the next node which this thread makes."""
    return torch._C._autograd._get_sequence_nr()


def working_node() -> int | None:
    """Return the number of the autograd node whose backward runs in this thread, or None outside of a backward."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def padding_of(conv: nn.Module) -> list[int]:
    """Return a convolution's padding of x (B, C, *size) as `F.pad` takes it: before and after, last axis first."""
    padding: Any = conv._reversed_padding_repeated_twice
    return list(padding)


def is_watched(module: nn.Module) -> bool:
    """Return whether hooks look at a module's inputs, outputs or gradients, so that its forward must run as a call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled, by its own `compile()` or by `torch.compile`."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def in_forward() -> bool:
    """Return whether this thread is inside a module's forward: PyTorch has no flag for it, one function calls all."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame is not None


def own_view(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a fresh tensor in another shape, e.g. (T, o) as (B, S, o), not counted as a view of it.

    A node of the graph that returned a view could not be added to in place, as some models do with a layer's output.
    """
    return torch.ops.aten._unsafe_view.default(fresh, shape)  # type: ignore[no-any-return]
