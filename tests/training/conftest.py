"""A tiny sentence encoder on disk, and rows of each kind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training_parts import tiny_encoder


@pytest.fixture(scope="session", autouse=True)
def _quick_collection() -> Iterator[None]:
    """accelerate collects garbage in every run, which takes as long as all that was imported is large."""
    import sentence_transformers  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 3 layers x 4 heads x 8 with mean pooling and normalisation, saved by sentence-transformers."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    tiny_encoder().save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def encoder() -> Any:
    """The same model in memory, in evaluation mode."""
    return tiny_encoder().eval()
