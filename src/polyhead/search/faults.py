"""What storage reports when it fails, told so that the reader knows what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polyhead.errors import IndexStorageError, PolyheadError

__all__ = ["is_conflict", "story", "told"]


def is_conflict(error: Exception) -> bool:
    """Whether a write failed only because another process committed first."""
    text = str(error).lower()
    return "conflict" in text or "concurrent" in text or "too many attempts" in text


@contextmanager
def told(uri: str, done: str) -> Iterator[None]:
    """Turn failures of the storage into IndexStorageError.

    Args:
        uri: of the index.
        done: what was to be done: "opened", "read" or "written".
    """
    try:
        yield
    except PolyheadError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise IndexStorageError(story(uri, done, error)) from error


def story(uri: str, done: str, error: BaseException) -> str:
    """What failed, why, and what to do."""
    text = " ".join(str(error).split())
    low = text.lower()
    if "no space left" in low or "os error 28" in low or "quota" in low:
        advice = "The disk is full: make room and run the same command again; what was committed is kept."
    elif "permission denied" in low or "read-only file system" in low or "os error 13" in low:
        advice = "Check the permissions of that folder, or name another with --index."
    elif done == "written":
        advice = "What was committed before is kept; run the same command again."
    else:
        advice = "It may be damaged, or still being copied; make it anew with: polyhead index PATH --rebuild"
    return f"The index {uri} cannot be {done}: {text[:400]}. {advice}"
