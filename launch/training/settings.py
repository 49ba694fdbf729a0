"""Settings of a training run: what a recipe and the command line can set, and what is invalid in combination.

Each field's docstring is its text in --help; its range stands in its type. launch/training/recipe.py reads the settings.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from data.command_line import UserError, add_origins, describe, joined_by_or, not_utf8, replace
from data.preparation.settings import MIN_VOCAB_SIZE
from data.sampling.batch_plan import BatchPlan, BatchSettings, Segment
from data.sampling.settings import SamplingSettings
from launch import REPOSITORY
from launch.ranks.layout import Layout, largest_micro_batch_size
from launch.training.initial_model import differences_from_init
from launch.training.schedule import seesaw
from model.config import ModelConfig


def whole_row_as_0(group_size: int | None) -> int | None:
    """Return a group size with 0 in place of -1, the name that GPTQ's configurations have for the whole row."""
    return 0 if group_size == -1 else group_size


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its numbers."""

    name: Literal["adamw", "muon", "lamb", "lars", "sgd", "lion"] = "adamw"
    """AdamW (arXiv 1711.05101); Muon (arXiv 2502.16982) for the blocks' matrices and AdamW for the rest; LAMB (arXiv 1904.00962); LARS
    (arXiv 1708.03888); SGD with momentum; Lion (arXiv 2302.06675)."""
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Learning rate after warm-up."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decay of matrices (embeddings among them) a step, as a multiple of the learning rate. Biases and norms have no decay."""
    decay: Literal["times_rate", "independent"] = "times_rate"
    """What weight_decay is multiplied by in a step: the step's learning rate, or (independent) that rate / learning_rate, so that another
    learning_rate leaves the decay as it is. Not for lamb and lars, whose trust ratio scales the decay too."""
    cautious_decay: bool = False
    """Decay a weight only where the update does not oppose it: where it also brings the weight nearer to 0 (arXiv 2510.12402)."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay rate of the running mean of gradients."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay rate of the running mean of squared gradients."""
    epsilon: Annotated[float, Gt(0)] = 1e-8
    """Value added to the root of the mean square."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """muon, lars, sgd: decay rate of the running mean (muon) or sum (lars, sgd) of gradients."""
    muon_precision: Literal["auto", "float32", "bf16"] = "auto"
    """muon: type in which matrices are orthogonalised and sent between ranks (auto: bf16 on a GPU, float32 on a CPU)."""
    gradient_clipping: Annotated[float, Ge(0)] = 1.0
    """Largest norm of the whole gradient; a larger gradient is scaled down to it. 0: no clipping."""

    @property
    def decay_coefficient(self) -> float:
        """Factor of the weights that a step subtracts, as a multiple of that step's learning rate."""
        return self.weight_decay / self.learning_rate if self.decay == "independent" else self.weight_decay

    @property
    def has_trust_ratio(self) -> bool:
        """True if each matrix has a rate of its own, which scales its decay too."""
        return self.name in ("lamb", "lars")


_OPTIMIZERS_THAT_READ: dict[str, tuple[str, ...]] = {
    "beta1": ("adamw", "muon", "lamb", "lion"),
    "beta2": ("adamw", "muon", "lamb", "lion"),
    "epsilon": ("adamw", "muon", "lamb"),
    "momentum": ("muon", "lars", "sgd"),
    "muon_precision": ("muon",),
}
"""Names of the optimizers that read a setting, for the settings that not all read."""


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate over the steps."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up. wsd (warmup-stable-decay, arXiv 2404.06395) is constant and falls at the end."""
    warmup_steps: Annotated[int, Ge(0), Lt(2**31)] | None = None
    """Steps in which the learning rate rises linearly from 0 (default: a tenth of all steps, at most 100)."""
    warmup_tokens: Annotated[float, Ge(0), Lt(1e18)] | None = None
    """Warm-up in tokens, rounded up to whole steps. Give this or warmup_steps."""
    min_learning_rate: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the end, one step after the last. Not used by kind constant."""
    decay_fraction: Annotated[float, Gt(0), Le(1)] = 0.2
    """wsd: share of the run's tokens in which the learning rate falls linearly."""


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Terms of the training loss. The validation loss is always plain cross-entropy."""

    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each target's probability that is spread over the whole vocabulary (Szegedy et al. 2015, arXiv 1512.00567, section 7;
    Vaswani et al. 2017 used 0.1)."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Weight of the squared logarithm of the softmax denominator. It keeps logits from drifting (PaLM, arXiv 2204.02311, section 5,
    used 1e-4)."""


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    """Learning from the predictions of a teacher model (Hinton et al. 2015, arXiv 1503.02531), in training only."""

    teacher: str | None = None
    """Run folder, checkpoint or Hugging Face folder of the teacher model. Every rank that computes the loss holds the whole teacher
    (default: no teacher)."""
    kl_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of temperature^2 KL(teacher || model), in nats a target token."""
    cross_entropy_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the loss against the targets, with its smoothing and z_loss. (After pruning arXiv 2407.14679 uses 0; in our own
    measurement both losses together were better than either alone.)"""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Softmax temperature applied to teacher and student. Above 1, tokens that the teacher finds unlikely count more."""


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """Quantization-aware training of the blocks' linear layers."""

    bits: Annotated[int, Ge(2), Le(8)] | None = None
    """Bits of the integers that weights are rounded to, in training and validation, as launch/quantize.py --method rtn rounds them.
    The weights that are trained and saved stay unrounded (straight-through estimator, Bengio et al. 2013, arXiv 1308.3432; default:
    no rounding)."""
    group_size: Annotated[int, Ge(-1)] | None = None
    """Entries of a weight's row that share a scale. 0 or -1: the whole row (default: 128 for integers below 8 bits, else the whole row)."""
    symmetric: bool = True
    """True if zero is the middle of the integers; false if each group has its own zero point."""
    activations: Literal["none", "int8"] = "none"
    """Type that the inputs of those layers are rounded to, with one scale a token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_size", whole_row_as_0(self.group_size))

    @property
    def entries_per_scale(self) -> int | None:
        """Entries of a row that share a scale; None: the whole row."""
        if self.group_size is None:
            return 128 if self.bits is not None and self.bits < 8 else None
        return self.group_size or None


@dataclasses.dataclass(frozen=True)
class DataSettings(SamplingSettings):
    """Data that the run reads, and the samples made of it."""

    path: tuple[str, ...] = ("prepared",)
    """Folder that data/prepare.py wrote, or several folders to blend. If the default folder is missing, the embedded corpus is prepared
    into it."""
    max_epochs: Annotated[float, Gt(0)] | None = None
    """Largest number of epochs that a run may read of a folder. A run that would read more is refused before it starts (default: no
    limit)."""
    vocab_size: Annotated[int, Ge(MIN_VOCAB_SIZE), Lt(2**31)] = 4096
    """Vocabulary size of the tokenizer that is trained if the embedded corpus has to be prepared."""


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """Log lines, validation and generated samples."""

    interval: Annotated[int, Gt(0)] = 10
    """Steps between log lines on the console."""
    validation_interval: Annotated[int, Ge(0)] = 100
    """Steps between validations. There is always one after the last step. 0: only that one."""
    validation_samples: Annotated[int, Ge(0)] = 64
    """Sequences of the validation split in a validation, always the same ones. 0: all of them. In a blend they are shared by the
    sources."""
    sample_interval: Annotated[int, Ge(0)] = 500
    """Steps between generated texts in TensorBoard. 0: none. An encoder generates none."""
    sample_prompt: str = "def "
    """Text that a decoder continues in those samples. An encoder-decoder takes it as the source and writes the likeliest target."""
    noise_scale: bool = False
    """Estimate the gradient noise scale, a lower bound of the largest useful batch (McCandlish et al. 2018, arXiv 1812.06162), and write
    it to TensorBoard. A step must have two micro-batches or more: with one data rank the default batch.micro_batch_size is at most
    half of the smallest batch."""
    noise_horizon: Annotated[int, Ge(10)] = 50
    """Horizon of the noise scale's running means, in steps of the run's largest batch. A step with fewer sequences counts less."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are saved, and how many are kept."""

    interval: Annotated[int, Ge(0)] = 500
    """Steps between checkpoints. There is always one after the last step. 0: only that one."""
    keep: Annotated[int, Ge(2)] = 3
    """Number of newest checkpoints to keep. At least 2, so that training can resume if one of them is damaged."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """A training run: the recipe and where it runs."""

    deepspeed: str = str(REPOSITORY / "ds_configs" / "zero1.json")
    """DeepSpeed's JSON file with the engine choices. Numbers that the recipe sets are "auto" in it."""
    output: str = "runs/run"
    """Folder of the run: curves, log, checkpoints. A second start with the same folder resumes the run."""
    size: str | None = None
    """Named size that the model settings start from, such as gpt2-124m or llama3-8b. On the command line it replaces the model settings
    of the recipe."""
    init: str | None = None
    """Hugging Face folder, run folder or checkpoint with the weights that training starts from. The model settings come from it."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    batch: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)
    distillation: DistillationSettings = dataclasses.field(default_factory=DistillationSettings)
    quantization: QuantizationSettings = dataclasses.field(default_factory=QuantizationSettings)
    hold_zeros: bool = False
    """Keep every weight of the blocks' linear layers at 0 that is exactly 0 in init, so that a pruned model stays sparse."""
    train_steps: Annotated[int, Gt(0), Lt(2**31)] | None = None
    """Length of training in optimizer steps. Give this or train_tokens."""
    train_tokens: Annotated[float, Gt(0), Lt(1e18)] | None = None
    """Length of training in tokens, rounded down to whole steps. Every position of a sample counts, padding too. In an encoder-decoder
    only the positions of the source count."""
    pause_tokens: Annotated[float, Gt(0), Lt(1e18)] | None = None
    """Stop before the end, after the first step that has read this many tokens: validate, save a checkpoint and end with status 85. The
    schedule stays that of the whole run. The same command with a larger value, or without it, resumes (default: no pause)."""
    precision: Literal["bf16", "fp16", "float32"] = "bf16"
    """Type of weights and activations. With bf16 and fp16 the optimizer keeps float32 master weights."""
    seed: int = 1
    """Seed for weight initialisation, sample order and dropout."""
    pipeline_stages: Annotated[int, Ge(1)] | None = None
    """Pipeline stages that the layers are divided among (default: 2 if the DeepSpeed JSON has a "pipeline" section, else 1: no
    pipeline)."""
    tensor_parallel_size: Annotated[int, Ge(1)] = 1
    """Ranks that each weight matrix is divided among, best on one node."""
    sequence_parallel_size: Annotated[int, Ge(1)] = 1
    """Ranks that each sequence is divided among."""
    rendezvous_seconds: Annotated[float, Gt(0)] = 30.0
    """Longest wait at the start for all ranks to connect to rank 0, in seconds."""
    communication_timeout: Annotated[float, Gt(0)] = 600.0
    """Longest wait of a rank for the other ranks, in seconds, before it stops. It must be longer than the slowest rank takes to save
    or read a checkpoint, or to compile."""
    preflight: bool = True
    """Compare the ranks before training, as launch/preflight.py does. Only with several nodes or in a SLURM job."""
    recompute: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again. This needs less memory and a third more
    computation."""
    compile: bool = False
    """Compile each block with torch.compile. This takes a minute at the start and makes steps faster."""
    log: LogSettings = dataclasses.field(default_factory=LogSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    resume: bool = False
    """Resume from a checkpoint, and refuse to start if there is none."""
    allow_changes: bool = False
    """Resume even if settings that change the mathematics differ from those of the run so far. With another batch size the run reads
    the next samples, and train_steps or train_tokens, whichever is given, stays."""
    peak_tflops: Annotated[float, Gt(0)] | None = None
    """Peak speed of one device in TFLOP/s, for utilisation (default: from its data sheet; on an unknown GPU a measured matrix product; on a
    CPU none, and MFU is not shown)."""
    dry_run: bool = False
    """Print the plan and stop."""

    @property
    def batch_plan(self) -> BatchPlan:
        """The samples that each step reads, and the run's steps and tokens, which follow from them. (For a resume: Start.plan.)"""
        if not self.batch.is_seesaw:
            return BatchPlan(self.batch, self.model.sequence_length, self.train_steps, self.train_tokens)
        schedule, plan = self.schedule, self._plan_of_one_size
        return seesaw(
            plan,
            schedule.kind,
            self.warmup_steps_in(plan),
            schedule.min_learning_rate,
            self.optimizer.learning_rate,
            schedule.decay_fraction,
        )

    @property
    def _plan_of_one_size(self) -> BatchPlan:
        """The plan of a run whose batch always has global_batch_size."""
        segments = (Segment(0, 0, self.batch.global_batch_size),)
        return BatchPlan(self.batch, self.model.sequence_length, self.train_steps, self.train_tokens, segments)

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up of a run that has not been resumed."""
        return self.warmup_steps_in(self.batch_plan)

    def warmup_steps_in(self, plan: BatchPlan) -> int:
        """Return the steps of warm-up: those that were set, else the default, which follows the length of the run."""
        if self.batch.is_seesaw:
            plan = self._plan_of_one_size  # on whose rates the ramp depends
        if self.schedule.warmup_tokens is not None:
            return plan.steps_to_read(self.schedule.warmup_tokens)
        chosen = self.schedule.warmup_steps
        return min(100, plan.steps // 10) if chosen is None else chosen

    def pause_step(self, plan: BatchPlan) -> int:
        """Return the number of steps after which a run that reads the samples of `plan` stops."""
        return plan.steps if self.pause_tokens is None else min(plan.steps_to_read(self.pause_tokens), plan.steps)

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is invalid. Ranges are checked before."""
        return [
            *not_utf8("log.sample_prompt", self.log.sample_prompt),
            *_complaints_about_init(self),
            *_complaints_about_length(self),
            *_complaints_about_learning_rate(self),
            *_complaints_about_optimizer(self),
            *_complaints_about_distillation(self),
            *_complaints_about_quantization(self),
            *_complaints_about_objective(self),
            *_complaints_about_horizon(self),
        ]


def _complaints_about_init(settings: RunSettings) -> list[str]:
    complaints = []
    if settings.hold_zeros and settings.init is None:
        complaints.append(f"{describe(settings, 'hold_zeros')} needs init: give the folder of the pruned model whose zeros are kept.")
    if settings.init is not None and settings.size is not None:
        complaints.append(f"{describe(settings, 'size')} and {describe(settings, 'init')} both set the model; keep one of them.")
    elif settings.init is not None:
        complaints += [
            f"{describe(settings, f'model.{name}')} differs from init {settings.init}, where it is {value}. "
            "Remove the setting, or start from other weights."
            for name, value in differences_from_init(settings.model, settings.init, settings.output).items()
        ]
    return complaints


def _complaints_about_length(settings: RunSettings) -> list[str]:
    steps, tokens = describe(settings, "train_steps"), describe(settings, "train_tokens")
    if settings.train_steps is None and settings.train_tokens is None:
        return ["Give train_steps or train_tokens, the length of training."]
    if settings.train_steps is not None and settings.train_tokens is not None:
        return [f"{steps} and {tokens} both set the length of training; keep one and set the other to null."]
    complaints = _complaints_about_ramp(settings)
    if settings.schedule.warmup_steps is not None and settings.schedule.warmup_tokens is not None:
        given = [describe(settings, f"schedule.{name}") for name in ("warmup_steps", "warmup_tokens")]
        complaints.append(f"{given[0]} and {given[1]} both set the warm-up; keep one and set the other to null.")
    elif not (Path(settings.output) / "run.json").exists():  # the steps of a run that resumes are not known here
        complaints += _complaints_about_steps(settings, settings.batch_plan if not settings.batch.is_seesaw else settings._plan_of_one_size)
    return complaints


def _complaints_about_steps(settings: RunSettings, plan: BatchPlan) -> list[str]:
    """Return a message if a run that reads the samples of `plan` is shorter than a step or ends before its warm-up."""
    steps, tokens = describe(settings, "train_steps"), describe(settings, "train_tokens")
    length, warmup_steps = describe(settings, "model.sequence_length"), settings.warmup_steps_in(plan)
    size = describe(settings, "batch.global_batch_size")
    if plan.size(0) != settings.batch.global_batch_size:
        size = (
            f"{plan.size(0)} sequences, the first size of {describe(settings, 'batch.ramp')}," if settings.batch.ramp else f"{plan.size(0)}"
        )
    if settings.train_tokens is not None and settings.train_tokens < plan.tokens(0):
        return [f"{tokens} is less than one step, which is {size} x {length} = {plan.tokens(0):,} tokens."]
    if warmup_steps < plan.steps or settings.schedule.kind == "constant":
        return []
    if settings.schedule.warmup_tokens is not None:
        most = f"{plan.tokens_before(plan.steps - 1):,}, the tokens of all steps but the last of "
        most += tokens if settings.train_tokens is not None else steps
        return [f"{describe(settings, 'schedule.warmup_tokens')} is too long: it must be at most {most}."]
    of_a_step = f" with {size} x {length}" if len(plan.segments) == 1 else ""
    most = steps if settings.train_steps is not None else f"{plan.steps}, the steps of {tokens}{of_a_step}"
    return [
        f"{describe(settings, 'schedule.warmup_steps')} must be below {most}. "
        f"Use --schedule.warmup_steps {plan.steps - 1}{' or less' if plan.steps > 1 else ''}."
    ]


def _complaints_about_ramp(settings: RunSettings) -> list[str]:
    batch, ramp = settings.batch, describe(settings, "batch.ramp")
    if batch.ramp is None:
        rules = [name for name in ("rate_rule", "beta2_rule") if getattr(batch, name) != getattr(BatchSettings, name)]
        return [f"{describe(settings, f'batch.{name}')} has no effect without batch.ramp." for name in rules]
    if not batch.is_seesaw:
        return []
    complaints = []
    if settings.schedule.kind == "constant":
        complaints.append(f"{ramp} needs a schedule whose rate falls; that of {describe(settings, 'schedule.kind')} never falls.")
    if settings.train_tokens is None:
        complaints.append(
            f"{ramp} needs train_tokens in place of {describe(settings, 'train_steps')}: the ramp decides the number of steps."
        )
    if batch.rate_rule != "sqrt":
        complaints.append(f"{describe(settings, 'batch.rate_rule')} does not apply to {ramp}, whose rate follows the root of the size.")
    return complaints


def _complaints_about_learning_rate(settings: RunSettings) -> list[str]:
    if settings.schedule.min_learning_rate <= settings.optimizer.learning_rate or settings.schedule.kind == "constant":
        return []
    return [f"{describe(settings, 'schedule.min_learning_rate')} must not be above {describe(settings, 'optimizer.learning_rate')}."]


def _complaints_about_optimizer(settings: RunSettings) -> list[str]:
    chosen, default = settings.optimizer, OptimizerSettings()
    changed = {
        f"optimizer.{field}": names for field, names in _OPTIMIZERS_THAT_READ.items() if getattr(chosen, field) != getattr(default, field)
    }
    if settings.batch.beta2_rule != BatchSettings.beta2_rule:
        changed["batch.beta2_rule"] = _OPTIMIZERS_THAT_READ["beta2"]
    complaints = [
        f"{describe(settings, field)} has no effect with {describe(settings, 'optimizer.name')}. Remove it, or use optimizer.name "
        f"{joined_by_or(names)}."
        for field, names in changed.items()
        if chosen.name not in names
    ]
    if chosen.decay == "independent" and chosen.has_trust_ratio:
        complaints.append(
            f"{describe(settings, 'optimizer.decay')} is not supported with {describe(settings, 'optimizer.name')}, whose trust ratio "
            "scales the decay too. Use --optimizer.decay times_rate."
        )
    if chosen.weight_decay == 0:
        complaints += [
            f"{describe(settings, f'optimizer.{field}')} has no effect with {describe(settings, 'optimizer.weight_decay')}. "
            "Remove one of them."
            for field in ("decay", "cautious_decay")
            if getattr(chosen, field) != getattr(default, field)
        ]
    return complaints


def _complaints_about_distillation(settings: RunSettings) -> list[str]:
    complaints = _without_effect(settings, "distillation", "teacher")
    weights = [describe(settings, f"distillation.{name}") for name in ("kl_weight", "cross_entropy_weight")]
    if not settings.distillation.kl_weight and not settings.distillation.cross_entropy_weight:
        complaints.append(f"{' and '.join(weights)} leave nothing to learn. Set one of them above 0.")
    if settings.distillation.teacher and not settings.distillation.cross_entropy_weight:
        unused = [name for name in ("loss.label_smoothing", "loss.z_loss") if getattr(settings.loss, name.removeprefix("loss."))]
        complaints += [f"{describe(settings, name)} has no effect with {weights[1]}." for name in unused]
    return complaints


def _complaints_about_quantization(settings: RunSettings) -> list[str]:
    complaints = _without_effect(settings, "quantization", "bits")
    size, model = settings.quantization.entries_per_scale, settings.model
    widths = model.hidden_size, model.num_attention_heads * model.head_size, model.intermediate_size
    if settings.quantization.bits is not None and size is not None and math.gcd(size, *widths) != size:
        common = math.gcd(*widths)
        allowed = [str(number) for number in range(8, min(common, 256) + 1) if common % number == 0]
        given = describe(settings, "quantization.group_size").replace("group_size null", f"group_size {size}")
        complaints.append(
            f"{given} does not divide the rows of the blocks' weights, which have {', '.join(map(str, sorted(set(widths))))} entries "
            f"(model.hidden_size, model.num_attention_heads x model.head_size, model.intermediate_size). "
            f"Use {', '.join(allowed)}{' or ' if allowed else ''}0 (the whole row)."
        )
    return complaints


def _complaints_about_objective(settings: RunSettings) -> list[str]:
    from data.sampling.objectives import table  # imports numpy, which --help does not need

    model = settings.model
    shape = table.ModelShape(model.sequence_length, model.document_mask, model.architecture, model.token_types)
    return [add_origins(complaint, settings) for complaint in table.objective_complaints(settings.data, shape)]


def _complaints_about_horizon(settings: RunSettings) -> list[str]:
    if settings.log.noise_scale or settings.log.noise_horizon == LogSettings.noise_horizon:
        return []
    return [f"{describe(settings, 'log.noise_horizon')} has no effect without log.noise_scale."]


def _without_effect(settings: RunSettings, section: str, switch: str) -> list[str]:
    """Return a message for each setting of a section that has no effect because the setting that switches the section on is null."""
    chosen = getattr(settings, section)
    if getattr(chosen, switch) is not None:
        return []
    unused = [field.name for field in dataclasses.fields(chosen) if getattr(chosen, field.name) != field.default]
    return [f"{describe(settings, f'{section}.{name}')} has no effect without {section}.{switch}." for name in unused]


def share_the_batch(
    settings: RunSettings, layout: Layout, plan: BatchPlan | None = None, first_step: int = 0, most: int | None = None
) -> RunSettings:
    """Return the settings with a micro-batch size and warm-up, if none were given.

    `plan` and `first_step` are those of a run that resumes. `most` is the largest default micro-batch (None: no limit). Raises UserError
    if the run ends before its warm-up, or if a size of the batch that is still to come cannot be shared by the ranks or has no noise scale.
    """
    plan = plan or settings.batch_plan
    if complaints := _complaints_about_steps(settings, plan):
        raise UserError("\n".join(complaints))
    sizes: Sequence[int] = plan.sizes_from(first_step)
    try:
        shares = [settings.batch.accumulation_steps(layout.data_parallel_size, size=size) for size in sizes]
    except UserError as error:
        raise UserError(add_origins(str(error), settings)) from error
    if settings.batch.ramp:  # a run that resumes keeps the micro-batches of one that never stopped, and so its bits
        shares += [size // layout.data_parallel_size for size in plan.sizes_from(0) if size % layout.data_parallel_size == 0]
    least = 2 if settings.log.noise_scale and layout.data_parallel_size == 1 else 1
    size = settings.batch.micro_batch_size or _micro_batch_size(shares, layout.pipeline_stages, least, most)
    batch = dataclasses.replace(settings.batch, micro_batch_size=size)
    schedule = settings.schedule
    if schedule.warmup_tokens is None:
        schedule = dataclasses.replace(schedule, warmup_steps=settings.warmup_steps_in(plan))
    shared = replace(settings, batch=batch, schedule=schedule, pipeline_stages=layout.pipeline_stages)
    if settings.log.noise_scale and (complaint := _why_noise_cannot_be_measured(settings, shared.batch, layout, sizes)):
        raise UserError(complaint)
    return shared


def _why_noise_cannot_be_measured(settings: RunSettings, batch: BatchSettings, layout: Layout, sizes: Sequence[int]) -> str | None:
    """Return a message if the gradients of micro-batches cannot be compared.

    `batch` has a micro-batch size; `sizes` are the sequences of the steps that the run still takes.
    """
    wanted, smallest = describe(settings, "log.noise_scale"), min(sizes)
    if layout.sequence_parallel_size > 1:
        return (
            f"{wanted} is not supported with {describe(settings, 'sequence_parallel_size')}: each rank has only a part of the gradient "
            "of a sequence. Use --sequence_parallel_size 1 or --log.noise_scale false."
        )
    assert batch.micro_batch_size is not None
    if smallest > batch.micro_batch_size:
        return None
    size = next((size for size in range(smallest // 2, 0, -1) if math.gcd(*sizes) % size == 0), None)
    larger = "sizes of 2 or more in --batch.ramp" if batch.ramp else "--batch.global_batch_size 2 or more"
    advice = f"--batch.micro_batch_size {size}" if size else larger
    step = f"a step of {smallest} sequence{'s' if smallest > 1 else ''}"
    return f"{wanted} needs at least two micro-batches a step, and {step} has one. Use {advice}."


def _micro_batch_size(shares: Sequence[int], stages: int, least: int, most: int | None) -> int:
    """Return the default micro-batch size for a rank's shares of all sizes of the batch: the largest up to `most` that divides them.

    Each share has `least` micro-batches or more, if it has as many sequences.
    """
    largest = min(largest_micro_batch_size(min(shares), stages), max(1, min(shares) // least), most or min(shares))
    return next(size for size in range(largest, 0, -1) if math.gcd(*shares) % size == 0)
