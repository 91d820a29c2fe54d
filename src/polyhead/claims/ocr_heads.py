"""OCR heads: the heads that look at the patches of what is being written; without them a reader cannot read."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import MissingExtraError
from polyhead.evaluate.statistics import bootstrap_interval

if TYPE_CHECKING:
    import torch

    from polyhead.heads.span_heads import CopySample

_DIGITS, _GRID, _FILLER, _BEGIN = 4, (2, 8), 10, 11
_CONTEXT = _GRID[0] * _GRID[1]


def run(scale: Scale, seed: int) -> Evidence:
    """A small decoder trained here to write four digits, from an image of them or from text that holds them.

    The two heads of the highest copy score on held-out images are switched off, against all pairs of other heads; the
    interval is over other held-out images.
    """
    import torch

    from polyhead.act import Gate
    from polyhead.heads.span_heads import OcrHeads, jaccard
    from polyhead.model import load

    reader = _Reader(seed)
    reader.train(500 if scale == "smoke" else 2500)
    model = load(reader.decoder)
    few, many = (60, 200) if scale == "smoke" else (300, 400)
    images = [reader.sample(image=True) for _ in range(few)]
    texts = [reader.sample(image=False) for _ in range(few)]
    seeing, copying = OcrHeads().score(model, images), OcrHeads().score(model, texts)
    best = seeing.top(2)
    embedded, digits = reader.batch(many, image=True, held_out=True)
    steps = slice(_CONTEXT, _CONTEXT + _DIGITS)

    def right(off: list[tuple[int, int]]) -> np.ndarray:
        with torch.inference_mode(), Gate.off(off, model).on(model):
            logits = model(inputs_embeds=embedded).logits[:, steps]
        return (logits.argmax(-1) == digits).double().mean(1).numpy()

    others = [head for head in seeing.top(1.0) if head not in best]
    without, whole = right(best), right([])
    random = np.mean([right(list(pair)) for pair in combinations(others, 2)], axis=0)
    gap = bootstrap_interval(random - without, seed=seed)
    return Evidence(
        measured={
            "difference": gap.value,
            "accuracy without the top 2": float(without.mean()),
            "image heads above 0.1": float((seeing.values > 0.1).mean()),
            "rank correlation with text heads": seeing.rank_correlation(copying),
            "jaccard with text heads": jaccard(seeing, copying),
        },
        baseline={
            "accuracy": float(whole.mean()),
            "accuracy without two others": float(random.mean()),
            "text heads above 0.1": float((copying.values > 0.1).mean()),
        },
        expected="without the two heads of the highest copy score fewer digits are read than without two others",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high),
        decides="difference",
        data=f"strips of {_DIGITS} scikit-learn digits, {few} to score heads and {many} others to switch them off",
        model="decoder of 2 layers x 4 heads, trained here",
        notes="A toy reader: nothing is said about vision-language models.",
        details={"image": seeing.values.tolist(), "text": copying.values.tolist()},
    )


class _Reader:
    """A GPT-2 of 2 layers and 4 heads over patches or words, and the data it is trained on."""

    def __init__(self, seed: int) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        try:
            from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError("The claim reads scikit-learn's digits: pip install 'polyhead[claims]'") from error

        torch.manual_seed(seed)
        self.random = np.random.default_rng(seed)
        config = GPT2Config(
            vocab_size=12, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        self.decoder: Any = GPT2LMHeadModel(config).eval()
        self.patch = torch.nn.Linear(16, 64)
        data: Any = load_digits()
        self.images, self.labels = data.images / 16.0, data.target
        self.split = int(0.7 * len(self.labels))

    def batch(self, n: int, *, image: bool, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded sequences ``[n, 20, 64]`` (context, begin, all digits but the last) and digits ``[n, 4]``."""
        import torch

        first, end = (self.split, len(self.labels)) if held_out else (0, self.split)
        chosen = self.random.integers(first, end, (n, _DIGITS))
        digits = torch.tensor(self.labels[chosen])
        words = self.decoder.transformer.wte
        if image:
            strips = self.images[chosen].reshape(n, _DIGITS, 2, 4, 2, 4).transpose(0, 2, 1, 4, 3, 5)
            context = self.patch(torch.tensor(strips.reshape(n, _CONTEXT, 16), dtype=torch.float32))
        else:
            ids = torch.full((n, _CONTEXT), _FILLER)
            ids[:, torch.arange(_DIGITS) * 4 + 2] = digits
            context = words(ids)
        begin = words(torch.full((n, 1), _BEGIN))
        return torch.cat([context, begin, words(digits[:, :-1])], dim=1), digits

    def train(self, steps: int) -> None:
        """Adam on the digits' cross-entropy, images and texts in turn."""
        import torch

        parameters = [*self.decoder.parameters(), *self.patch.parameters()]
        optimiser = torch.optim.Adam(parameters, 2e-3)
        for step in range(steps):
            embedded, digits = self.batch(64, image=step % 2 == 0)
            logits = self.decoder(inputs_embeds=embedded).logits[:, _CONTEXT:]
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), digits.flatten()).backward()
            optimiser.step()
        self.patch.requires_grad_(False)

    def sample(self, *, image: bool) -> CopySample:
        """One held-out sequence, one of its digits, and the patches or the word that show it."""
        import torch

        from polyhead.heads.span_heads import CopySample, evidence_tokens

        with torch.no_grad():
            embedded, digits = self.batch(1, image=image, held_out=True)
        at = int(self.random.integers(_DIGITS))
        evidence = evidence_tokens([(8 * at, 0, 8 * at + 8, 8)], _GRID, (8, 8 * _DIGITS)) if image else [at * 4 + 2]
        return CopySample({"inputs_embeds": embedded}, [_CONTEXT + at], [int(digits[0, at])], evidence)
