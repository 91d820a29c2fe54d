"""One writer at a time on a local disk."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyhead.errors import IndexBusyError
from polyhead.search.faults import told

__all__ = ["writing"]

_LOCK, _HOLDER = ".lock", ".writer.json"


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Hold the right to write an index in a local folder; the system gives it back when the process dies.

    Readers need no lock. Object stores have none: there the primary key keeps two writers from adding a row twice.

    Raises:
        IndexBusyError: another process holds it; says which.
        IndexStorageError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    holder = Path(folder, _HOLDER)
    with told(folder, "written"):
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, _LOCK), timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise IndexBusyError(
                f"The index {folder} is being written by {_who(holder)}. Wait for that to end and run the same command "
                "again; searching what is already committed works meanwhile (polyhead search --no-update)."
            ) from None
    try:
        with told(folder, "written"):
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            holder.write_text(json.dumps(me), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        them = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {them['pid']} on {them['host']} since {them['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
