"""A tiny sentence encoder on disk, and rows of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import WORDS, pairs, tiny_encoder


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


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """16 pairs without a double."""
    assert len(WORDS) > 16
    torch.manual_seed(0)
    return pairs(16)
