"""Fixed seed, no network, and `torch.empty` filled with NaN so that unwritten memory cannot pass a test."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_before() -> Iterator[None]:
    """Give transformers' messages and torch's threads back as they were."""
    from transformers.utils import logging

    level, threads = logging.get_verbosity(), torch.get_num_threads()
    yield
    logging.set_verbosity(level)
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty`, `empty_like` and `Tensor.new_empty` return with NaN."""

    def poison(make):  # type: ignore[no-untyped-def]
        def made(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
