"""Errors a user can act on. Each message says what was given, what was expected and what to do."""

from __future__ import annotations

__all__ = [
    "DataNotFoundError",
    "IndexBusyError",
    "IndexMismatchError",
    "IndexStorageError",
    "InputError",
    "MissingExtraError",
    "ModelNotFoundError",
    "PolyheadError",
    "ReadError",
    "UnreadableModelError",
]


class PolyheadError(Exception):
    """Base of every error Polyhead raises on purpose; the command line prints it without a traceback."""


class InputError(PolyheadError, ValueError):
    """An argument, file or query that cannot be used as given."""


class ModelNotFoundError(PolyheadError):
    """A model name that is neither a path, nor an installed model package, nor reachable on the Hugging Face hub."""


class UnreadableModelError(PolyheadError):
    """A model whose attention heads could not be found; names the module and what was looked for."""


class DataNotFoundError(PolyheadError):
    """An evaluation data set that is neither under ``POLYHEAD_DATA`` nor could be downloaded."""


class IndexMismatchError(PolyheadError):
    """An index made by another model, other settings or another format version."""


class IndexBusyError(PolyheadError):
    """Another process is writing the same index."""


class IndexStorageError(PolyheadError):
    """An index that cannot be read or written: damaged, foreign, no permission, disk full."""


class MissingExtraError(PolyheadError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class ReadError(PolyheadError):
    """A document file that cannot be read: damaged, encrypted, binary, gone. Other files are not affected."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, str]]:
        return type(self), (self.path, self.reason)
