"""The package's own names. Run: pytest tests/test_package.py"""

from __future__ import annotations

import subprocess
import sys

WALK = """
import importlib, pkgutil, types, moa
for found in pkgutil.walk_packages(moa.__path__, "moa."):
    if found.name != "moa.__main__":
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            assert error.name in ("vllm", "flwr"), error  # environments of their own have them
hidden = [name for name in moa.__all__ if isinstance(getattr(moa, name), types.ModuleType)]
assert not hidden, hidden
"""


def test_importing_any_module_hides_no_public_name() -> None:
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
