"""The trainer: a model, rows of texts and an objective in; a folder that plain sentence-transformers opens out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyhead.errors import InputError
from polyhead.training.data import Examples, examples
from polyhead.training.describe import describe
from polyhead.training.evaluation import Evaluation, held_out
from polyhead.training.loss import loss_for
from polyhead.training.models import headed, needs_training, trainable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from polyhead.training.engine import StepAction
    from polyhead.training.heads import Tuning

__all__ = ["Options", "Trainer"]

Progress = Callable[[int, "int | None"], None]
_RECORD = "training.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Options:
    """How long, how fast and with what machine a model is trained.

    Attributes:
        batch_size: rows a step.
        epochs: passes over the data.
        steps: optimiser steps in place of epochs.
        learning_rate: of AdamW, its highest; it falls linearly to 0.
        warmup: share of the steps in which it rises.
        weight_decay: of AdamW.
        bf16: compute the model in bfloat16 (weights and objective stay in float32).
        cached: rows the model sees at once, for batches that do not fit memory: cached gradients, the same step at the
            price of a second forward pass. None: ordinary steps.
        batches: "random" order; "no-duplicates", no text twice in a batch (it would be its own negative);
            "by-label", at least two rows of each of at least two labels; "auto" takes the one that the data needs.
        save_every: steps between checkpoints, the places from which a run can be resumed; None: each epoch.
        seed: of everything random.
        max_tokens: a lower limit on input length than the model's.
        device: None takes CUDA where there is one.
        more: further arguments of sentence-transformers' ``SentenceTransformerTrainingArguments``.
    """

    batch_size: int = 32
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 2e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    bf16: bool = False
    cached: int | None = None
    batches: Literal["auto", "random", "no-duplicates", "by-label"] = "auto"
    save_every: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    device: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("learning_rate", 0), ("warmup", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}.")
        for name in ("steps", "cached", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1, or None.")
        if self.batches not in ("auto", "random", "no-duplicates", "by-label"):
            raise InputError(f"batches is {self.batches!r}, expected auto, random, no-duplicates or by-label.")
        if self.cached is not None and self.more.get("gradient_accumulation_steps", 1) != 1:
            raise InputError("Cached gradients take the place of accumulated ones; use a larger batch_size.")


class Trainer:
    """Trains a text encoder with an objective, on sentence-transformers' trainer.

    A run with ``out`` keeps checkpoints there. Killed at any moment and started again with ``resume=True`` it goes on
    from the last complete one and ends at the same weights, bit for bit on the same machine.

    Args:
        objective: a Polyhead objective or loss, :class:`~polyhead.training.Matryoshka` and its kind, a distillation, or
            a loss of sentence-transformers.
        out: folder for the trained model; None keeps it in memory only, and nothing can be resumed.
        options: see :class:`Options`.
        tune: what of the model is trained, see :mod:`polyhead.training.heads`; None: all of it.
        during: actions in force in every training step, such as :class:`~polyhead.training.HeadDropout`.

    Attributes:
        model_: the trained ``SentenceTransformer``.
        metrics_: of the held-out rows after training, by name.
        history_: what was logged, in order.
        steps_: optimiser steps of the whole run, those before a resume included.

    Example:
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import Options, Trainer
        >>> rows = [{"anchor": f"what is {n}", "positive": f"{n} is a number"} for n in range(8)]
        >>> trainer = Trainer(InfoNCE(), options=Options(batch_size=4, epochs=1))
        >>> trainer.fit("all-MiniLM-L6-v2", rows).steps_
        2
    """

    def __init__(
        self,
        objective: Any,
        out: str | Path | None = None,
        options: Options | None = None,
        *,
        tune: Tuning | None = None,
        during: Sequence[StepAction] = (),
    ) -> None:
        self.objective = objective
        self.out = out
        self.options = options
        self.tune = tune
        self.during = during

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        evaluation: Any = None,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        pooling: Any = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> Trainer:
        """Train.

        Args:
            model: see :func:`~polyhead.training.trainable`. A ``SentenceTransformer`` is trained in place.
            data: see :func:`~polyhead.training.examples`.
            evaluation: held-out rows like the data, or a function of the model that gives metrics; measured after each
                epoch and at the end.
            columns: role -> column, where names do not say it.
            pooling: a name or a :class:`~polyhead.pooling.Pooler`, in place of the model's own.
            resume: go on with the run in ``out``, with the same model, data and settings; where none was begun, begin.
            progress: called with steps done and steps in all.

        Raises:
            InputError: data, objective and settings that do not go together, a folder that is in use, or a resume with
                other settings than the run was begun with.
        """
        needs_training()
        options = self.options or Options()
        rows = examples(data, columns)
        measure = evaluation if callable(evaluation) or evaluation is None else held_out(examples(evaluation, columns))
        body = trainable(model, pooling, device=options.device, max_tokens=options.max_tokens)
        settings = self._settings(options, rows, model, pooling)
        with ExitStack() as stack:
            if self.out is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                folder = Path(self.out)
                if self._begin(folder, settings, resume):
                    return self._reopen(folder)
            self._train(body, rows, measure, folder, options, progress)
        return self

    def _settings(self, options: Options, rows: Examples, model: Any, pooling: Any) -> dict[str, Any]:
        """All that decides the weights; plain values."""
        name = model if isinstance(model, (str, Path)) else getattr(model, "name", type(model).__name__)
        return {
            "model": str(name),
            "pooling": describe(pooling),
            "data": {"kind": rows.kind, "rows": len(rows), "columns": list(rows.columns), "sha256": rows.fingerprint},
            "objective": describe(self.objective),
            "options": describe({**asdict(options), "device": None, "save_every": None}),
            "tune": describe(self.tune),
            "during": [describe(action) for action in self.during],
        }

    def _begin(self, folder: Path, settings: dict[str, Any], resume: bool) -> bool:
        """Take a folder for this run; True where the run is finished already."""
        file = folder / _RECORD
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        settings = json.loads(json.dumps(settings))
        if record is None:
            if folder.is_dir() and any(folder.iterdir()):
                raise InputError(f"The folder '{folder}' is in use; give an empty or a new one.")
            folder.mkdir(parents=True, exist_ok=True)
            _write(file, {"settings": settings, "finished": False})
            return False
        if not resume:
            state = "a finished run" if record["finished"] else "a run that was begun and can be resumed"
            raise InputError(
                f"The folder '{folder}' holds {state}; say resume=True (--resume), or give another folder."
            )
        if different := [key for key in settings if record["settings"].get(key) != settings[key]]:
            said = "; ".join(f"{key} was {record['settings'].get(key)}, is now {settings[key]}" for key in different)
            raise InputError(f"The run in '{folder}' was begun with other settings: {said}. Give another folder.")
        return bool(record["finished"])

    def _reopen(self, folder: Path) -> Trainer:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        self.model_ = trainable(folder)
        self.steps_, self.metrics_, self.history_ = record["steps"], record["metrics"], record["history"]
        return self

    def _train(
        self,
        model: SentenceTransformer,
        rows: Examples,
        measure: Evaluation | None,
        folder: Path,
        options: Options,
        progress: Progress | None,
    ) -> None:
        from polyhead.training.engine import last_checkpoint, quiet

        with ExitStack() as stack:
            stack.enter_context(quiet())
            loss = loss_for(self.objective, model, rows.kind)
            if self.tune is not None:
                stack.enter_context(self.tune.on(headed(model), loss))
            for action in self.during:
                if hasattr(action, "attach"):
                    action.attach(headed(model))
            engine = self._engine(model, loss, rows, measure, folder, options, progress)
            found = last_checkpoint(folder / _CHECKPOINTS)
            stack.callback(engine.unwrap)
            engine.train(resume_from_checkpoint=None if found is None else str(found))
        self.steps_ = int(engine.state.global_step)
        self.history_ = list(engine.state.log_history)
        self.model_ = model.eval()
        self.metrics_ = {} if measure is None else measure(model)
        if self.out is not None:
            from polyhead.pooling.sentence import save

            save(model, folder)
            done = {"finished": True, "steps": self.steps_, "metrics": self.metrics_, "history": self.history_}
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            _write(folder / _RECORD, {**record, **done})
            shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)

    def _engine(
        self,
        model: SentenceTransformer,
        loss: Any,
        rows: Examples,
        measure: Evaluation | None,
        folder: Path,
        options: Options,
        progress: Progress | None,
    ) -> Any:
        from transformers import PrinterCallback

        from polyhead.training.engine import Engine, Reporter
        from polyhead.training.evaluation import evaluator

        if self.tune is not None and options.weight_decay:
            raise InputError("Weight decay moves weights that are not tuned too; set weight_decay to 0 with tune.")
        # Else examples for the model card are drawn at random, with a progress bar of their own.
        source, *others = [rows.columns[name][0] for name in rows.texts]
        model.model_card_data.widget = [{"source_sentence": source, "sentences": others or [source]}]
        engine = Engine(
            cached=options.cached,
            actions=self.during,
            keep=2,
            model=model,
            args=_arguments(options, rows, folder / _CHECKPOINTS, self.out is not None, measure is not None),
            train_dataset=rows.dataset(),
            loss=loss,
            evaluator=None if measure is None else evaluator(measure),
            callbacks=[] if progress is None else [Reporter(progress)],
        )
        engine.remove_callback(PrinterCallback)
        return engine


def _arguments(options: Options, rows: Examples, folder: Path, saved: bool, measured: bool) -> Any:
    """The settings as sentence-transformers' trainer takes them."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    save = {"save_strategy": "no"}
    if saved:
        save = {"save_strategy": "epoch"} if options.save_every is None else {"save_strategy": "steps"}
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": options.batch_size,
        "num_train_epochs": options.epochs,
        "max_steps": options.steps or -1,
        "learning_rate": options.learning_rate,
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "bf16": options.bf16,
        "use_cpu": _on_cpu(options.device),
        "batch_sampler": _sampler(options, rows),
        "save_steps": options.save_every or 500,
        "eval_strategy": "epoch" if measured else "no",
        "logging_steps": 10,
        "seed": options.seed,
        "data_seed": options.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **save,
    }
    return SentenceTransformerTrainingArguments(**{**given, **options.more})


def _on_cpu(device: str | None) -> bool:
    import torch

    return device == "cpu" or not torch.cuda.is_available()


def _sampler(options: Options, rows: Examples) -> Any:
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    from polyhead.training.engine import LabelBatches, ShuffledBatches

    auto = {"pairs": "no-duplicates", "triplets": "no-duplicates", "labelled": "by-label"}.get(rows.kind, "random")
    name = auto if options.batches == "auto" else options.batches
    if name == "by-label" and rows.kind != "labelled":
        raise InputError(f"batches by label need labels; the data has {rows.kind}.")
    if name == "by-label" and (options.batch_size < 4 or options.batch_size % 2):
        raise InputError(f"batch_size is {options.batch_size}; batches by label are even and of at least 4 rows.")
    if name == "by-label" and len(set(rows.columns["label"])) < 2:
        raise InputError("All rows have one label; training by label needs at least two.")
    return {"random": ShuffledBatches, "no-duplicates": NoDuplicatesBatchSampler, "by-label": LabelBatches}[name]


def _write(file: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
    partial.replace(file)
