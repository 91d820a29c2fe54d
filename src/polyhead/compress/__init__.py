"""Smaller models out of larger ones: each transform gives ``(model, Report)``."""

from polyhead.compress.hashed_tokens import hash_tokens, token_counts
from polyhead.compress.hashing import HashEmbedding, MultiHashEmbedding, collisions, hash_text, word_shape
from polyhead.compress.mla import LatentAttention, latent_factors, rope_contribution, to_mla
from polyhead.compress.product import ProductQuantizer
from polyhead.compress.prune import prune, save_pruned
from polyhead.compress.report import Cost, Report, cost_of
from polyhead.compress.scalar import BinaryQuantizer, Int8Quantizer
from polyhead.compress.share import alike_groups, convert_to_gqa, pool_heads, tie_key_values
from polyhead.compress.transmla import ExpandedAttention, gqa_to_mla, is_gqa_representable
from polyhead.compress.vectors import Quantizer, compress_vectors

__all__ = [
    "BinaryQuantizer",
    "Cost",
    "ExpandedAttention",
    "HashEmbedding",
    "Int8Quantizer",
    "LatentAttention",
    "MultiHashEmbedding",
    "ProductQuantizer",
    "Quantizer",
    "Report",
    "alike_groups",
    "collisions",
    "compress_vectors",
    "convert_to_gqa",
    "cost_of",
    "gqa_to_mla",
    "hash_text",
    "hash_tokens",
    "is_gqa_representable",
    "latent_factors",
    "pool_heads",
    "prune",
    "rope_contribution",
    "save_pruned",
    "tie_key_values",
    "to_mla",
    "token_counts",
    "word_shape",
]
