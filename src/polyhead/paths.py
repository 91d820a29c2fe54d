"""Where Polyhead keeps what it makes: caches, indexes and downloaded data."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["home", "make_folder"]


def home() -> Path:
    """The folder named by ``POLYHEAD_HOME``, else the user's cache folder for polyhead; made if it is missing."""
    given = os.environ.get("POLYHEAD_HOME")
    if given:
        folder = Path(given).expanduser()
    else:
        from platformdirs import user_cache_path

        folder = user_cache_path("polyhead")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Put a folder in place in one step: ``fill`` writes into another, which is then renamed.

    Where two processes do it at once, one of the equal results stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        fill(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
