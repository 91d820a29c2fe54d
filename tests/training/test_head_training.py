"""Head-local training: what is not tuned does not move by a bit; offsets are folded; heads are off in steps only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_parts import pairs, tiny_encoder

from polyhead.act import Steer
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.objectives import InfoNCE
from polyhead.training import HeadDropout, HeadOffsets, HeadWeights, Options, Trainer
from polyhead.training.models import headed

HEADS = [(0, 1), (2, 3)]
WIDTH = 8


def options(**changes: Any) -> Options:
    return Options(**{"batch_size": 8, "steps": 2, "learning_rate": 1e-2, "warmup": 0.0, "device": "cpu", **changes})


@pytest.mark.parametrize("cached", [None, 3])
def test_only_the_chosen_heads_move(cached: int | None) -> None:
    values = np.zeros((3, 4))
    for at in HEADS:
        values[at] = 1.0
    heads = HeadMap(values, "chosen").top(2)
    before = {name: value.clone() for name, value in tiny_encoder().state_dict().items()}
    trainer = Trainer(InfoNCE(), options=options(cached=cached), tune=HeadWeights(heads))
    after = trainer.fit(tiny_encoder(), pairs(8)).model_.state_dict()
    moved = {name: (after[name] != value) for name, value in before.items()}
    for layer in range(3):
        rows = torch.zeros(32, dtype=torch.bool)
        for at, head in HEADS:
            if at == layer:
                rows[head * WIDTH : (head + 1) * WIDTH] = True
        stem = f"0.model.encoder.layer.{layer}.attention."
        for part in ("query", "value"):
            assert torch.equal(moved.pop(f"{stem}self.{part}.weight").any(1), rows)
            assert torch.equal(moved.pop(f"{stem}self.{part}.bias"), rows)
        assert torch.equal(moved.pop(f"{stem}self.key.weight").any(1), rows)
        moved_bias = moved.pop(f"{stem}self.key.bias")  # softmax does not see it: moves by rounding at most
        assert not moved_bias[~rows].any()
        assert torch.equal(moved.pop(f"{stem}output.dense.weight").any(0), rows)
    assert not any(change.any() for change in moved.values())
    assert all(parameter.requires_grad for parameter in trainer.model_.parameters())


def test_offsets_are_learned_alone_and_folded() -> None:
    start = {name: value.clone() for name, value in tiny_encoder().state_dict().items()}
    model = tiny_encoder(dropout=0.0)
    seen: list[torch.Tensor] = []

    class Watched(HeadOffsets):
        """Keeps the offsets as they are at the end."""

        def on(self, model: Any, loss: Any) -> Any:
            inner = super().on(model, loss)

            class Both:
                def __enter__(self) -> None:
                    inner.__enter__()

                def __exit__(self, *error: Any) -> Any:
                    seen.append(loss.head_offsets.detach().clone())
                    return inner.__exit__(*error)

            return Both()

    trained = Trainer(InfoNCE(), options=options(), tune=Watched(HEADS)).fit(model, pairs(8)).model_
    after = trained.state_dict()
    moved = {name for name, value in start.items() if not torch.equal(after[name], value)}
    assert moved == {f"0.model.encoder.layer.{layer}.attention.output.dense.bias" for layer, _ in HEADS}
    (offsets,) = seen
    assert {(int(i), int(j)) for i, j in offsets.abs().sum(-1).nonzero()} == set(HEADS)
    # The offsets of the training, put on the start, are the folded model.
    fresh = tiny_encoder(dropout=0.0).eval()
    with Steer(offsets, heads=HEADS).on(headed(fresh)):
        expected = fresh.encode(["the river runs"])
    np.testing.assert_allclose(trained.encode(["the river runs"]), expected, atol=1e-6)


def test_a_stopped_run_is_left_as_it_was() -> None:
    model = tiny_encoder()

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    for tune in (HeadOffsets(HEADS), HeadWeights(HEADS)):
        with pytest.raises(KeyboardInterrupt):
            Trainer(InfoNCE(), options=options(), tune=tune).fit(model, pairs(8), progress=stop)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not model[0].auto_model.encoder.layer[0].attention.output.dense._forward_pre_hooks


@pytest.mark.parametrize("policy", ["random", "importance"])
def test_heads_are_off_in_training_steps_only(policy: Any) -> None:
    model = tiny_encoder(dropout=0.0)
    zero: list[tuple[bool, set[tuple[int, int]]]] = []

    def watch(layer: int, z: torch.Tensor) -> None:
        if layer == 0:
            zero.append((model.training and torch.is_grad_enabled(), set()))
        zero[-1][1].update((layer, head) for head in range(4) if not z[:, :, head].abs().sum())

    body = headed(model)
    hooks = []
    for layer, at in enumerate(body.attention_layers):

        def hook(module: Any, args: Any, layer: int = layer) -> None:
            watch(layer, args[0].unflatten(-1, (4, 8)))

        dropout_hook = at.output_projection.register_forward_pre_hook
        hooks.append((dropout_hook, hook))

    class Late(HeadDropout):
        """Registers the watch behind the mask's own hook, which is put on in each step."""

        def during(self, step: int, loss: Any) -> Any:
            inner = super().during(step, loss)

            class Both:
                def __enter__(self) -> None:
                    inner.__enter__()
                    self.handles = [put(hook) for put, hook in hooks]

                def __exit__(self, *error: Any) -> Any:
                    for handle in self.handles:
                        handle.remove()
                    return inner.__exit__(*error)

            return Both()

    trainer = Trainer(InfoNCE(), options=options(steps=3), during=[Late(1, policy, seed=5)])
    trainer.fit(model, pairs(8))
    steps = [zero[i : i + 2] for i in range(0, len(zero), 2)]  # anchors and positives
    assert len(steps) == 3
    for first, second in steps:
        assert first == second
        assert sorted(layer for layer, _ in first[1]) == [0, 1, 2]
    if policy == "random":
        assert len({frozenset(first[1]) for first, _ in steps}) > 1


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match="weight_decay to 0"):
        Trainer(InfoNCE(), options=options(weight_decay=0.1), tune=HeadWeights(HEADS)).fit(tiny_encoder(), pairs(8))
    with pytest.raises(InputError, match="No heads were named"):
        HeadWeights([])
    with pytest.raises(InputError, match="policy is 'best'"):
        HeadDropout(1, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="4 heads of each layer"):
        Trainer(InfoNCE(), options=options(), during=[HeadDropout(4)]).fit(tiny_encoder(), pairs(8))
