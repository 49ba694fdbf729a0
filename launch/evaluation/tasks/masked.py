"""Masked language modelling: hidden tokens are predicted from those on both sides; optionally also the order of two texts."""

import torch
from torch import Tensor

from data.sampling.batches import Batch
from data.sampling.objectives import masked as objectives
from data.sampling.samples import IGNORED
from data.sampling.settings import SamplingSettings
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import LoadedModel, OpenedModel
from launch.evaluation.predictions import FilledMasks
from launch.evaluation.settings import GenerateSettings
from launch.evaluation.tasks.task import FILE_OPTIONS, Task


class Masked(Task):
    """Masked language modelling (BERT; Devlin et al. 2018, arXiv 1810.04805), with data.next_sentence also next-sentence prediction."""

    objective = objectives.Masked
    model_kind = "an encoder with masks to fill"
    options = ("top_k", *FILE_OPTIONS)

    def num_classes(self, data: SamplingSettings) -> tuple[int, str]:
        """Return 2 with data.next_sentence, else 0."""
        return 2 if data.next_sentence else 0, f"data.next_sentence is {str(data.next_sentence).lower()}"

    def settings_of_exported(self, opened: OpenedModel) -> dict:
        """Return data.next_sentence, which is on if the model has two classes."""
        return {"next_sentence": opened.config.num_classes == 2}

    def predictor(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, settings: GenerateSettings) -> FilledMasks:
        """Return the predictor that fills masks."""
        return FilledMasks(trained, tokenizer, device, 5 if settings.top_k is None else settings.top_k)

    def pipeline_tag(self, architecture: str) -> str:
        """Return "fill-mask"."""
        return "fill-mask"

    def original_tokens(self, batch: Batch) -> Tensor:
        """Return the tokens with the targets where they were hidden.  -> [batch, seq]"""
        return torch.where(batch.targets != IGNORED, batch.targets, batch.tokens)
