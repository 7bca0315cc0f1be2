"""The package's own names. Run: pytest tests/test_package.py"""

from __future__ import annotations

import subprocess
import sys


def test_importing_a_module_does_not_hide_a_function_of_its_name() -> None:
    code = "import moa.types, moa.train, moa.build, moa; assert all(map(callable, (moa.build, moa.load, moa.fold)))"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True, timeout=300)
