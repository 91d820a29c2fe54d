"""Claims: one file a paper, a small experiment that supports or refutes its headline."""

from polyhead.claims.base import Evidence, claim_ids, run_claim

__all__ = ["Evidence", "claim_ids", "run_claim"]
