"""MixLoRA as its authors run it: one expert after the other over the rows that chose it. Written from its behaviour.

No library that installs here has MixLoRA, so that this is what `mixlora` is compared with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainMixLoRA(nn.Module):
    """A Llama feed-forward block and E LoRAs on each of its linears, the k best of a softmax gate per row.

    The frozen gate and up products are formed once for all rows, then each expert slices the rows that chose it, adds
    its LoRAs, and multiplies its own rows by the frozen down projection: k times per row.

    Args:
        block: with gate_proj and up_proj (d -> f), down_proj (f -> d) and act_fn; frozen.
        n_experts: E.
        k: experts per row.
        rank: r.
        scaling: on every LoRA's output.

    Source: arXiv 2404.15159, eq. 3-7; the order of work is that of its released code.
    """

    def __init__(self, block: Any, n_experts: int, k: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.block, self.k, self.scaling = block, k, scaling
        d, f = block.gate_proj.in_features, block.gate_proj.out_features
        self.gate = nn.Parameter(torch.randn(n_experts, d) * 0.02)
        for name, (d_in, d_out) in {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}.items():
            for e in range(n_experts):
                down = nn.Linear(d_in, rank, bias=False)
                up = nn.Linear(rank, d_out, bias=False)
                nn.init.uniform_(down.weight, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in))
                nn.init.normal_(up.weight, std=0.01)
                self.add_module(f"{name}_{e}", nn.Sequential(down, up))

    def forward(self, x: Tensor) -> Tensor:
        """Return Σ_{e in top-k} w_e FFN_e(x), (B, S, d)."""
        rows = x.flatten(0, -2)
        scores = F.linear(rows, self.gate).float().softmax(-1)
        weights, chosen = scores.topk(self.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        gate, up = self.block.gate_proj(rows), self.block.up_proj(rows)
        out = torch.zeros_like(rows)
        for e in range(self.gate.shape[0]):
            where, slot = torch.where(chosen == e)
            own = rows[where]
            hidden = self.block.act_fn(gate[where] + self.lora("gate_proj", e, own))
            hidden = hidden * (up[where] + self.lora("up_proj", e, own))
            y = self.block.down_proj(hidden) + self.lora("down_proj", e, hidden)
            out.index_add_(0, where, y * weights[where, slot, None])
        return out.view_as(x)

    def lora(self, name: str, expert: int, x: Tensor) -> Tensor:
        """Return s · B_e A_e x, (T, o), of x (T, i)."""
        out: Tensor = self.get_submodule(f"{name}_{expert}")(x) * self.scaling
        return out


def plain_mixlora(model: Any, **options: Any) -> Any:
    """Return a Llama whose feed-forward blocks are `PlainMixLoRA`, everything else frozen; (B, S, d) in and out.

    Args:
        model: changed in place.
        options: of `PlainMixLoRA`.
    """
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = PlainMixLoRA(layer.mlp, **options)
    return model
