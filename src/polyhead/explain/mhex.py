"""Branches that classify from every stage of a network and say which tokens or pixels spoke for a class (MHEX).

The paper names three parts: an attention gate, deep supervision and an equivalent matrix. Its abstract and summaries
were read, its equations and code were not, so **the details here are reconstructed**: the gate is one linear map a
stage (a 1x1 convolution) with ReLU behind it, without bias; the classifier is linear on the mean of the gated features;
the equivalent matrix is the product of the two weights; stage maps are smoothed with direct neighbours and added
without weights; the answer is the mean of the stages' logits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.explain.base import Attributor, Readout
from polyhead.explain.baselines import judged_only
from polyhead.heads.base import Progress
from polyhead.model import HeadedModel
from polyhead.papers import paper
from polyhead.recording import blocks_of

__all__ = ["MHEX", "MHEXBranch", "MHEXReadout", "MHEXSaliency", "Saliency", "Stage", "attach_mhex"]

Inputs = dict[str, torch.Tensor] | torch.Tensor


class Stage(NamedTuple):
    """What a stage of the network gives.

    Attributes:
        states: float32 ``[batch, places, dim]``; a place is a token or a pixel.
        mask: bool ``[batch, places]``, False at padding.
        grid: ``(height, width)`` of the places, None for tokens.
    """

    states: torch.Tensor
    mask: torch.Tensor
    grid: tuple[int, int] | None


@paper("mhex")
class MHEXBranch(nn.Module):
    """Gate and classifier of one stage: ``logits = W_c mean_t ReLU(W_g x_t) + b`` (mhex, reconstructed).

    Args:
        dim: features of the stage.
        n_classes: of the task.

    Example:
        >>> branch, states = MHEXBranch(8, 3), torch.randn(2, 5, 8)
        >>> branch(states).shape, branch.saliency(states, torch.tensor([0, 2])).shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim, bias=False)
        self.classifier = nn.Linear(dim, n_classes)

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor | None = None, *, non_negative: bool = True
    ) -> torch.Tensor:
        """Logits ``[batch, classes]`` of ``[batch, places, dim]``; ``non_negative=False`` leaves ReLU out."""
        gated = self.gate(states)
        if non_negative:
            gated = gated.relu()
        share = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
        pooled = torch.einsum("btd,bt->bd", gated, share / share.sum(1, keepdim=True).clamp(min=1))
        logits: torch.Tensor = self.classifier(pooled)
        return logits

    @property
    def equivalent(self) -> torch.Tensor:
        """``E = W_c W_g``, ``[classes, dim]``: straight from a place's features to the classes."""
        return self.classifier.weight @ self.gate.weight

    def evidence(self, states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """``<E_c, x_t>``, ``[batch, places]``; its mean and the bias are the logit without ReLU."""
        return torch.einsum("btd,bd->bt", states, self.equivalent[classes])

    def saliency(self, states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """``ReLU(<E_c, x_t>)``, ``[batch, places]``."""
        return self.evidence(states, classes).relu()


@dataclass(frozen=True)
class Saliency:
    """Where the evidence for a class stands.

    Attributes:
        classes: ``[batch]``, explained.
        logits: ``[batch, classes]``, mean of the stages.
        stages: for each stage ``[batch, tokens]`` or ``[batch, height, width]``, never negative, 0 at padding.
        merged: their sum, smoothed, at the finest grid.
    """

    classes: torch.Tensor
    logits: torch.Tensor
    stages: list[torch.Tensor]
    merged: torch.Tensor


@paper("mhex")
class MHEX(nn.Module):
    """A network (``model``) with explaining ``branches`` at some of its stages; made by :func:`attach_mhex`."""

    def __init__(self, model: nn.Module, stages: Sequence[tuple[nn.Module, int]], dims: Sequence[int], n_classes: int):
        super().__init__()
        self.model = model
        self.branches = nn.ModuleList(MHEXBranch(dim, n_classes) for dim in dims)
        self._stages = list(stages)

    def features(self, inputs: Inputs) -> list[Stage]:
        """What the stages give for ``inputs``: keywords of the model (with ``attention_mask``), or one tensor."""
        with _watch(self._stages) as seen:
            self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        given = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        return [_stage(seen[module][call], given) for module, call in self._stages]

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Logits of each stage, ``[stages, batch, classes]``."""
        return self._logits(self.features(inputs))

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """The answer: mean of the stages' logits, ``[batch, classes]``."""
        return self(inputs).mean(0)

    def _branches(self) -> list[MHEXBranch]:
        return [branch for branch in self.branches if isinstance(branch, MHEXBranch)]

    def _logits(self, features: Sequence[Stage]) -> torch.Tensor:
        pairs = zip(self._branches(), features, strict=True)
        return torch.stack([branch(stage.states, stage.mask) for branch, stage in pairs])

    def fit(
        self,
        batches: Sequence[tuple[Inputs, torch.Tensor]],
        *,
        epochs: int = 10,
        rate: float = 1e-3,
        train_model: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> MHEX:
        """Deep supervision: the cross-entropy of every stage and of their mean, added up.

        Args:
            batches: inputs and classes ``[batch]``. Unless the model is trained too, each batch runs through it once
                and its features are kept: stages x places x dim floats.
            epochs: passes over the batches, in another order each.
            rate: of AdamW, falling to 0 along a cosine.
            train_model: train the network with the branches, as the paper does, instead of leaving it frozen.
            seed: of the order.
            progress: called with batches done and to do.

        Raises:
            InputError: no batches.
        """
        if not batches:
            raise InputError("MHEX has nothing to learn from: give at least one batch of inputs and classes.")
        random, done = np.random.default_rng(seed), 0
        learned = list(self.parameters() if train_model else self.branches.parameters())
        optimiser = torch.optim.AdamW(learned, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(batches))
        kept: dict[int, list[Stage]] = {}
        self.branches.train()
        if train_model:
            self.model.train()
        for _ in range(epochs):
            for at in random.permutation(len(batches)):
                inputs, answers = batches[at]
                if train_model:
                    features = self.features(inputs)
                else:
                    if at not in kept:
                        with torch.no_grad():
                            kept[at] = self.features(inputs)
                    features = kept[at]
                logits = self._logits(features)
                every = torch.cat([logits, logits.mean(0, keepdim=True)])
                loss = nn.functional.cross_entropy(every.flatten(0, 1), answers.repeat(len(every))) * len(every)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                done += 1
                if progress is not None:
                    progress(done, epochs * len(batches))
        self.branches.eval()
        if train_model:
            self.model.eval()
        return self

    def explain(self, inputs: Inputs, classes: int | torch.Tensor | None = None, *, smooth: float = 0.25) -> Saliency:
        """Saliency of each stage and of all together.

        Args:
            inputs: as the model takes them.
            classes: one for all rows or one a row; without it, the likeliest.
            smooth: share of each place's value that is spread to its direct neighbours, 0 to 1; 0 does not smooth.

        Raises:
            InputError: a share outside 0 to 1, or stages of tokens and of pixels together.
        """
        if not 0 <= smooth <= 1:
            raise InputError(f"smooth is {smooth}, expected a share between 0 and 1.")
        with torch.no_grad():
            features = self.features(inputs)
            logits = self._logits(features).mean(0)
            if classes is None:
                classes = logits.argmax(-1)
            chosen = torch.as_tensor(classes, device=logits.device).expand(len(logits))
            maps = [
                branch.saliency(stage.states, chosen) * stage.mask
                for branch, stage in zip(self._branches(), features, strict=True)
            ]
            shaped = [
                one.unflatten(1, stage.grid) if stage.grid else one for one, stage in zip(maps, features, strict=True)
            ]
            return Saliency(chosen, logits, shaped, _merged(shaped, features, smooth))


@paper("mhex")
def attach_mhex(
    model: HeadedModel | nn.Module,
    layers: Sequence[int] | Sequence[str],
    n_classes: int,
    *,
    example: Inputs | None = None,
    seed: int = 0,
) -> MHEX:
    """Put branches on a network; the network itself stays as it is.

    Args:
        model: a loaded Transformer, or any module.
        layers: of a Transformer, the layers (the output of the whole block is read; negative counts from the end); of a
            module, the names of submodules that give ``[batch, places, dim]`` or ``[batch, dim, height, width]``.
        n_classes: of the task.
        example: inputs for one run that tells the widths of the stages; a loaded Transformer needs none.
        seed: of the branches' first weights.

    Raises:
        InputError: no layers, one that does not exist, or a module without ``example``.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> mhex = attach_mhex(model, [1, 3, 5], n_classes=2)
        >>> inputs = model.tokenize(["good film", "a dull and tiring film"])
        >>> found = mhex.fit([(inputs, torch.tensor([1, 0]))]).explain(inputs)
        >>> found.classes.tolist(), found.merged.shape
        ([1, 0], torch.Size([2, 8]))
    """
    if not layers:
        raise InputError("No layers were named to put branches on.")
    if isinstance(model, HeadedModel):
        blocks = blocks_of(model)
        chosen = model._chosen([int(layer) for layer in layers])
        stages = [(blocks[layer], sum(blocks[i] is blocks[layer] for i in range(layer))) for layer in chosen]
        module, dims = model.module, [model.hidden_size] * len(stages)
    else:
        known = dict(model.named_modules())
        missing = [name for name in layers if name not in known]
        if missing or example is None:
            raise InputError(
                f"A plain module needs the names of submodules and an example; unknown names: {missing}, example "
                f"{'missing' if example is None else 'given'}."
            )
        module, stages = model, [(known[str(name)], 0) for name in layers]
        with torch.no_grad():
            dims = [stage.states.shape[-1] for stage in MHEX(module, stages, [], n_classes).features(example)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MHEX(module, stages, dims, n_classes).to(next(module.parameters()).device)


class MHEXReadout(Readout):
    """The answer of a Transformer's branches, so that every attribution can explain it and be judged on it.

    Args:
        model: the loaded Transformer under the branches.
        mhex: fitted branches on it.
        names: of the classes.
        batch_size: rows in one forward pass.
    """

    def __init__(self, model: HeadedModel, mhex: MHEX, names: Sequence[str], batch_size: int = 32) -> None:
        super().__init__(model, batch_size)
        if mhex.model is not model.module:
            raise InputError(f"These branches stand on another model than '{model.name}'.")
        self.mhex, self.names = mhex, list(names)

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """See :class:`Readout`."""
        return self.mhex.logits(inputs)

    def reads(self, tokens: int) -> torch.Tensor:
        """All tokens alike."""
        return torch.full((tokens,), 1 / tokens)

    def name_of(self, target: int) -> str:
        """The class's name."""
        return self.names[target]


@paper("mhex")
@dataclass
class MHEXSaliency(Attributor):
    """The merged saliency of the branches as an attribution: ``MHEXSaliency().text(readout, text)``.

    Args:
        smooth: see :meth:`MHEX.explain`.
    """

    smooth: float = 0.25
    name = "mhex"

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`; never negative.

        Raises:
            InputError: a readout that is no :class:`MHEXReadout`.
        """
        if not isinstance(readout, MHEXReadout):
            raise InputError(
                f"MHEX explains the answer of its own branches: a MHEXReadout, not {type(readout).__name__}."
            )
        found = readout.mhex.explain({"input_ids": ids[None].to(readout.model.device)}, target, smooth=self.smooth)
        return judged_only(found.merged[0].double().cpu().numpy(), judged)


@contextmanager
def _watch(stages: Sequence[tuple[nn.Module, int]]) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """Outputs of each stage's module in this thread, one a call."""
    seen: dict[nn.Module, list[torch.Tensor]] = {module: [] for module, _ in stages}
    thread = threading.get_ident()

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            seen[module].append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [module.register_forward_hook(keep) for module in seen]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _stage(output: torch.Tensor, given: torch.Tensor | None) -> Stage:
    grid = None
    if output.dim() == 4:
        grid = (output.shape[2], output.shape[3])
        output = output.flatten(2).transpose(1, 2)
    if output.dim() != 3:
        raise InputError(f"A stage gives {list(output.shape)}; expected [batch, places, dim] or [batch, dim, h, w].")
    fits = given is not None and grid is None and given.shape == output.shape[:2]
    mask = given.bool() if given is not None and fits else output.new_ones(output.shape[:2], dtype=torch.bool)
    return Stage(output.float(), mask, grid)


def _merged(maps: Sequence[torch.Tensor], features: Sequence[Stage], smooth: float) -> torch.Tensor:
    """Maps brought to the finest grid, smoothed and added up."""
    grids = [stage.grid for stage in features if stage.grid is not None]
    if grids and len(grids) < len(features):
        raise InputError("Some stages give tokens and some pixels: their maps cannot be added up.")
    if not grids:
        pairs = zip(maps, features, strict=True)
        return torch.stack([_smoothed(one, stage.mask, smooth) for one, stage in pairs]).sum(0)
    finest = max(grids, key=lambda grid: grid[0] * grid[1])
    total = torch.zeros(len(maps[0]), *finest, device=maps[0].device)
    for one in maps:
        large = nn.functional.interpolate(one[:, None], finest, mode="bilinear", align_corners=False)[:, 0]
        everywhere = torch.ones_like(large, dtype=torch.bool)
        across = _smoothed(large, everywhere, smooth)
        total += _smoothed(across.transpose(1, 2), everywhere.transpose(1, 2), smooth).transpose(1, 2)
    return total


def _smoothed(values: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """Mean with the two neighbours along the last axis; what is masked neither gives nor gets."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        sides = nn.functional.pad(x, (1, 1))
        return (1 - share) * x + share / 2 * (sides[..., :-2] + sides[..., 2:])

    weight = mask.to(values)
    return weight * spread(values * weight) / spread(weight).clamp(min=torch.finfo(values.dtype).tiny)
