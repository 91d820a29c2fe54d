"""MiniLMv2: a student learns how the teacher's queries, keys and values relate to each other."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.model import HeadedModel
from polyhead.papers import paper
from polyhead.tap import AttentionCall
from polyhead.training.models import headed, trainable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["Distillation", "RelationDistillLoss", "capture_qkv", "fresh_student"]

_PARTS = {"qq": "query", "kk": "key", "vv": "value"}
QKV = Mapping[str, Tensor]


@contextmanager
def capture_qkv(model: HeadedModel, layer: int) -> Iterator[dict[str, Tensor]]:
    """Queries, keys and values of one layer, ``[batch, heads, tokens, head_dim]`` each, of the forward passes inside.

    They are seen where attention is computed: positions that turn queries and keys (RoPE) have done so. Part of the
    autograd graph.

    Raises:
        UnreadableModelError: the layer does not attend through transformers' attention interface.
    """
    found: dict[str, Tensor] = {}

    def watch(index: int, call: AttentionCall) -> None:
        found.update(query=call.query, key=call.key, value=call.value)

    with model.tap_attention(watch, layers=[layer]):
        yield found


@paper("minilmv2")
class RelationDistillLoss(nn.Module):
    """Mean ``KL(R_teacher || R_student)`` of relations ``R = softmax(X X^T / sqrt(d_r))``, X in queries, keys, values.

    The heads of X are laid side by side and cut anew into ``relation_heads`` of width ``d_r``; so teacher and student
    may differ in heads and width. Padding is in no relation. The mean is over relations, heads, texts and tokens.

    Args:
        relation_heads: must divide the width of queries, keys and values of both.
        relations: any of "qq", "kk", "vv".

    Example:
        >>> import torch
        >>> teacher = {name: torch.randn(2, 4, 5, 8) for name in ("query", "key", "value")}
        >>> student = {name: torch.randn(2, 2, 5, 12) for name in ("query", "key", "value")}
        >>> loss = RelationDistillLoss(relation_heads=8)(teacher, student, torch.ones(2, 5))
        >>> loss.ndim
        0
    """

    def __init__(self, relation_heads: int = 48, relations: Sequence[str] = ("qq", "kk", "vv")) -> None:
        super().__init__()
        if relation_heads < 1 or not relations or set(relations) - set(_PARTS):
            raise InputError(
                f"relation_heads {relation_heads} and relations {list(relations)}: expected at least one head and one "
                f"of {', '.join(_PARTS)}."
            )
        self.relation_heads, self.relations = relation_heads, tuple(relations)

    def forward(self, teacher: QKV, student: QKV, mask: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            teacher, student: "query", "key", "value" -> ``[batch, heads, tokens, head_dim]``.
            mask: ``[batch, tokens]``, 1 for tokens and 0 for padding.
        """
        losses = []
        real = mask.bool()
        for name in self.relations:
            to = self.relation(teacher[_PARTS[name]], real).detach()
            own = self.relation(student[_PARTS[name]], real)
            # Padded keys are -inf in both; their share is 0.
            terms = (to.exp() * (to - own)).masked_fill(~real[:, None, None, :], 0.0).sum(-1)
            losses.append(terms.mean(1)[real].mean())
        return torch.stack(losses).mean()

    def relation(self, states: Tensor, real: Tensor) -> Tensor:
        """``log R [batch, relation_heads, tokens, tokens]`` of ``states [batch, heads, tokens, head_dim]``."""
        width = states.shape[1] * states.shape[3]
        if width % self.relation_heads:
            raise InputError(f"A width of {width} cannot be cut into {self.relation_heads} relation heads.")
        whole = states.float().transpose(1, 2).flatten(2)
        cut = whole.unflatten(-1, (self.relation_heads, -1)).transpose(1, 2)
        logits = cut @ cut.transpose(-1, -2) / (width // self.relation_heads) ** 0.5
        return logits.masked_fill(~real[:, None, None, :], -torch.inf).log_softmax(-1)


@paper("minilmv2")
class Distillation:
    """MiniLMv2 as an objective of the :class:`~polyhead.training.Trainer`: texts alone in, no labels.

    Args:
        teacher: a folder, name or model with the student's vocabulary; it is not trained.
        teacher_layer: that is learned from; the paper takes the last of base models, an upper-middle one of large ones.
        student_layer: that learns.
        relation_heads: see :class:`RelationDistillLoss`.
        relations: see :class:`RelationDistillLoss`.

    Example:
        >>> from polyhead.training import Distillation, Options, Trainer, fresh_student
        >>> student = fresh_student("all-MiniLM-L6-v2", layers=2, hidden_size=192, heads=4)
        >>> trainer = Trainer(Distillation("all-MiniLM-L6-v2"), options=Options(batch_size=2, learning_rate=5e-4))
        >>> trainer.fit(student, ["one text", "another text"]).steps_
        1
    """

    def __init__(
        self,
        teacher: str | Path | SentenceTransformer,
        *,
        teacher_layer: int = -1,
        student_layer: int = -1,
        relation_heads: int = 48,
        relations: Sequence[str] = ("qq", "kk", "vv"),
    ) -> None:
        self.teacher = teacher
        self.teacher_layer, self.student_layer = teacher_layer, student_layer
        self.loss: nn.Module = RelationDistillLoss(relation_heads, relations)

    def bind(self, model: SentenceTransformer) -> nn.Module:
        """The loss of a student.

        Raises:
            InputError: a student with another vocabulary than the teacher's.
        """
        teacher = trainable(self.teacher, device=str(model.device)).eval()
        if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise InputError("Teacher and student have different vocabularies; relations are between the same tokens.")
        return _DistillationLoss(model, teacher, self)


class _DistillationLoss(nn.Module):
    """Under sentence-transformers' contract of a loss."""

    def __init__(self, model: SentenceTransformer, teacher: SentenceTransformer, settings: Distillation) -> None:
        super().__init__()
        self.model = model
        self.loss = settings.loss
        # In a tuple, where torch does not see it: it is neither trained nor saved.
        self._teacher = (headed(teacher), settings.teacher_layer)
        self._student = (headed(model), settings.student_layer)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None) -> Tensor:
        """The loss of a batch: the mean over its columns of texts."""
        return torch.stack([self._column(features) for features in sentence_features]).mean()

    def _column(self, features: dict[str, Any]) -> Tensor:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: features[name] for name in names if name in features}
        teacher, student = self._teacher[0], self._student[0]
        with torch.no_grad(), capture_qkv(teacher, self._teacher[1]) as theirs:
            teacher(**inputs)
        with capture_qkv(student, self._student[1]) as own:
            student(**inputs)
        with torch.autocast(self.model.device.type, enabled=False):
            loss: Tensor = self.loss(theirs, own, inputs["attention_mask"])
        return loss


def fresh_student(
    teacher: str | Path | SentenceTransformer,
    *,
    layers: int,
    hidden_size: int,
    heads: int,
    seed: int = 0,
) -> SentenceTransformer:
    """A small model with random weights, of the teacher's family, vocabulary and pooling.

    Args:
        teacher: whose like it is.
        layers, hidden_size, heads: of the student; its feed-forward layers are four times as wide as its states.
        seed: of the weights.

    Raises:
        InputError: a width that heads do not divide, or a teacher with more than a pooling and a normalisation.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoModel

    if hidden_size % heads:
        raise InputError(f"A width of {hidden_size} cannot be cut into {heads} heads.")
    like = trainable(teacher)
    rest = list(like)[1:]
    if not all(isinstance(module, (Normalize, Pooling)) for module in rest):
        raise InputError("The teacher has modules made for its width; give the plain folder of its Transformer.")
    body = copy.copy(like[0])
    body._modules = dict(like[0]._modules)
    config = copy.deepcopy(like[0].auto_model.config)
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = layers, hidden_size, heads
    config.intermediate_size = 4 * hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body.model = AutoModel.from_config(config, dtype=torch.float32)
    pooled = [
        Pooling(hidden_size, module.pooling_mode, module.include_prompt) if isinstance(module, Pooling) else Normalize()
        for module in rest
    ]
    return SentenceTransformer(modules=[body, *pooled], device=str(like.device))
