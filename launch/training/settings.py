"""Settings of a run, from recipe and command line, and the batch arithmetic that follows from them."""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data.command_line import UserError, flatten, read_settings
from data.sampling.batch_plan import BatchPlan, BatchSettings
from data.sampling.settings import SamplingSettings
from launch import REPOSITORY
from launch.ranks.launchers import without_local_rank
from launch.ranks.layout import Layout, micro_batch_size
from model.config import ModelConfig, named_size

DEMO_RECIPE = REPOSITORY / "launch" / "recipes" / "demo.yaml"
NOT_IN_THE_WEIGHTS = (
    "dropout",
    "document_mask",
    "initializer_range",
    "prefix_attention",
    "sliding_window",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_original_length",
)
"""Settings of the model with which the same weights can go on."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float = 3e-4
    """AdamW's rate after warm-up (Loshchilov and Hutter, arXiv 1711.05101)."""
    weight_decay: float = 0.1
    """Decay a step, times the rate, on matrices only (embeddings among them); biases and norms have none."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the mean square."""
    gradient_clipping: float = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What the rate does after warm-up; wsd (warmup-stable-decay, arXiv 2404.06395) stays, then falls at the end."""
    warmup_steps: int = 100
    """Steps in which the rate rises linearly from 0."""
    min_learning_rate: float = 0.0
    """Where the rate ends, one step behind the last (constant: not used)."""
    decay_fraction: float = 0.2
    """wsd only: the share of all steps in which the rate falls, linearly."""


@dataclasses.dataclass(frozen=True)
class LossSettings:
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the whole vocabulary (Szegedy et al. 2015, arXiv 1512.00567, section 7;
    Vaswani et al. 2017 used 0.1). Losses of training contain it, those of validation never do."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of softmax's divisor, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5,
    used 1e-4). In training alone, as label_smoothing."""


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    teacher: str | None = None
    """Run folder or checkpoint of ours, or Hugging Face folder, of a model whose distribution over the next token is learnt (Hinton et
    al. 2015, arXiv 1503.02531). Every rank that computes the loss holds all of it (default: none, and the targets alone are learnt).
    In training alone, as loss.label_smoothing."""
    kl_weight: float = 1.0
    """Weight of temperature^2 KL(teacher || model), in nats a target token."""
    cross_entropy_weight: float = 1.0
    """Weight of the loss against the targets, with its smoothing and z_loss. (After pruning arXiv 2407.14679 uses none; both were better
    than either alone where we measured.)"""
    temperature: float = 1.0
    """That the logits of both are divided by for the KL: above 1 what the teacher finds unlikely counts more."""


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    bits: int | None = None
    """Quantization-aware training: the blocks' linear layers compute with weights rounded to integers of so many bits, 2 to 8, in
    training and validation alike, as launch/quantize.py --method rtn rounds them. What is trained and saved stays unrounded
    (straight-through estimator, Bengio et al. 2013, arXiv 1308.3432; default: no rounding)."""
    group_size: int | None = None
    """Entries of a weight's row that share a scale; 0: the whole row (default: 128 of integers below 8 bits, else the row)."""
    symmetric: bool = True
    """Zero is the middle of the integers; else each group has a zero point of its own."""
    activations: Literal["none", "int8"] = "none"
    """What the inputs of those layers are rounded to, with a scale a token."""

    @property
    def shared_by(self) -> int | None:
        """Entries of a row that share a scale; None: all."""
        if self.group_size is None:
            return 128 if self.bits is not None and self.bits < 8 else None
        return self.group_size or None


@dataclasses.dataclass(frozen=True)
class DataSettings(SamplingSettings):
    path: tuple[str, ...] = ("prepared",)
    """Folder that data/prepare.py wrote, or several to blend. Where the default is missing, the embedded corpus is prepared into it."""
    max_epochs: float | None = None
    """Most epochs that a run may read of a folder; one that would read more is refused before it starts (default: no limit)."""
    vocab_size: int = 4096
    """Pieces of the tokenizer trained when the embedded corpus has to be prepared."""


@dataclasses.dataclass(frozen=True)
class LogSettings:
    interval: int = 10
    """Steps between console lines."""
    validation_interval: int = 100
    """Steps between validations (always one after the last step); 0: only that one."""
    validation_samples: int = 64
    """Sequences of the held-out split in a validation, always the same ones; 0: all of it. Of a blend each source has its part."""
    sample_interval: int = 500
    """Steps between samples of generated text in TensorBoard; 0: none. An encoder writes none."""
    sample_prompt: str = "def "
    """What those samples start with; of an encoder-decoder the source, for which the likeliest target is written."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    interval: int = 500
    """Steps between checkpoints (always one after the last step); 0: only that one."""
    keep: int = 3
    """Newest checkpoints that are kept, at least 2."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """A training run: the recipe (what a person decides) and where it happens."""

    deepspeed: str = str(REPOSITORY / "ds_configs" / "zero1.json")
    """DeepSpeed's JSON: engine choices. Numbers that the recipe owns are "auto" there."""
    output: str = "runs/run"
    """Folder of the run: curves, log, checkpoints. A second start with the same one goes on."""
    size: str | None = None
    """Named size the model settings start from, such as gpt2-124m or llama3-8b; on the command line it replaces those of the recipe."""
    init: str | None = None
    """Hugging Face folder, or run folder or checkpoint of ours, whose weights training starts from; the model settings come from it."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    batch: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    distillation: DistillationSettings = dataclasses.field(default_factory=DistillationSettings)
    quantization: QuantizationSettings = dataclasses.field(default_factory=QuantizationSettings)
    hold_zeros: bool = False
    """A weight of the blocks' linear layers that is exactly 0 in init stays 0: a pruned model trains on under its mask."""
    train_steps: int | None = None
    """Length of training in optimizer steps; give this or train_tokens."""
    train_tokens: float | None = None
    """Length of training in tokens, rounded down to whole steps. As everywhere, each place of a sample counts, padding too; in an
    encoder-decoder the places of the source alone."""
    precision: Literal["bf16", "fp16", "float32"] = "bf16"
    """Type of weights and activations; bf16 and fp16 keep float32 master weights in the optimizer."""
    seed: int = 1
    """Of the fresh weights, the order of samples and dropout."""
    pipeline_stages: int | None = None
    """Stages that the layers are spread over (default: 2 where the JSON has a "pipeline" section, else 1: no pipeline)."""
    tensor_parallel_size: int = 1
    """Ranks, best of one node, that each weight matrix is cut among."""
    sequence_parallel_size: int = 1
    """Ranks that each sequence is cut among."""
    rendezvous_seconds: float = 30.0
    """Longest wait at the start until all ranks have found rank 0."""
    communication_timeout: float = 600.0
    """Seconds that a rank waits for the others before it ends: more than the slowest takes to save, to read a checkpoint or to compile."""
    preflight: bool = True
    """Compare the ranks before training, where there are several nodes or it is a SLURM job: what launch/preflight.py does."""
    recompute: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again: less memory, a third more work."""
    compile: bool = False
    """torch.compile each block: a minute at the start, faster steps."""
    log: LogSettings = dataclasses.field(default_factory=LogSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    resume: bool = False
    """Insist on going on from a checkpoint: refuse to start where there is none."""
    allow_changes: bool = False
    """Go on although settings that change the mathematics differ from those of the run so far."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for utilisation (default: its data sheet; on an unknown device a measured product)."""
    dry_run: bool = False
    """Print the plan and stop."""

    @property
    def batch_plan(self) -> BatchPlan:
        """The samples that each step reads, and the run's steps and tokens, which follow from them."""
        return BatchPlan(self.batch, self.model.sequence_length, self.train_steps, self.train_tokens)


def read_run_settings(arguments: Sequence[str]) -> RunSettings:
    """Settings from the command line over the recipe over the defaults; with neither recipe nor model, over the demo recipe.

    Raises UserError, with every complaint about their combination at once.
    """
    words = without_local_rank(arguments)
    if not any(_says(words, name) for name in ("--config", "--size", "--init")):
        words = ["--config", str(DEMO_RECIPE), *words]
    aliases = {"--deepspeed_config": "--deepspeed", "--data": "--data.path"}
    try:
        words = [*_words_of_size(words), *_words_of_length(words), *words]
        settings = read_settings(RunSettings, words, "Train a transformer with DeepSpeed.", aliases=aliases, defaults=_model_defaults)
    except UserError:
        raise
    except ValueError as error:  # the model's own complaints
        raise UserError(str(error)) from error
    _refuse_impossible(settings)
    return settings


def _words_of_size(words: list[str]) -> list[str]:
    """A size on the command line, spelt out: like everything there it lies over the recipe, and under --model.* beside it."""
    sizes = [word.removeprefix("--size=") for word in words if word.startswith("--size=")]
    sizes += [value for name, value in itertools.pairwise(words) if name == "--size"]
    if not sizes:
        return []
    shape = _defaults_as_written() | named_size(sizes[-1])
    return [f"--model.{name}={'null' if value is None else str(value).lower()}" for name, value in shape.items()]


def _words_of_length(words: list[str]) -> list[str]:
    """A length on the command line takes the place of the recipe's, also where that is counted in the other unit."""
    steps, tokens = _says(words, "--train_steps"), _says(words, "--train_tokens")
    return (["--train_steps=null"] if tokens and not steps else []) + (["--train_tokens=null"] if steps and not tokens else [])


def _says(words: list[str], name: str) -> bool:
    return any(word == name or word.startswith(f"{name}=") for word in words)


def _model_defaults(given: dict) -> dict:
    """Those of the weights that training starts from, of a size, or of every model."""
    if given.get("init") and given.get("size"):
        raise UserError(f"size {given['size']} and init {given['init']} both say what the model is; keep one of them.")
    if given.get("init"):
        written = dataclasses.asdict(_model_of_init(given["init"], given.get("output", RunSettings.output)))
    else:
        written = _defaults_as_written() | (named_size(given["size"]) if given.get("size") else {})
    return {f"model.{name}": value for name, value in written.items()}


def _model_of_init(path: str, output: str) -> ModelConfig:
    """The model whose weights lie at `path`. Raises UserError where there is none, or one that is not ours to build.

    A run that has started from there is the model of its record: the weights may be gone by then.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recipe = json.loads((Path(output) / "run.json").read_text(encoding="utf-8"))["recipe"]
        if recipe["init"] == path:
            return ModelConfig(**recipe["model"])
    from launch.checkpoints.initial import opened  # and with it torch, which a start without init imports later

    return opened(path).config


def _defaults_as_written() -> dict:
    """The model's defaults, what is derived left open: a width on the command line changes what follows from it."""
    return {field.name: field.default for field in dataclasses.fields(ModelConfig)}


def _refuse_impossible(settings: RunSettings) -> None:
    complaints = [
        f"{name} is {value}; it must be a finite number."
        for name, value in flatten(dataclasses.asdict(settings)).items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if complaints:
        raise UserError("\n".join(complaints))
    complaints += _other_than_in_init(settings)
    if settings.train_steps is None and settings.train_tokens is None:
        complaints.append("Give train_steps or train_tokens, the length of training.")
    elif settings.train_steps is not None and settings.train_tokens is not None:
        complaints.append(
            f"train_steps {settings.train_steps} and train_tokens {settings.train_tokens:g} both say how long to train; "
            "keep one and set the other to null."
        )
    elif settings.train_tokens is not None and settings.train_tokens < settings.batch_plan.tokens(0):
        complaints.append(f"train_tokens {settings.train_tokens:g} is less than one step of {settings.batch_plan.tokens(0):,} tokens.")
    positive = {
        "batch.global_batch_size": settings.batch.global_batch_size,
        "batch.micro_batch_size": 1 if settings.batch.micro_batch_size is None else settings.batch.micro_batch_size,
        "optimizer.learning_rate": settings.optimizer.learning_rate,
        "optimizer.epsilon": settings.optimizer.epsilon,
        "data.max_epochs": 1 if settings.data.max_epochs is None else settings.data.max_epochs,
        "train_steps": 1 if settings.train_steps is None else settings.train_steps,
        "log.interval": settings.log.interval,
        "rendezvous_seconds": settings.rendezvous_seconds,
        "communication_timeout": settings.communication_timeout,
        "peak_tflops": 1 if settings.peak_tflops is None else settings.peak_tflops,
        "distillation.temperature": settings.distillation.temperature,
    }
    complaints += [f"{name} is {value}; it must be above 0." for name, value in positive.items() if value <= 0]
    not_negative = {
        "optimizer.weight_decay": settings.optimizer.weight_decay,
        "optimizer.gradient_clipping": settings.optimizer.gradient_clipping,
        "schedule.warmup_steps": settings.schedule.warmup_steps,
        "schedule.min_learning_rate": settings.schedule.min_learning_rate,
        "log.validation_interval": settings.log.validation_interval,
        "log.validation_samples": settings.log.validation_samples,
        "log.sample_interval": settings.log.sample_interval,
        "checkpoint.interval": settings.checkpoint.interval,
        "loss.z_loss": settings.loss.z_loss,
        "distillation.kl_weight": settings.distillation.kl_weight,
        "distillation.cross_entropy_weight": settings.distillation.cross_entropy_weight,
    }
    complaints += [f"{name} is {value}; it may not be negative." for name, value in not_negative.items() if value < 0]
    below_one = {
        "optimizer.beta1": settings.optimizer.beta1,
        "optimizer.beta2": settings.optimizer.beta2,
        "loss.label_smoothing": settings.loss.label_smoothing,
    }
    complaints += [f"{name} is {value}; it must be at least 0 and below 1." for name, value in below_one.items() if not 0 <= value < 1]
    if not 0 < settings.schedule.decay_fraction <= 1:
        complaints.append(f"schedule.decay_fraction is {settings.schedule.decay_fraction}; it must be above 0 and at most 1.")
    if settings.schedule.min_learning_rate > settings.optimizer.learning_rate and settings.schedule.kind != "constant":
        complaints.append(
            f"schedule.min_learning_rate {settings.schedule.min_learning_rate:g} is above optimizer.learning_rate "
            f"{settings.optimizer.learning_rate:g}."
        )
    complaints += _impossible_after_compression(settings)
    if settings.checkpoint.keep < 2:
        complaints.append(
            f"checkpoint.keep is {settings.checkpoint.keep}; at least 2 are kept, so that a damaged one leaves another to go on from."
        )
    if not complaints and settings.schedule.warmup_steps >= settings.batch_plan.steps and settings.schedule.kind != "constant":
        complaints.append(
            f"schedule.warmup_steps {settings.schedule.warmup_steps} leaves nothing of the {settings.batch_plan.steps} steps. "
            f"Nearest: {max(0, settings.batch_plan.steps - 1)}."
        )
    if complaints:
        raise UserError("\n".join(complaints))


def _impossible_after_compression(settings: RunSettings) -> list[str]:
    """Of distillation, zeros that are held, and quantization-aware training."""
    complaints = []
    for name, switch in (("distillation", "teacher"), ("quantization", "bits")):
        section = getattr(settings, name)
        if getattr(section, switch) is None:
            idle = [field.name for field in dataclasses.fields(section) if getattr(section, field.name) != field.default]
            complaints += [f"{name}.{field} {getattr(section, field)} does nothing without {name}.{switch}." for field in idle]
    if not settings.distillation.kl_weight and not settings.distillation.cross_entropy_weight:
        complaints.append("distillation.kl_weight and distillation.cross_entropy_weight are both 0: nothing would be learnt.")
    if settings.distillation.teacher and not settings.distillation.cross_entropy_weight:
        idle = [name for name in ("label_smoothing", "z_loss") if getattr(settings.loss, name)]
        complaints += [f"loss.{name} does nothing while distillation.cross_entropy_weight is 0." for name in idle]
    if settings.hold_zeros and settings.init is None:
        complaints.append("hold_zeros keeps the zeros of a pruned model; give its folder as init: of fresh weights none is 0.")
    bits, size, model = settings.quantization.bits, settings.quantization.shared_by, settings.model
    if bits is not None and not 2 <= bits <= 8:
        complaints.append(f"quantization.bits is {bits}; it must be 2 to 8.")
    assert model.head_size and model.intermediate_size
    widths = model.hidden_size, model.num_attention_heads * model.head_size, model.intermediate_size
    if bits is not None and size is not None and (size < 1 or math.gcd(size, *widths) != size):
        common = math.gcd(*widths)
        fitting = [str(number) for number in range(8, min(common, 256) + 1) if common % number == 0]
        complaints.append(
            f"quantization.group_size {size} does not divide the rows of the blocks' weights, which are "
            f"{', '.join(str(width) for width in sorted(set(widths)))} long. Allowed: {', '.join([*fitting, '0 (the whole row)'])}."
        )
    return complaints


def _other_than_in_init(settings: RunSettings) -> list[str]:
    """Why the weights that training starts from do not fit the model that is asked for."""
    if settings.init is None:
        return []
    there, here = (dataclasses.asdict(model) for model in (_model_of_init(settings.init, settings.output), settings.model))
    # A pretrained encoder becomes a classifier so.
    free = (*NOT_IN_THE_WEIGHTS, "num_classes", "token_head", *(["sequence_length"] if settings.model.positions != "learned" else []))
    return [
        f"model.{name} is {here[name]}; in init {settings.init} it is {there[name]}. Leave it out, or start from other weights."
        for name in here
        if name not in free and here[name] != there[name]
    ]


def share_the_batch(settings: RunSettings, layout: Layout) -> RunSettings:
    """The same settings with a micro-batch size, where none was given. Raises UserError where the batch does not divide."""
    share = settings.batch.accumulation_steps(layout.data_parallel_size)
    size = settings.batch.micro_batch_size or micro_batch_size(share, layout.pipeline_stages)
    batch = dataclasses.replace(settings.batch, micro_batch_size=size)
    return dataclasses.replace(settings, batch=batch, pipeline_stages=layout.pipeline_stages)
