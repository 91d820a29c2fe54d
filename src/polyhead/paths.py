"""Where Polyhead keeps what it makes: caches, indexes and downloaded data."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["home"]


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
