"""Files an encoder keeps: facts of a model, its export, what was fastest here. Written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from polyhead.paths import home

__all__ = ["EncoderCache", "cpu_has_bf16", "installed_version"]

# Raise this when what is written or how a graph is made changes.
_FORMAT = "1"


class EncoderCache:
    """The files of one encoder, found by its fingerprint and by the versions that made them.

    Args:
        fingerprint: of the encoder.
        root: folder of all encoders' files; ``None`` takes ``POLYHEAD_HOME``'s ``cache``.
    """

    def __init__(self, fingerprint: str, root: str | Path | None = None) -> None:
        base = home() / "cache" if root is None else Path(root)
        self.folder = base / "encoders" / fingerprint
        stamp = "-".join(installed_version(name) for name in ("torch", "transformers"))
        self.facts_file = self.folder / f"facts-{_FORMAT}-{stamp}.json"
        self.export_folder = self.folder / f"openvino-{_FORMAT}-{installed_version('openvino')}-{stamp}"
        self.choices_file = self.folder / f"choices-{_FORMAT}-{installed_version('openvino')}-{stamp}-{_machine()}.json"

    def write(self, file: Path, text: str) -> None:
        """Put a text file in place in one step, so that no reader sees half of it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as content:
                content.write(text)
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def read_choices(self) -> dict[str, Any]:
        """What calibration found on this machine; empty where there was none or its file is damaged."""
        try:
            content = json.loads(self.choices_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


@cache
def installed_version(package: str) -> str:
    """Version of an installed package, or "none"; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def _cpu() -> str:
    """The kernel's description of the first processor, flags included; what Python knows where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.processor()} {platform.machine()}"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by itself (AVX512-BF16, AMX, or Arm's BF16)."""
    words = set(_cpu().lower().split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _machine() -> str:
    """A short name of what decides speed here: processor, cores we may use, an NVIDIA device."""
    lines = [line for line in _cpu().splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = "\n".join([*lines, platform.machine(), str(cores), str(Path("/dev/nvidia0").exists())])
    return hashlib.sha256(described.encode()).hexdigest()[:12]
