"""Multiple-choice circuits: few heads write the letter, few dimensions of them suffice, less so for random letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval

if TYPE_CHECKING:
    import torch

    from polyhead.heads.letter_heads import Choices
    from polyhead.model import HeadedModel

_TEXTS, _LETTERS, _OPTIONS, _WIDTH = 16, 26, 4, 64
_RANKS = (1, 2, 3, 4, 6, 8)


def run(scale: Scale, seed: int) -> Evidence:
    """A decoder of 4 layers x 4 heads learns to give the letter of a repeated text; its heads are taken apart.

    Prompts are four texts, each with its letter after it, A to D in half of them and random letters in the others, then
    the text asked for. Decided by the share of right answers that is kept when the queries, the keys or the values of
    the correct-letter heads are projected onto 3 directions found on A to D: on A to D, less on random letters, mean
    over the three. Supported where that interval is above 0, A to D keep more than 0.8, and a quarter of the heads
    holds over half of the positive attribution. Smoke trains one model, full three.
    """
    found: list[dict[str, Any]] = [_study(seed + number) for number in range(1 if scale == "smoke" else 3)]
    kept, random = (np.concatenate([each[name] for each in found]) for name in ("kept", "random"))
    gap = bootstrap_interval(kept - random, seed=seed)
    mean = {
        name: float(np.mean([each[name] for each in found]))
        for name in ("share", "patching", "accuracy", "random accuracy")
    }
    firm = mean["share"] > 0.5 and kept.mean() > 0.8
    return Evidence(
        measured={
            "difference": gap.value,
            "right answers kept at rank 3, A to D": float(kept.mean()),
            "attribution held by 4 of 16 heads": mean["share"],
            "correlation of attribution and patching": mean["patching"],
        },
        baseline={
            "right answers kept at rank 3, random letters": float(random.mean()),
            "accuracy, A to D": mean["accuracy"],
            "accuracy, random letters": mean["random accuracy"],
        },
        expected="few heads hold most of the attribution; 3 directions keep the answers for A to D, fewer for others",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high) if firm else "refuted",
        decides="difference",
        data=f"{len(kept)} prompts of each kind, four texts of {_TEXTS} with letters",
        model=f"{len(found)} decoders of 4 layers x 4 heads, trained here",
        notes="A toy model and one-token texts in place of a 70B model and MMLU. A letter comes after its text, and "
        "each token is given with a projection of the one before it, so that one layer can pair them. The interval is "
        "over prompts.",
        details={"models": [each["details"] for each in found]},
    )


def _study(seed: int) -> dict[str, Any]:
    """Train one model and take it apart."""
    from polyhead.heads.letter_heads import SubspaceCompressor, letter_attribution, letter_heads
    from polyhead.heads.patching import ActivationPatching

    model, embed = _trained(seed, 250)
    random = np.random.default_rng((seed, 1))
    fit, test, strange = (_choices(random, 200, other, embed)[0] for other in (False, False, True))
    attribution = letter_attribution(model, test)
    values = attribution.heads.values
    positive = np.sort(np.clip(values, 0, None).ravel())[::-1]
    sorted_heads = letter_heads(model, test)
    heads = sorted_heads.of_kind("correct letter") or attribution.heads.top(2)
    effect = ActivationPatching().score(model, _patching(random, embed)).values
    base = {name: _right(model, each) for name, each in (("A to D", test), ("random", strange))}
    kept, other, by_rank = [], [], {}
    for which in ("q", "k", "v"):
        compressor = SubspaceCompressor(heads, which).fit(model, fit)
        for rank in _RANKS:
            compressor.rank = rank
            right = []
            for each in (test, strange):
                with compressor.on(model, each):
                    right.append(_right(model, each))
            by_rank[f"{which}{rank}"] = [float(one.mean()) for one in right]
            if rank == 3:
                kept.append(right[0] / base["A to D"].mean())
                other.append(right[1] / base["random"].mean())
    return {
        "kept": np.mean(kept, axis=0),
        "random": np.mean(other, axis=0),
        "share": float(positive[:4].sum() / positive.sum()),
        "patching": float(np.corrcoef(values.ravel(), effect.ravel())[0, 1]),
        "accuracy": float(base["A to D"].mean()),
        "random accuracy": float(base["random"].mean()),
        "details": {
            "kinds": sorted_heads.kinds,
            "attribution": values.tolist(),
            "feed-forward": attribution.feedforward.tolist(),
            "accuracy by rank, A to D and random": by_rank,
        },
    }


def _choices(
    random: np.random.Generator, n: int, strange: bool | None, embed: _Embedding
) -> tuple[Choices, torch.Tensor]:
    """Prompts with their tokens; letters are A to D, random, or either where ``strange`` is None."""
    import torch

    from polyhead.heads.letter_heads import Choices

    texts = random.random((n, _TEXTS)).argsort(1)[:, :_OPTIONS]
    drawn = random.random((n, _LETTERS)).argsort(1)[:, :_OPTIONS]
    other = random.random((n, 1)) < 0.5 if strange is None else np.full((n, 1), strange)
    labels = np.where(other, drawn, np.arange(_OPTIONS)) + _TEXTS
    right = random.integers(0, _OPTIONS, n)
    pairs = np.stack([texts, labels], 2).reshape(n, -1)
    ids = np.concatenate([pairs, np.full((n, 1), _TEXTS + _LETTERS), texts[np.arange(n), right][:, None]], 1)
    places = torch.arange(2 * _OPTIONS).reshape(1, _OPTIONS, 2).expand(n, -1, -1)
    tokens = torch.tensor(ids)
    return Choices({"inputs_embeds": embed(tokens)}, torch.tensor(labels), places, torch.tensor(right)), tokens


def _patching(random: np.random.Generator, embed: _Embedding) -> Any:
    """Clean prompts, and the same with another text asked for."""
    import torch

    from polyhead.heads.patching import PatchingData, answer_difference
    from polyhead.heads.tasks import Batch

    clean, ids = _choices(random, 64, False, embed)
    rows = torch.arange(64)
    other = (clean.right + 1) % _OPTIONS
    targets = {"answer": clean.labels[rows, clean.right], "other": clean.labels[rows, other]}
    corrupt = ids.clone()
    corrupt[:, -1] = corrupt[rows, 2 * other]
    batches = [Batch({"inputs_embeds": embed(tokens)}, targets, 64) for tokens in (ids, corrupt)]
    return PatchingData([batches[0]], [batches[1]], answer_difference)


def _right(model: HeadedModel, choices: Choices) -> np.ndarray:
    import torch

    with torch.inference_mode():
        found = choices.log_probabilities(model(**choices.inputs).logits).argmax(-1)
    return (found == choices.right).double().numpy()


class _Embedding:
    """Embeddings of prompts: each token's, and a learned projection of the one's before it."""

    def __init__(self, words: Any) -> None:
        import torch

        self.words, self.before = words, torch.nn.Linear(_WIDTH, _WIDTH, bias=False)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        own = self.words(ids)
        return own + torch.nn.functional.pad(self.before(own[:, :-1]), (0, 0, 1, 0))


def _trained(seed: int, steps: int) -> tuple[HeadedModel, _Embedding]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from polyhead.model import load

    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    config = GPT2Config(
        vocab_size=_TEXTS + _LETTERS + 1, n_positions=2 * _OPTIONS + 2, n_embd=_WIDTH, n_layer=4, n_head=4,
        n_inner=_WIDTH, bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        initializer_range=0.15,
    )  # fmt: skip
    module: Any = GPT2LMHeadModel(config)
    embed = _Embedding(module.transformer.wte)
    optimiser = torch.optim.AdamW([*module.parameters(), *embed.before.parameters()], 2e-3, weight_decay=0.01)
    for _ in range(steps):
        batch, _ = _choices(random, 64, None, embed)
        logits = module(**batch.inputs).logits[:, -1]
        answer = batch.labels[torch.arange(64), batch.right]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, answer).backward()
        optimiser.step()
    embed.before.requires_grad_(False)
    return load(module.eval().requires_grad_(False)), embed
