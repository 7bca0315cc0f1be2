"""Small shapes under NVIDIA's compute-sanitizer, beside the other checks: `python -m experiments.gpu.sanitizer`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .machine import Machine
from .processes import end

TOOLS = ("memcheck", "racecheck")
SECONDS = 90.0


class Checks:
    """Both tools, each in a process of its own that runs beside other checks, and nothing is left of it at the end.

    Args:
        machine: a rehearsal runs the program without a tool, when it is asked for.
        done: the tools that have been run already.
    """

    def __init__(self, machine: Machine, done: Collection[str]) -> None:
        self.toy, self.left = machine.toy, [tool for tool in TOOLS if tool not in done]
        self.here = self.toy or shutil.which("compute-sanitizer") is not None
        self.running = {} if self.toy or not self.here else {tool: self._start(tool) for tool in self.left}

    def _start(self, tool: str) -> tuple[subprocess.Popen[bytes], Path, float]:
        prefix = [] if self.toy else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return _start(prefix, ["--toy"] if self.toy else [])

    def ended(self, tool: str) -> dict[str, Any]:
        """Return what a tool said, once it has ended or its time is over."""
        if not self.here:
            return {"holds": False, "said": "compute-sanitizer is not here"}
        return _ended(*(self.running.pop(tool, None) or self._start(tool)))

    def close(self) -> None:
        """End what nobody waited for."""
        for process, _, _ in self.running.values():
            end(process)


def _start(prefix: list[str], arguments: list[str]) -> tuple[subprocess.Popen[bytes], Path, float]:
    # Each tensor gets memory of its own, so that a read beyond its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = Path(tempfile.mkdtemp()) / "log"
    command = [*prefix, sys.executable, "-m", "experiments.gpu.sanitizer", *arguments]
    process = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment)
    return process, log, time.time() + SECONDS


def _ended(process: subprocess.Popen[bytes], log: Path, until: float) -> dict[str, Any]:
    try:
        process.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        end(process)
    lines = log.read_text(errors="replace").splitlines()
    done = any(line.endswith("all shapes ran") for line in lines)
    said = [line for line in lines if "=========" in line][:30] or lines[-8:]
    return {"holds": process.returncode == 0 and done, "code": process.returncode, "said": said}


def main() -> None:
    """Run every kernel on shapes that no block divides."""
    import torch

    from moa.kernels import Gate, gated_linear, low_rank_mixture

    from .shapes import SANITIZED, draw

    device, dtype = ("cpu", torch.float16) if "--toy" in sys.argv else ("cuda", torch.bfloat16)
    for shape in (shape.toy() if device == "cpu" else shape for shape in SANITIZED):
        leaves, indices, grad = draw(shape, device)
        given = [*(leaf.to(dtype).requires_grad_() for leaf in leaves[:3]), leaves[3].float().requires_grad_()]
        for engine in ("triton_concat", "triton_grouped"):
            y = low_rank_mixture(*given, indices, engine=engine)
            torch.autograd.grad(y, given, grad.to(dtype))
        if shape.k is not None:
            gate = torch.randn(shape.n_experts, shape.d_in, device=device).requires_grad_()
            base = torch.randn(shape.d_out, shape.d_in, device=device).to(dtype)
            y = gated_linear(given[0], base, None, Gate(gate, shape.k), given[1], given[2], engine="triton_concat")[0]
            torch.autograd.grad(y, gate, grad.to(dtype))
    print("all shapes ran")


if __name__ == "__main__":
    main()
