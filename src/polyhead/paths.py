"""Where Polyhead keeps what it makes for itself: exported models, remembered choices, indexes without a place."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["home"]


def home() -> Path:
    """The folder of Polyhead's own files: ``POLYHEAD_HOME`` where it is set, else the user's cache folder.

    The folder is not created; who writes into it makes what it needs.

    Example:
        >>> from polyhead.paths import home
        >>> home().name != ""
        True
    """
    given = os.environ.get("POLYHEAD_HOME")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("polyhead"))
