"""Late interaction: token vectors, exact MaxSim, and MUVERA's encodings that find its candidates."""

from __future__ import annotations

from polyhead.embed.tokens import TokenVectors
from polyhead.search.late.muvera import FDEEncoder, MuveraIndex
from polyhead.search.late.scoring import best_matches, maxsim

__all__ = ["FDEEncoder", "MuveraIndex", "TokenVectors", "best_matches", "maxsim"]
