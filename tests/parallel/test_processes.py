"""Several processes, by DDP or by FSDP2, end with the weights of one that has the same global batch, for every recipe.

Uneven rows and padding, accumulation, experts without rows, forwards that only one process makes; unused parameters
would be an error, as DDP looks for none. Run: pytest tests/parallel/test_processes.py; all variants: -m slow
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import moa
from moa.errors import CheckpointError, ConfigError, ContextError
from tests import models
from tests.laws import assert_close

from .processes import run_together
from .steps import (
    CASES,
    ONE_EACH,
    STEPS,
    base_of,
    by_task,
    learned,
    model_of,
    optimizer_of,
    rows_of,
    same_draws,
    take_step,
)

TOLERANCE = 1e-10  # of how far a weight moved: fp64 throughout


WAYS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes have left what they trained."""
    folder = tmp_path_factory.mktemp("two")
    run_together("tests.parallel.job", 2, str(folder), ",".join(ONE_EACH))
    return folder


@functools.cache
def alone(case: str, world: int, half: Path | None = None) -> dict[str, torch.Tensor]:
    """Return what one process learns on the batches of several, from the start or from what they saved after a step."""
    model = model_of(case) if half is None else moa.load(half / case, base_of(case)).train()
    optimizer = optimizer_of(model)
    if half is not None:
        optimizer.load_state_dict(torch.load(half / f"{case}.optimizer.pt"))
    with same_draws():
        for step in range(0 if half is None else 1, STEPS):
            take_step(model, optimizer, step, world, None, by_task(case))
    return learned(model)


def assert_moved_alike(case: str, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Fail unless what training moved lies where it does in one process."""
    before = learned(model_of(case))
    assert got.keys() == expected.keys() == before.keys()
    moved = {name: expected[name] - value for name, value in before.items()}
    assert any(bool(value.any()) for value in moved.values()) or case.startswith("arrow"), "nothing was learned"
    for name, value in moved.items():
        assert_close(got[name] - before[name], value, TOLERANCE, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ONE_EACH)
def test_two_processes_learn_what_one_does(case: str, way: str, two: Path) -> None:
    assert_moved_alike(case, learned(moa.load(two / way / case, base_of(case))), alone(case, 2))


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_checkpoint_of_two_processes_goes_on_in_one(case: str, two: Path) -> None:
    assert_moved_alike(case, alone(case, 2, two / "half"), alone(case, 2))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_variant_learns_what_one_process_does(world: int, tmp_path: Path) -> None:
    run_together("tests.parallel.job", world, str(tmp_path), ",".join(CASES))
    for case in CASES:
        for way in WAYS:
            assert_moved_alike(case, learned(moa.load(tmp_path / way / case, base_of(case))), alone(case, world))
        assert_moved_alike(case, alone(case, world, tmp_path / "half"), alone(case, world))


def test_a_sharded_save_knows_its_base(two: Path) -> None:
    other = base_of("topk-default")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    with pytest.raises(CheckpointError, match="wrong base"):
        moa.load(two / "fsdp" / "topk-default", other)


def test_a_model_prepared_for_evaluation_does_not_train_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate puts no DDP around a model that `trainer.evaluate()` has prepared."""
    model = model_of("topk-default")
    Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
    batch = rows_of(0, 0)
    batch.pop("task_ids")
    assert model(**batch).loss.requires_grad, "one process needs no wrapper"
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    with pytest.raises(ContextError, match="prepared for evaluation, and nothing averages its gradients"):
        model(**batch)


def test_each_process_by_itself_is_an_option() -> None:
    """The keyword reaches every router, and a recipe without a loss refuses it."""
    for name in ("topk", "switch", "noisy_topk", "adamole", "loramoe", "mixlora"):
        options = {"targets": "all-linear", "losses_over": "process"}
        model = moa.build(models.llama(num_hidden_layers=1), name, n_experts=4, **options)
        found = {branch.router.losses_over for _, branch in model.branches() if branch.router.loss_weights}
        assert found == {"process"}, name
    with pytest.raises(ConfigError, match="losses_over='process' changes nothing"):
        moa.make_recipe("dense", losses_over="process")
    with pytest.raises(ConfigError, match="unknown losses_over 'local'"):
        moa.make_recipe("topk", losses_over="local")
