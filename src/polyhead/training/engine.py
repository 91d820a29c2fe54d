"""sentence-transformers' trainer with what an exact resume needs, steps with cached gradients, and head actions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor, nn
from transformers import TrainerCallback

from polyhead.errors import InputError
from polyhead.objectives import cached_step
from polyhead.training.layers import LayerObjective
from polyhead.training.loss import ObjectiveLoss

__all__ = ["Engine", "LabelBatches", "Reporter", "ShuffledBatches", "StepAction", "last_checkpoint", "quiet"]

_OBJECTIVE = "objective.safetensors"
_COMPLETE = "complete"


class StepAction(Protocol):
    """Something that acts on the model in every training step and not in evaluation, such as heads switched off."""

    def during(self, step: int, loss: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """In force for one step.

        Args:
            step: number of the optimiser step; what is random must follow from it, or a resumed run goes other ways.
            loss: the loss of the batch as it would be without the action.
        """


class ShuffledBatches(DefaultBatchSampler):
    """Rows in a random order that follows from seed and epoch alone.

    The stock sampler goes on with one generator from epoch to epoch, which a resumed run starts anew.
    """

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.sampler), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


class LabelBatches(DefaultBatchSampler):
    """Rows two by two of one label, in a random order of pairs that follows from seed and epoch alone.

    With an even batch size a batch has at least two rows of each label in it. Rows left single (labels with an odd
    number of rows) come last: none is left out.
    """

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        labels = torch.tensor(self.sampler["label"])
        shuffled = torch.randperm(len(labels), generator=generator)
        by_label = shuffled[labels[shuffled].argsort(stable=True)]
        pairs: list[list[int]] = []
        single: list[int] = []
        for part in by_label.split(labels.unique(return_counts=True)[1].tolist()):
            rows = part.tolist()
            single += rows[len(rows) // 2 * 2 :]
            pairs += [rows[i : i + 2] for i in range(0, len(rows) - 1, 2)]
        order = [row for i in torch.randperm(len(pairs), generator=generator).tolist() for row in pairs[i]] + single
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


class Engine(SentenceTransformerTrainer):
    """The trainer underneath :class:`~polyhead.training.Trainer`; not made by users.

    Args:
        cached: rows encoded at once in a step with cached gradients, or None for ordinary steps.
        actions: in force during every training step.
        keep: checkpoints kept.
        **given: of sentence-transformers' trainer.
    """

    def __init__(self, *, cached: int | None, actions: Sequence[StepAction], keep: int, **given: Any) -> None:
        super().__init__(**given)
        self.cached, self.actions, self.keep = cached, tuple(actions), keep
        whole = not isinstance(self.loss, ObjectiveLoss) or isinstance(self.loss.objective, LayerObjective)
        if cached is not None and whole:
            raise InputError("Cached gradients need an objective over vectors; this one runs the model itself.")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One step, with the actions in force."""
        model.train()
        with ExitStack() as stack:
            for action in self.actions:
                stack.enter_context(action.during(self.state.global_step, lambda: self._plain_loss(model, inputs)))
            if self.cached is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._cached_step(model, self._prepare_inputs(inputs))

    def compute_loss_context_manager(self) -> ExitStack:
        """bfloat16 for whatever a loss runs of the model, not for its ``forward`` alone."""
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self.args.bf16:
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    def unwrap(self) -> None:
        """Give the model its own ``forward`` back, which computes in bfloat16 no longer."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _plain_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(dict(inputs)))
        assert isinstance(loss, Tensor)
        return loss

    def _cached_step(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        assert isinstance(self.loss, ObjectiveLoss)
        assert self.cached is not None
        features, labels = self.collect_features(inputs)
        sides = []
        for column in features:
            starts = range(0, len(column["input_ids"]), self.cached)
            sides.append([_rows(column, start, start + self.cached) for start in starts])

        def encode(part: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                found: Tensor = model(dict(part))["sentence_embedding"]
            return found

        loss_of = self.loss.compute_loss_from_embeddings
        return cached_step(encode, sides, lambda *vectors: loss_of(vectors, labels))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights of the model and of the objective; the model card waits for the end of the run."""
        folder = str(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, create_model_card=False)
        own = self._objective_state()
        if own:
            save_file(own, Path(folder) / _OBJECTIVE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint counts once it is complete: a process killed while writing leaves the one before in force."""
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir or ".")
        (folder / f"checkpoint-{self.state.global_step}" / _COMPLETE).touch()
        for old in sorted(_checkpoints(folder), key=_step)[: -self.keep]:
            shutil.rmtree(old)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        """Weights of the model, and those of the objective, which sentence-transformers would start anew."""
        super()._load_from_checkpoint(checkpoint_path)
        file = Path(checkpoint_path) / _OBJECTIVE
        if file.is_file():
            self.loss.load_state_dict(load_file(file), strict=False)

    def _objective_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the loss that are not the model's."""
        models = {id(value) for value in self.model.state_dict(keep_vars=True).values()}
        found = self.loss.state_dict(keep_vars=True)
        own = {name: value for name, value in found.items() if id(value) not in models}
        return {name: value.detach().cpu().contiguous().clone() for name, value in own.items()}


def _rows(column: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Some rows of a batch's features; what is not a row a text stays."""
    if "cu_seq_lens_q" in column:
        raise InputError("Cached gradients need padded batches; load the model without unpadded inputs.")
    count = len(column["input_ids"])
    cut = {name for name, value in column.items() if isinstance(value, Tensor) and value.ndim and len(value) == count}
    return {name: value[start:end] if name in cut else value for name, value in column.items()}


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint in a folder of them."""
    return max(_checkpoints(folder), key=_step, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if (path / _COMPLETE).is_file()]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class Reporter(TrainerCallback):
    """Calls ``progress(steps done, steps in all)`` after every step."""

    def __init__(self, progress: Callable[[int, int | None], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of transformers' trainer."""
        self.progress(state.global_step, state.max_steps)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of the libraries underneath, which a progress callback takes the place of."""
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
