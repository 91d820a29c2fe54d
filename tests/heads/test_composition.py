"""Composition of heads against its definition in float64, and against heads wired together by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.composition import KComposition, QComposition, VComposition, channels, compose
from polyhead.heads.weights import read_weights
from polyhead.model import HeadedModel, load


def _model(family: str = "gpt2", layers: int = 3) -> HeadedModel:
    return load(tiny(family, **({"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers})))


def _definition(model: HeadedModel, kind: str) -> np.ndarray:
    """||W_V W_O R|| / (||W_V W_O|| ||R||) by explicit hidden x hidden products, one pair at a time."""
    layers = [layer.expanded() for layer in read_weights(model, dtype=torch.float64).layers]
    found = np.full((len(layers), 4, len(layers), 4), np.nan)
    for i, a in enumerate(layers):
        for j, b in enumerate(layers):
            for g in range(4):
                for h in range(4):
                    if i >= j:
                        continue
                    write = a.value[g] @ a.output[g]
                    read = {
                        "Q": b.query[h] @ b.key[h].T,
                        "K": b.key[h] @ b.query[h].T,
                        "V": b.value[h] @ b.output[h],
                    }[kind]
                    found[i, g, j, h] = (write @ read).norm() / (write.norm() * read.norm())
    return found


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama", "gpt-neox"])
def test_equals_the_definition(family, kind):
    model = _model(family)
    assert np.allclose(compose(model, kind).values, _definition(model, kind), atol=1e-6, equal_nan=True)


def test_channels_make_up_the_whole():
    """The whole score is the channels' in root mean square, each weighed by what it carries."""
    found = compose(_model(), "K", dtype=torch.float64)
    power = found.sizes**2 / (found.sizes**2).sum(-1, keepdims=True)
    whole = np.sqrt((power[..., None, None] * found.by_channel**2).sum(2))
    assert np.allclose(whole, found.values, equal_nan=True)


def test_a_channel_is_a_rank_one_piece_and_its_score_the_definition_of_that_piece():
    model = _model("gemma3")
    layers = [layer.expanded() for layer in read_weights(model, dtype=torch.float64).layers]
    piece = channels(layers[0], 2)
    whole = torch.einsum("i,id,ie->de", piece.sizes, piece.reads, piece.writes)
    assert torch.allclose(whole, layers[0].value[2] @ layers[0].output[2])
    read = layers[2].query[1] @ layers[2].key[1].T
    one = piece.sizes[1] * torch.outer(piece.reads[1], piece.writes[1])
    expected = (one @ read).norm() / (one.norm() * read.norm())
    assert np.isclose(compose(model, "Q").by_channel[0, 2, 1, 2, 1], float(expected), atol=1e-6)


def _wire(model: HeadedModel, width: int) -> None:
    """Head (0, 1) writes ``width`` directions that the keys of head (2, 3), and nothing else, read."""
    first, last = model.module.h[0], model.module.h[2]
    basis = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(3))).Q.T
    basis = torch.linalg.qr((basis - basis.mean(1, keepdim=True)).T).Q.T  # LayerNorm centres
    first.attn.c_proj.weight.data[8 + 0 : 8 + width] = basis[:width] * 3
    keys = last.attn.c_attn.weight.data[:, 32 + 24 : 32 + 32]
    keys.zero_()
    keys[:, :width] = basis[:width].T


def test_a_wired_pair_is_found_first_by_the_whole_and_by_its_channel():
    model = _model()
    _wire(model, 8)
    best = compose(model, "K").top(1)[0]
    assert (best.writer, best.reader) == ((0, 1), (2, 3))
    assert best.score > 0.3  # of at most 8 ** -0.5: writer and reader share all 8 directions
    other = _model()
    _wire(other, 1)
    best = compose(other, "K").top(1, by_channel=True)[0]
    assert (best.writer, best.channel, best.reader) == ((0, 1), 0, (2, 3))
    assert KComposition().score(other).top(1) == [(2, 3)]
    assert KComposition(side="writer").score(model).top(1) == [(0, 1)]


@pytest.mark.parametrize("score", [QComposition, KComposition, VComposition])
def test_head_with_a_zero_value_matrix_is_read_by_nobody_and_zero_is_no_nan(score):
    model = _model()
    for block in model.module.h:
        block.attn.c_attn.weight.data[:, 64 + 8 : 64 + 16] = 0  # values of head 1
    found = score().pairs(model)
    assert np.nanmax(found.values[:, 1]) == 0
    assert np.nanmax(found.by_channel[:, 1]) == 0
    values = score(side="writer").score(model).values
    assert (values[:2, 1] == 0).all()
    assert np.isnan(values[2]).all()


def test_random_matrices_score_what_chance_says():
    found = compose(_model(layers=4), "V")
    assert np.sqrt(np.nanmean(found.values**2)) == pytest.approx(found.chance, rel=0.1)


def test_wrong_kind_and_side_are_refused():
    with pytest.raises(InputError, match="'Q', 'K' or 'V'"):
        compose(_model(), "O")
    with pytest.raises(InputError, match="reader"):
        KComposition(side="both").score(_model())
