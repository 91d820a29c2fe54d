"""Head pursuit: flipping the sign of few heads found by it takes a concept away, and little else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.headmap import HeadMap
from polyhead.model import HeadedModel

_CITIES = (
    "Paris Berlin Rome Madrid London Tokyo Beijing Moscow Delhi Cairo Athens Vienna Warsaw Dublin Oslo Stockholm "
    "Lisbon Istanbul Havana Nairobi Bangkok Budapest Lima Tehran Baghdad Toronto Helsinki Copenhagen Munich Milan"
)
_THINGS = (
    "car dress wall door flag shirt bird horse house hat coat bag boat chair flower bicycle curtain scarf cup book "
    "ribbon umbrella carpet train lamp blanket balloon jacket sofa fence"
)
_AMOUNTS = (
    "apples dogs children houses days books players chairs cars weeks teams questions rooms windows miles soldiers "
    "eggs pages tickets months cups cats stones trees boats coins letters friends horses shops"
)
_PROMPTS = {  # words, and templates to put them into
    "countries": (
        _CITIES,
        "{} is a city in|{} lies in|She flew to {}, in|The train from {} crosses|{} belongs to|He was born in {},|"
        "The university of {} is in|The museum in {} is the largest in|The embassy in {} is the embassy of|"
        "People who live in {} live in",
    ),
    "colours": (
        _THINGS,
        "The colour of the {} was|They painted the {}|The {} was painted|Her favourite {} is|The {} is coloured|"
        "The colour of her {} is|His {} was light|The {} was dark|The {} is black and|The {} turned",
    ),
    "numbers": (
        _AMOUNTS,
        "The number of {} is|The {} were more than|We counted the {}: one, two,|Of the {} there are exactly|"
        "She has three {} and he has|Of these {}, at least|Not one of the {} but|The {} were divided into|"
        "The {} came in groups of|They needed twenty {} but had only",
    ),
}


def run(scale: Scale, seed: int) -> Evidence:
    """Log-probability that Gemma-3-270M gives a concept's tokens, with the sign of a few heads flipped.

    Concepts are countries, colours and numbers. Heads are ranked on some prompts that call for the concept and flipped
    on others: by head pursuit, by the logit lens (mean over prompts of what the head adds to the concept's logits above
    the mean token's), and at random in pursuit's layers. The target is the fall of the log-probability of the concept's
    tokens together; the control is the change, either way, of the log-probability of the token that follows in news.
    Supported where pursuit's fall lies above random heads' and its target-to-control ratio above the logit lens's;
    refuted where one of the two lies below. Smoke takes 20 prompts to choose and 12 to judge, and flips 4 heads; full
    200, 100 and 1, 2 and 4.
    """
    from polyhead.data import load_texts
    from polyhead.evaluate.statistics import bootstrap_interval, bootstrap_of

    model = loaded("gemma-3-270m", lm_head=True)
    choose, judge, items, sizes, draws = (20, 12, 8, (4,), 2) if scale == "smoke" else (200, 100, 32, (1, 2, 4), 2)
    news = [" ".join(text.split()[:14]) for text in load_texts("ag-news", items)]
    targets: dict[str, list[np.ndarray]] = {"pursuit": [], "logit lens": [], "random": []}
    controls: dict[str, list[np.ndarray]] = {name: [] for name in targets}
    details, plain_news = {}, _next(model, news)
    for concept in _PROMPTS:
        prompts = _prompts(concept, seed)
        tokens, maps = _maps(model, concept, prompts[:choose])
        chosen = {name: [found.top(size) for size in sizes] for name, found in maps.items()}
        details[concept] = {name: [list(head) for head in heads[-1]] for name, heads in chosen.items()}
        judged = (prompts[choose : choose + judge], news, plain_news)
        effects = _effects(model, chosen, judged, tokens, (seed, draws))
        for name, (target, control) in effects.items():
            targets[name].append(target)
            controls[name].append(control)
    # One row a prompt (or a news item) of each concept: the mean over how many heads were flipped.
    fall = {name: np.concatenate(found) for name, found in targets.items()}
    change = {name: np.concatenate(found) for name, found in controls.items()}
    difference = bootstrap_interval(fall["pursuit"] - fall["random"], seed=seed)

    def advantage(rows: np.ndarray) -> float:
        news_rows = rows % len(change["pursuit"])  # news items are drawn again as well
        mine, lens = (fall[name][rows].mean() / change[name][news_rows].mean() for name in ("pursuit", "logit lens"))
        return float(mine - lens)

    ratio = bootstrap_of(advantage, len(fall["pursuit"]), seed=seed)
    verdicts = {verdict_of(difference.low, difference.high), verdict_of(ratio.low, ratio.high)}
    return Evidence(
        measured={
            "fall of the concept (pursuit)": float(fall["pursuit"].mean()),
            "change of news (pursuit)": float(change["pursuit"].mean()),
            "fall beyond random heads": difference.value,
            "ratio beyond the logit lens": ratio.value,
        },
        baseline={f"fall ({name})": float(fall[name].mean()) for name in ("logit lens", "random")}
        | {f"change of news ({name})": float(change[name].mean()) for name in ("logit lens", "random")},
        expected="a larger fall than with random heads of the same layers, and a better target-to-control ratio than "
        "heads chosen by the logit lens",
        interval=(difference.low, difference.high),
        verdict="refuted" if "refuted" in verdicts else "inconclusive" if len(verdicts) > 1 else verdicts.pop(),
        decides="fall beyond random heads",
        data=f"{choose} prompts to choose and {judge} to judge, of each of 3 concepts; {items} news items",
        model=model.name,
        notes="One model of 270M parameters with 72 heads, so 4 heads are 6%, not 1%; prompts from templates. "
        "The interval is over prompts and does not cover which random heads are drawn.",
        details={
            "heads": details,
            "heads flipped": list(sizes),
            "interval of the ratio": [ratio.low, ratio.high],
            "fall by concept": {name: [float(part.mean()) for part in found] for name, found in targets.items()},
        },
    )


def _prompts(concept: str, seed: int) -> list[str]:
    """All prompts of a concept in a random order."""
    words, templates = _PROMPTS[concept]
    every = [template.format(word) for word, template in product(words.split(), templates.split("|"))]
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))]


def _maps(model: HeadedModel, concept: str, prompts: Sequence[str]) -> tuple[list[int], dict[str, HeadMap]]:
    """The concept's tokens, and the maps of the two ways to choose, of one run of the model."""
    from polyhead.heads.head_pursuit import CONCEPTS, HeadPursuit, concept_tokens
    from polyhead.heads.logit_lens import LogitLens

    tokens = list(concept_tokens(model, CONCEPTS[concept]).values())
    score = HeadPursuit(concept)
    writes = score.writes(model, prompts)
    unembedding = LogitLens(model).unembedding
    direction = unembedding[tokens].mean(0) - unembedding.mean(0)
    logits = np.stack([(written @ direction).mean(0).numpy() for written in writes])
    return tokens, {"pursuit": score.shares(model, writes), "logit lens": HeadMap(logits, "logit-lens", model.name)}


def _effects(
    model: HeadedModel,
    chosen: dict[str, list[list[tuple[int, int]]]],
    judged: tuple[Sequence[str], Sequence[str], np.ndarray],
    tokens: Sequence[int],
    random: tuple[int, int],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each way to choose: fall of the concept ``[prompts]`` and change of news ``[news]``, means over sizes.

    ``judged`` holds prompts, news items and what the untouched model gives for the latter.
    """
    from polyhead.act.gate import Gate
    from polyhead.heads.head_pursuit import heads_like

    prompts, news, plain_news = judged
    seed, draws = random
    plain = _concept(model, prompts, tokens)

    def effect(heads: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        gates = torch.ones(model.layers, model.heads)
        for layer, head in heads:
            gates[layer, head] = -1
        with Gate(gates).on(model):
            return plain - _concept(model, prompts, tokens), np.abs(plain_news - _next(model, news))

    found = {name: [effect(heads) for heads in sizes] for name, sizes in chosen.items()}
    others = [heads_like(heads, model, seed + draw) for heads in chosen["pursuit"] for draw in range(draws)]
    found["random"] = [effect(heads) for heads in others]
    return {
        name: (np.mean([target for target, _ in each], axis=0), np.mean([control for _, control in each], axis=0))
        for name, each in found.items()
    }


def _concept(model: HeadedModel, prompts: Sequence[str], tokens: Sequence[int]) -> np.ndarray:
    """Log-probability of the tokens together after each prompt, ``[prompts]``."""
    from polyhead.act.vectors import batches_of, last_logits

    found = []
    with torch.inference_mode():
        for inputs in batches_of(model, prompts, 32):
            found.append(torch.log_softmax(last_logits(model, inputs), -1)[:, list(tokens)].logsumexp(-1))
    return torch.cat(found).double().numpy()


def _next(model: HeadedModel, texts: Sequence[str]) -> np.ndarray:
    """Log-probability of each text's last token, ``[texts]``."""
    from polyhead.act.vectors import last_logits

    found = []
    with torch.inference_mode():
        for first in range(0, len(texts), 32):
            inputs = model.tokenize(texts[first : first + 32])
            last = inputs["input_ids"][:, -1]  # padded on the left
            before = {key: value[:, :-1] for key, value in inputs.items()}
            found.append(torch.log_softmax(last_logits(model, before), -1)[torch.arange(len(last)), last])
    return torch.cat(found).double().numpy()
