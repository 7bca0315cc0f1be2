"""Layers whose weight a model reads and multiplies by itself, so that their experts would be no experts.

Two ways to know: a short table of layers in known models, which groups of targets leave out; and the weight that a
mixture shows inside a forward, which notices when it is multiplied.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..compat import in_forward
from ..errors import ConfigError
from ..layers import is_dense

# class of the parent -> its layers that it reads and does not call
LEFT_OUT = {
    r"MultiheadAttention": r".*",
    r"\w*MambaMixer": r"dt_proj",
    r"WavLMAttention": r"[qkv]_proj|out_proj",
    r"\w*MHAttentionMap": r"k_linear|k_proj",
    r"\w*Indexer(Scorer)?": r".*",  # called, but only to rank keys: no gradient goes through a rank
}
# class of the model -> its layers that are called for an output which its head does not read
FOR_NOBODY = {
    r"BigBirdFor(MaskedLM|CausalLM|SequenceClassification|TokenClassification|QuestionAnswering)": r"bert\.pooler",
}
# what multiplies a weight into something; reads of its dtype, its device or its shape are none of it
PRODUCTS = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "dot", "inner", "einsum"),
    *("tensordot", "addmm", "addmv", "addbmm", "baddbmm", "conv1d", "conv2d", "conv3d"),
    *("multi_head_attention_forward", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
}
# what may change a weight before it is multiplied, as a mask does; what makes tensors without looking at its values
TIMES = {"mul", "multiply", "__mul__", "__rmul__"}
CHANGES = TIMES | {"add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "div", "where", "lerp"}
FRESH = re.compile(r"new_\w+|\w+_like")


def is_left_out(parent: nn.Module, child: str) -> bool:
    """Tell whether experts on a layer (i -> o) are known to do nothing, by the module that holds it.

    Args:
        parent: that module.
        child: the layer's name in it.
    """
    known = isinstance(parent, nn.MultiheadAttention)
    kinds = (layers for kind, layers in LEFT_OUT.items() if re.fullmatch(kind, type(parent).__name__))
    return known or any(re.fullmatch(layers, child) for layers in kinds)


def is_idle_in(model: nn.Module, name: str) -> bool:
    """Tell whether a layer (i -> o) is known to do nothing in a whole model.

    It attends to an encoder where there is none, as in BART's decoder used alone, or its output is not read, as that of
    the pooler below a head of language.

    Args:
        model: any module; that it has no encoder is said by its configuration.
        name: dotted name of the layer.
    """
    alone = getattr(getattr(model, "config", None), "is_encoder_decoder", None) is False
    kinds = (layers for kind, layers in FOR_NOBODY.items() if re.fullmatch(kind, type(model).__name__))
    return (alone and "encoder_attn" in name.split(".")) or any(re.fullmatch(layers, name) for layers in kinds)


def maps_linearly(module: nn.Module) -> bool:
    """Tell whether a layer is x (*rows, i) -> W x + b (*rows, o), tried on one row where its class has its own forward.

    Models derive routers (which return a tuple) and block-diagonal layers from `nn.Linear`.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    weight: Any = module.weight
    if not is_dense(weight) or weight.is_meta:
        return True
    x = torch.ones(1, 1, module.in_features, dtype=weight.dtype, device=weight.device)
    was = module.training
    try:
        with torch.no_grad():
            out = module.eval()(x)
    except (RuntimeError, ValueError, TypeError, IndexError):  # it wants rows of another shape
        return False
    finally:
        module.train(was)
    return isinstance(out, Tensor) and out.shape == (1, 1, module.out_features)


def shown(weight: Any, name: str) -> Any:
    """Return a layer's weight (o, i) for a model that reads it: inside a forward it notices when it is multiplied.

    Args:
        weight: of the frozen layer.
        name: dotted name of the layer.
    """
    if torch.compiler.is_compiling() or not is_dense(weight) or not in_forward():
        return weight
    seen: Shown = weight.as_subclass(Shown)
    seen.layer = name
    return seen


class Shown(Tensor):
    """A mixture's weight (o, i) as a forward sees it; parts, casts and transposes of it are such weights, too.

    Raises:
        ConfigError: it is multiplied with another tensor: the layer's experts have no part in that product.
    """

    layer: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch on the plain tensors, unless it is a product with another tensor (…, i)."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        weights = [value for value in tensors if isinstance(value, Shown)]
        first, name = weights[0], getattr(func, "__name__", "")
        mixed = len(weights) < len(tensors)
        plain_args, plain_kwargs = tree_map_only(Shown, lambda value: value.as_subclass(Tensor), (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        grown = name in TIMES and out.ndim > first.ndim >= 2  # rows times a weight, to be summed
        if mixed and (name in PRODUCTS or grown):
            raise ConfigError(_message(first.layer))
        if FRESH.fullmatch(name) or (mixed and not (name in CHANGES and out.shape == first.shape)):
            return out
        return tree_map_only(Tensor, lambda value: _named(value, first.layer), out)


def _named(value: Tensor, layer: str) -> Shown:
    seen: Shown = value.as_subclass(Shown)
    seen.layer = layer
    return seen


def _message(name: str) -> str:
    return (
        f"{name}: the model multiplies by this layer's weight itself and does not call the layer, so its experts would "
        f"add nothing. Leave it out of the targets (known layers of this kind are left out of 'all-linear')."
    )
