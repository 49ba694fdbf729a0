"""Settings of launch/evaluate.py, launch/generate.py and launch/compare.py. Nothing heavy is imported here."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from data.command_line import not_utf8
from data.files import output_complaint
from data.sampling.settings import ObjectiveName


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Settings of launch/evaluate.py."""

    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    data: str | None = None
    """Folder that data/prepare.py wrote (default: the folder or folders that the run was trained on)."""
    split: Literal["validation", "train"] = "validation"
    """Split of the documents to evaluate on."""
    objective: ObjectiveName | None = None
    """Objective to evaluate, as data.objective in a recipe (default: the run's objective with its other data settings; for an exported
    folder the objective that fits the model)."""
    labels: tuple[str, ...] = ()
    """Labels of the classes in order, as data.labels in a recipe (default: the run's labels)."""
    sequence_length: Annotated[int | None, Ge(1)] = None
    """Length of a window or sample, tokens (default: the model's context)."""
    stride: Annotated[int | None, Ge(1)] = None
    """Distance between the starts of two windows, tokens (default: sequence_length, so windows do not overlap). Below sequence_length,
    each token is predicted from at least sequence_length - stride tokens before it. Only for causal models."""
    micro_batch_size: Annotated[int, Ge(1)] = 16
    """Windows or samples in one forward pass."""
    precision: Literal["float32", "bf16"] = "float32"
    """Type of weights and activations; losses are always computed in float32."""
    average: Annotated[int, Ge(1)] = 1
    """Number of the run's newest checkpoints whose weights are averaged."""


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """Settings of launch/generate.py."""

    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    prompt: str = ""
    """Text to read. A decoder continues it (default: empty, the start of a document); an encoder-decoder writes its target; an encoder
    fills each [MASK] in it, or classifies it."""
    input: str | None = None
    """File with one text per line in place of --prompt, or - for standard input; one line is written for each. Not for decoders."""
    output: str | None = None
    """New file for the results of --input (default: standard output)."""
    batch_size: Annotated[int | None, Ge(1)] = None
    """Lines of --input in one batch (default: 64)."""
    max_new_tokens: Annotated[int | None, Ge(1)] = None
    """Maximum length of the written text, tokens (default: 200; for beam search, the length of the source + 50)."""
    temperature: Annotated[float | None, Ge(0)] = None
    """Divisor of the logits; 0 always takes the most likely token (default: 0.8). An encoder-decoder samples only if this option, top_k,
    top_p or seed is given."""
    top_k: Annotated[int | None, Ge(1)] = None
    """Sample only from the k most likely tokens (default: all); for a [MASK], the number of tokens to show (default: 5)."""
    top_p: Annotated[float | None, Gt(0), Le(1)] = None
    """Sample only from the most likely tokens that together have this probability (arXiv 1904.09751; default: all)."""
    seed: int | None = None
    """Seed for sampling (default: 0)."""
    beam_size: Annotated[int | None, Ge(1)] = None
    """Number of targets that beam search of an encoder-decoder follows (default: 4); 1 is greedy search."""
    length_penalty: float | None = None
    """Exponent of beam search's length penalty: the target with the highest log P / ((5 + tokens) / 6) ** length_penalty is chosen
    (arXiv 1609.08144; default: 0.6)."""
    average: Annotated[int, Ge(1)] = 1
    """Number of the run's newest checkpoints whose weights are averaged."""
    tokenizer: str | None = None
    """tokenizer.model, tokenizer.json or .tiktoken file (default: the one next to the model)."""

    def given(self, *names: str) -> dict:
        """Return those of the named settings that were given, by name."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def complaints(self) -> list[str]:
        """Return an error message for each value that is wrong whatever the model is."""
        complaints = [complaint] if self.output and (complaint := output_complaint(self.output)) else []
        complaints += not_utf8("--prompt", self.prompt)
        if self.input and self.prompt:
            complaints.append("--prompt and --input both give the text to read: keep one of them.")
        if not self.input:
            complaints += [f"--{name} applies only to --input, which is not given." for name in self.given("output", "batch_size")]
        return complaints


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """Settings of launch/compare.py."""

    models: tuple[str, ...]
    """Two or more run folders, checkpoints in them, Hugging Face folders, or .gguf files. The others are compared with the first. A .gguf
    file must have the shape of a model listed before it. Models listed before the first option need no --models."""
    data: str | None = None
    """Folder that data/prepare.py wrote (default: the data that the first of these models with a recipe was trained on)."""
    split: Literal["validation", "train"] = "validation"
    """Split of the documents to evaluate on."""
    sequence_length: Annotated[int | None, Ge(1)] = None
    """Length of a window or sample, tokens (default: the smallest context of the models)."""
    micro_batch_size: Annotated[int, Ge(1)] = 16
    """Windows or samples in one forward pass."""
    output: str | None = None
    """New folder for the table (compare.md, compare.json) and a picture of perplexity against bytes (compare.svg)."""

    def complaints(self) -> list[str]:
        """Return an error message for each value that is wrong whatever the models are."""
        complaints = []
        if len(self.models) < 2:
            complaints.append(f"--models are {', '.join(self.models) or 'none'}; give two or more to compare.")
        if self.output is not None and (complaint := output_complaint(self.output)):
            complaints.append(complaint)
        return complaints
