"""LoRA-Pro: steps of low-rank factors that come as near to the whole weight's step as factors can.

Wang et al. 2024, arXiv 2407.18242.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..model.host import Host
from .factor_pairs import factored_banks

Pair = tuple[Tensor, Tensor]


def nearest_step(down: Tensor, up: Tensor, grad_down: Tensor, grad_up: Tensor, scaling: float) -> Pair:
    """Return the steps of A and B whose product's step, s B dA + s dB A, is nearest to the whole weight's gradient.

    dA = (BᵀB)⁻¹ gA / s² + X A,  dB = (I - B (BᵀB)⁻¹ Bᵀ) gB (AAᵀ)⁻¹ / s² - B X

    X does not change the product's step; of all, it is the one with dA, dB nearest to gA, gB:
    BᵀB X + X AAᵀ = -(BᵀB)⁻¹ gA Aᵀ / s².

    Args:
        down: (*, r, i) A; leading axes, as those of experts, are apart.
        up: (*, r, o) Bᵀ, as the banks store it.
        grad_down: (*, r, i) gA.
        grad_up: (*, r, o) gBᵀ.
        scaling: s, by which the product is multiplied.

    Returns:
        dA (*, r, i) and dBᵀ (*, r, o), in the work type of the factors.

    Source: arXiv 2407.18242, theorem 2.1 (the steps), 2.3 (X).
    Differs: the released code takes s = 16 / 8 whatever the layer's; directions without length (B = 0 at the start)
        have no step in A here, by the pseudo-inverse, where it adds 1e-8 to them.
    """
    a, b, g_a, g_b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (down, up, grad_down, grad_up))
    lengths_b, turned_b = torch.linalg.eigh(b @ b.mT)  # BᵀB = Q Λ Qᵀ, (*, r), (*, r, r)
    lengths_a, turned_a = torch.linalg.eigh(a @ a.mT)
    inverse_b, inverse_a = _inverse(lengths_b, turned_b), _inverse(lengths_a, turned_a)
    step_a = inverse_b @ g_a / scaling**2
    inside = b.mT @ (inverse_b @ (b @ g_b.mT))  # (*, o, r): the part of gB in B's column space
    step_b = inverse_a @ (g_b - inside.mT) / scaling**2  # (*, r, o)
    right = -step_a @ a.mT  # (*, r, r)
    sums = lengths_b.unsqueeze(-1) + lengths_a.unsqueeze(-2)  # (*, r, r)
    inner = turned_b.mT @ right @ turned_a / sums.where(sums > 0, 1.0)  # where the sum is 0, so is what it divides
    x = turned_b @ inner @ turned_a.mT
    return step_a + x @ a, step_b - x.mT @ b


class LoRAPro(torch.optim.Optimizer):
    """Trains a model's low-rank experts by LoRA-Pro, and all else that is trained by AdamW.

    Args:
        model: whose experts are low-rank and trained; each expert's factors, (r, i) and (r, o), are a pair.
        lr: of both.
        mode: "sgd", p -= lr · step; "adam", whose moments are those of the product's gradient: two tensors (E, o, i)
            for each layer.
        betas: of the moments.
        eps: added to the root of the second.
        weight_decay: of all.

    Raises:
        ConfigError: a layer's experts have no factors of their own that are trained, a bad mode.
    Source: arXiv 2407.18242, algorithm 1 (sgd), 2 (adam).
    """

    def __init__(
        self,
        model: Host,
        lr: float = 1e-3,
        mode: Literal["sgd", "adam"] = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if mode not in ("sgd", "adam"):
            raise ConfigError(f"mode must be 'sgd' or 'adam', got {mode!r}.")
        self.mode, self.scales = mode, []
        factors: list[nn.Parameter] = []
        for bank in factored_banks(model, "LoRA-Pro corrects").values():
            factors += [bank.down, bank.up]
            self.scales.append(bank.scaling)
        own = set(factors)
        rest = [p for p in model.parameters() if p.requires_grad and p not in own]
        shared: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        groups = [{"params": factors}, {"params": rest}][: 1 + bool(rest)]
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))], lr=lr, **shared)
        super().__init__(groups, {**self._adamw.defaults, "lr": lr, **shared})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step by the gradients, of the parameters' shapes, and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            group = self.param_groups[0]
            pairs = zip(group["params"][::2], group["params"][1::2], self.scales, strict=True)
            for down, up, scaling in pairs:
                if down.grad is not None and up.grad is not None:
                    self._step_pair(down, up, scaling, group)
        # one state and one schedule for both
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
        self._adamw.step()
        return loss

    def _step_pair(self, down: Tensor, up: Tensor, scaling: float, group: dict[str, Any]) -> None:
        grad_down, grad_up = down.grad, up.grad
        assert grad_down is not None and grad_up is not None
        step_down, step_up = nearest_step(down, up, grad_down, grad_up, scaling)
        if self.mode == "adam":
            whole = scaling * (up.mT @ step_down.to(up.dtype) + step_up.to(up.dtype).mT @ down)  # (E, o, i)
            whole = self._normalised(down, whole, group)
            step_down, step_up = nearest_step(down, up, scaling * up @ whole, scaling * (whole @ down.mT).mT, scaling)
        for parameter, step in ((down, step_down), (up, step_up)):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step.to(parameter.dtype))

    def _normalised(self, down: Tensor, whole: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Adam's direction (E, o, i) for a gradient (E, o, i), with moments of its size."""
        state = self.state[down]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(whole), exp_avg_sq=torch.zeros_like(whole))
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(whole, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(whole, whole, value=1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        root = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt()
        direction: Tensor = mean / root.add_(group["eps"])
        return direction


def _inverse(lengths: Tensor, turned: Tensor) -> Tensor:
    """Return the pseudo-inverse (*, r, r) of a matrix with eigenvalues (*, r) and eigenvectors (*, r, r)."""
    kept = lengths > lengths.amax(-1, keepdim=True).clamp(min=0) * lengths.shape[-1] * torch.finfo(lengths.dtype).eps
    return turned * torch.where(kept, 1 / lengths, 0.0).unsqueeze(-2) @ turned.mT
