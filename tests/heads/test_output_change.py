"""Change of an answer when a head is off, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from tiny import GROUPED, IMAGE, inputs_for, tiny

from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.output_change import OutputChange
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import Batch
from polyhead.model import HeadedModel, load


def classifier() -> HeadedModel:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return load(ViTForImageClassification(ViTConfig(**IMAGE, num_labels=5)).eval().double())


def decoder() -> HeadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return load(LlamaForCausalLM(LlamaConfig(**GROUPED)).eval())


def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    pixels = 3 * torch.randn(5, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4])
    return [
        Batch({"pixel_values": pixels[:3]}, {"label": labels[:3]}, 3),
        Batch({"pixel_values": pixels[3:]}, {"label": labels[3:]}, 2),
    ]


def test_metrics_match_their_definitions() -> None:
    model, batches = classifier(), images()
    found = OutputChange().changes(model, batches)
    labels = np.concatenate([batch.targets["label"].numpy() for batch in batches])

    def answers() -> np.ndarray:
        with torch.no_grad():
            return torch.cat([torch.softmax(model(**b.inputs).logits, -1) for b in batches]).numpy()

    p, rows = answers(), np.arange(5)
    for layer, head in every_head(model):
        with Gate.off([(layer, head)], model).on(model):
            q = answers()
        own, other = p[rows, labels], q[rows, labels]
        np.testing.assert_allclose(found["prob"][layer, head], own - other, atol=1e-9)
        np.testing.assert_allclose(found["loss"][layer, head], np.log(own) - np.log(other), atol=1e-9)
        np.testing.assert_allclose(found["jsd"][layer, head], jensenshannon(p, q, axis=1) ** 2, atol=1e-9)
    for metric in ("prob", "loss", "jsd"):
        values = OutputChange(metric).score(model, batches).values  # type: ignore[arg-type]
        np.testing.assert_allclose(values, found[metric].mean(-1))  # type: ignore[index]


def test_a_head_that_writes_nothing_changes_nothing() -> None:
    model = classifier()
    model.attention_layers[0].output_projection.weight.data[:, 8:16] = 0
    values = OutputChange("jsd").score(model, images()).values
    assert values[0, 1] < 1e-15
    assert np.delete(values.ravel(), 1).min() > 1e-12


def test_a_language_model_answers_with_its_last_real_token() -> None:
    model, inputs = decoder(), inputs_for("llama")
    label = torch.tensor([5, 9])
    together = OutputChange().changes(model, [Batch(inputs, {"label": label}, 2)])
    for row in range(2):
        ids = inputs["input_ids"][row : row + 1, : int(inputs["attention_mask"][row].sum())]
        alone = OutputChange().changes(model, [Batch({"input_ids": ids}, {"label": label[row : row + 1]}, 1)])
        for metric, values in alone.items():
            np.testing.assert_allclose(together[metric][..., row], values[..., 0], atol=1e-6)


def test_models_without_an_answer_and_data_without_labels_are_refused() -> None:
    with pytest.raises(InputError, match="need logits"):
        OutputChange().score(load(tiny("vit")), [Batch(inputs_for("vit"), {"label": torch.tensor([0, 1])}, 2)])
    with pytest.raises(InputError, match="'label'"):
        OutputChange().score(classifier(), [Batch(inputs_for("vit"), {}, 2)])
    with pytest.raises(InputError, match="no language-model head"):
        OutputChange().score(load(tiny("llama")))
    with pytest.raises(InputError, match="expected one of prob"):
        OutputChange("kl").score(classifier(), images())  # type: ignore[arg-type]
