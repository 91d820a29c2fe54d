"""A vector for every token: those of sentence-transformers, with no token of a long text lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyhead.embed import Encoder, TokenVectors
from polyhead.errors import InputError

TEXTS = ["the river rises in the hills", "", "a bridge, of iron", "what did it cost"]


def test_token_vectors_are_the_last_states_of_the_texts_own_tokens(
    sentence_folder: Callable[..., tuple[Path, Any]],
) -> None:
    folder, peer = sentence_folder(pooling="mean", prompts={"query": "search : ", "document": ""})
    found = Encoder(str(folder), backend="torch").encode_tokens(TEXTS)
    assert found.lengths.tolist() == [6, 0, 5, 4]
    assert found.spans is not None
    words = [TEXTS[text][start:end] for text in (0, 2) for start, end in found.take(np.array([text])).spans.tolist()]  # type: ignore[union-attr]
    assert " ".join(words) == "the river rises in the hills a bridge , of iron"
    for text, vectors in zip(TEXTS, found, strict=True):
        states = peer.encode([text], output_value="token_embeddings", prompt="")[0].cpu().numpy()[1:-1]
        states = states / np.linalg.norm(states, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, states, atol=1e-5)


def test_a_questions_prompt_is_read_and_left_out(sentence_folder: Callable[..., tuple[Path, Any]]) -> None:
    folder, peer = sentence_folder(pooling="mean", prompts={"query": "search : "})
    found = Encoder(str(folder), backend="torch").encode_tokens(["what did it cost"], query=True)
    states = peer.encode(["search : what did it cost"], output_value="token_embeddings", prompt="")[0].cpu().numpy()
    states = states[3:-1] / np.linalg.norm(states[3:-1], axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, states, atol=1e-5)
    assert found.spans is not None
    assert found.spans.tolist() == [[0, 4], [5, 8], [9, 11], [12, 16]]


def test_no_token_of_a_long_text_is_lost_or_counted_twice(tiny_bert: Path) -> None:
    encoder = Encoder(str(tiny_bert), backend="torch")
    text = " ".join(["the river rises in the hills and runs west"] * 9)
    found = encoder.encode_tokens([text, "the river"])
    assert encoder.max_tokens == 24
    assert found.lengths.tolist() == [81, 2]
    assert found.spans is not None
    assert [text[start:end] for start, end in found.spans[:81].tolist()] == text.split()
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)


def test_offsets_must_fit() -> None:
    with pytest.raises(InputError, match="rising offsets"):
        TokenVectors(np.zeros((3, 2)), np.array([0, 5]))
    with pytest.raises(InputError, match="one array"):
        TokenVectors.of([])
