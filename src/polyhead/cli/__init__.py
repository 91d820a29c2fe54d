"""The command line. Thin: it reads arguments, calls the rooms below and shows what they return."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of ``polyhead``; errors a user can act on are printed without a traceback, with exit status 1."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars in a log file help nobody
    from polyhead.cli.app import app
    from polyhead.errors import PolyheadError

    try:
        app()
    except PolyheadError as error:
        from polyhead.cli.show import errors

        errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        from polyhead.cli.show import errors

        errors.print("\nInterrupted. What was written is kept; the same command goes on from there.")
        sys.exit(130)


def escape(text: str) -> str:
    """Text that Rich prints as it is, square brackets included."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)
