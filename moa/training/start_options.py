"""What `moa.initialize` may be told; nothing heavy is imported."""

from __future__ import annotations

from ..errors import ConfigError, unknown_name

MOST = 1_000_000  # batches
METHODS = {
    "lora-sb": "expert='core' with save_bases=True",
    "eva": "expert='lora'",
    "qwha": "expert='qwha' with mask='given'",
}


def check_start(method: str, batches: int, lr: float | None = None, original: object = None) -> None:
    """Check what `initialize` is told, no tensors, so no shapes.

    Raises:
        ConfigError: an unknown method, a number out of range, lr or original where it is not read, or no original.
    """
    if method in ("pissa", "olora"):
        raise ConfigError(f"{method!r} needs no data: it is a start of LoRA itself, moa.build(…, start={method!r}).")
    if method not in METHODS:
        raise ConfigError(unknown_name("method", method, METHODS, "moa.initialize"))
    if not 1 <= batches <= MOST:
        raise ConfigError(f"batches must be from 1 to {MOST:,}, got {batches}.")
    if lr is not None and not (method == "lora-sb" and 0 < lr <= 1):
        raise ConfigError(f"lr is the size of the first step of 'lora-sb', above 0 and at most 1: {method!r} got {lr}.")
    if method == "qwha" and original is None:
        raise ConfigError(
            "'qwha' restores what quantising the base lost, which its own weights do not say: give original=, the "
            "model that it was quantised from, its tensors, or its folder."
        )
    if method != "qwha" and original is not None:
        raise ConfigError(
            f"original is the weights before they were quantised, for 'qwha': {method!r} does not read it."
        )
