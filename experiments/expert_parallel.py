"""What expert parallelism would exchange: `python -m experiments.expert_parallel`

One layer, one training step, bytes that each device sends, against replicated and sharded experts. Rows choose experts
at random, evenly or with a skew, and experts lie on the devices in blocks; a device that holds several chosen experts
of a row gets the row once. Nothing is timed: whether bytes or products bound a step is for the network at hand.

- replicated: every device holds all experts; gradients are summed in a ring, 2 (D - 1) / D of them in fp32.
- sharded (FSDP2): the weights are gathered for the forward and again for the backward, the gradients scattered.
- expert parallel: G = min(D, E) devices share the experts; x goes to the chosen ones and y comes back, and the
  gradients the same way in reverse, in bf16; D / G groups sum the gradients of what they hold alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bench.common import write

COMMAND = "python -m experiments.expert_parallel"
FEATURES = 4096  # i = o
ROWS = 8192  # on each device
BANKS = {
    "8 × rank 8": (8, 8, 2),
    "64 × rank 16": (64, 16, 2),
    "256 × rank 64": (256, 64, 4),
    "1024 × rank 64": (1024, 64, 4),
}
DEVICES = (8, 64, 512, 1024)
SKEW = 1.0  # standard deviation of the experts' log-popularity
WIDE, NARROW = 4, 2  # bytes of gradients and of activations
OPTIMIZER = 16  # bytes of a parameter in training: weight, gradient, two moments


def choices(n_experts: int, k: int, skew: float, rows: int = ROWS) -> Tensor:
    """Return the experts (T, K) of rows, drawn without replacement."""
    generator = torch.Generator().manual_seed(0)
    popularity = torch.randn(n_experts, generator=generator) * skew
    uniform = torch.rand(rows, n_experts, generator=generator)
    return (popularity - (-uniform.log()).log()).topk(k, -1).indices


def exchanged(n_experts: int, rank: int, k: int, devices: int, skew: float) -> dict[str, float]:
    """Return what a device sends a step for one layer, in bytes, and what it holds."""
    parameters = n_experts * rank * 2 * FEATURES
    ring = (devices - 1) / devices
    group = min(devices, n_experts)
    owner = choices(n_experts, k, skew) * group // n_experts  # (T, K)
    reached = torch.zeros(ROWS, group, dtype=torch.bool).scatter_(1, owner, True)  # (T, G)
    remote = reached.sum().item() * (group - 1) / group  # any device of the group
    load = reached.sum(0).float()
    replicas = devices // group
    return {
        "replicated": 2 * ring * parameters * WIDE,
        "sharded": 3 * ring * parameters * WIDE,
        "expert parallel": 2 * remote * 2 * FEATURES * NARROW
        + 2 * (replicas - 1) / replicas * parameters / group * WIDE,
        "busiest device over the mean": (load.max() / load.mean()).item(),
        "held, replicated": parameters * OPTIMIZER,
        "held, expert parallel": parameters * OPTIMIZER / group,
    }


def even_rows(n_experts: int, rank: int, k: int) -> float:
    """Return the rows of a device at which both exchange the same, on very many devices: E r WIDE / (K NARROW)."""
    return n_experts * rank * WIDE / (k * NARROW)


def main() -> None:
    """Simulate every bank on every number of devices and write the JSON."""
    rows = {}
    for bank, (n_experts, rank, k) in BANKS.items():
        rows[bank] = {
            "k": k,
            "even_rows": even_rows(n_experts, rank, k),
            "devices": {
                str(devices): {
                    "even": exchanged(n_experts, rank, k, devices, 0.0),
                    "skewed": exchanged(n_experts, rank, k, devices, SKEW),
                }
                for devices in DEVICES
            },
        }
    settings = {"features": FEATURES, "rows_per_device": ROWS, "skew": SKEW}
    print(write("expert_parallel", {"settings": settings, "banks": rows}, COMMAND))


if __name__ == "__main__":
    main()
