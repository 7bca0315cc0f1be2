"""Damage for files: bytes that flip and files that end early, values of other types, names that lead away."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, 1e308, -1e308, 10**9, 2**31, 2**63, 10**300, float("nan"), float("inf")),
    *(
        "",
        "x",
        "topk",
        "../..",
        "/etc/passwd",
        "a/../../b",
        "nul\0byte",
        "\ud800",
        "\x1b[31m",
        "(.*)*z",
        "(",
        "x" * 5000,
    ),
    *([], {}, [None], [[]], {"a": 1}, ["x", 1], [0] * 5, {"": None}, {"(.*)*z": 8}, {".*": None}),
]


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with one kind of damage."""
    out = bytearray(data)
    kind = draw.randrange(6)
    at = draw.randrange(len(out)) if out else 0
    if kind == 0:  # most structure is at the beginning
        for _ in range(draw.randint(1, 4)):
            out[draw.randrange(min(len(out), draw.choice((8, 64, 2000, len(out)))))] = draw.randrange(256)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = draw.randbytes(draw.randint(1, 20))
    elif kind == 3:
        del out[at : at + draw.randint(1, 20)]
    elif kind == 4:
        out[:8] = draw.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(out), len(out) * 2)).to_bytes(8, "little")
    else:
        out = bytearray(draw.randbytes(draw.randint(0, 200)))
    return bytes(out)


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in _nodes(part, (*path, key)))]


def damaged_value(value: Any, draw: random.Random) -> Any:
    """Return plain values in which one, or two, are of another type or size, missing, or too many."""
    out = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2))):
        path = draw.choice(_nodes(out))
        if not path:
            continue
        inner = out
        for key in path[:-1]:
            inner = inner[key]
        kind = draw.randrange(6)
        if kind == 0:
            del inner[path[-1]]
        elif kind == 1 and isinstance(inner, dict):
            inner[str(draw.choice(JUNK))[:60]] = inner.pop(path[-1]) if draw.random() < 0.5 else draw.choice(JUNK)
        elif kind == 2 and isinstance(inner[path[-1]], (int, float)):
            inner[path[-1]] = inner[path[-1]] * draw.choice((-1, 0, 2, 1000, 10**6)) + draw.choice((0, 1))
        else:
            inner[path[-1]] = copy.deepcopy(draw.choice(JUNK))
    return out


def json_text(value: Any, draw: random.Random) -> str:
    """Return values as JSON, or nearly: with a key twice, nested too deep, cut off."""
    text = json.dumps(value)
    kind = draw.randrange(20)
    if kind == 0 and text.startswith("{") and len(text) > 2:
        return text[:-1] + ", " + text[1:]
    if kind == 1:
        return text.replace("1", "1" * 5000, 1)
    if kind == 2:
        return text.replace(": ", ": " + "[" * 5000, 1)
    if kind == 3:
        return text[: draw.randrange(len(text) + 1)]
    return text


def damaged_tensors(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """Return tensors of which one has another name, type, shape or value, or is missing."""
    out = dict(tensors)
    name = draw.choice(sorted(out))
    tensor = out.pop(name)
    kind = draw.randrange(8)
    if kind == 0:
        return out
    if kind == 1:
        tensor = tensor.clone()
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice((float("nan"), float("inf"), -float("inf")))
    elif kind == 2:
        tensor = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor.to(torch.int64)
    elif kind == 3:
        tensor = tensor.to(draw.choice((torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.float16)))
    elif kind == 4:
        tensor = draw.choice((tensor.reshape(-1), tensor[:0], tensor[None], tensor.T.contiguous(), torch.tensor(1.0)))
    elif kind == 5:
        name = draw.choice((name + "x", name.replace("0", "7", 1), "x", "", "../" + name, "\x1b[2J", name.upper()))
    elif kind == 6:
        out["extra" if draw.random() < 0.5 else name + ".extra"] = torch.ones(draw.choice((0, 1, 7)))
    else:
        tensor = torch.zeros(0, 2**40) if draw.random() < 0.5 else torch.randn(tensor.shape)
    out[name] = tensor
    return out


def damaged_file(data: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file that is damaged, in its bytes, its header or its tensors."""
    kind = draw.randrange(3)
    if kind == 0:
        return damaged_bytes(data, draw)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if kind == 1:
        text = json_text(damaged_value(header, draw), draw).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    return save(damaged_tensors(load(data), draw), header.get("__metadata__"))
