"""Causal language modelling: each token is predicted from those before it."""

from collections.abc import Mapping

from data.sampling.objectives import causal as objectives
from data.sampling.settings import SamplingSettings
from data.shards import PreparedData
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import LoadedModel
from launch.evaluation.evaluation_sets import EvaluationSet, window_sets
from launch.evaluation.predictions import Continuation
from launch.evaluation.settings import GenerateSettings
from launch.evaluation.tasks.task import SAMPLING_OPTIONS, Task, TextRequest
from model.config import ModelConfig


class Decoding(Task):
    """The part that all tasks of decoders share: a prompt is continued."""

    model_kind = "a decoder"
    options = ("max_new_tokens", *SAMPLING_OPTIONS)
    needs_prompt = False

    def predictor(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, settings: GenerateSettings) -> Continuation:
        """Return the predictor that continues a prompt."""
        return Continuation(trained, tokenizer, device, sampling_of(settings))

    def pipeline_tag(self, architecture: str) -> str:
        """Return "text-generation"."""
        return "text-generation"

    def text_request(self, prompt: list[int], end_of_text: int, start_token: int | None, config: ModelConfig) -> TextRequest:
        """Return the prompt, which the model continues; if it is empty, the end of the text before."""
        tokens = prompt or [end_of_text]
        return TextRequest(tokens, temperature=0.8, shown=tuple(tokens))


class Causal(Decoding):
    """Causal language modelling. Evaluation reads the text in windows, which may overlap."""

    objective = objectives.Causal
    description = "the next token"

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
        """Return windows over the text of each folder that has the split, in a fixed order."""
        return window_sets(config, folders, split, micro_batch_size, length, stride or length, limit_samples)


def sampling_of(settings: GenerateSettings) -> dict:
    """Return the options of model.generation.generate."""
    return {"max_new_tokens": 200, "temperature": 0.8, "seed": 0} | settings.given("max_new_tokens", *SAMPLING_OPTIONS)
