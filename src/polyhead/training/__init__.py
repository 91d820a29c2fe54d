"""Training: any objective on any text encoder, on sentence-transformers' trainer, and what belongs to it."""

from polyhead.training.autoencode import LadderAutoencoder
from polyhead.training.data import Examples, examples
from polyhead.training.distill import Distillation, RelationDistillLoss, fresh_student
from polyhead.training.evaluation import held_out
from polyhead.training.heads import HeadDropout, HeadOffsets, HeadWeights
from polyhead.training.layers import LayerObjective, embed_layers
from polyhead.training.loss import ObjectiveLoss
from polyhead.training.matryoshka import Matryoshka, Starbucks, TwoDMatryoshka
from polyhead.training.models import trainable
from polyhead.training.names import OBJECTIVES, objective_for
from polyhead.training.shorten import SizeReport, grid_report, shorten
from polyhead.training.soup import greedy_soup, soup
from polyhead.training.trainer import Options, Trainer

__all__ = [
    "OBJECTIVES",
    "Distillation",
    "Examples",
    "HeadDropout",
    "HeadOffsets",
    "HeadWeights",
    "LadderAutoencoder",
    "LayerObjective",
    "Matryoshka",
    "ObjectiveLoss",
    "Options",
    "RelationDistillLoss",
    "SizeReport",
    "Starbucks",
    "Trainer",
    "TwoDMatryoshka",
    "embed_layers",
    "examples",
    "fresh_student",
    "greedy_soup",
    "grid_report",
    "held_out",
    "objective_for",
    "shorten",
    "soup",
    "trainable",
]
