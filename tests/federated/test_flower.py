"""The strategy and the client on Flower, in its own environment, `make env-flower`. Run: pytest tests/federated"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".envs" / "flower" / "bin" / "python"
# what the second client does, and what is said of it; the third vanishes
SPOILED = {
    "nan": "bank.down holds NaN or infinity",
    "pickle": "bank.down cannot be read: This file contains pickled (object) data",
    "long": "bytes came, expected at most",
    "nothing": "its message cannot be read: 'arrays'",
    "error": "out of memory",
    "metrics": "examples must be above 0",
}


def run_flower(*arguments: str, timeout: float = 500) -> str:
    """Return what a module prints that runs in Flower's environment, which reports nothing to anybody."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def rounds() -> dict[str, Any]:
    """Two rounds of five clients for each kind of client."""
    if not PYTHON.is_file():
        pytest.skip("no Flower here: make env-flower")
    out = run_flower("tests.federated.flower_rounds", json.dumps(["", *SPOILED]))
    return json.loads(next(x for x in out.splitlines() if x.startswith("RESULT")).removeprefix("RESULT"))


@pytest.mark.parametrize("kind", SPOILED)
def test_a_client_that_misbehaves_is_named_and_one_that_vanishes_is_missed(rounds: dict[str, Any], kind: str) -> None:
    for taken, refused, vanished, changed, _, _ in rounds[kind]["rounds"]:
        assert sorted(taken) == [1, 4, 5] and vanished == [3] and changed
        assert list(refused) == ["2"] and SPOILED[kind] in refused["2"]
    assert rounds[kind]["same"]
    # Σ n² · 10 / Σ n · 10 of the three that were taken
    assert rounds[kind]["loss"]["2"]["loss"] == pytest.approx((1 + 16 + 25) / (1 + 4 + 5))
    assert rounds[kind]["sums"] == pytest.approx(rounds["nan"]["sums"])


def test_all_clients_are_taken_and_measured(rounds: dict[str, Any]) -> None:
    found = rounds[""]
    assert [sorted(r[0]) for r in found["rounds"]] == [[1, 2, 3, 4, 5]] * 2 and found["same"]
    assert found["loss"]["1"]["loss"] == pytest.approx(55 / 15)
    assert found["evaluated"]["2"]["loss"] == pytest.approx(55 / 15)
    assert found["sums"] != rounds["nan"]["sums"]
    down, up = found["rounds"][0][4:]
    assert down % 5 == 0 and up < down  # clients of lower ranks send less


def test_local_routers_stay_with_their_client(rounds: dict[str, Any]) -> None:
    own = rounds["local"]["local"]
    assert len(own) == 5 and all(".router." in name for names in own for name in names)
    assert not any(".router." in name for name in rounds["local"]["sums"])
    assert rounds["local"]["rounds"][0][4] < rounds[""]["rounds"][0][4]


def test_too_few_clients_change_nothing(rounds: dict[str, Any]) -> None:
    found = rounds["few"]
    assert [r[3] for r in found["rounds"]] == [False, False] and found["same"] is None and not found["loss"]


def test_types_that_numpy_lacks_come_back_bit_for_bit(rounds: dict[str, Any]) -> None:
    assert rounds["bits"]


LEAVES = """
import moa, torch
from moa.federated.flower import _load_own
from moa.federated.update import update_of
from tests import models

kept = {n: t + 1 for n, t in update_of(moa.build(models.bert(), "topk", n_experts=2, k=1)).tensors.items()}
for router, same in (("fixed", True), ("topk", False)):
    model = moa.build(models.bert(), router, n_experts=2, **({"k": 1} if router == "topk" else {}))
    before = {n: t.clone() for n, t in update_of(model).tensors.items()}
    _load_own(model, kept)
    assert all(torch.equal(t, before[n]) for n, t in update_of(model).tensors.items()) is same, router
"""


def test_what_a_node_kept_of_another_model_is_left() -> None:
    """A study of several methods has the same nodes for all of them."""
    if not PYTHON.is_file():
        pytest.skip("no Flower here: make env-flower")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PYTHON), "-c", LEAVES], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
