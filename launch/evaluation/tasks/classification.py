"""Classification: one class is predicted for each text."""

from collections.abc import Iterable

from data.command_line import UserError
from data.sampling.objectives import classification as objectives
from data.sampling.settings import SamplingSettings
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import LoadedModel, OpenedModel
from launch.evaluation.predictions import Classes
from launch.evaluation.settings import GenerateSettings
from launch.evaluation.tasks.task import FILE_OPTIONS, Task


class Classification(Task):
    """Classification of texts; data.labels name the classes."""

    objective = objectives.Classification
    token_head = False
    model_kind = "a classifier"
    options = FILE_OPTIONS

    def num_classes(self, data: SamplingSettings) -> tuple[int, str]:
        """Return the number of data.labels."""
        return len(data.labels), f"data.labels are {len(data.labels)}"

    def sampling_settings(self, opened: OpenedModel, name: str, labels: Iterable[str] = ()) -> SamplingSettings:
        """Return the settings of the evaluation samples. Raises UserError if the number of labels is not the model's number of classes."""
        sampling = super().sampling_settings(opened, name, labels)
        if len(sampling.labels) != opened.config.num_classes:
            raise UserError(
                f"The number of labels is {len(sampling.labels)}; {name} has {opened.config.num_classes} classes. "
                "Give --labels, in the order of the classes."
            )
        return sampling

    def predictor(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, settings: GenerateSettings) -> Classes:
        """Return the predictor of classes."""
        return Classes(trained, tokenizer, device)

    def pipeline_tag(self, architecture: str) -> str:
        """Return "text-classification"."""
        return "text-classification"
