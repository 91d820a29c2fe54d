"""The same vectors as sentence-transformers, for every pooling and module we read, and a clear no for the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyhead.embed import Encoder
from polyhead.embed.folder import read_recipe
from polyhead.errors import InputError

TEXTS = ["the river rises", "What did the bridge of iron cost, in the town?", "", "a", "hills and hills and hills"]
POOLINGS: list[Any] = [
    "mean",
    "cls",
    "max",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    ("max", "mean", "cls"),
]


def same(folder: Path, peer: Any, tmp_path: Path, **options: Any) -> None:
    ours = Encoder(str(folder), backend="torch", cache_dir=tmp_path).encode(TEXTS, **options)
    expected = peer.encode(TEXTS, batch_size=2, **options)
    assert ours.dense.shape == expected.shape
    np.testing.assert_allclose(ours.dense, expected, atol=1e-5)


@pytest.mark.parametrize("base", ["bert", "llama"])
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_poolings(sentence_folder: Callable[..., Any], tmp_path: Path, pooling: Any, base: str) -> None:
    # The causal model pads on the left in sentence-transformers.
    same(*sentence_folder(pooling=pooling, base=base), tmp_path)


def test_dense_and_normalize(sentence_folder: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    after = [Dense(32, 12), Normalize(), Dense(12, 12, activation_function=torch.nn.ReLU(), use_residual=True)]
    folder, peer = sentence_folder(*after, Normalize(), pooling="mean")
    same(folder, peer, tmp_path)
    encoder = Encoder(str(folder), backend="torch", cache_dir=tmp_path)
    assert (encoder.dim, encoder.normalizes) == (12, True)
    raw = encoder.encode(TEXTS, normalize=False).dense
    assert abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.05
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), encoder.encode(TEXTS).dense, atol=1e-6)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "cls"])
def test_prompts(sentence_folder: Callable[..., Any], tmp_path: Path, pooling: str, include_prompt: bool) -> None:
    prompts = {"query": "search: ", "document": "find: "}
    folder, peer = sentence_folder(
        pooling=pooling, include_prompt=include_prompt, prompts=prompts, default_prompt_name="document"
    )
    same(folder, peer, tmp_path)  # The default prompt.
    same(folder, peer, tmp_path, prompt="the river: ")
    encoder = Encoder(str(folder), backend="torch", cache_dir=tmp_path)
    np.testing.assert_allclose(encoder.encode_query(TEXTS).dense, peer.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_document(TEXTS).dense, peer.encode_document(TEXTS), atol=1e-5)
    assert abs(encoder.encode(TEXTS, prompt="").dense - encoder.encode(TEXTS).dense).max() > 1e-3


def test_a_lower_limit_and_lower_case(sentence_folder: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = sentence_folder(pooling="mean")
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_seq_length": 9, "do_lower_case": True}))
    encoder = Encoder(str(folder), backend="torch", cache_dir=tmp_path)
    assert encoder.max_tokens == 9
    from sentence_transformers import SentenceTransformer

    texts = ["The River RISES in the hills and runs west"]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    with pytest.warns(UserWarning, match="were cut"):
        ours = encoder.encode(texts, on_long="truncate").dense
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.real_model
def test_minilm(minilm_path: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [
        "",
        "The river rises in the hills. " * 8,
        "Two heads",
        "naïve café, 12,000 € — 東京",
        "  spaces \n around  ",
    ]
    ours = Encoder("all-MiniLM-L6-v2", backend="torch", cache_dir=tmp_path).encode(texts).dense
    np.testing.assert_allclose(ours, SentenceTransformer(minilm_path, device="cpu").encode(texts), atol=1e-5)


def test_older_folders_name_poolings_by_switches(tmp_path: Path) -> None:
    kinds = ["models.Transformer", "models.Pooling"]
    entries = [
        {"idx": number, "path": "" if number == 0 else "1_Pooling", "type": f"sentence_transformers.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "1_Pooling").mkdir()
    switches = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(switches))
    recipe = read_recipe(tmp_path)
    assert recipe.pooling == ("cls", "mean")
    assert not recipe.normalizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "sentence_transformers.models.LSTM"}, "LSTM"),
        ({"type": "my_package.Pooling"}, "my_package.Pooling"),
    ],
)
def test_unknown_modules_are_refused(
    sentence_folder: Callable[..., Any], tmp_path: Path, change: dict[str, str], message: str
) -> None:
    folder, _ = sentence_folder(pooling="mean")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    entries = json.loads((copy / "modules.json").read_text())
    entries[1].update(change)
    (copy / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=f"{message}.*Transformer, Pooling, Dense, Normalize"):
        Encoder(str(copy))


def test_damaged_json_is_named(sentence_folder: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(InputError, match=r"modules\.json is not readable JSON"):
        Encoder(str(tmp_path))


def test_an_activation_that_is_not_torchs_is_refused(sentence_folder: Callable[..., Any], tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    folder, _ = sentence_folder(Dense(32, 4), pooling="mean")
    file = folder / "2_Dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "activation_function": "os.system"}))
    with pytest.raises(InputError, match=r"os\.system"):
        Encoder(str(folder), backend="torch", cache_dir=tmp_path).encode(["a"])
