"""The part that all tasks of encoder-decoders share: a target text is written for a source text."""

from data.command_line import UserError
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import LoadedModel, OpenedModel
from launch.evaluation.predictions import TargetText
from launch.evaluation.settings import GenerateSettings
from launch.evaluation.tasks.causal import sampling_of
from launch.evaluation.tasks.task import FILE_OPTIONS, SAMPLING_OPTIONS, Task, TextRequest
from model.config import ModelConfig


class TextToText(Task):
    """Tasks of encoder-decoders."""

    model_kind = "an encoder-decoder"
    options = ("max_new_tokens", *SAMPLING_OPTIONS, "beam_size", "length_penalty", *FILE_OPTIONS)

    def settings_of_exported(self, opened: OpenedModel) -> dict:
        """Return data.start_token, the decoder's first token in the exported folder."""
        if opened.tokenizer is None:
            return {}
        tokenizer = load_tokenizer(opened.tokenizer)
        start = opened.start_token(tokenizer)
        if start not in tokenizer.special_names:
            raise UserError(f"{opened.folder}/config.json: decoder_start_token_id {start} is not a special token of {tokenizer.path}.")
        return {"start_token": None if start == tokenizer.end_of_text else tokenizer.special_names[start]}

    def option_complaints(self, settings: GenerateSettings, config: ModelConfig) -> list[str]:
        """Return messages for options of search and sampling together, and for a target longer than the model's longest."""
        complaints = []
        for_search = [name for name in settings.given("beam_size", "length_penalty") if name != "beam_size" or settings.beam_size != 1]
        for_sampling = list(settings.given(*SAMPLING_OPTIONS))
        if for_search and for_sampling:
            complaints.append(
                f"--{for_sampling[0]} is for sampling tokens, --{for_search[0]} for the search for the best target: keep one of them."
            )
        if (settings.max_new_tokens or 0) > config.sequence_length:
            complaints.append(
                f"--max_new_tokens is {settings.max_new_tokens}; it must be at most {config.sequence_length}, the longest target of "
                f"{settings.model}."
            )
        return complaints

    def predictor(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, settings: GenerateSettings) -> TargetText:
        """Return the predictor of targets; it samples if an option of sampling is given, else it searches."""
        search = settings.given("max_new_tokens", "beam_size", "length_penalty")
        return TargetText(trained, tokenizer, device, search, sampling_of(settings) if settings.given(*SAMPLING_OPTIONS) else None)

    def pipeline_tag(self, architecture: str) -> str:
        """Return "translation" for Marian's architecture, else "text2text-generation"."""
        return "translation" if architecture == "marian" else "text2text-generation"

    def text_request(self, prompt: list[int], end_of_text: int, start_token: int | None, config: ModelConfig) -> TextRequest:
        """Return the prompt as a source, for which the model writes the target."""
        assert start_token is not None
        source = [*prompt[: config.sequence_length - 1], end_of_text]
        return TextRequest([start_token], temperature=0.0, source=source)
