"""The mark ``@paper``: which function or class implements which paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from polyhead.errors import InputError

__all__ = ["implementations", "paper"]

Marked = TypeVar("Marked", bound=Callable[..., Any])

_MARKED: dict[str, list[str]] = {}


def paper(*ids: str) -> Callable[[Marked], Marked]:
    """Mark a function or class as the implementation of one or more papers of the catalogue.

    The ids are kept in ``__papers__`` of the marked object. They are not looked up here, so that importing a
    mechanism never reads the catalogue; :func:`polyhead.papers.find` and the tests of this room name an unknown id.
    A subclass does not take over its base's papers unless it is marked itself.

    Args:
        ids: paper ids, for example ``"mrag"``.

    Returns:
        A decorator that returns the object itself, unwrapped.

    Raises:
        InputError: no id given, or something other than a string (such as a bare ``@paper``).

    Example:
        >>> @paper("mrag")
        ... def votes(ranks): ...
        >>> votes.__papers__
        ('mrag',)
    """
    if not ids or not all(isinstance(name, str) and name for name in ids):
        raise InputError(f"@paper was given {ids!r}, expected one or more paper ids: write @paper('mrag').")

    def mark(target: Marked) -> Marked:
        own = tuple(vars(target).get("__papers__", ()))
        added = tuple(name for name in dict.fromkeys(ids) if name not in own)
        # setattr, as neither a function type nor a type declares the attribute.
        setattr(target, "__papers__", own + added)  # noqa: B010
        where = f"{target.__module__}.{target.__qualname__}"
        for name in added:
            known = _MARKED.setdefault(name, [])
            if where not in known:
                known.append(where)
        return target

    return mark


def implementations(id: str) -> tuple[str, ...]:
    """Dotted names of the objects marked with a paper's id in the modules imported so far.

    It sees what other packages mark as well; what Polyhead itself has, imported or not, is in ``find(id).code``.

    Example:
        >>> implementations("no-module-with-this-mark-is-imported")
        ()
    """
    return tuple(_MARKED.get(id, ()))
