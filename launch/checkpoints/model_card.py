"""README.md of an exported model: its architecture, its training, and the check of the export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from data.command_line import flatten
from data.sampling.batch_plan import BatchPlan, BatchSettings, read_segments
from data.sampling.objectives.table import OBJECTIVES, default_objective
from data.tokenization.configuration import read_json_object
from launch.checkpoints import checkpoint, state
from launch.checkpoints.opening import OpenedModel
from launch.checkpoints.run_record import data_paths, versions
from model import huggingface
from model.config import ModelConfig, count_parameters

# Settings of a recipe that the card lists unless they are zero or not set -> their names in the card.
_LISTED_SETTINGS = {
    "batch.global_batch_size": "sequences a step",
    "batch.ramp": "batch ramp",
    "optimizer.learning_rate": "learning rate",
    "schedule.kind": "schedule",
    "schedule.warmup_steps": "warm-up steps",
    "schedule.warmup_tokens": "warm-up tokens",
    "loss.label_smoothing": "label smoothing",
    "model.dropout": "dropout",
    "precision": "precision",
    "seed": "seed",
}


def model_card(opened: OpenedModel, name: str, average: int, dtype: torch.dtype, difference: float, pipeline_tag: str) -> str:
    """Return Markdown with the header that Hugging Face's hub reads. Unknown facts are left out, for example if the run is missing.

    `average` is the number of averaged checkpoints. `difference` is the largest difference between a logit of transformers and ours, in
    float32. `pipeline_tag` is the hub's name of the model's task.
    """
    loader, rows = huggingface.auto_class(opened.config), [*_shape(opened.config), *_training(opened, average)]
    rows.append(
        ("weights", f"{str(dtype).removeprefix('torch.')}; read by transformers, logits differ from ours by at most {difference:.1e}")
    )
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {pipeline_tag}\ntags:\n- megabatch\n---\n\n"
        f"# {name}\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
        f'tokenizer, model = AutoTokenizer.from_pretrained("{name}"), {loader}.from_pretrained("{name}")\n```\n'
    )


def _shape(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the rows (label, value) on the network's shape."""
    yield "architecture", f"{huggingface.to_huggingface(config)['architectures'][0]}: our {config.architecture.replace('_', '-')}"
    yield "parameters", f"{count_parameters(config):,}"
    decoder = f" + {config.num_decoder_layers}" if config.num_decoder_layers else ""
    yield "shape", f"{config.num_layers}{decoder} blocks of width {config.hidden_size}, {config.num_attention_heads} heads"
    yield "vocabulary", f"{config.vocab_size:,}"
    yield "context", f"{config.sequence_length:,} tokens"


def _training(opened: OpenedModel, average: int) -> Iterator[tuple[str, str]]:
    """Yield the rows (label, value) on the training; none for a model without a run."""
    if opened.step is None:
        return
    mean = f", mean of the newest {average} checkpoints" if average > 1 else ""
    yield "step", f"{opened.step:,}{mean}"
    manifest = checkpoint.read_manifest(opened.folder)
    record = read_json_object(opened.root / "run.json")
    if opened.recipe:
        settings = flatten(opened.recipe)
        segments = read_segments(manifest.get("batch_plan", []))
        plan = BatchPlan(BatchSettings(settings["batch.global_batch_size"]), settings["model.sequence_length"], segments=segments)
        yield "tokens", f"{plan.tokens_before(opened.step):,}"
        yield (
            "data",
            ", ".join(Path(path).name for path in data_paths(opened.recipe)) + f", fingerprint {manifest['data']['fingerprint'][:12]}",
        )
        objective = settings.get("data.objective") or default_objective(opened.config.architecture).name
        rate = f", {settings['data.mask_rate']:g} of the tokens" if "mask_rate" in OBJECTIVES[objective].own_settings else ""
        yield "objective", objective.replace("_", " ") + rate
        yield "optimizer", state.optimizer_description_in(manifest)
        for name, label in _LISTED_SETTINGS.items():
            if settings.get(name):
                yield label, str(settings[name])
    if average == 1 and (loss := _validation_loss(opened.root / "metrics.jsonl", opened.step)) is not None:
        yield "validation loss", f"{loss:.4f} nats a target token"
    yield "written by", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", versions()).items())
    if record.get("commit"):
        yield "commit", record["commit"]


def _validation_loss(metrics: Path, step: int) -> float | None:
    """Return the last validation loss up to a step; None if there is none."""
    loss = None
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        if re.search(r'"loss/validation": \d', line):
            entry = json.loads(line)
            loss = entry["loss/validation"] if entry["step"] <= step else loss
    return loss
