"""The main job on real documents found on any machine: search the Python standard library's own documentation.

Run by ``make demo``. Every step is a command a user can type; the script prints it before running it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig

STDLIB = sysconfig.get_path("stdlib")
LEAVE_OUT = ["test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"]
QUESTIONS = [
    "read rows from a CSV file, compress them with gzip and send them as an e-mail attachment",
    "parse a date in another time zone, run a function after a delay in a background thread, "
    "and write the result to a log file that rotates",
    "guess a file's type from its name, compute a hash of its contents and copy it to a temporary directory",
]


def polyhead(*arguments: str) -> None:
    """Show a command as a user would type it, then run it in this environment."""
    print("\n$ polyhead " + " ".join(shlex.quote(argument) for argument in arguments), flush=True)
    subprocess.run([sys.executable, "-m", "polyhead", *arguments], check=True)


def main() -> None:
    exclude = [word for name in LEAVE_OUT for word in ("--exclude", name)]
    print(f"Indexing the documentation strings of {STDLIB}")
    polyhead("index", STDLIB, "--include", "*.py", *exclude)
    for question in QUESTIONS:
        polyhead("search", STDLIB, question, "-k", "8", "--explain")
    print("\nNow your own files:  .venv/bin/polyhead search PATH 'what you want to know, and what else'")
    print(
        f"Or look at it in a browser:  .venv/bin/polyhead serve {shlex.quote(STDLIB)}  and open http://127.0.0.1:8000"
    )


if __name__ == "__main__":
    main()
