"""The encoder: heads, order, long texts, streams, odd input; against float64 references and against itself."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyhead.embed import Encoder, LongTextWarning
from polyhead.errors import InputError, ModelNotFoundError

TEXTS = ["the river rises", "a", "What did the bridge of iron cost, in the town?", "", "hills and runs west"]


@pytest.fixture
def bert(tiny_bert: Path, tmp_path: Path) -> Encoder:
    return Encoder(str(tiny_bert), backend="torch", cache_dir=tmp_path, layers=(0, -1))


def captured(folder: Path, text: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Last states ``[tokens, hidden]`` and what enters each output projection, of one text on its own."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    names = ("attention.output.dense", "self_attn.o_proj")
    projections = [part for name, part in model.named_modules() if name.endswith(names)]
    taken: list[np.ndarray] = []
    for projection in projections:
        projection.register_forward_pre_hook(lambda _, given: taken.append(given[0][0].double().numpy()))
    with torch.no_grad():
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
        states = model(input_ids=ids).last_hidden_state[0].double().numpy()
    return states, taken


def test_dense_and_heads_of_a_batch_are_those_of_each_text_alone(bert: Encoder, tiny_bert: Path) -> None:
    found = bert.encode(TEXTS, heads=True)
    assert found.heads is not None
    assert (found.dense.shape, found.heads.shape) == ((5, 32), (5, 2, 4, 8))
    assert (bert.dim, bert.head_shape, bert.max_tokens) == (32, (2, 4, 8), 24)
    for row, text in enumerate(TEXTS):
        states, taken = captured(tiny_bert, text)
        np.testing.assert_allclose(found.dense[row], states.mean(0), atol=1e-5)
        for number, layer in enumerate((0, 1)):
            np.testing.assert_allclose(found.heads[row, number].ravel(), taken[layer].mean(0), atol=1e-5)
    np.testing.assert_array_equal(bert.encode(TEXTS).dense, found.dense)


def test_a_causal_model_gives_its_last_token(tiny_llama: Path, tmp_path: Path) -> None:
    found = Encoder(str(tiny_llama), backend="torch", cache_dir=tmp_path).encode(TEXTS, heads=True)
    assert found.heads is not None
    for row, text in enumerate(TEXTS):
        states, taken = captured(tiny_llama, text)
        np.testing.assert_allclose(found.dense[row], states[-1], atol=1e-5)
        np.testing.assert_allclose(found.heads[row, 0].ravel(), taken[-1][-1], atol=1e-5)


def test_results_have_the_order_of_the_input(bert: Encoder) -> None:
    random = np.random.default_rng(0)
    words = ["the", "a", "river", "rises", "in", "hills", "and", "runs", "west", "bridge"]
    texts = [" ".join(random.choice(words, size=random.integers(0, 18))) for _ in range(300)]
    together = bert.encode(texts).dense
    alone = np.concatenate([bert.encode([text]).dense for text in texts[:40]])
    np.testing.assert_allclose(together[:40], alone, atol=1e-5)
    order = random.permutation(len(texts))
    np.testing.assert_allclose(bert.encode([texts[at] for at in order]).dense, together[order], atol=1e-5)


def test_long_texts_become_chunks_that_cover_them(bert: Encoder) -> None:
    long = " the river rises in the hills, and runs west: " * 6
    with pytest.warns(LongTextWarning, match="1 of 2 texts"):
        merged = bert.encode([long, "a"], heads=True)
    chunks = bert.encode_chunks([long, "a"], heads=True, overlap=4)
    assert chunks.heads is not None
    assert chunks.owner.tolist() == [0] * (len(chunks) - 1) + [1]
    assert (chunks.start[0], chunks.end[-2], chunks.start[-1], chunks.end[-1]) == (0, len(long), 0, 1)
    assert (chunks.start[1:-1] < chunks.end[:-2]).all(), "neighbours overlap"
    # Each chunk is encoded as its own characters would be.
    pieces = [long[start:end] for start, end in zip(chunks.start[:-1], chunks.end[:-1], strict=True)]
    alone = bert.encode(pieces, heads=True, on_long="error")
    assert alone.heads is not None
    np.testing.assert_allclose(chunks.dense[:-1], alone.dense, atol=1e-5)
    np.testing.assert_allclose(chunks.heads[:-1], alone.heads, atol=1e-5)
    # The default overlap of this small model differs from 4, so take the chunks it makes itself.
    default = bert.encode_chunks([long], heads=True)
    assert default.heads is not None
    pieces = [long[start:end] for start, end in zip(default.start, default.end, strict=True)]
    weights = np.array([len(bert.tokens(piece)) - 2 for piece in pieces], dtype=np.float64)
    np.testing.assert_allclose(merged.dense[0], weights @ default.dense / weights.sum(), atol=1e-5)
    expected = np.tensordot(weights, default.heads, 1) / weights.sum()
    assert merged.heads is not None
    np.testing.assert_allclose(merged.heads[0], expected, atol=1e-5)


def test_merged_vectors_are_normalised_once_merged(bert: Encoder) -> None:
    with pytest.warns(LongTextWarning):
        found = bert.encode(["the river " * 40], normalize=True).dense
    assert np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-6)


def test_long_texts_can_be_cut_or_refused(bert: Encoder) -> None:
    long = "the " * 50
    with pytest.warns(LongTextWarning, match="were cut"):
        cut = bert.encode(["a", long], on_long="truncate").dense
    np.testing.assert_allclose(cut[1], bert.encode(["the " * 22]).dense[0], atol=1e-6)
    with pytest.raises(InputError, match=r"text 1 .*52 tokens.*24"):
        bert.encode(["a", long], on_long="error")
    with pytest.raises(InputError, match="on_long = 'shorten'"):
        bert.encode(["a"], on_long="shorten")  # type: ignore[arg-type]


def test_a_prompt_stands_before_each_chunk(bert: Encoder) -> None:
    long = "the river rises " * 20
    chunks = bert.encode_chunks([long], prompt="search: ")
    alone = [bert.encode([long[a:b]], prompt="search: ", on_long="error").dense[0] for a, b in _spans(chunks)]
    np.testing.assert_allclose(chunks.dense, alone, atol=1e-5)
    with pytest.raises(InputError, match="shorter prompt"):
        bert.encode_chunks([long], prompt="find: " * 12)


def _spans(chunks: Any) -> list[tuple[int, int]]:
    return list(zip(chunks.start.tolist(), chunks.end.tolist(), strict=True))


def test_stream_keeps_order_and_reads_no_further_than_it_must(bert: Encoder) -> None:
    texts = [TEXTS[number % len(TEXTS)] + " a" * (number % 7) for number in range(95)]
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for text in texts:
            read += 1
            yield text

    done: list[int] = []
    stream = bert.encode_stream(source(), heads=True, window=20, progress=lambda count, total: done.append(count))
    first = next(stream)
    assert (len(first), read) == (20, 20)
    parts = [first, *stream]
    assert [len(part) for part in parts] == [20, 20, 20, 20, 15]
    whole = bert.encode(texts, heads=True)
    np.testing.assert_allclose(np.concatenate([part.dense for part in parts]), whole.dense, atol=1e-5)
    assert done == sorted(done)
    assert done[-1] == 95


def test_ctrl_c_passes_through_and_finished_windows_stay(bert: Encoder) -> None:
    calls = 0

    def interrupt(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if done > 20:
            raise KeyboardInterrupt

    got = []
    stream = bert.encode_stream(["the river rises"] * 60, window=20, progress=interrupt)

    def write_all() -> None:
        for part in stream:
            got.append(part)

    with pytest.raises(KeyboardInterrupt):
        write_all()
    assert [len(part) for part in got] == [20]
    np.testing.assert_allclose(bert.encode(["the river rises"]).dense[0], got[0].dense[5], atol=1e-5)


def test_stream_says_once_how_many_were_long(bert: Encoder) -> None:
    with pytest.warns(LongTextWarning, match="6 of 60 texts") as caught:
        list(bert.encode_stream((["a"] * 9 + ["the " * 30]) * 6, window=10))
    assert len([each for each in caught if each.category is LongTextWarning]) == 1


def test_progress_counts_texts_up_to_all_of_them(bert: Encoder) -> None:
    seen: list[tuple[int, int | None]] = []
    with pytest.warns(LongTextWarning):
        bert.encode(["the " * 60, *["a"] * 400], progress=lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert len(counts) > 1
    assert seen[-1] == (401, 401)


def test_token_ids_are_taken_as_they_are(bert: Encoder) -> None:
    ids = [bert.tokens(text).tolist() for text in TEXTS]
    found = bert.encode_token_ids([*ids, []], heads=True)
    expected = bert.encode(TEXTS, heads=True)
    np.testing.assert_allclose(found.dense[:-1], expected.dense, atol=1e-6)
    assert not found.dense[-1].any()
    with pytest.raises(InputError, match="sequence 0 has 25 token ids"):
        bert.encode_token_ids([[5] * 25])


def test_no_texts_no_rows(bert: Encoder) -> None:
    found = bert.encode([], heads=True)
    assert found.heads is not None
    assert (found.dense.shape, found.heads.shape) == ((0, 32), (0, 2, 4, 8))
    assert bert.encode_chunks([], heads=True).owner.shape == (0,)
    assert list(bert.encode_stream([])) == []


def test_bad_arguments_say_what_is_wrong(bert: Encoder, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="put it in a list"):
        bert.encode("one text")
    with pytest.raises(InputError, match="text 1 is NoneType"):
        bert.encode(["a", None])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"layer 2 was asked for.*has 2: give -2 to 1"):
        Encoder(str(tiny_bert), layers=(2,), cache_dir=tmp_path).encode(["a"])
    with pytest.raises(InputError, match="max_tokens = 25"):
        Encoder(str(tiny_bert), max_tokens=25, cache_dir=tmp_path).encode(["a"])
    with pytest.raises(InputError, match="backend = 'jax'"):
        Encoder(str(tiny_bert), backend="jax")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pooling = 'median'"):
        Encoder(str(tiny_bert), pooling="median")
    with pytest.raises(ModelNotFoundError):
        Encoder("/no/such/model")


def test_a_text_without_tokens_has_zeros(tiny_bert: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(tiny_bert, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoder = Encoder(str(folder), backend="torch", cache_dir=tmp_path / "cache")
    if len(encoder.tokens("")):
        pytest.skip("this transformers adds special tokens all the same")
    found = encoder.encode(["", "the river", "  "], heads=True, normalize=True)
    assert found.heads is not None
    assert not found.dense[[0, 2]].any()
    assert not found.heads[[0, 2]].any()
    assert np.linalg.norm(found.dense[1]) == pytest.approx(1, abs=1e-6)


def test_memory_does_not_grow_with_calls(bert: Encoder) -> None:
    def resident() -> float:
        with open("/proc/self/statm") as content:
            return int(content.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    texts = [" ".join(["river"] * (1 + number % 20)) for number in range(64)]
    for _ in range(20):
        bert.encode(texts, heads=True)
    gc.collect()
    before = resident()
    for _ in range(60):
        bert.encode(texts, heads=True)
    gc.collect()
    assert resident() - before < 8, "MiB after 60 more calls"


def test_auto_calibrates_once_many_calls_add_up_to_long_work(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index is made in batches, each below the number that is worth a calibration."""
    from polyhead.embed import backends

    calls: list[int] = []

    def calibrate(self: backends.Backends, *_: Any) -> None:
        calls.append(1)
        self._settled = True

    monkeypatch.setattr(backends, "CALIBRATE_FROM", 5)
    monkeypatch.setattr(backends.Backends, "calibrate", calibrate)
    encoder = Encoder(str(tiny_bert), cache_dir=tmp_path)
    encoder.encode(TEXTS[:2])
    encoder.encode_chunks(TEXTS[:2])
    assert not calls
    encoder.encode(TEXTS[:2])
    encoder.encode(TEXTS[:2])
    assert len(calls) == 1


def test_openvino_reports_nothing_and_forks_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    """OpenVINO would tell its makers of imports and exports; LanceDB, which may be loaded too, must not be forked."""
    pytest.importorskip("openvino_telemetry")
    script = (
        "import os, sys, time\n"
        "os.fork = lambda: os.write(1, b'forked') and 0\n"
        "from polyhead.embed import Encoder\n"
        "Encoder(sys.argv[1], backend='openvino', cache_dir=sys.argv[2]).encode(['the river'])\n"
        "time.sleep(0.5)\n"
        "os.write(1, b'done')\n"
        "os._exit(0)\n"
    )
    # In a process of its own, as this one has imported OpenVINO already.
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tiny_bert), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == "done", ran.stderr
