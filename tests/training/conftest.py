"""What tests of training share."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest


@pytest.fixture
def galore_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return galore-torch; its package imports bitsandbytes for an optimizer that is not used here."""
    if "bitsandbytes" not in sys.modules:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
            module = types.ModuleType(name)
            module.Optimizer2State = object  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
    return pytest.importorskip("galore_torch", reason="needs galore-torch: pip install --no-deps galore-torch")
