"""The plug-in of vLLM for mixtures that route per token: its entry point, which the engine calls in every process."""

from __future__ import annotations

ARCHITECTURE = "MoaForCausalLM"
MODEL_TYPE = "moa"


def register() -> None:
    """Tell the engine the architecture and the configuration of an exported folder; nothing heavy is imported."""
    from .registration import register_all

    register_all()
