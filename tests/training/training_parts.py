"""What tests of training share; imported by a process of its own too, so it needs nothing of pytest."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

# fmt: off
WORDS = [
    "the", "a", "river", "rises", "in", "hills", "and", "runs", "west", "bridge", "of", "iron", "opened",
    "town", "what", "did", "it", "cost", "search", "find", "is", "number", "north", "stone", "road",
]
# fmt: on


def tiny_encoder(dropout: float = 0.1) -> Any:
    """A random BERT of 3 layers x 4 heads x 8 with mean pooling and normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    with tempfile.TemporaryDirectory() as folder:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (Path(folder) / "vocab.txt").write_text("\n".join([*special, *WORDS]), encoding="utf-8")
        BertTokenizer(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(special) + len(WORDS),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=24,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        BertModel(config).save_pretrained(folder)
        body = Transformer(folder)
    return SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu")


def pairs(n: int) -> list[dict[str, str]]:
    """``n`` pairs of sentences, no text twice."""
    return [{"anchor": f"{WORDS[i]} river", "positive": f"the {WORDS[i]} runs {WORDS[-1 - i]}"} for i in range(n)]


def run_until_killed(folder: str) -> None:
    """The run of the test of resuming, which says what step it is at."""
    from polyhead.objectives import InfoNCE
    from polyhead.training import HeadDropout, Matryoshka, Trainer

    def progress(done: int, total: int | None) -> None:
        print(f"step {done}", flush=True)

    trainer = Trainer(Matryoshka(InfoNCE(), (8, 32)), f"{folder}/killed", run_options(), during=[HeadDropout(1)])
    trainer.fit(f"{folder}/model", pairs(16), progress=progress)


def run_options() -> Any:
    """Four steps an epoch, a checkpoint every third step, so that one falls inside an epoch."""
    from polyhead.training import Options

    return Options(batch_size=4, epochs=2, learning_rate=1e-3, save_every=3, device="cpu", seed=7)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))  # as in the run it is compared with
    run_until_killed(sys.argv[1])
