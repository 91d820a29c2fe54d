"""Which patterns attention maps follow: an autoencoder's codes and their clusters (vit-attention-visual-analytics)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.heads.streaming import Pattern, stream_attention
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["AttentionPatternAE", "attention_maps"]


def attention_maps(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Attention of every head on every row of a batch, ``[layers, heads, batch, queries, keys]`` float32.

    For images and texts of few tokens: nothing is averaged, so memory grows with all five.

    Raises:
        InputError: a model whose layers have different numbers of heads.
    """
    found: list[torch.Tensor] = []

    def visit(pattern: Pattern) -> None:
        found.append(pattern.weights.transpose(0, 1).cpu())

    stream_attention(model, inputs, visit)
    if len({each.shape for each in found}) > 1:
        raise InputError(f"The layers of '{model.name}' attend in different shapes; expected as many heads in each.")
    return torch.stack(found)


@paper("vit-attention-visual-analytics")
class AttentionPatternAE:
    """An autoencoder of attention maps: a map of ``[queries, keys]`` in, a short code out; codes are clustered.

    Two layers each way, ``code = W2 gelu(W1 x)``. Maps are divided by their largest weight and centred on the mean map,
    so that the sharp and the soft form of a pattern lie together. Clusters are k-means on the codes, started far apart.

    Args:
        latent: length of a code; 2 can be drawn as it is.
        hidden: width between map and code.
        steps, learning_rate: of Adam, on all maps at a time or 256 of them.
        seed: of the weights and the order.

    Example:
        >>> maps = torch.cat([torch.eye(6).repeat(20, 1, 1), torch.full((20, 6, 6), 1 / 6)])
        >>> coder = AttentionPatternAE(steps=50).fit(maps)
        >>> labels = coder.cluster(maps, 2)
        >>> sorted(np.bincount(labels).tolist())
        [20, 20]
    """

    def __init__(
        self, latent: int = 2, *, hidden: int = 64, steps: int = 300, learning_rate: float = 3e-3, seed: int = 0
    ) -> None:
        if latent < 1 or hidden < 1 or steps < 1:
            raise InputError(f"latent={latent}, hidden={hidden}, steps={steps}; expected whole numbers above 0.")
        self.latent, self.hidden, self.steps, self.learning_rate, self.seed = latent, hidden, steps, learning_rate, seed
        self._parts: tuple[nn.Module, nn.Module] | None = None
        self._mean = torch.zeros(0)

    def fit(self, maps: torch.Tensor) -> AttentionPatternAE:
        """Learn to give maps ``[n, queries, keys]`` back; the random state of torch is left as it was."""
        rows = self._rows(maps)
        self._mean = rows.mean(0)
        rows = rows - self._mean
        width = rows.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = nn.Sequential(nn.Linear(width, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.latent))
            decoder = nn.Sequential(nn.Linear(self.latent, self.hidden), nn.GELU(), nn.Linear(self.hidden, width))
            optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], self.learning_rate)
            for _ in range(self.steps):
                some = rows if len(rows) <= 256 else rows[torch.randint(len(rows), (256,))]
                loss = (decoder(encoder(some)) - some).square().mean()
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
        self._parts = encoder.eval(), decoder.eval()
        return self

    def codes(self, maps: torch.Tensor) -> np.ndarray:
        """``[n, latent]`` of maps ``[n, queries, keys]``."""
        return self._through(maps)[0].numpy()

    def error(self, maps: torch.Tensor) -> float:
        """Squared error of the maps given back over that of the mean map: 0 loses nothing, 1 is no better."""
        codes, rows = self._through(maps)
        assert self._parts is not None
        with torch.no_grad():
            left = self._parts[1](codes) - rows
        return float(left.square().sum() / rows.square().sum())

    def cluster(self, maps: torch.Tensor, count: int) -> np.ndarray:
        """Which of ``count`` clusters of codes each map is in, ``[n]``."""
        codes = self.codes(maps)
        if not 1 <= count <= len(codes):
            raise InputError(f"{count} clusters of {len(codes)} maps were asked for; expected 1 to {len(codes)}.")
        return _k_means(codes, count)

    def _through(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._parts is None:
            raise InputError("The autoencoder has seen no maps yet: call fit(maps) first.")
        rows = self._rows(maps)
        if rows.shape[1] != len(self._mean):
            raise InputError(f"Maps of {rows.shape[1]} weights were given; it was fitted to {len(self._mean)}.")
        rows = rows - self._mean
        with torch.no_grad():
            codes: torch.Tensor = self._parts[0](rows)
        return codes, rows

    @staticmethod
    def _rows(maps: torch.Tensor) -> torch.Tensor:
        if maps.dim() != 3 or not len(maps):
            raise InputError(f"Maps of the shape {list(maps.shape)} were given; expected [n, queries, keys].")
        rows = maps.detach().flatten(1).float()
        return rows / rows.amax(1, keepdim=True).clamp(min=1e-30)


def _k_means(codes: np.ndarray, count: int, rounds: int = 100) -> np.ndarray:
    """Lloyd's rounds from centres each as far as can be from those before, the first from the mean."""
    chosen: Sequence[int] = [int(((codes - codes.mean(0)) ** 2).sum(1).argmax())]
    while len(chosen) < count:
        away = ((codes[:, None] - codes[chosen]) ** 2).sum(-1).min(1)
        chosen = [*chosen, int(away.argmax())]
    centres = codes[chosen]
    labels = np.zeros(len(codes), dtype=np.int64)
    for _ in range(rounds):
        labels = ((codes[:, None] - centres) ** 2).sum(-1).argmin(1)
        moved = np.array([codes[labels == i].mean(0) if (labels == i).any() else centres[i] for i in range(count)])
        if np.allclose(moved, centres):
            break
        centres = moved
    return labels
