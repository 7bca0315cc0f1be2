"""Reinforcement learning with the engine's rollouts: the same numbers in trainer and engine. Run: make test-vllm"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm_engine import needs_engine, run_engine

STEPS = 3
SCRIPT = """
from pathlib import Path
from experiments.serving.grpo import train

folder, steps = arguments
answer(train(Path(folder), steps))
"""


@needs_engine
def test_log_probabilities_of_trainer_and_engine_are_equal_after_every_step(tmp_path: Path) -> None:
    found = run_engine(SCRIPT, str(tmp_path), STEPS)
    assert found["rollouts"] == "vLLM" and len(found["rewards"]) == STEPS
    assert len(found["differences"]) == STEPS
    assert max(found["differences"]) < 2e-5
    assert min(found["moved"]) > 1e-3, "a step that moves nothing shows nothing"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.utils.data")
def test_without_the_engine_the_rollouts_are_the_trainers_own(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from experiments.serving.grpo import train

    found = train(tmp_path, 1)
    assert found["rollouts"].startswith("the trainer's own") and len(found["rewards"]) == 1
    assert found["differences"] == []
