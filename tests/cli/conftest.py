"""Tiny bases, written once for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import decoder_folder, encoder_folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a BERT and a Llama; a test that changes one makes its own."""
    folder = tmp_path_factory.mktemp("bases")
    return {"encoder": encoder_folder(folder / "encoder"), "decoder": decoder_folder(folder / "decoder")}
