"""Head pooling: a text's vector from chosen, centred, weighted heads and layers of a model, no weight of it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from polyhead.data import SentencePairs
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.hub import DEFAULT_MODEL
from polyhead.pooling.heads_fit import PairForms, fit_weights, folds_of, mean_spearman, weights_by_folds, whitening
from polyhead.pooling.heads_pooler import BlockPooler

if TYPE_CHECKING:
    from polyhead.embed import Embeddings, Encoder
    from polyhead.embed.types import Progress
    from polyhead.model import HeadedModel

__all__ = ["HeadPooler"]

Kind = Literal["blend", "layers", "heads", "both"]
Scored = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows [pairs, 2], gold [pairs], set of each pair
PENALTIES = (0.1, 0.03, 0.01)


class HeadPooler:
    """Makes a pooling of a frozen model's heads and layers from unlabelled texts, better with a few scored pairs.

    Every block (a head's output, or the states between two layers) is averaged over tokens, each weighing
    ``rarity / (rarity + its frequency)`` (SIF weights; special tokens weigh ``special``), centred and whitened by
    ``power``. Blocks are laid side by side with weights: alike where nothing is known, fitted where ``pairs`` are given
    (Pearson's correlation within each set, the penalty chosen by holding sets out). ``kind="blend"`` adds up the
    layers' states as they are instead of laying them side by side; it is saved as stock modules.

    Args:
        model: as in :class:`polyhead.embed.Encoder`.
        kind: "blend", "layers", "heads", or "both" (layers and heads).
        power: of the whitening: 1 whole, 0 centring alone, None neither; several are offered side by side to a fit.
        rarity: of the token weights; ``inf`` weighs all tokens alike.
        special: weight of special tokens; None: 0 where the model is causal, 0.3 elsewhere.
        by_position: whether later tokens weigh more, as suits deep layers of causal models.
        keep: blocks that are kept, the heaviest.
        dim: numbers of the vector, the blocks' principal directions; 0 keeps all (a blend has the model's width).

    Attributes:
        pooler_: the pooling itself, a :class:`polyhead.pooling.BlockPooler`.
        heads_: weight of each head in the vector, a HeadMap (zeros where layers alone were chosen).
        layers_: weight of each layer's states, ``[layers + 1]``; all weights sum to 1.
        penalty_, held_out_: the penalty chosen, and the mean Spearman on pairs of sets held out; None without pairs.

    Raises:
        InputError: a knob that is not one of those above.

    Example:
        >>> from polyhead.pooling import HeadPooler
        >>> pooler = HeadPooler("all-MiniLM-L6-v2").fit(["Heads of cattle.", "Heads of a model.", "Tails of mice."])
        >>> pooler.encode(["A head.", "A tail."]).dense.shape
        (2, 384)
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        kind: Kind = "blend",
        power: float | Sequence[float] | None = None,
        rarity: float = 3e-3,
        special: float | None = None,
        by_position: bool = False,
        keep: int = 16,
        dim: int = 0,
    ) -> None:
        if kind not in ("blend", "layers", "heads", "both"):
            raise InputError(f"kind = {kind!r}, expected 'blend', 'layers', 'heads' or 'both'.")
        if not rarity > 0 or keep < 1 or dim < 0:
            raise InputError(
                f"rarity = {rarity}, keep = {keep}, dim = {dim}: expected more than 0, at least 1, and 0 up."
            )
        self.model, self.kind, self.rarity, self.special = model, kind, rarity, special
        self.power, self.by_position, self.keep, self.dim = power, by_position, keep, dim
        self._encoder: Encoder | None = None

    def fit(
        self,
        texts: Sequence[str],
        pairs: SentencePairs | None = None,
        *,
        background: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> HeadPooler:
        """Learn means and spreads from texts, and the blocks' weights from pairs where there are some.

        Holds the pooled blocks of all texts in memory: for Gemma-3-270M with ``kind="both"`` 120 KB a text.

        Args:
            texts: unlabelled, a few hundred at least; the pairs' own need not be among them.
            pairs: scored pairs of texts with the set each is from (:func:`polyhead.data.load_sts`).
            background: more texts, for the frequencies of tokens alone; the model does not run on them.
            progress: called with texts done and texts in all.

        Raises:
            InputError: fewer than 2 texts, or pairs that all have one score.
        """
        from polyhead.embed import Encoder

        if isinstance(texts, str) or len(texts) < 2:
            raise InputError("fit needs several texts to learn what is common to all; give a list of 2 or more.")
        if pairs is not None and np.ptp(pairs.gold) == 0:
            raise InputError(f"All {len(pairs)} pairs have the score {pairs.gold[0]}; give pairs of different scores.")
        paired = [] if pairs is None else [text for pair in pairs.pairs for text in pair]
        several = list(dict.fromkeys([*texts, *paired]))
        reader = self.reader([*several, *background])
        blocks = Encoder(self.model, pooling=reader).encode(several, normalize=False, progress=progress).dense
        return self.fit_blocks(reader, several, blocks, pairs)

    def fit_blocks(
        self, reader: BlockPooler, texts: Sequence[str], blocks: np.ndarray, pairs: SentencePairs | None = None
    ) -> HeadPooler:
        """:meth:`fit` where the blocks are pooled already, to try several knobs on them.

        Args:
            reader: what pooled them, from :meth:`reader`.
            texts: ``[n]``, the pairs' among them.
            blocks: ``[n, columns]``.
            pairs: as in :meth:`fit`.
        """
        self.penalty_: float | None = None
        self.held_out_: float | None = None
        parts = _split(reader, blocks)
        scored: Scored | None = None
        if pairs is not None:
            place = {text: row for row, text in enumerate(texts)}
            rows = np.array([[place[left], place[right]] for left, right in pairs.pairs])
            scored = rows, pairs.gold, np.array(pairs.group)
        fitted = self._blended(reader, parts, scored) if self.kind == "blend" else self._beside(reader, parts, scored)
        fitted.token_weights = reader.token_weights
        self.pooler_, self._encoder = fitted.eval(), None
        return self

    def encode(self, texts: Sequence[str], **options: Any) -> Embeddings:
        """Vectors of length 1, as :meth:`polyhead.embed.Encoder.encode` with this pooling; ``options`` are its."""
        return self.encoder().encode(texts, **{"normalize": True, **options})

    def encoder(self) -> Encoder:
        """An encoder of the model with this pooling, made once; search and evaluation take it."""
        if self._encoder is None:
            from polyhead.embed import Encoder

            self._encoder = Encoder(self.model, pooling=self._fitted())
        return self._encoder

    def save(self, folder: str | Path) -> bool:
        """Write a sentence-transformers folder: the model as it is, this pooling, and vectors of length 1.

        Returns:
            Whether its modules are all sentence-transformers' own (a blend is). If not, the folder needs Polyhead
            installed and ``trust_remote_code=True``; :class:`polyhead.embed.Encoder` reads both.
        """
        from tempfile import TemporaryDirectory

        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

        from polyhead.model import load
        from polyhead.pooling.sentence import PoolerModule, save

        pooler = self._fitted()
        model = load(self.model, dtype="float32")
        module: Any = model.module
        with TemporaryDirectory() as plain:
            module.save_pretrained(plain)
            model.tokenizer.save_pretrained(plain)
            limits = {"model_max_length": self.encoder().max_tokens}
            body = Transformer(plain, config_kwargs={"output_hidden_states": True}, processor_kwargs=limits)
            modules = [body, PoolerModule(pooler, pooler.sizes[0]), Normalize()]
            return not save(SentenceTransformer(modules=modules, device="cpu"), folder)

    def _fitted(self) -> BlockPooler:
        if not hasattr(self, "pooler_"):
            raise InputError("This HeadPooler is not fitted; call fit(texts) or fit(texts, pairs) first.")
        return self.pooler_

    def reader(self, texts: Sequence[str]) -> BlockPooler:
        """A pooler of every block on offer side by side, tokens weighed by their frequency in the texts.

        On offer are all heads, and the states that enter a layer or leave the last one; the last of a causal model,
        made to name the next token, is left out but in a blend.
        """
        from polyhead.embed import Encoder
        from polyhead.model import load

        encoder, model = Encoder(self.model), load(self.model)
        module: Any = model.module
        causal = _is_causal(model)
        layers = range(model.layers + (self.kind == "blend" or not causal)) if self.kind != "heads" else []
        heads = [(layer, head) for layer in range(model.layers) for head in range(model.heads)]
        hidden, vocabulary = model.config.hidden_size, module.get_input_embeddings().num_embeddings
        reader = BlockPooler(
            layers,
            heads if self.kind in ("heads", "both") else [],
            (hidden, model.heads, model.head_dim),
            vocabulary,
            by_position=self.by_position,
        )
        counts = Counter(int(token) for text in texts for token in encoder.tokens(text))
        shares = torch.zeros(vocabulary)
        for token, count in counts.items():
            shares[token] = count / counts.total()
        reader.token_weights = self.rarity / (self.rarity + shares) if self.rarity < np.inf else torch.ones(vocabulary)
        special = [token for token in model.tokenizer.all_special_ids if token != model.tokenizer.unk_token_id]
        reader.token_weights[special] = (0.0 if causal else 0.3) if self.special is None else self.special
        return reader

    def _blended(self, reader: BlockPooler, parts: list[np.ndarray], scored: Scored | None) -> BlockPooler:
        power = self._powers()[0]
        centred = [part - part.mean(0) if power is not None else part for part in parts]
        sizes = np.array([np.sqrt((part.astype(np.float64) ** 2).sum(1).mean()) for part in centred])
        sizes = np.maximum(sizes, 1e-12)
        prior = np.full(len(parts), 0.02)
        prior[0], prior[-1] = 0.3, 1.0
        weights = prior
        if scored is not None:
            stacked = np.stack([part / size for part, size in zip(centred, sizes, strict=True)], 1)
            weights = self._weights(_forms(stacked, scored, "pld,pmd->plm"), scored, prior)
        fitted = BlockPooler(
            reader.layers,
            [],
            reader.sizes,
            reader.vocabulary,
            reader.sizes[0],
            blend=True,
            by_position=self.by_position,
        )
        amounts = (weights / sizes).astype(np.float32)
        blended = np.einsum("l,lnd->nd", amounts, np.stack(parts))
        white = whitening(blended, power)
        fitted.layer_weights = torch.from_numpy(amounts)
        fitted.map = torch.from_numpy(np.ascontiguousarray(white.matrix.T))
        fitted.offset = -torch.from_numpy(white.mean @ white.matrix)
        self._tell(reader, weights)
        return fitted

    def _beside(self, reader: BlockPooler, parts: list[np.ndarray], scored: Scored | None) -> BlockPooler:
        offered = [(number, power) for number in range(len(parts)) for power in self._powers()]
        white = [whitening(parts[number], power) for number, power in offered]
        weights = np.full(len(offered), 1 / len(offered))
        if scored is not None:
            forms = [
                _forms(each(parts[number])[:, None], scored, "pld,pld->pl")
                for each, (number, _) in zip(white, offered, strict=True)
            ]
            weights = self._weights(torch.cat(forms, -1), scored, weights)
        chosen = np.sort(np.argsort(-weights, kind="stable")[: self.keep if scored is not None else None])
        kept = sorted({offered[i][0] for i in chosen})
        count = len(reader.layers)
        layers, heads = (
            [reader.layers[i] for i in kept if i < count],
            [reader.heads[i - count] for i in kept if i >= count],
        )
        starts = dict(zip(kept, np.cumsum([0] + [parts[number].shape[1] for number in kept[:-1]]), strict=True))
        beside = [np.sqrt(weights[i]).astype(np.float32) * white[i](parts[offered[i][0]]) for i in chosen]
        directions = _directions(np.concatenate(beside, 1), self.dim)
        matrix = np.zeros((directions.shape[1], sum(parts[number].shape[1] for number in kept)), dtype=np.float32)
        offset, row = np.zeros(len(matrix), dtype=np.float32), 0
        for i in chosen:
            wide = white[i].matrix.shape[1]
            step = np.sqrt(weights[i]).astype(np.float32) * (white[i].matrix @ directions[row : row + wide]).T
            begin = starts[offered[i][0]]
            matrix[:, begin : begin + step.shape[1]] += step
            offset, row = offset - step @ white[i].mean, row + wide
        fitted = BlockPooler(layers, heads, reader.sizes, reader.vocabulary, len(matrix), by_position=self.by_position)
        fitted.map, fitted.offset = torch.from_numpy(matrix), torch.from_numpy(offset.astype(np.float32))
        total = np.zeros(len(parts))
        for i in chosen:
            total[offered[i][0]] += weights[i]
        self._tell(reader, total)
        return fitted

    def _weights(self, forms: torch.Tensor, scored: Scored, prior: np.ndarray) -> np.ndarray:
        """Weights under the penalty that serves held-out sets best."""
        pairs = PairForms(forms, scored[1], scored[2])
        fold = folds_of(scored[2])
        tried = {}
        for penalty in PENALTIES if fold.max() else PENALTIES[:1]:
            found = weights_by_folds(pairs, prior, penalty, fold) if fold.max() else np.zeros(0)
            tried[penalty] = mean_spearman(found, *scored[1:]) if fold.max() else np.nan
        self.penalty_ = max(tried, key=lambda penalty: tried[penalty])
        self.held_out_ = tried[self.penalty_]
        return fit_weights(pairs, prior, self.penalty_)

    def _powers(self) -> list[float | None]:
        several = isinstance(self.power, Sequence)
        return list(self.power) if several else [self.power]  # type: ignore[arg-type, list-item]

    def _tell(self, reader: BlockPooler, weights: np.ndarray) -> None:
        """``heads_`` and ``layers_`` of the blocks' weights."""
        shares = weights / weights.sum()
        layers, heads = reader.layers, reader.heads
        self.layers_ = shares[: len(layers)]
        values = np.zeros((max([layer for layer, _ in heads], default=0) + 1, reader.sizes[1]))
        for (layer, head), share in zip(heads, shares[len(layers) :], strict=True):
            values[layer, head] = share
        self.heads_ = HeadMap(values, "head pooling weight", self.model, "", "more of the vector")


def _is_causal(model: HeadedModel) -> bool:
    """Whether the first token's state does not depend on the last: asked of the model itself."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=model.device)
    with torch.inference_mode():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    return bool(torch.allclose(first[0], first[1], atol=1e-6))


def _split(reader: BlockPooler, blocks: np.ndarray) -> list[np.ndarray]:
    """One array ``[texts, width]`` a block: layers, then heads."""
    hidden, _, head_dim = reader.sizes
    ends = np.cumsum([hidden] * len(reader.layers) + [head_dim] * len(reader.heads))
    if blocks.shape[1] != ends[-1]:
        raise InputError(f"Blocks of {blocks.shape[1]} columns were given, the reader gives {ends[-1]}.")
    return np.split(blocks, ends[:-1], axis=1)


def _forms(blocks: np.ndarray, scored: Scored, products: str) -> torch.Tensor:
    """``[pairs, 3, blocks]`` (or ``blocks, blocks``) of blocks ``[texts, blocks, width]``; see :class:`PairForms`."""
    left, right = (torch.from_numpy(blocks[rows]) for rows in scored[0].T)
    found = [torch.einsum(products, a, b) for a, b in ((left, right), (left, left), (right, right))]
    return torch.stack(found, 1).double()


def _directions(vectors: np.ndarray, dim: int) -> np.ndarray:
    """``[columns, dim]``, orthonormal: the directions in which ``vectors [texts, columns]`` are longest; all for 0.

    Exact to 2,048 columns, above that by a randomised decomposition (the same each time).
    """
    columns = vectors.shape[1]
    if not 0 < dim < columns:
        return np.eye(columns, dtype=np.float32)
    if columns <= 2048:
        products = vectors.T.astype(np.float64) @ vectors
        return np.linalg.eigh(products)[1][:, -dim:].astype(np.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(torch.from_numpy(vectors), q=min(dim, *vectors.shape), niter=4)[2].numpy()
