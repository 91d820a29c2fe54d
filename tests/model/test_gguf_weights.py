from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from polyhead.gguf_weights import LARGE, reading_weights  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_array("tokenizer.ggml.tokens", [f"tök{i}" for i in range(LARGE + 5)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * (LARGE + 5))
    writer.add_array("tokenizer.ggml.merges", ["a b", "c d"])
    writer.add_string("general.name", "after the long ones")
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_all_but_long_lists_is_what_the_stock_reader_reads(file: Path) -> None:
    stock = gguf.GGUFReader(file)
    with reading_weights():
        quick = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is quick
    assert list(quick.fields) == list(stock.fields)
    for name, field in stock.fields.items():
        assert len(quick.fields[name].data) == len(field.data), name
        assert quick.fields[name].types == field.types, name
        if len(field.data) <= LARGE:
            assert quick.fields[name].contents() == field.contents(), name
    for ours, theirs in zip(quick.tensors, stock.tensors, strict=True):
        assert (ours.name, ours.data_offset) == (theirs.name, theirs.data_offset)
        assert np.array_equal(ours.data, theirs.data)


def test_the_stock_reader_is_back_after_the_block_and_after_errors() -> None:
    stock = gguf.GGUFReader
    with pytest.raises(FileNotFoundError), reading_weights():
        gguf.GGUFReader("there is no such file")
    assert gguf.GGUFReader is stock


def test_blocks_wait_for_each_other() -> None:
    seen: list[str] = []
    with reading_weights():
        other = threading.Thread(target=lambda: [seen.append("in") for _ in [0] if _enter()])
        other.start()
        other.join(0.1)
        assert seen == []
    other.join(5)
    assert seen == ["in"]


def _enter() -> bool:
    with reading_weights():
        return True
