"""MiniLMv2 against its definition; soups against the mean of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_parts import WORDS, tiny_encoder

from polyhead.errors import InputError
from polyhead.training import Distillation, Options, RelationDistillLoss, Trainer, fresh_student, greedy_soup, soup
from polyhead.training.distill import capture_qkv
from polyhead.training.models import headed


def random_qkv(heads: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("query", "key", "value")
    return {name: torch.randn(2, heads, 5, width, generator=generator, dtype=torch.float64) for name in names}


def defined(teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], mask: torch.Tensor, cut: int) -> float:
    """Text by text, relation head by relation head, on the real tokens alone."""
    values = []
    for name in ("query", "key", "value"):
        for text in range(len(mask)):
            real = mask[text].bool()
            made = []
            for states in (teacher[name], student[name]):
                flat = torch.cat([states[text, head][real] for head in range(states.shape[1])], dim=1)
                size = flat.shape[1] // cut
                parts = [flat[:, i * size : (i + 1) * size] for i in range(cut)]
                made.append([torch.softmax(part @ part.T / size**0.5, -1) for part in parts])
            kl = [(t * (t / s).log()).sum(-1) for t, s in zip(*made, strict=True)]
            values.append(torch.stack(kl).mean(0))
    tokens = sum(len(value) for value in values)
    return float(sum(value.sum() for value in values) / tokens)


def test_relations_are_their_definition() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    teacher, student = random_qkv(4, 6, 0), random_qkv(2, 4, 1)
    student = {name: value.requires_grad_() for name, value in student.items()}
    loss = RelationDistillLoss(relation_heads=8)
    found = loss(teacher, student, mask)
    plain = {name: value.detach() for name, value in student.items()}
    assert float(found.detach()) == pytest.approx(defined(teacher, plain, mask, 8), rel=1e-5)
    found.backward()
    gradient = student["query"].grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[1, :, :2].abs().sum() == 0  # padding
    assert float(loss(teacher, teacher, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(RelationDistillLoss(8, ["qq"])(teacher, {**teacher, "value": student["value"]}, mask)) < 1e-6
    with pytest.raises(InputError, match="cannot be cut into 5"):
        RelationDistillLoss(5)(teacher, student, mask)
    with pytest.raises(InputError, match="one of qq, kk, vv"):
        RelationDistillLoss(8, ["qk"])


def test_queries_are_those_of_the_layer(encoder: Any) -> None:
    inputs = encoder.preprocess(["the river", "a"])
    body = encoder[0].auto_model
    seen: list[torch.Tensor] = []
    handle = body.encoder.layer[1].attention.self.query.register_forward_hook(lambda *args: seen.append(args[2]))
    with capture_qkv(headed(encoder), 1) as found:
        body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    handle.remove()
    torch.testing.assert_close(found["query"].transpose(1, 2).flatten(2), seen[-1])


def test_a_student_learns_the_teachers_relations() -> None:
    teacher = tiny_encoder(dropout=0.0)
    texts = [f"the {word} runs in the {other}" for word in WORDS[:6] for other in WORDS[6:10]]
    student = fresh_student(teacher, layers=1, hidden_size=16, heads=2)
    assert student[0].auto_model.config.hidden_size == 16
    assert student.get_embedding_dimension() == 16
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = Distillation(teacher, relation_heads=4)
    loss = objective.bind(student)
    student.eval()
    before = float(loss([student.preprocess(texts)], None).detach())
    options = Options(batch_size=24, epochs=10, learning_rate=2e-2, device="cpu")
    Trainer(objective, options=options).fit(student, texts)
    assert float(loss([student.preprocess(texts)], None).detach()) < 0.7 * before
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name, _ in loss.named_parameters())
    twin = fresh_student(teacher, layers=1, hidden_size=16, heads=2, seed=1)
    other = fresh_student(teacher, layers=1, hidden_size=16, heads=2, seed=0)
    weights = [model[0].auto_model.encoder.layer[0].output.dense.weight for model in (twin, other)]
    assert not torch.equal(*weights)
    with pytest.raises(InputError, match="cannot be cut into 3 heads"):
        fresh_student(teacher, layers=1, hidden_size=16, heads=3)


def noisy(seed: int) -> Any:
    model = tiny_encoder()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_soup_is_the_mean() -> None:
    models = [noisy(seed) for seed in range(3)]
    found = soup(models, [1, 2, 1]).state_dict()
    for name, value in models[0].state_dict().items():
        expected = value
        if value.is_floating_point():
            parts = np.stack([model.state_dict()[name].double().numpy() for model in models])
            expected = torch.tensor(np.average(parts, axis=0, weights=[1, 2, 1]), dtype=value.dtype)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)
    other = fresh_student(models[0], layers=1, hidden_size=16, heads=2)
    with pytest.raises(InputError, match="differs from the first in the shape"):
        soup([models[0], other])
    for weights in ([1, 2], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(InputError, match="one weight a model"):
            soup(models, weights)


def test_a_greedy_soup_takes_what_helps() -> None:
    """Scored by closeness to a point: two models on either side of it help each other, the far one does not."""
    models = [noisy(0), noisy(0), noisy(0)]
    name = "0.model.encoder.layer.0.output.dense.bias"
    for model, shift in zip(models, (5.0, -1.0, 0.9), strict=True):
        with torch.no_grad():
            model.state_dict()[name].fill_(shift)

    def score(model: Any) -> float:
        return -float(model.state_dict()[name].abs().sum())

    found, chosen = greedy_soup(models, score)
    assert chosen == [2, 1]
    assert float(found.state_dict()[name][0]) == pytest.approx(-0.05, abs=1e-6)
