"""Token scores in words: searched sentences are true by construction, a language model's are not."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import data_folder, load_texts
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.explain.base import Attribution, ClassReadout
from polyhead.explain.baselines import LeaveOneOut
from polyhead.explain.statements import Statement, phrases, share, speakable
from polyhead.explain.verbalize import span_search, top_k_search, verbalize, verbalize_by
from polyhead.model import HeadedModel

_TOPICS = ("World", "Sports", "Business", "Technology")


def run(scale: Scale, seed: int) -> Evidence:
    """Share of true statements in template texts and in Gemma's texts about the same leave-one-out scores.

    all-MiniLM-L6-v2 with a linear classifier of AG News topics. Also: how much of the attribution the chosen span
    covers beside random spans of its length, and how often a bag-of-words classifier guesses the model's answer from
    the spoken words alone, from as many random words, and from as many of the highest scores.
    """
    full = scale == "full"
    judged, written = (60, 6) if full else (10, 2)
    readout, texts, words_of_class, quality = _classifier(400 if full else 150, judged, seed)
    backend = _gemma()
    scores = [_by_words(readout, text) for text in texts]
    found = _compared(scores, words_of_class, seed)
    asked = [verbalize_by(backend, one, "name the topic of a news item") for one in scores[:written]]
    told = np.array([verbalize(one).check.faithfulness for one in scores])
    wrote = np.array([one.check.faithfulness for one in asked])
    both = np.isfinite(told[:written]) & np.isfinite(wrote)
    difference = bootstrap_interval((told[:written] - wrote)[both] if both.any() else [0.0], seed=seed)
    true = bool((told[np.isfinite(told)] == 1).all())
    coverage = bootstrap_interval(np.array(found["span"]) - np.array(found["random span"]), seed=seed)
    guess = bootstrap_interval(np.array(found["spoken"]) - np.array(found["random words"]), seed=seed)
    verdict = verdict_of(difference.low, difference.high) if true else "refuted"
    if int(both.sum()) < 5 and verdict == "supported":
        verdict = "inconclusive"  # an interval over so few texts is too narrow to lean on
    return Evidence(
        measured={
            "difference": difference.value,
            "true statements, templates": float(np.nanmean(told)),
            "coverage of the chosen span": float(np.mean(found["span"])),
            "topic guessed from the spoken words": float(np.mean(found["spoken"])),
        },
        baseline={
            "true statements, Gemma": float(np.mean(wrote[both])) if both.any() else float("nan"),
            "coverage of a random span": float(np.mean(found["random span"])),
            "topic guessed from random words": float(np.mean(found["random words"])),
            "topic guessed from the highest scores": float(np.mean(found["rationale"])),
        },
        expected="every statement of the templates true and more than of Gemma's; coverage and guesses above random",
        interval=(difference.low, difference.high),
        verdict=verdict,
        decides="difference",
        data=f"ag-news, {judged} texts, {int(both.sum())} of them told by Gemma too; classifier accuracy {quality:.2f}",
        model=f"{readout.model.name}, gemma-3-270m",
        notes="Refuted if a single template statement is false. Ratings by people cannot be had here; a 270M model "
        "stands for GPT-3.5, and its texts are judged only where they quote words of the text.",
        details={
            "coverage, chosen minus random": [coverage.value, coverage.low, coverage.high],
            "guesses, spoken minus random": [guess.value, guess.low, guess.high],
            "a template text": verbalize(scores[0]).text,
            "a text of Gemma": asked[0].text,
            "what is wrong with it": asked[0].check.reasons,
        },
    )


def _compared(
    attributions: Sequence[Attribution], guess: Callable[[Sequence[str]], str], seed: int
) -> dict[str, list[float]]:
    """Coverage of the chosen and of a random span, and whether each choice of words gives the answer away."""
    generator = np.random.default_rng(seed)
    names = ("span", "random span", "spoken", "random words", "rationale")
    found: dict[str, list[float]] = {name: [] for name in names}
    for scores in attributions:
        spans = span_search(scores)
        if spans:
            runs = phrases(scores, len(spans[0].positions))
            found["span"].append(spans[0].coverage)
            found["random span"].append(share(scores, runs[generator.integers(len(runs))]))
        spoken = _words(verbalize(scores).claims)
        pool = [token for token, can in zip(scores.tokens, speakable(scores), strict=True) if can]
        rationale = [scores.tokens[i] for one in top_k_search(scores, len(spoken)) for i in one.positions]
        drawn = generator.choice(pool, min(len(spoken), len(pool)), replace=False).tolist()
        for name, words in (("spoken", spoken), ("random words", drawn), ("rationale", rationale)):
            found[name].append(float(guess(words) == scores.target))
    return found


def _by_words(readout: ClassReadout, text: str) -> Attribution:
    offsets = readout.model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return LeaveOneOut().text(readout, text).words(text, offsets)


def _words(claims: Sequence[Statement]) -> list[str]:
    """Each spoken word once, in the order of speaking."""
    return list(dict.fromkeys(word for claim in claims for run in claim.words for word in run.split()))


def _classifier(
    train: int, judged: int, seed: int
) -> tuple[ClassReadout, list[str], Callable[[Sequence[str]], str], float]:
    """The readout, the texts to judge, a bag-of-words guesser of its answers, and its accuracy on 100 other texts."""
    model = loaded("all-MiniLM-L6-v2")
    with (data_folder("ag-news", {"test.csv": ""}) / "test.csv").open(encoding="utf-8", newline="") as stream:
        labels = np.array([int(row[0]) - 1 for row in csv.reader(stream)])
    texts = load_texts("ag-news")
    rows = np.random.default_rng(seed).permutation(len(texts))[: train + 100 + judged]
    known = [_cut(texts[i]) for i in rows[: train + 100]]
    states = _states(model, known)
    wanted = torch.eye(4)[torch.tensor(labels[rows[:train]])]
    centre = states[:train].mean(0)
    gram = (states[:train] - centre).T @ (states[:train] - centre) + torch.eye(states.shape[1])
    weight = 8 * torch.linalg.solve(gram, (states[:train] - centre).T @ (wanted - wanted.mean(0))).T
    readout = ClassReadout(model, weight, -weight @ centre, _TOPICS)
    answers = ((states - centre) @ weight.T).argmax(-1).numpy()
    quality = float((answers[train:] == labels[rows[train : train + 100]]).mean())
    return readout, [_cut(texts[i]) for i in rows[train + 100 :]], _guesser(known, answers), quality


def _cut(text: str) -> str:
    """The first 20 words: leaving one out after another costs by the square of the length."""
    return " ".join(text.split()[:20])


def _states(model: HeadedModel, texts: Sequence[str]) -> torch.Tensor:
    """Mean token states ``[texts, hidden]``, special tokens included, as :class:`ClassReadout` reads them."""
    found = []
    for first in range(0, len(texts), 50):
        batch = model.tokenize(texts[first : first + 50])
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def _guesser(texts: Sequence[str], answers: np.ndarray) -> Callable[[Sequence[str]], str]:
    """Naive Bayes over words, taught the model's answers."""
    counts: dict[str, np.ndarray] = {}
    for text, answer in zip(texts, answers, strict=True):
        for word in set(_plain(text.split())):
            counts.setdefault(word, np.zeros(4))[answer] += 1
    each = np.bincount(answers, minlength=4)

    def guess(words: Sequence[str]) -> str:
        score = np.log(each + 1.0)
        for word in _plain(words):
            score = score + np.log((counts.get(word, np.zeros(4)) + 0.5) / (each + 1.0))
        return _TOPICS[int(score.argmax())]

    return guess


def _plain(words: Sequence[str]) -> list[str]:
    return [plain for word in words if (plain := "".join(c for c in word.lower() if c.isalnum()))]


def _gemma() -> Callable[[str], str]:
    """Gemma's continuation of a prompt, 40 tokens, its likeliest each time."""
    model = loaded("gemma-3-270m", lm_head=True)

    def answer(prompt: str) -> str:
        inputs = model.tokenize([prompt])
        with torch.inference_mode():
            tokens = model.module.generate(**inputs, max_new_tokens=40, do_sample=False)  # type: ignore[operator]
        return str(model.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer
