"""Features whose inner product is the Taylor polynomial of ``exp`` of the inner product: Fastmax, Based."""

from __future__ import annotations

import math

import torch

from polyhead.errors import InputError

__all__ = ["taylor_count", "taylor_features"]


def taylor_count(size: int, order: int = 2) -> int:
    """Features that :func:`taylor_features` makes of ``size``; products that are the same twice are kept once.

    Raises:
        InputError: an order other than 1 or 2.

    Example:
        >>> taylor_count(16), taylor_count(16, 1)
        (153, 17)
    """
    if order not in (1, 2):
        raise InputError(f"A Taylor polynomial of order {order} was asked for; expected 1 or 2.")
    return 1 + size + (size * (size + 1) // 2 if order == 2 else 0)


def taylor_features(states: torch.Tensor, order: int = 2) -> torch.Tensor:
    """``[..., size]`` -> ``[..., taylor_count(size, order)]``: ``phi(q) . phi(k) = sum_{l <= order} (q . k)^l / l!``.

    Raises:
        InputError: an order other than 1 or 2.

    Source:
        fastmax (Gerami et al. 2024, section 2.2); based (Arora et al. 2024, section 4.1).

    Example:
        >>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
        >>> (taylor_features(q) @ taylor_features(k)).item()  # 1 - 1.5 + 1.5^2 / 2
        0.625
    """
    size = states.shape[-1]
    taylor_count(size, order)
    parts = [torch.ones_like(states[..., :1]), states]
    if order == 2:
        first, second = torch.triu_indices(size, size, 1, device=states.device)
        parts += [states.square() / math.sqrt(2), states[..., first] * states[..., second]]
    return torch.cat(parts, -1)
