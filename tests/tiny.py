"""Tiny random models of every supported family: two layers, four heads, a few kilobytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
IMAGE |= {"image_size": 32, "patch_size": 8}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", TEXT),
    "roberta": ("RobertaConfig", TEXT),
    "xlm-roberta": ("XLMRobertaConfig", TEXT),
    "mpnet": ("MPNetConfig", TEXT),
    "distilbert": ("DistilBertConfig", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}),
    "modernbert": (
        "ModernBertConfig",
        {**TEXT, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "albert": ("AlbertConfig", {**TEXT, "embedding_size": 16}),
    "electra": ("ElectraConfig", {**TEXT, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config", TEXT),
    "gpt2": ("GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", TEXT),
    "opt": ("OPTConfig", {**TEXT, "ffn_dim": 37, "word_embed_proj_dim": 32}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 3}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma2": ("Gemma2Config", {**GROUPED, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "falcon": ("FalconConfig", {**TEXT, "new_decoder_architecture": False}),
    "bloom": ("BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "t5": ("T5Config", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}),
    "vit": ("ViTConfig", IMAGE),
    "deit": ("DeiTConfig", IMAGE),
    "dinov2": ("Dinov2Config", IMAGE),
    "whisper": (
        "WhisperConfig",
        {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 37}
        | {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 37, "max_source_positions": 20}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
}
TWO_TOWERS = {
    "clip": ("CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig"),
    "siglip": ("SiglipConfig", "SiglipTextConfig", "SiglipVisionConfig"),
}
FAMILIES = [*_CONFIGS, *(f"{name}-{tower}" for name in TWO_TOWERS for tower in ("text", "vision"))]
VISION = {"vit", "deit", "dinov2", "clip-vision", "siglip-vision"}
FALLBACK = {"mpnet", "deberta-v2", "falcon", "bloom"}


def tiny(family: str, attention: str | None = None, **changes: Any) -> nn.Module:
    """A tiny random model of ``family``, in evaluation mode and float32, the same every time."""
    import transformers

    torch.manual_seed(0)
    name, _, tower = family.partition("-")
    if name in TWO_TOWERS and tower in ("text", "vision", ""):
        config_name, text_name, vision_name = TWO_TOWERS[name]
        text = getattr(transformers, text_name)(**TEXT, max_position_embeddings=32, eos_token_id=98).to_dict()
        vision = getattr(transformers, vision_name)(**IMAGE).to_dict()
        config = getattr(transformers, config_name)(text_config=text, vision_config=vision)
    else:
        config_name, given = _CONFIGS[family]
        config = getattr(transformers, config_name)(**{**given, **changes})
    kernel = {} if attention is None else {"attn_implementation": attention}
    return transformers.AutoModel.from_config(config, **kernel).eval()


def inputs_for(family: str, batch: int = 2) -> dict[str, torch.Tensor]:
    """Random inputs of the kind the family takes; texts are padded, on the right unless it is a decoder."""
    generator = torch.Generator().manual_seed(1)
    if family in VISION:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if family == "whisper":
        return {"input_features": torch.randn(batch, 80, 40, generator=generator)}
    ids = torch.randint(3, 98, (batch, 7), generator=generator)
    if family.startswith("clip"):
        ids[:, -1] = 98
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tower_of(family: str) -> str | None:
    """The tower a family's name speaks of."""
    name, _, tower = family.partition("-")
    return tower if name in TWO_TOWERS else None
