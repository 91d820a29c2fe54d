"""Which backend encodes: asked for, remembered, or found by a short calibration on this machine."""

from __future__ import annotations

import json
import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.embed.batching import Batch, token_batches
from polyhead.embed.cache import EncoderCache, cpu_has_bf16, installed_version
from polyhead.embed.facts import ModelFacts, learn_facts
from polyhead.embed.folder import Recipe
from polyhead.embed.tokenizer import TextTokenizer
from polyhead.embed.types import Embeddings, Progress
from polyhead.errors import InputError, PolyheadError

if TYPE_CHECKING:
    from polyhead.embed.graph import EncoderGraph
    from polyhead.embed.openvino_backend import OpenVINOBackend
    from polyhead.embed.torch_backend import TorchBackend
    from polyhead.model import HeadedModel
from polyhead.paths import make_folder

__all__ = ["CALIBRATE_FROM", "MIN_COSINE", "Backends"]

log = logging.getLogger("polyhead")

CALIBRATE_FROM = 2000
"""Texts from which on the seconds of a calibration are worth it."""

MIN_COSINE = 0.999
"""Least cosine to torch in float32, over dense vectors and every head, of a backend that may be chosen."""

_PASSAGE = (
    "The river rises in the hills and runs west for two hundred miles before it meets the sea. In 1841 a bridge of "
    "iron replaced the ferry; 12,000 people came to see it opened. What did it cost? Nobody wrote it down, though "
    "bills for oak, rope and gunpowder survive in the town's archive. "
)


class Backends:
    """Makes, chooses and keeps the backends of one encoder.

    Args:
        recipe: how vectors are made.
        layers: layers whose heads are given.
        max_tokens: the caller's limit on input length, if any.
        cache: where files are kept.
        asked: backend, precision and device, as the encoder was given them.
    """

    def __init__(
        self,
        recipe: Recipe,
        layers: tuple[int, ...],
        max_tokens: int | None,
        cache: EncoderCache,
        asked: tuple[str, str, str | None],
    ) -> None:
        self._recipe, self._layers, self._limit = recipe, layers, max_tokens
        self._cache = cache
        self._asked, self._precision, self._device = asked
        self._active: TorchBackend | OpenVINOBackend | None = None
        self._settled = False

    @property
    def current(self) -> str:
        """Backend and precision in use, "" before the first."""
        return "" if self._active is None else f"{self._active.name} {self._active.precision}"

    @cached_property
    def facts(self) -> ModelFacts:
        """Facts of the model: read where they are known, else learned from the model and kept."""
        try:
            return ModelFacts.from_json(self._cache.facts_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            facts = learn_facts(self._model, self._recipe, self._layers, self._limit)
            self._cache.write(self._cache.facts_file, facts.to_json())
            return facts

    def get(self, tokenizer: TextTokenizer, work: int) -> TorchBackend | OpenVINOBackend:
        """The backend for so many texts."""
        if self._asked == "auto" and not self._settled:
            self._choose(tokenizer, work)
        elif self._active is None:
            self._use(self._asked, self._precision_for(self._asked))
        assert self._active is not None
        return self._active

    def calibrate(self, tokenizer: TextTokenizer, progress: Progress | None) -> dict[str, Any]:
        """Check and time all candidates, take the fastest that passes, and remember it for this machine."""
        sample = _sample(tokenizer)
        reference, _ = self._measure(self._torch("fp32"), sample, None)
        candidates = self._candidates()
        found = []
        for number, (name, precision) in enumerate(candidates):
            found.append(self._try(name, precision, sample, reference))
            if progress is not None:
                progress(number + 1, len(candidates))
        passed = [each for each in found if each["min_cosine"] >= MIN_COSINE]
        if not passed:
            raise InputError(
                f"no {self._asked} backend in precision {self._precision} agrees with torch in float32 to a cosine of "
                f"{MIN_COSINE}: {found}; use backend='auto'"
            )
        best = max(passed, key=lambda each: each["texts_per_second"])
        choice = {"backend": best["backend"], "precision": best["precision"], "candidates": found}
        choices = self._cache.read_choices()
        self._cache.write(self._cache.choices_file, json.dumps({**choices, self._question: choice}, indent=1))
        self._use(best["backend"], best["precision"])
        self._settled = True
        return choice

    @property
    def token_dim(self) -> int:
        """Numbers in a token's last state."""
        return int(self._model.hidden_size)

    def token_states(self, batch: Batch) -> np.ndarray:
        """The model's last token states ``[batch, tokens, hidden]`` float32, of torch: exports give pooled vectors."""
        import torch

        with torch.inference_mode():
            ids, mask = (torch.from_numpy(each).to(self._model.device) for each in (batch.ids, batch.mask))
            return self._token_graph.states(ids, mask).float().cpu().numpy()

    @cached_property
    def _token_graph(self) -> EncoderGraph:
        return self._graph(self._model)

    @property
    def _question(self) -> str:
        """What was asked, as the key under which its answer is remembered."""
        return f"{self._asked} {self._precision} {self._device or 'any device'}"

    def _choose(self, tokenizer: TextTokenizer, work: int) -> None:
        """Settle "auto": what is remembered, else what is at hand while there is little work, else a calibration."""
        known = self._cache.read_choices().get(self._question)
        if known is not None and self._available(known["backend"]):
            self._use(known["backend"], known["precision"])
            self._settled = True
        elif work >= CALIBRATE_FROM:
            self.calibrate(tokenizer, None)
        elif self._active is None:
            self._use("torch", self._precision_for("torch"))

    def _available(self, name: str) -> bool:
        return name == "torch" or installed_version("openvino") != "none"

    def _precision_for(self, name: str) -> str:
        if self._precision != "auto":
            return self._precision
        return "bf16" if name == "openvino" and cpu_has_bf16() else "fp32"

    def _use(self, name: str, precision: str) -> None:
        if self.current == f"{name} {precision}":
            return
        self._active = self._openvino(precision) if name == "openvino" else self._torch(precision)
        if name == "openvino":
            # The export has its own copy of the weights.
            self.__dict__.pop("_model", None)
        log.info("encoding with %s", self.current)

    def _candidates(self) -> list[tuple[str, str]]:
        names = ["torch", "openvino"] if self._asked == "auto" else [self._asked]
        if "openvino" in names and not self._available("openvino") and self._asked == "auto":
            names.remove("openvino")
            log.info(
                "OpenVINO is not installed; on a CPU it is often 3 times as fast: pip install 'polyhead[openvino]'"
            )
        if self._model.device.type != "cpu" and self._asked == "auto":
            names = ["torch"]
        bf16 = cpu_has_bf16() or self._model.device.type != "cpu"
        precisions = [self._precision] if self._precision != "auto" else ["fp32", *(["bf16"] if bf16 else [])]
        return [(name, precision) for name in names for precision in precisions]

    def _try(self, name: str, precision: str, sample: list[np.ndarray], reference: Embeddings) -> dict[str, Any]:
        """Parity and speed of one candidate; one that cannot be made counts as not agreeing, and says why."""
        found: dict[str, Any] = {"backend": name, "precision": precision, "min_cosine": 0.0, "texts_per_second": 0.0}
        try:
            backend = self._openvino(precision) if name == "openvino" else self._torch(precision)
            vectors, rate = self._measure(backend, sample, 3)
        except PolyheadError:
            raise
        except Exception as error:
            # What an export cannot do shows as any kind of error of other libraries; torch in float32 remains.
            found["error"] = f"{type(error).__name__}: {error}"[:500]
            log.warning("%s %s is left out: %s", name, precision, found["error"])
            return found
        return {**found, "min_cosine": _min_cosine(vectors, reference), "texts_per_second": rate}

    def _measure(self, backend: Any, sample: list[np.ndarray], rounds: int | None) -> tuple[Embeddings, float]:
        """Vectors of the sample, and texts per second in the best of some rounds after them."""
        facts = self.facts
        result = Embeddings(
            np.zeros((len(sample), facts.dim), np.float32),
            np.zeros((len(sample), len(facts.layers), facts.heads, facts.head_dim), np.float32),
        )

        def sink(batch: Any, dense: np.ndarray, heads: np.ndarray | None) -> None:
            result.dense[batch.rows] = dense
            assert result.heads is not None
            result.heads[batch.rows] = heads

        tokens = sum(map(len, sample))
        times = []
        for _ in range(1 + (rounds or 0)):
            batches = token_batches(sample, budget=backend.budget(tokens), pad_id=facts.pad_id, limit=facts.max_tokens)
            begin = time.perf_counter()
            backend.run(batches, True, 0, sink)
            times.append(time.perf_counter() - begin)
        return result, len(sample) / min(times[1:] or times)

    @cached_property
    def _model(self) -> HeadedModel:
        return self._load("fp32")

    def _load(self, precision: str) -> HeadedModel:
        import torch

        from polyhead.model import load

        if self._asked == "openvino":
            device = "cpu"
        else:
            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        model = load(self._recipe.transformer, dtype=kind, device=device)
        # A cache of keys and values serves generation; here it would only hold memory.
        if getattr(model.config, "use_cache", False):
            model.config.use_cache = False
        return model

    def _graph(self, model: HeadedModel) -> EncoderGraph:
        from polyhead.embed.graph import EncoderGraph

        graph = EncoderGraph(model, self.facts.pooling, self._recipe, self.facts.layers)
        graph.steps.to(model.device)
        graph.pooler.to(model.device)
        return graph

    def _torch(self, precision: str) -> TorchBackend:
        from polyhead.embed.torch_backend import TorchBackend

        if self._active is not None and self.current == f"torch {precision}":
            return self._active  # type: ignore[return-value]
        return TorchBackend(self._graph(self._model if precision == "fp32" else self._load(precision)), precision)

    def _openvino(self, precision: str) -> OpenVINOBackend:
        from polyhead.embed.openvino_backend import OpenVINOBackend, export_graph

        folder = self._cache.export_folder
        if not folder.is_dir():
            log.info("exporting the model to OpenVINO, once")
            graph = self._graph(self._model)
            make_folder(folder, lambda draft: export_graph(graph, draft))
        return OpenVINOBackend(folder, precision)


def _sample(tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Token ids of 24 texts of all lengths up to 256 tokens."""
    room = min(256, tokenizer.max_tokens)
    long = tokenizer.truncate(_PASSAGE * 40, "").ids
    return [_cut(long, 3 + (room - 3) * number // 23) for number in range(24)]


def _cut(ids: np.ndarray, length: int) -> np.ndarray:
    """The sequence at another length, its last tokens (which may be special) kept."""
    return ids if length >= len(ids) else np.concatenate([ids[: length - 1], ids[-1:]])


def _min_cosine(found: Embeddings, reference: Embeddings) -> float:
    """The least cosine between vectors of the same text, over dense vectors and every head."""
    assert found.heads is not None
    assert reference.heads is not None
    return min(float(_cosines(a, b).min()) for a, b in ((found.dense, reference.dense), (found.heads, reference.heads)))


def _cosines(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(reference, axis=-1)
    return np.sum(found * reference, axis=-1) / np.maximum(norms, 1e-12)
