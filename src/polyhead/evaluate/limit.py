"""What vectors of a given size cannot return: sign-rank bounds and free embeddings (LIMIT, arXiv 2508.21038)."""

from __future__ import annotations

import itertools

import numpy as np

from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["all_pairs", "critical_n", "free_embedding_fit", "sign_rank_bounds"]


def all_pairs(n: int) -> np.ndarray:
    """Relevance ``[n (n - 1) / 2, n]`` bool of LIMIT: a question for every pair of ``n`` documents."""
    pairs = np.array(list(itertools.combinations(range(n), 2)))
    relevance = np.zeros((len(pairs), n), dtype=bool)
    relevance[np.arange(len(pairs))[:, None], pairs] = True
    return relevance


@paper("limit")
def free_embedding_fit(
    relevance: np.ndarray, dim: int, *, steps: int = 1_000, learning_rate: float = 0.05, seed: int = 0
) -> float:
    """Share of questions whose relevant documents can all come first, with vectors made for that alone.

    Question and document vectors of length 1 are free parameters, trained by InfoNCE over the whole relevance matrix
    with Adam at a temperature of 0.1; no text and no model limits them. The best share that any step reached is given,
    and training stops at 1.

    Args:
        relevance: ``[questions, documents]`` bool, at least one relevant and one other document a question.
        dim: of the vectors.
        steps: of Adam at most.
        learning_rate: of Adam.
        seed: of the first vectors.

    Example:
        >>> free_embedding_fit(all_pairs(4), 3)
        1.0
    """
    import torch

    relevant = torch.from_numpy(_checked(relevance))
    if dim < 1 or steps < 1:
        raise InputError(f"dim={dim} and steps={steps} were given, expected at least 1.")
    generator = torch.Generator().manual_seed(seed)
    shapes = ((len(relevant), dim), (relevant.shape[1], dim))
    vectors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    optimizer = torch.optim.Adam(vectors, learning_rate)
    best = 0.0
    for _ in range(steps):
        questions, documents = (torch.nn.functional.normalize(each, dim=1) for each in vectors)
        logits = questions @ documents.T
        worst = logits.masked_fill(~relevant, torch.inf).amin(1)
        best = max(best, (worst > logits.masked_fill(relevant, -torch.inf).amax(1)).float().mean().item())
        if best == 1.0:
            break
        # Each relevant document against those that are not: two relevant ones do not compete.
        scaled = logits / 0.1
        others = scaled.masked_fill(relevant, -torch.inf).logsumexp(1, keepdim=True)
        loss = (torch.logaddexp(scaled, others) - scaled)[relevant].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


@paper("limit")
def critical_n(dim: int, *, most: int = 60, steps: int = 1_000, tries: int = 2, seed: int = 0) -> int:
    """The largest number of documents of which free vectors of ``dim`` numbers can return every pair.

    Documents are added one at a time until no one of ``tries`` beginnings succeeds; ``most`` is given where none fails
    up to there. It is a lower bound on what is possible, as the search is by gradient. On the circle and the sphere it
    is exact: the two nearest of a question share a border of their Voronoi cells, so that all pairs need a complete
    planar graph, which ends at 3 documents for 2 numbers and at 4 for 3.

    Example:
        >>> critical_n(2, steps=300)
        3
    """
    for n in range(dim + 2, most + 1):
        relevance = all_pairs(n)
        if not any(free_embedding_fit(relevance, dim, steps=steps, seed=seed + one) == 1.0 for one in range(tries)):
            return n - 1
    return most


@paper("limit")
def sign_rank_bounds(relevance: np.ndarray) -> tuple[float, int]:
    """Bounds on the size of vectors that rank all relevant documents first, ``(low, high)``.

    The paper brackets that size between the sign rank of ``2 A - 1`` less one and the sign rank. Sign rank itself is
    hard to compute; it is at least ``sqrt(m n) / ||2 A - 1||`` (Forster 2002), and at most the rank, and at most
    ``2 max(relevant a question) + 1`` (points on the moment curve, Alon, Frankl and Rodl 1985).

    Args:
        relevance: ``[m, n]`` bool.
    """
    signs = 2.0 * _checked(relevance).astype(np.float64) - 1.0
    low = float(np.sqrt(signs.size) / np.linalg.norm(signs, 2))
    high = min(int(np.linalg.matrix_rank(signs)), 2 * int(relevance.sum(1).max()) + 1)
    return max(1.0, low - 1.0), high


def _checked(relevance: np.ndarray) -> np.ndarray:
    relevance = np.asarray(relevance, dtype=bool)
    if relevance.ndim != 2 or not relevance.any(1).all() or relevance.all(1).any():
        raise InputError(
            f"Relevance is {list(relevance.shape)}; expected [questions, documents] with at least one relevant and one "
            "other document a question."
        )
    return relevance
