"""The table of all objectives, and the check of the settings that choose one."""

import dataclasses

from data.command_line import UserError, as_text
from data.ranges import range_complaints
from data.sampling.objectives.base import ModelShape, Objective
from data.sampling.objectives.causal import Causal
from data.sampling.objectives.classification import Classification
from data.sampling.objectives.masked import Masked
from data.sampling.objectives.pairs import Pairs
from data.sampling.objectives.prefix import Prefix
from data.sampling.objectives.span_corruption import SpanCorruption
from data.sampling.settings import Architecture, SamplingSettings
from data.shards import PreparedData
from data.tokenization.tokenizer import Tokenizer

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Causal, Prefix, Masked, Classification, SpanCorruption, Pairs)
}
"""Each objective by its name. The first of an architecture is its default."""


def default_objective(architecture: Architecture) -> type[Objective]:
    """Return the objective that data.objective stands for if it is not given."""
    return next(objective for objective in OBJECTIVES.values() if objective.architecture == architecture)


def open_objective(settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> Objective:
    """Return the objective that the settings name, or the default of the architecture.

    Raises UserError with every setting that fits neither it, the model nor another setting.
    """
    if complaints := [*range_complaints(settings, "data."), *objective_complaints(settings, model)]:
        raise UserError("\n".join(complaints))
    return _objective(settings, model)(settings, model, tokenizer, end_of_text)


def objective_complaints(settings: SamplingSettings, model: ModelShape) -> list[str]:
    """Return a message for each setting that fits neither the objective, the model nor another setting. Ranges are not checked."""
    objective = _objective(settings, model)
    return [*_misplaced(objective, settings, model.architecture), *objective.complaints(settings, model)]


def refuse_other_records(objective: type[Objective], folder: PreparedData, split: str) -> None:
    """Raise UserError if the documents of a split are pairs of texts and the objective reads single texts, or the other way round."""
    stream = folder.splits[split]
    if not stream.num_documents or stream.holds_pairs == objective.reads_pairs:
        return
    if objective.reads_pairs:
        raise UserError(f"{folder.folder} holds single texts; data.objective {objective.name} needs pairs: prepare it with --pair_field.")
    others = [f"{one.name} (model.architecture {one.architecture})" for one in OBJECTIVES.values() if one.reads_pairs]
    raise UserError(
        f"{folder.folder} holds pairs of texts (--pair_field); data.objective {objective.name} learns single texts, and would predict both "
        f"texts of a pair. Use data.objective {' or '.join(others)}. To learn both as one text, write them into one field and prepare it "
        "without --pair_field."
    )


def _objective(settings: SamplingSettings, model: ModelShape) -> type[Objective]:
    return OBJECTIVES[settings.objective] if settings.objective else default_objective(model.architecture)


def _misplaced(objective: type[Objective], settings: SamplingSettings, architecture: Architecture) -> list[str]:
    """Return a sentence if the objective is another architecture's, and one for each setting that only other objectives read."""
    complaints = []
    if objective.architecture != architecture:
        allowed = " or ".join(one.name for one in OBJECTIVES.values() if one.architecture == architecture)
        complaints.append(f"data.objective is {objective.name}; a model.architecture {architecture} learns {allowed}.")
    for field in dataclasses.fields(SamplingSettings):
        value, readers = getattr(settings, field.name), [one.name for one in OBJECTIVES.values() if field.name in one.own_settings]
        if value != field.default and readers and objective.name not in readers:
            complaints.append(
                f"data.{field.name} is {as_text(value)}; it is for data.objective {' or '.join(readers)}, and this is {objective.name}."
            )
    return complaints
