"""The tokenizer inside a GGUF file, converted once a machine: reading it out of the file takes many seconds."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polyhead.paths import home, make_folder

__all__ = ["gguf_tokenizer"]


def gguf_tokenizer(folder: str | Path, file: str) -> Any:
    """The tokenizer of ``folder / file``, kept below ``POLYHEAD_HOME`` in the form that loads fast.

    A file that changed in size or time, or another transformers, converts again. Where nothing can be written, the
    tokenizer is read out of the file each time.

    Raises:
        OSError, ValueError, KeyError: what transformers says of a file without a tokenizer.
    """
    from transformers import AutoTokenizer

    source = Path(folder) / file
    about = source.stat()
    key = f"{source.resolve()} {about.st_size} {about.st_mtime_ns} {version('transformers')}"
    kept = home() / "cache" / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if kept.is_dir():
        return AutoTokenizer.from_pretrained(str(kept))
    found = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    try:
        make_folder(kept, found.save_pretrained)
    except OSError:
        return found
    return found
