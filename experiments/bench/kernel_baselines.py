"""Plain versions of how others mix low-rank experts, written from their behaviour, not from their code.

Each takes x (T, i), a (E, r, i), b (E, r, o), weights (T, K), indices (T, K) and returns y (T, o). All agree with
`moa.kernels.low_rank_mixture`; `tests/kernels/test_peers.py` checks it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lean_loop(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """One pass per expert over the rows that chose it: the usual eager loop (transformers' eager experts)."""
    y = torch.zeros(x.shape[0], b.shape[-1], dtype=x.dtype, device=x.device)
    for expert in range(a.shape[0]):
        rows, slots = torch.where(indices == expert)
        if rows.numel():
            out = F.linear(x[rows], a[expert]) @ b[expert]
            y.index_add_(0, rows, (out * weights[rows, slots, None]).to(y.dtype))
    return y


def mola_loop(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The loop as MoLA-style code runs it: fp32 adapters, a dropout of 0.05 for each expert.

    Dropout makes its values differ; its cost is what counts.
    """
    wide = x.float()
    y = torch.zeros(x.shape[0], b.shape[-1], dtype=torch.float32, device=x.device)
    for expert in range(a.shape[0]):
        rows, slots = torch.where(indices == expert)
        out = F.linear(F.dropout(wide[rows], 0.05), a[expert].float()) @ b[expert].float()
        y.index_add_(0, rows, out * weights[rows, slots, None].float())
    return y.to(x.dtype)


def xlora_loop(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Every adapter on every row, x scaled first: X-LoRA in peft, where top-k only zeroes the scale."""
    gates = _dense(weights, indices, a.shape[0]).to(x.dtype)
    y = torch.zeros(x.shape[0], b.shape[-1], dtype=x.dtype, device=x.device)
    for expert in range(a.shape[0]):
        y = y + F.linear(x * gates[:, expert, None], a[expert]) @ b[expert]
    return y


def arrow_einsum(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Every adapter on every row at once, (T, E, o) in memory, then the weighted sum: Arrow in peft."""
    gates = _dense(weights, indices, a.shape[0]).to(x.dtype)
    outs = torch.einsum("ter,ero->teo", torch.einsum("ti,eri->ter", x, a), b)
    return (outs * gates[..., None]).sum(1)


def grouped_mm(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Rows copied in the order of their experts around two grouped products: transformers' grouped experts."""
    k = indices.shape[1]
    experts, order = torch.sort(indices.flatten(), stable=True)
    counts = torch.histc(experts.float(), bins=a.shape[0], min=0, max=a.shape[0] - 1)
    offsets = counts.cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(x[order // k], a.transpose(1, 2), offs=offsets)
    out = F.grouped_mm(hidden, b, offs=offsets)
    out = (out * weights.flatten()[order, None]).to(x.dtype)
    place = torch.argsort(order)
    return out[place].view(x.shape[0], k, -1).sum(1)


def batched_mm(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Each slot's factors gathered, one small product per slot: transformers' batched experts. For few rows."""
    down, up = a[indices], b[indices]
    out = (down @ x[:, None, :, None]).transpose(-1, -2) @ up
    return (out.squeeze(-2) * weights[..., None].to(x.dtype)).sum(1)


def plain_concat(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The concatenated form in six lines of autograd: what a good engineer writes."""
    n_experts, rank, _ = a.shape
    gates = _dense(weights, indices, n_experts).to(x.dtype)
    hidden = F.linear(x, a.flatten(0, 1)).view(-1, n_experts, rank)
    return (hidden * gates[..., None]).flatten(1) @ b.flatten(0, 1)


def scatter_copies(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Sorted rows, k expanded copies, each expert's span multiplied on its own, scattered and summed (ScatterMoE's
    data movement in plain torch)."""
    k = indices.shape[1]
    experts, order = torch.sort(indices.flatten(), stable=True)
    edges = torch.searchsorted(experts, torch.arange(a.shape[0] + 1, device=x.device)).tolist()
    rows = x[order // k]
    spans = [slice(*edges[e : e + 2]) for e in range(a.shape[0])]
    out = torch.cat([F.linear(rows[span], a[e]) @ b[e] for e, span in enumerate(spans)])
    expanded = torch.empty_like(out).index_copy(0, order, out).view(x.shape[0], k, -1)
    return torch.bmm(weights[:, None].to(x.dtype), expanded).squeeze(1)


def _dense(weights: Tensor, indices: Tensor, n_experts: int) -> Tensor:
    return weights.new_zeros(weights.shape[0], n_experts).scatter(1, indices, weights)


PEERS = {
    "lean python loop": lean_loop,
    "MoLA as coded": mola_loop,
    "X-LoRA loop": xlora_loop,
    "Arrow einsum": arrow_einsum,
    "HF grouped_mm": grouped_mm,
}
