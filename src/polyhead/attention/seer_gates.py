"""Gates for a model as it is: trained to foresee its own attention, then used to look at few blocks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.attention.seer import SeerGate, best_blocks, block_attention_targets, gate_loss
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel
    from polyhead.tap import AttentionCall

__all__ = ["ModelGates"]

Progress = Callable[[int, "int | None"], None]


@paper("seer-attention")
class ModelGates:
    """Gates for every layer of a decoder as it is, trained to foresee its own attention; no weight of it changes.

    Args:
        block: tokens of a block.
        keep: earlier blocks looked at while :meth:`on`.
        steps: passes of AdamW over the texts given.
        rate: its learning rate. Queries and keys are brought to size 1 first, whatever the model's is.
        seed: of the gates' first values.

    Attributes:
        gates_: a :class:`SeerGate` a layer, after :meth:`fit`.
        losses_: divergence after each pass.

    Source:
        seer-attention (Gao et al. 2024, section 4.1).

    Example:
        >>> import polyhead
        >>> from polyhead.data import load_texts
        >>> model = polyhead.load("gemma-3-270m", lm_head=True)
        >>> ids = [model.tokenizer(text)["input_ids"] for text in load_texts("ag-news", 4)]
        >>> gates = ModelGates(block=8, keep=2).fit(model, ids)
        >>> with gates.on(model):
        ...     states = model(**model.tokenize(["Only the blocks that matter are read."]))
    """

    gates_: nn.ModuleList
    losses_: list[float]

    def __init__(self, block: int = 64, keep: int = 8, *, steps: int = 100, rate: float = 3e-3, seed: int = 0) -> None:
        if keep < 1 or steps < 1:
            raise InputError(f"keep={keep} and steps={steps} were given; expected at least 1.")
        self.block = block
        self.keep = keep
        self.steps = steps
        self.rate = rate
        self.seed = seed

    def fit(self, model: HeadedModel, rows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> ModelGates:
        """Learn from texts of token ids.

        Raises:
            InputError: no texts, or layers of several head widths.
        """
        if not rows:
            raise InputError("Gates were given no texts to learn from; expected at least one list of token ids.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            gates = [SeerGate(at.heads, at.head_dim, block=self.block) for at in model.attention_layers]
        self.gates_ = nn.ModuleList(gates).to(model.device)
        seen = [self._pooled(model, row) for row in rows]
        for at, gate in enumerate(gates):
            for part in (0, 1):
                gate.units[part] = torch.cat([text[at][part].flatten() for text in seen]).square().mean().sqrt()
        optimizer = torch.optim.AdamW(self.gates_.parameters(), self.rate, weight_decay=0.0)
        self.losses_ = []
        for step in range(self.steps):
            with torch.enable_grad():
                losses = [
                    gate_loss(gate.logits(asked, keys), target)
                    for text in seen
                    for gate, (asked, keys, target) in zip(gates, text, strict=True)
                ]
                loss = torch.stack(losses).mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            self.losses_.append(loss.item())
            if progress is not None:
                progress(step + 1, self.steps)
        self.gates_.requires_grad_(False)
        return self

    @torch.no_grad()
    def _pooled(self, model: HeadedModel, row: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Pooled queries and keys, and targets, of every layer."""
        from polyhead.tap import attention_weights, tapped

        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def watch(call: AttentionCall) -> None:
            gate: Any = self.gates_[len(found)]
            target = block_attention_targets(attention_weights(call).float(), self.block)
            found.append((gate.pool_queries(call.query.float()), gate.pool_keys(call.key.float()), target))

        with tapped(model.module, watch):
            model(input_ids=torch.tensor([list(row)], device=model.device))
        return found

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """Let ``model`` see its own block and the ``keep`` earlier ones its gates choose, for texts without padding.

        Raises:
            InputError: gates that were not fitted, or a pass over padding or with a cache.
        """
        from polyhead.tap import additive_mask, tapped

        if not hasattr(self, "gates_"):
            raise InputError("These gates have learned nothing yet; call fit(model, rows) first.")
        layer_of = {id(layer.module): at for at, layer in enumerate(model.attention_layers)}

        def prepare(call: AttentionCall) -> AttentionCall:
            mask, tokens = additive_mask(call), call.query.shape[2]
            if mask is None or call.key.shape[2] != tokens or bool((mask[..., -1, -1] < 0).any()):
                raise InputError("Gates were given padding or a cache; expected whole texts of one length.")
            scores = self.gates_[layer_of[id(call.module)]](call.query.float(), call.key.float())
            own = torch.arange(scores.shape[2], device=scores.device)[:, None]
            opened = torch.zeros_like(scores, dtype=torch.bool).scatter(3, best_blocks(scores, own, self.keep), True)
            opened = opened | (own == own.T)
            met = opened.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)[:, :, :tokens, :tokens]
            call.mask = mask.masked_fill(~met, torch.finfo(mask.dtype).min)
            return call

        with tapped(model.module, lambda _: None, prepare=prepare):
            yield
