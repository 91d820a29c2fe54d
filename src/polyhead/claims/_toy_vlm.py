"""A vision-language model small enough to train inside a claim: pictures of coloured shapes and their captions.

The model is a stock ``LlavaForConditionalGeneration``: a CLIP vision tower that is taught to name what is in a patch
and then frozen, a projector, and a Llama. It first learns to caption pictures, nearly without error. Then its language
part alone reads captions without pictures, in which a colour nearly always comes with one shape (red circles, green
squares, ...), until it makes up three in ten objects of pictures where every shape is as likely as the others. So the
picture is still seen, and language speaks against it; an object named that is not in the picture is a hallucination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from polyhead.act.base import Action
from polyhead.claims.base import Verdict
from polyhead.evaluate.statistics import Interval, bootstrap_interval
from polyhead.model import HeadedModel, load

__all__ = [
    "IMAGE",
    "Pictures",
    "ToyVLM",
    "captions",
    "draw",
    "fewer",
    "hallucination",
    "perplexity",
    "said",
    "toy_vlm",
    "verdict_both",
    "without_image",
]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
    "white": (240, 240, 240),
    "purple": (150, 50, 180),
}
SHAPES = ("circle", "square", "triangle", "cross")
WORDS = ("<pad>", "<bos>", "<eos>", "<image>", "a", *COLOURS, *SHAPES)
GRID, CELL, OBJECTS = 4, 8, 3
IMAGE = (1, 1 + GRID * GRID)  # where the image's tokens stand in the input
_NUMBER = {word: number for number, word in enumerate(WORDS)}
_KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
_PROMPT = [_NUMBER["<bos>"], *[_NUMBER["<image>"]] * GRID**2]
_LENGTH = 3 * OBJECTS + 1  # tokens of a caption: "a", colour and shape of each object, and the end


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures.

    Attributes:
        pixels: ``[n, 3, 32, 32]``, as the model takes them.
        kinds: ``[n, 16]``, for each patch 1 + the number of the kind of object in it, 0 where there is none.
    """

    pixels: torch.Tensor
    kinds: torch.Tensor

    def objects(self, row: int) -> list[tuple[str, str]]:
        """Colour and shape of each object, left to right and top to bottom."""
        return [_KINDS[kind - 1] for kind in self.kinds[row].tolist() if kind]

    def prompt(self) -> dict[str, torch.Tensor]:
        """What a caption starts from: the start token and the image."""
        return {"input_ids": torch.tensor([_PROMPT]).repeat(len(self.pixels), 1), "pixel_values": self.pixels}

    def captioned(self) -> dict[str, torch.Tensor]:
        """Prompts with their true captions."""
        rows = [[_NUMBER[w] for one in self.objects(row) for w in ("a", *one)] for row in range(len(self.pixels))]
        written = torch.tensor([[*row, _NUMBER["<eos>"]] for row in rows])
        return {"input_ids": torch.cat([self.prompt()["input_ids"], written], 1), "pixel_values": self.pixels}

    def answering(self) -> list[dict[str, torch.Tensor]]:
        """Inputs that end where the shape of an object is asked for: after each colour of the true captions."""
        given = self.captioned()
        ends = [len(_PROMPT) + 3 * number + 2 for number in range(OBJECTS)]
        return [{**given, "input_ids": given["input_ids"][:, :end]} for end in ends]


@dataclass(frozen=True)
class ToyVLM:
    """The model, whose layers and heads are those of its language tower, and its vision tower."""

    model: HeadedModel
    vision: HeadedModel


def draw(n: int, seed: int, usual: float = 0.0) -> Pictures:
    """``n`` pictures of three objects of different colours; with probability ``usual`` a colour has its usual shape."""
    generator = np.random.default_rng(seed)
    pixels = np.empty((n, GRID * CELL, GRID * CELL, 3))
    kinds = np.zeros((n, GRID**2), dtype=np.int64)
    for row in range(n):
        image = Image.new("RGB", (GRID * CELL, GRID * CELL), (90, 90, 90))
        pencil = ImageDraw.Draw(image)
        cells = generator.choice(GRID**2, OBJECTS, replace=False)
        for cell, colour in zip(cells, generator.choice(len(COLOURS), OBJECTS, replace=False), strict=True):
            free = generator.random() >= usual
            shape = int(generator.integers(len(SHAPES))) if free else int(colour) % len(SHAPES)
            left, top = (CELL * at + int(generator.integers(2)) for at in (cell % GRID, cell // GRID))
            _draw_shape(pencil, SHAPES[shape], left, top, list(COLOURS.values())[colour])
            kinds[row, cell] = 1 + colour * len(SHAPES) + shape
        pixels[row] = np.asarray(image)
    pixels += generator.normal(0, 20, pixels.shape)
    return Pictures(torch.tensor((pixels - 110) / 60, dtype=torch.float32).permute(0, 3, 1, 2), torch.tensor(kinds))


def _draw_shape(pencil: Any, shape: str, left: int, top: int, colour: tuple[int, int, int]) -> None:
    right, bottom = left + CELL - 2, top + CELL - 2
    if shape == "circle":
        pencil.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pencil.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        pencil.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)
    else:
        pencil.line((left, top, right, bottom), fill=colour, width=2)
        pencil.line((left, bottom, right, top), fill=colour, width=2)


@lru_cache(maxsize=3)
def toy_vlm(seed: int = 0, rate: float = 0.3) -> ToyVLM:
    """The trained model, made once a run in about 12 seconds on one core.

    Args:
        seed: of weights and pictures.
        rate: of hallucination that reading without pictures goes on to.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=GRID * CELL,
            patch_size=CELL,
        )
        text = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=128,
            initializer_range=0.05,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=_NUMBER["<image>"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
        module = LlavaForConditionalGeneration(config)
        # Of heads this small, eager attention is a third faster than SDPA.
        module.set_attn_implementation("eager")
        tower = module.model.vision_tower
        _teach_to_see(tower, draw(1500, seed + 1000))
        tower.requires_grad_(False)
        _teach_to_write(module, draw(2000, seed + 2000, usual=0.5))
        _teach_what_is_usual(module, draw(1000, seed + 3000, usual=0.95), draw(100, seed + 4000), rate)
    return ToyVLM(load(module.eval()), load(tower.eval()))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _teach_to_see(tower: nn.Module, pictures: Pictures, steps: int = 150) -> None:
    """Name the kind of object in each patch, as pretraining would have taught a vision tower."""
    head = nn.Linear(32, 1 + len(_KINDS))
    weight = torch.ones(1 + len(_KINDS))
    weight[0] = 0.1  # most patches are empty

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logits = head(tower(pictures.pixels[rows]).last_hidden_state[:, 1:])
        return nn.functional.cross_entropy(logits.flatten(0, 1), pictures.kinds[rows].flatten(), weight)

    _train([*tower.parameters(), *head.parameters()], loss, len(pictures.pixels), steps, 64)


def _teach_to_write(module: nn.Module, pictures: Pictures, steps: int = 200) -> None:
    given = pictures.captioned()
    labels = given["input_ids"].clone()
    labels[:, : len(_PROMPT)] = -100

    def loss(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module(**{name: each[rows] for name, each in given.items()}, labels=labels[rows]).loss
        return found

    _train([each for each in module.parameters() if each.requires_grad], loss, len(labels), steps, 32)


def _train(
    parameters: list[nn.Parameter], loss: Callable[[torch.Tensor], torch.Tensor], n: int, steps: int, batch: int
) -> None:
    optimizer = torch.optim.AdamW(parameters, 4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(torch.randint(n, (batch,))).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _teach_what_is_usual(module: Any, read: Pictures, shown: Pictures, rate: float) -> None:
    """Captions without pictures, until the rate of hallucination on the pictures shown is reached, or 60 batches."""
    ids = without_image(read.captioned()["input_ids"])
    parameters = [*module.model.language_model.parameters(), *module.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3, fused=True)
    model = load(module)
    for step in range(1, 61):
        rows = torch.randint(len(ids), (64,))
        optimizer.zero_grad()
        with torch.enable_grad():
            module(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        optimizer.step()
        if step % 4 == 0 and hallucination(captions(model, shown), shown).mean() >= rate:
            break


def without_image(ids: torch.Tensor) -> torch.Tensor:
    """Input ids ``[n, tokens]`` with the image's tokens left out."""
    return torch.cat([ids[:, : IMAGE[0]], ids[:, IMAGE[1] :]], 1)


def captions(
    model: HeadedModel,
    pictures: Pictures,
    action: Action | None = None,
    each: Callable[[torch.Tensor], Action] | None = None,
) -> torch.Tensor:
    """What the model writes, greedily and with a cache: ids ``[n, 10]``.

    Args:
        model: of :class:`ToyVLM`.
        pictures: what it is shown.
        action: on while a caption is written.
        each: ``each(ids)`` gives an action for the next token alone; ids ``[n, tokens]`` are the input so far.
    """
    given, past = pictures.prompt(), None
    ids = given["input_ids"]
    with action.on(model) if action else nullcontext():
        for _ in range(_LENGTH):
            with each(ids).on(model) if each else nullcontext(), torch.inference_mode():
                out = model(**given, past_key_values=past, use_cache=True)
            past = out.past_key_values
            ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
            given = {"input_ids": ids[:, -1:]}
    return ids[:, len(_PROMPT) :]


def said(ids: torch.Tensor, pictures: Pictures) -> list[list[tuple[int, bool]]]:
    """For each caption its objects: where the shape's word stands in the caption, and whether it is in the picture."""
    found = []
    for row, caption in enumerate(ids.tolist()):
        words = [WORDS[number] for number in caption]
        there = set(pictures.objects(row))
        pairs = enumerate(pairwise(words), start=1)
        found.append([(at, pair in there) for at, pair in pairs if pair[0] in COLOURS and pair[1] in SHAPES])
    return found


def hallucination(ids: torch.Tensor, pictures: Pictures) -> np.ndarray:
    """Share of a caption's objects that are not in the picture, ``[n]``; 1 for a caption that names none."""
    return np.array([np.mean([not true for _, true in each]) if each else 1.0 for each in said(ids, pictures)])


def perplexity(model: HeadedModel, pictures: Pictures, action: Action | None = None) -> float:
    """Of the true captions, word by word."""
    given = pictures.captioned()
    with action.on(model) if action else nullcontext(), torch.inference_mode():
        logits = model(**given).logits[:, len(_PROMPT) - 1 : -1].double()
    wanted = given["input_ids"][:, len(_PROMPT) :]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).exp())


def fewer(than: np.ndarray, rate: np.ndarray, seed: int) -> Interval:
    """How much lower a rate is than another's, over the same pictures."""
    return bootstrap_interval(than - rate, seed=seed)


def verdict_both(first: Interval, second: Interval) -> Verdict:
    """Supported where both intervals lie above 0, refuted where one lies below, else inconclusive."""
    if first.high < 0 or second.high < 0:
        return "refuted"
    return "supported" if first.low > 0 and second.low > 0 else "inconclusive"
