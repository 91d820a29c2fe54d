"""A middle layer's vectors are better than the last one's, and label-free measures tell which layers are good."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import SentencePairs, load_sts
from polyhead.evaluate.classification import measure_classification
from polyhead.evaluate.layers import LayerCurve, layer_metrics, layer_vectors
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.sts import measure_sts
from polyhead.evaluate.task_data import LabelledTexts, load_labelled
from polyhead.model import HeadedModel

Lookup = Callable[[Sequence[str]], np.ndarray]
Task = Callable[[Lookup], Measured]
LABEL_FREE = ("prompt entropy", "curvature", "effective rank", "infonce", "dime")
TOKENS = 48


def run(scale: Scale, seed: int) -> Evidence:
    """Gain of Gemma-3-270M's best layer over its last, the layer chosen on other examples than it is judged by.

    Mean-pooled vectors of every layer on STS 2015 (Spearman) and intents of Banking77 (logistic regression, 8 texts a
    label; full adds AG News), each set cut into a half that chooses and a half that judges. The same for
    all-MiniLM-L6-v2, where the last layer was trained for it. Decides: the mean gain over the tasks, its interval by
    resampling the judged examples.
    """
    smoke = scale == "smoke"
    choose, judge, texts = _tasks(smoke, seed)
    told = texts[:16] if smoke else texts[:300]
    found = {
        name: _model(loaded(name), choose, judge, texts, told, seed) for name in ("gemma-3-270m", "all-MiniLM-L6-v2")
    }
    gemma, minilm = found["gemma-3-270m"], found["all-MiniLM-L6-v2"]
    best = max(gemma["rho"], key=lambda name: abs(gemma["rho"][name]))
    return Evidence(
        measured={
            "gain of the chosen layer, gemma": gemma["gain"],
            "chosen layer, gemma": gemma["layer"],
            "gain of the chosen layer, minilm": minilm["gain"],
            "chosen layer, minilm": minilm["layer"],
            **{f"rho of {name} with the tasks, gemma": gemma["rho"][name] for name in LABEL_FREE},
            f"gain of the layer by {best}, gemma": gemma["free"][best],
        },
        baseline={"layers, gemma": gemma["layers"], "layers, minilm": minilm["layers"]},
        expected="a layer before Gemma's last, chosen on other examples, is better than the last: interval above 0; "
        "MiniLM's is at or near its last; label-free measures correlate with the tasks over layers",
        interval=gemma["interval"],
        verdict=verdict_of(*gemma["interval"]),
        decides="gain of the chosen layer, gemma",
        data=", ".join(judge) + f", cut after {TOKENS} tokens",
        model="gemma-3-270m, all-MiniLM-L6-v2",
        notes="The last layer is what the model gives, after its final norm. The correlation is over the layers of one "
        f"model; which end of {best} is the good one was read off the choosing half.",
        details=found,
    )


def _tasks(smoke: bool, seed: int) -> tuple[dict[str, Task], dict[str, Task], list[str]]:
    """Tasks that choose, tasks that judge, and all their texts."""
    sts = load_sts(2015).sample(36 if smoke else 1000, seed)
    halves: list[dict[str, Task]] = [{}, {}]
    texts = [text for pair in sts.pairs for text in pair]
    for side, tasks in enumerate(halves):
        rows = range(side, len(sts), 2)
        part = SentencePairs("sts", [sts.pairs[i] for i in rows], sts.gold[rows], [""] * len(rows))
        tasks["sts-2015"] = lambda encode, part=part: measure_sts(part, encode)["spearman"]  # type: ignore[misc]
    for name, labels, judged in (("banking77", 4 if smoke else 30, 40 if smoke else 600), ("ag-news", 4, 600)):
        if smoke and name == "ag-news":
            continue
        data = _some(load_labelled(name), labels, judged, seed)
        texts += data.train + data.test
        for side, tasks in enumerate(halves):
            part_of = LabelledTexts(name, data.train, data.train_labels, data.test[side::2], data.test_labels[side::2])
            tasks[name] = lambda encode, part=part_of: measure_classification(part, encode, experiments=3)["accuracy"]  # type: ignore[misc]
    return halves[0], halves[1], texts


def _some(data: LabelledTexts, labels: int, judged: int, seed: int) -> LabelledTexts:
    """So many labels, 16 texts of each to learn from, and so many texts to be judged by."""
    generator = np.random.default_rng(seed)
    names = sorted(set(data.train_labels))
    kept = {names[i] for i in generator.choice(len(names), labels, replace=False)}
    train: list[int] = []
    for name in sorted(kept):
        own = [row for row, label in enumerate(data.train_labels) if label == name]
        train += [own[i] for i in generator.permutation(len(own))[:16]]
    test = [row for row, label in enumerate(data.test_labels) if label in kept]
    test = [test[i] for i in generator.permutation(len(test))[:judged]]
    sides = [
        ([texts[row] for row in rows], [of[row] for row in rows])
        for texts, of, rows in ((data.train, data.train_labels, train), (data.test, data.test_labels, test))
    ]
    return LabelledTexts(data.name, *sides[0], *sides[1])


def _model(
    model: HeadedModel, choose: dict[str, Task], judge: dict[str, Task], texts: list[str], told: list[str], seed: int
) -> dict:
    unique = list(dict.fromkeys(texts))
    pooled, _ = layer_vectors(model, unique, max_tokens=TOKENS)
    rows = {text: number for number, text in enumerate(unique)}
    last = pooled.shape[1] - 1

    def at(place: int) -> Lookup:
        return lambda some: pooled[[rows[text] for text in some], place]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hundred steps of the probe are mteb's, converged or not
        scores = np.array([_mean(choose, at(place)) for place in range(last + 1)])
        place = int(scores.argmax())
        gain, interval = _gain(judge, at(place), at(last), seed)
        curves = layer_metrics(model, told, LABEL_FREE, seed=seed, max_tokens=TOKENS)
        tasks = LayerCurve(scores, "tasks")
        rho = {name: curve.rank_correlation(tasks) for name, curve in curves.items()}
        by = {name: curve.best(lowest=rho[name] < 0) for name, curve in curves.items()}
        free = {name: _mean(judge, at(which)) - _mean(judge, at(last)) for name, which in by.items()}
    return {
        "gain": gain,
        "interval": interval,
        "layer": place,
        "layers": last,
        "tasks by layer": scores.tolist(),
        "rho": rho,
        "layer by": by,
        "free": free,
        "curves": {name: curve.values.tolist() for name, curve in curves.items()},
    }


def _mean(tasks: dict[str, Task], encode: Lookup) -> float:
    return float(np.mean([task(encode).value for task in tasks.values()]))


def _gain(tasks: dict[str, Task], one: Lookup, other: Lookup, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean over tasks of a layer's value less another's, with its interval."""
    value, draws = 0.0, np.zeros(1000)
    for number, task in enumerate(tasks.values()):
        a, b = task(one), task(other)
        value += (a.value - b.value) / len(tasks)
        draws += (a.draws(seed=seed + number) - b.draws(seed=seed + number)) / len(tasks)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return value, (float(low), float(high))
