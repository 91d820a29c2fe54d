"""Starbucks' pretraining against its definition, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_parts import WORDS, tiny_encoder

from polyhead.errors import InputError
from polyhead.training import LadderAutoencoder, Options, Trainer

TEXTS = ["the river runs west in the hills", "a bridge of iron", "the town is north of the road"]
SIZES = [(1, 8), (3, 32)]


def defined(loss: Any, features: dict[str, Any], drawn: torch.Tensor) -> float:
    """Straight from the paper's description: one text, one size, one token at a time."""
    model = loss.model[0].auto_model
    ids, mask = features["input_ids"], features["attention_mask"]
    special, vocabulary = set(loss.special), model.embeddings.word_embeddings.weight
    sums = torch.zeros(len(SIZES), 2)
    counts = [0, 0]
    for text in range(len(ids)):
        length = int(mask[text].sum())
        own = ids[text, :length]
        hide = [
            [int(own[i]) not in special and bool(drawn[text, i] < share) for i in range(length)] for share in (0.3, 0.6)
        ]
        inputs = [
            torch.tensor([loss.mask_id if gone else int(t) for gone, t in zip(h, own, strict=True)]) for h in hide
        ]
        states = model(inputs[0][None], output_hidden_states=True).hidden_states
        for number, (layer, width) in enumerate(SIZES):

            def read(state: torch.Tensor) -> torch.Tensor:
                narrow = loss.dense.weight[:, : len(state)] @ state + loss.dense.bias
                return loss.norm(torch.nn.functional.gelu(narrow))

            plain = model.embeddings(input_ids=inputs[1][None])[0]
            first = read(states[layer][0, 0, :width])
            decoded = loss.decoder(torch.cat((first[None], plain[1:]))[None])
            decoded = (decoded[0] if isinstance(decoded, tuple) else decoded)[0]
            for i in range(length):
                for which, state in ((0, states[layer][0, i, :width]), (1, decoded[i])):
                    if hide[which][i]:
                        logits = vocabulary @ read(state) + loss.bias
                        sums[number, which] -= logits.log_softmax(0)[own[i]]
                        counts[which] += number == 0
    return float((sums / torch.tensor(counts)).mean())


def test_it_is_its_definition() -> None:
    model = tiny_encoder(dropout=0.0)
    torch.manual_seed(1)
    loss = LadderAutoencoder(SIZES, mask=0.3, decoder_mask=0.6).bind(model)
    features = model.preprocess(TEXTS)
    torch.manual_seed(5)
    found = loss([features], None)
    torch.manual_seed(5)
    drawn = torch.rand(features["input_ids"].shape)
    with torch.no_grad():
        assert float(found) == pytest.approx(defined(loss, features, drawn), rel=1e-4)
    found.backward()
    for part in (loss.decoder.attention.self.query.weight, model[0].auto_model.encoder.layer[2].output.dense.weight):
        assert part.grad is not None
        assert part.grad.abs().sum() > 0
    assert loss.dense.weight.grad[:, 8:].abs().sum() > 0
    # A text without a token to hide costs nothing and breaks nothing.
    assert float(loss([model.preprocess([""])], None).detach()) == 0.0


def test_it_learns_to_fill_masks() -> None:
    texts = [f"the {word} runs west of the {word}" for word in WORDS[:16]]
    model = tiny_encoder(dropout=0.0)
    trainer = Trainer(
        LadderAutoencoder(SIZES), options=Options(batch_size=16, epochs=25, learning_rate=3e-3, device="cpu")
    ).fit(model, texts)
    logged = [entry["loss"] for entry in trainer.history_ if "loss" in entry]
    assert logged[-1] < 0.8 * logged[0]


def test_what_cannot_be_is_said() -> None:
    for sizes, mask, decoder_mask in (([], 0.2, 0.4), (SIZES, 0.5, 0.4), (SIZES, 0.0, 0.4)):
        with pytest.raises(InputError, match="at least one size"):
            LadderAutoencoder(sizes, mask=mask, decoder_mask=decoder_mask)
    with pytest.raises(InputError, match="has 3 layers of 32"):
        LadderAutoencoder([(4, 32)]).bind(tiny_encoder())
