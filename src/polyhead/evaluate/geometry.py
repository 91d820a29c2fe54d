"""What a cloud of vectors looks like, without labels: how evenly it is spread, how much it holds, how it moves."""

from __future__ import annotations

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.vectors import unit
from polyhead.papers import paper

__all__ = ["curvature", "dime", "effective_rank", "infonce", "isotropy", "lidar", "matrix_entropy"]


def _rows(x: np.ndarray, least: int, what: str) -> np.ndarray:
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < least or not np.isfinite(rows).all():
        raise InputError(f"{what} needs finite vectors [n, dim] with n at least {least}, got the shape {rows.shape}.")
    return rows


@paper("telecom-compass")
def isotropy(x: np.ndarray, method: str = "isoscore") -> float:
    """How evenly vectors use all directions: 1 where all alike, near 0 where a few hold everything.

    "isoscore" (Rudman et al. 2022): with ``s`` the variances along the principal axes, scaled to length ``sqrt(dim)``,
    ``delta = |s - 1| / sqrt(2 (dim - sqrt(dim)))`` and ``phi = (dim - delta^2 (dim - sqrt(dim)))^2 / dim^2``, it is
    ``(dim phi - 1) / (dim - 1)``; the mean and the scale of the vectors do not count.
    "partition" (Mu and Viswanath 2018): ``min_u Z(u) / max_u Z(u)`` with ``Z(u) = sum exp(u . x)`` over the principal
    directions ``u`` of the vectors as they are, both ways; a mean far from 0, or long vectors, count as uneven.

    Args:
        x: ``[n, dim]``, at least two vectors of two numbers.
        method: "isoscore" or "partition".

    Raises:
        InputError: an unknown method, or vectors it is not defined for (all the same, or of one number).

    Example:
        >>> import numpy as np
        >>> from polyhead.evaluate.geometry import isotropy
        >>> round(isotropy(np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), 3)
        1.0
        >>> round(isotropy(np.array([[1.0, 0], [-1, 0], [2, 0], [-2, 0]])), 3)
        0.0
    """
    rows = _rows(x, 2, "Isotropy")
    dim = rows.shape[1]
    if dim < 2:
        raise InputError("Isotropy compares directions: expected vectors of at least 2 numbers, got 1.")
    if method == "isoscore":
        centred = rows - rows.mean(0)
        spread = np.zeros(dim)
        values = np.linalg.svd(centred, compute_uv=False) ** 2
        spread[: len(values)] = values
        if not spread.any():
            raise InputError(f"All {len(rows)} vectors are the same; they have no directions to compare.")
        spread *= np.sqrt(dim) / np.linalg.norm(spread)
        defect = np.linalg.norm(spread - 1) / np.sqrt(2 * (dim - np.sqrt(dim)))
        phi = ((dim - defect**2 * (dim - np.sqrt(dim))) / dim) ** 2
        return float((dim * phi - 1) / (dim - 1))
    if method == "partition":
        directions = np.linalg.eigh(rows.T @ rows)[1]
        logits = rows @ np.concatenate([directions, -directions], axis=1)
        top = logits.max()
        sums = np.log(np.exp(logits - top).sum(0))
        return float(np.exp(sums.min() - sums.max()))
    raise InputError(f"method = {method!r}, expected 'isoscore' or 'partition'.")


@paper("layer-by-layer")
def matrix_entropy(x: np.ndarray, alpha: float = 1.0) -> float:
    """Rényi entropy of order ``alpha`` of the spectrum of ``x x^T``, scaled to trace 1: how many directions hold it.

    0 where all vectors lie on one line, ``log(min(n, dim))`` where the spectrum is flat. Of the token states of one
    prompt it is the paper's prompt entropy, of one vector a prompt its data-set entropy (equation 1).

    Args:
        x: ``[n, dim]``.
        alpha: order; 1 is the limit, von Neumann's entropy.

    Raises:
        InputError: ``alpha`` not above 0, or only zero vectors.
    """
    rows = _rows(x, 1, "Entropy")
    if not alpha > 0:
        raise InputError(f"alpha = {alpha}, expected a number above 0.")
    values = np.linalg.svd(rows, compute_uv=False) ** 2
    if not values.any():
        raise InputError("All vectors are zero; they have no spectrum.")
    shares = values / values.sum()
    shares = shares[shares > 0]
    if alpha == 1:
        return float(-(shares * np.log(shares)).sum())
    return float(np.log((shares**alpha).sum()) / (1 - alpha))


@paper("layer-by-layer")
def effective_rank(x: np.ndarray) -> float:
    """``exp`` of the entropy of the singular values, scaled to sum 1 (Roy and Vetterli 2007): 1 to ``min(n, dim)``."""
    values = np.linalg.svd(_rows(x, 1, "Effective rank"), compute_uv=False)
    if not values.any():
        raise InputError("All vectors are zero; they have no rank.")
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@paper("layer-by-layer")
def curvature(x: np.ndarray) -> float:
    """Mean angle, in radians, between successive steps from token to token: 0 on a line, pi where each turns back.

    Steps of length 0 have no direction; the angles at them are left out.

    Args:
        x: ``[tokens, dim]`` in reading order, at least 3.

    Raises:
        InputError: fewer tokens, or no two successive steps that have a length.
    """
    steps = np.diff(_rows(x, 3, "Curvature"), axis=0)
    length = np.linalg.norm(steps, axis=1)
    both = length[1:] * length[:-1]
    if not both.any():
        raise InputError("No two successive steps have a length; the path has no angle.")
    cosine = (steps[1:] * steps[:-1]).sum(1)[both > 0] / both[both > 0]
    return float(np.arccos(np.clip(cosine, -1, 1)).mean())


@paper("layer-by-layer")
def infonce(a: np.ndarray, b: np.ndarray, temperature: float = 0.1) -> float:
    """``log n`` less the InfoNCE loss of telling each vector's other view among all.

    At most ``log n``; 0 where all look alike, below 0 where the views mislead.

    Args:
        a, b: ``[n, dim]``, two views of the same things; compared by cosine, both ways.
        temperature: of the softmax.
    """
    x, y = (unit(_rows(view, 2, "InfoNCE")) for view in (a, b))
    _same(x, y)
    logits = x @ y.T / temperature
    loss = 0.0
    for one in (logits, logits.T):
        top = one.max(1, keepdims=True)
        loss += float((np.log(np.exp(one - top).sum(1)) + top[:, 0] - one.diagonal()).mean()) / 2
    return float(np.log(len(x)) - loss)


@paper("layer-by-layer")
def dime(a: np.ndarray, b: np.ndarray, *, alpha: float = 1.0, permutations: int = 5, seed: int = 0) -> float:
    """Difference of matrix-based entropies (Skean et al. 2023): what pairing two views right tells over random pairs.

    With Gaussian kernels ``K_a``, ``K_b`` of width the median distance, it is the mean of ``S(K_a * P K_b P^T)`` over
    random permutations ``P``, less ``S(K_a * K_b)``, each product taken entry by entry; 0 where the views have nothing
    in common.

    Args:
        a, b: ``[n, dim]``, two views of the same things.
        alpha: order of the entropy.
        permutations, seed: of the mean.
    """
    kernels = [_gaussian(_rows(view, 2, "DiME")) for view in (a, b)]
    _same(*kernels)
    generator = np.random.default_rng(seed)
    n = len(kernels[0])
    mixed = []
    for _ in range(permutations):
        order = generator.permutation(n)
        mixed.append(_kernel_entropy(kernels[0] * kernels[1][np.ix_(order, order)], alpha))
    return float(np.mean(mixed) - _kernel_entropy(kernels[0] * kernels[1], alpha))


@paper("layer-by-layer")
def lidar(views: np.ndarray, *, ridge: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2023): effective number of directions that tell things apart beyond their views.

    With ``B`` the covariance of the things' means and ``W`` that of views about their mean plus ``ridge``, it is
    ``exp`` of the entropy of the eigenvalues of ``W^-1/2 B W^-1/2``, scaled to sum 1.

    Args:
        views: ``[things, views, dim]``, at least two of each.
        ridge: added to the diagonal of ``W``.

    Raises:
        InputError: another shape, or things whose means are all the same.
    """
    x = np.asarray(views, dtype=np.float64)
    if x.ndim != 3 or min(x.shape[:2]) < 2 or not np.isfinite(x).all():
        raise InputError(f"LiDAR needs finite [things, views, dim], at least two of each, got the shape {x.shape}.")
    means = x.mean(1)
    between = np.cov(means.T, ddof=1).reshape(x.shape[2], -1)
    apart = (x - means[:, None]).reshape(-1, x.shape[2])
    within = apart.T @ apart / (x.shape[0] * (x.shape[1] - 1)) + ridge * np.eye(x.shape[2])
    values, directions = np.linalg.eigh(within)
    root = directions / np.sqrt(values) @ directions.T
    spectrum = np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None)
    if not spectrum.any():
        raise InputError("All things have the same mean; nothing tells them apart.")
    shares = spectrum[spectrum > 0] / spectrum.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _same(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise InputError(f"Two views of the same things have one shape, got {a.shape} and {b.shape}.")


def _gaussian(x: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)
    distance = np.clip(squares[:, None] + squares[None] - 2 * x @ x.T, 0, None)
    width = np.median(distance[np.triu_indices(len(x), 1)])
    if width <= 0:
        raise InputError("More than half of the vectors are the same; a kernel has no width for them.")
    return np.asarray(np.exp(-distance / (2 * width)))


def _kernel_entropy(kernel: np.ndarray, alpha: float) -> float:
    values = np.clip(np.linalg.eigvalsh(kernel), 0, None)
    shares = values[values > 0] / values.sum()
    if alpha == 1:
        return float(-(shares * np.log(shares)).sum())
    return float(np.log((shares**alpha).sum()) / (1 - alpha))
