"""One measurement, many actions: which heads matter for sentence similarity, and what it costs to act on the others.

    python examples/head_actions.py [PAIRS]

Heads of all-MiniLM-L6-v2 are scored by the gradient of their gates on STS 2014. The least important fifth is then
switched off, replaced by its mean, and removed for good, the same with as many random heads; and attention is sharpened
in the most important fifth alone. Each line says what that does to Spearman's correlation on STS 2015.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

import polyhead
from polyhead.act import Gate, MeanAblate, Temperature
from polyhead.compress import prune
from polyhead.data import load_sts, load_texts
from polyhead.evaluate.statistics import bootstrap_of
from polyhead.heads.importance import GradientImportance
from polyhead.heads.tasks import PairSimilarity, run_task

if TYPE_CHECKING:
    from polyhead.act import Action


def main(pairs: int) -> None:
    model = polyhead.load("all-MiniLM-L6-v2")
    importance = GradientImportance().score(model, PairSimilarity(load_sts(2014).sample(pairs // 2)))
    count = round(0.2 * importance.values.size)
    least, most = (-importance).top(count), importance.mask(count)
    drawn = np.random.default_rng(0).choice(importance.values.size, count, replace=False)
    random = [(int(i) // model.heads, int(i) % model.heads) for i in drawn]
    print(f"{importance.name}: most important {importance.top(3)}, least important {least[:3]}")

    task = PairSimilarity(load_sts(2015).sample(pairs))
    rows = np.arange(len(task.data))
    plain = run_task(task, model)
    print(f"\n{task.name}: Spearman {task.quality(plain, rows):.4f}\n")

    def show(what: str, headed: Any, action: Action | None = None) -> None:
        with action.on(headed) if action else nullcontext():
            found = run_task(task, headed)
        cost = bootstrap_of(
            lambda rows: task.quality(found, rows) - task.quality(plain, rows), len(rows), resamples=500
        )
        print(f"  {what:46}{cost.value:+.4f}  [{cost.low:+.4f}, {cost.high:+.4f}]")

    texts = load_texts("sts-2014", 200)
    for name, heads in ((f"{count} least important heads", least), (f"{count} random heads", random)):
        show(f"{name}: off", model, Gate.off(heads, model))
        show(f"{name}: mean in their place", model, MeanAblate.fit(model, texts, heads))
        smaller, report = prune(model, heads)
        show(f"{name}: removed", smaller)
        saved = 1 - report.after.flops_per_token / report.before.flops_per_token
        gone = report.before.parameters - report.after.parameters
        print(f"    {gone:,} parameters and {saved:.1%} of the work a token less\n")
    show(f"{count} most important heads: attention sharper", model, Temperature(np.where(most, 0.8, 1.0)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
