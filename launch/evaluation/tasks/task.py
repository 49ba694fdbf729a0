"""The base class of tasks."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.sampling.batches import Batch
from data.sampling.objectives.base import Objective
from data.sampling.settings import Architecture, ObjectiveName, SamplingSettings
from data.shards import PreparedData
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import LoadedModel, OpenedModel
from launch.evaluation.evaluation_sets import EvaluationSet, sample_sets
from launch.evaluation.predictions import Predictor
from launch.evaluation.score import Score, bits_per_byte, perplexity, score_of, sums_of
from launch.evaluation.settings import GenerateSettings
from model.config import ModelConfig
from model.loss import training_loss

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "seed")
FILE_OPTIONS = ("input", "output", "batch_size")


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """A text that a model in training is asked to write."""

    tokens: list[int]
    """Ids that the decoder reads first."""
    temperature: float
    source: list[int] | None = None
    """Ids that the encoder of an encoder-decoder reads."""
    shown: tuple[int, ...] = ()
    """Ids that are shown before those that the model writes."""


class Task:
    """A task: what a model learns and is judged by. It knows its samples, network outputs, loss, scores and predictions.

    Each task is a subclass in a file of this folder and has a line in table.py.
    """

    objective: type[Objective]
    """Makes the samples; it gives the task its name."""
    description = "what the model was trained for"
    """Name of the predicted thing, for reports."""

    @property
    def name(self) -> ObjectiveName:
        """The value of data.objective."""
        return self.objective.name

    @property
    def architecture(self) -> Architecture:
        """The model.architecture that can learn the task."""
        return self.objective.architecture

    @property
    def predicts_every_token(self) -> bool:
        """True if each token of a text is predicted from all tokens before it, so that the text as a whole has a probability."""
        return self.objective.predicts_every_token

    # ----- the network's outputs -----

    token_head = True
    """True if the network needs token logits (model.token_head)."""
    prefix_attention = False
    """True if the network needs model.prefix_attention."""

    def num_classes(self, data: SamplingSettings) -> tuple[int, str]:
        """Return how many classes the network must have (0: no class head), and the setting that decides it, for error messages."""
        return 0, f"data.objective is {self.name}"

    def fits(self, config: ModelConfig) -> bool:
        """Return True if a model of this configuration, of which nothing else is known, can be used for this task."""
        return (config.architecture, config.token_head, config.prefix_attention) == (
            self.architecture,
            self.token_head,
            self.prefix_attention,
        )

    def model_complaints(self, model: ModelConfig, data: SamplingSettings) -> list[str]:
        """Return an error message for each model setting with which the network lacks an output of the task, or has one too many."""
        complaints = []
        if model.prefix_attention != self.prefix_attention:
            complaints.append(
                f"data.objective is {self.name} and model.prefix_attention {str(model.prefix_attention).lower()}; "
                "objective prefix needs prefix_attention, and no other objective may have it."
            )
        classes, reason = self.num_classes(data)
        if model.num_classes != classes:
            complaints.append(f"model.num_classes is {model.num_classes}; {reason}, so it must be {classes}.")
        if model.architecture == self.architecture and model.token_head != self.token_head:
            complaints.append(
                f"model.token_head is {str(model.token_head).lower()}; data.objective {self.name} "
                f"{'predicts tokens: set it to true' if self.token_head else 'trains none: set it to false'}."
            )
        return complaints

    # ----- loss and scores -----

    training_loss = staticmethod(training_loss)
    """The loss of a micro-batch; model.loss.training_loss states its arguments."""
    sums_of = staticmethod(sums_of)
    """The sums of an evaluation batch; launch.evaluation.score.sums_of states its arguments."""
    score_of = staticmethod(score_of)
    """The score for the sums over batches; launch.evaluation.score.score_of states its arguments."""

    def measure(self, network: Callable, batches: Iterable[Batch], device: torch.device | str) -> Score:
        """Run a network on evaluation batches, one at a time, and return its score."""
        total = Score()
        with torch.no_grad():
            for batch in batches:
                batch = batch.map(lambda tensor: tensor.to(device))
                total += self.score_of(self.sums_of(network(*batch.inputs), batch.targets, batch.classes), [batch])
        return total

    def loss_is_per_token(self, data: SamplingSettings) -> bool:
        """Return True if the loss is the cross-entropy of tokens and nothing else."""
        return self.token_head and not self.num_classes(data)[0]

    def metrics(self, score: Score, num_bytes: float | None = None) -> dict[str, float]:
        """Return what a score means, by name: perplexity per token, bits per byte, accuracy.

        `num_bytes` is the size of the text in UTF-8 if each of its tokens was predicted, else None.
        """
        metrics = {}
        if score.tokens:
            loss = score.token_loss / score.tokens
            metrics["perplexity"] = perplexity(loss)
            if num_bytes is not None:
                metrics["bits_per_byte"] = bits_per_byte(loss, num_bytes / score.tokens)
        if score.accuracy is not None:
            metrics["accuracy"] = score.accuracy
        return metrics

    # ----- evaluation sets -----

    def sampling_settings(self, opened: OpenedModel, name: str, labels: Iterable[str] = ()) -> SamplingSettings:
        """Return the settings of the evaluation samples: the run's, or for an exported folder those that fit the model.

        `labels` replace the run's if given. `name` names the model in error messages. Raises UserError if labels do not fit the model.
        """
        fields = {field.name for field in dataclasses.fields(SamplingSettings)}
        data = opened.recipe.get("data", {})
        known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name in fields}
        known |= {"path": (), "weights": (), "objective": self.name} | ({"labels": tuple(labels)} if labels else {})
        return SamplingSettings(**known | ({} if opened.recipe else self.settings_of_exported(opened)))

    def settings_of_exported(self, opened: OpenedModel) -> dict:
        """Return the sampling settings that follow from an exported model, by name."""
        return {}

    def evaluation_sets(
        self,
        config: ModelConfig,
        folders: Mapping[str, PreparedData],
        sampling: SamplingSettings,
        split: str,
        micro_batch_size: int,
        length: int,
        stride: int | None = None,
        limit_samples: int | None = None,
    ) -> dict[str, EvaluationSet]:
        """Return the evaluation set of each folder that has the split, in a fixed order.

        `length` and `stride` are in tokens; only windows have a stride (default: length). `limit_samples` takes this many samples of each
        folder, evenly spread. Raises UserError if the split is empty in all folders.
        """
        return sample_sets(config, folders, sampling, split, micro_batch_size, length, limit_samples)

    # ----- predictions -----

    model_kind: str
    """The kind of model, for error messages: "a decoder"."""
    options: Sequence[str]
    """Settings of launch/generate.py that the task supports, besides those of all models."""
    needs_prompt = True
    """True if an empty text cannot be predicted from."""

    def option_complaints(self, settings: GenerateSettings, config: ModelConfig) -> list[str]:
        """Return an error message for each supported setting of launch/generate.py that has an invalid value or does not fit another."""
        return []

    def predictor(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, settings: GenerateSettings) -> Predictor:
        """Return the predictor of launch/generate.py."""
        raise NotImplementedError

    def text_request(self, prompt: list[int], end_of_text: int, start_token: int | None, config: ModelConfig) -> TextRequest | None:
        """Return what a model in training writes after a prompt, or None if it writes no text. `start_token` is the decoder's first id."""
        return None

    def pipeline_tag(self, architecture: str) -> str:
        """Return the name that Hugging Face's hub has for what the model is used for; `architecture` is the exported model's."""
        raise NotImplementedError

    # ----- comparison of texts -----

    run_tokens = 32
    """Number of consecutive tokens that stand in a sample as in its text; runs of this length in common mean a common text."""

    def original_tokens(self, batch: Batch) -> Tensor:
        """Return the tokens that the network reads first, with the original tokens where they were hidden.  -> [batch, seq]"""
        return batch.inputs[0]
