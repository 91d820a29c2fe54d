"""Two strategies on labelled data: run in a thread of its own, one after the other, and asked for how far it is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polyhead.errors import InputError, PolyheadError

if TYPE_CHECKING:
    from polyhead.evaluate.datasets import RetrievalData
    from polyhead.evaluate.report import Report
    from polyhead.serve.service import Service

__all__ = ["LABELLED", "Labelled", "Run", "Trial"]

LABELLED = {"limit-small": "LIMIT, small: 46 short documents, 1,000 questions that each two of them answer"}
METRICS = ("recall@2", "recall@10", "recall@20", "ndcg@10", "mrr")
TESTED = ("recall@2", "recall@10", "ndcg@10")
MOST_RUNS = 16
MOST_WAITING = 4


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        data: of :data:`LABELLED`.
        first, second: strategies; the first is tested against the second.
        size: questions wanted, as it was typed.
    """

    data: str
    first: str
    second: str
    size: str

    @property
    def count(self) -> int:
        """``size`` as a number.

        Raises:
            InputError: it is none, or not from 10 to 1,000.
        """
        if not self.size.isascii() or not self.size.isdigit() or not 10 <= int(self.size[:9]) <= 1000:
            raise InputError(f"The number of questions is {self.size!r}; give a whole number from 10 to 1000.")
        return int(self.size)


class Run:
    """A trial on its way.

    Attributes:
        done, total: texts encoded and to encode; 0 of 0 before the first.
    """

    def __init__(self) -> None:
        self.done, self.total = 0, 0
        self.documents, self.questions, self.of_questions = 0, 0, 0
        self.future: Future[Report] = Future()

    def tell(self, done: int, total: int | None) -> None:
        """Progress of the encoding."""
        self.done, self.total = done, total or 0

    @property
    def report(self) -> Report | None:
        """What was found; None until then, and where it failed."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None

    @property
    def trouble(self) -> str:
        """Why it failed; "" where it did not."""
        error = self.future.exception() if self.future.done() else None
        if error is None:
            return ""
        known = isinstance(error, PolyheadError)
        return str(error) if known else f"The trial failed ({type(error).__name__}: {error}); try again."


class Labelled:
    """Runs trials, one at a time, and keeps the last ones.

    Args:
        service: whose encoder is tried.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._runs: OrderedDict[tuple[str, str, str, int], Run] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="polyhead-trial")

    def of(self, trial: Trial) -> Run:
        """The run of a trial; begun where there is none yet, or the last one failed.

        Raises:
            InputError: unknown data, a number that cannot be read, or too many trials waiting.
        """
        if trial.data not in LABELLED:
            raise InputError(f"There is no labelled set {trial.data!r} here; choose one of {', '.join(LABELLED)}.")
        key = (trial.data, trial.first, trial.second, trial.count)
        with self._lock:
            known = self._runs.get(key)
            if known is not None and not known.trouble:
                return known
            if known is not None:  # told once, then begun anew when asked again
                del self._runs[key]
                return known
            if sum(not run.future.done() for run in self._runs.values()) >= MOST_WAITING:
                raise InputError(f"{MOST_WAITING} trials are running or waiting; ask again when one of them is done.")
            run = self._runs[key] = Run()
            run.future = self._thread.submit(self._try, trial, run)
            while len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
            return run

    def _try(self, trial: Trial, run: Run) -> Report:
        from polyhead.evaluate.datasets import load_retrieval
        from polyhead.evaluate.retrieval import evaluate_runs
        from polyhead.evaluate.run import rank_all
        from polyhead.search.strategies import strategy

        whole = load_retrieval(trial.data)
        data = _sample(whole, trial.count)
        run.documents, run.questions, run.of_questions = len(data.corpus), len(data.queries), len(whole.queries)
        chosen = [strategy(trial.first), strategy(trial.second)]
        ranked = rank_all(data, self._service.encoder, chosen, progress=run.tell)
        return evaluate_runs(data, ranked, metrics=METRICS, compare=TESTED)


def _sample(data: RetrievalData, count: int, seed: int = 0) -> RetrievalData:
    """So many questions, the same ones every time; all documents."""
    ids = list(data.queries)
    if count >= len(ids):
        return data
    kept = [ids[one] for one in np.sort(np.random.default_rng(seed).permutation(len(ids))[:count])]
    return replace(
        data,
        queries={one: data.queries[one] for one in kept},
        qrels={one: data.qrels[one] for one in kept},
        groups={name: {one: numbers[one] for one in kept} for name, numbers in data.groups.items()},
    )
