"""The engine: DeepSpeed with a few methods (train_step, validate, sample, save, load), through which everything else uses it."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from data.sampling.batches import Batch, target_classes, target_tokens
from launch.checkpoints.initial import InitialWeights
from launch.checkpoints.state import Region, ShardSlice, whole_region
from launch.evaluation.score import Score
from launch.evaluation.tasks.table import task_named
from launch.ranks.collectives import Ranks
from launch.ranks.layout import Layout
from launch.ranks.processes import Process, device_index, device_name
from launch.training import parallel, saving
from launch.training.deepspeed_state import OptimizerState
from launch.training.gradient_squares import GradientSquares, SquaresMeter
from launch.training.optimizers import optimizer_for
from launch.training.optimizers.base import is_matrix, scalars_of
from launch.training.optimizers.beta2 import change_beta2, count_step
from launch.training.optimizers.pieces import Pieces
from launch.training.settings import RunSettings
from launch.training.stopwatch import Stopwatch
from launch.training.teacher import Teacher, fingerprint
from model.cache import KeyValueCache
from model.compression.fake_quantization import fake_quantize
from model.compression.grids import Grid
from model.generation import generate
from model.loss import Labels, Teaching
from model.transformer import Block, Transformer


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The result of one optimizer step; the same on every rank, except `seconds`."""

    loss: float
    """Mean training loss in nats per target token of the global batch; plus, with classes, the mean per class. It includes label
    smoothing, z-loss and distillation."""
    gradient_norm: float
    """Norm of the whole gradient, before clipping."""
    skipped: bool
    """True if a gradient was not finite and no weight was changed."""
    stop_asked: bool
    """True if any rank was asked to stop."""
    loss_scale: float | None
    """Loss scale of fp16; None in other precisions."""
    seconds: dict[str, float]
    """Seconds of this rank by part: forward, backward, optimizer; in a pipeline also passing (sending, receiving, and waiting for both).
    Of an optimizer that needs whole parameters also exchange, a part of optimizer."""
    scalars: dict[str, float]
    """More scalars by their TensorBoard tag, the same on every rank; empty unless they were asked for."""
    squares: GradientSquares | None = None
    """Squared gradient norms of the step; None without log.noise_scale, and for a skipped step."""


class Engine:
    """A model that trains under DeepSpeed. Every rank has this object, and every method is called by every rank."""

    def __init__(self, settings: RunSettings, merged_json: dict, process: Process, layout: Layout):
        """Build the model and its optimizer as `merged_json`, DeepSpeed's completed JSON, and `layout` ask for."""
        self.config = settings.model
        self.process = process
        self.layout = layout
        self.device = torch.device(device_name(), device_index(process)) if device_name() == "cuda" else torch.device("cpu")
        self.ranks = Ranks(process, self.device)
        self.zero_stage = merged_json["zero_optimization"].get("stage", 0)
        self.current_step = 0
        self._seed = settings.seed
        self._loss, self._distillation = settings.loss, settings.distillation
        self.task = task_named(settings.data.objective, settings.model.architecture)
        self._micro_batches_seen: dict[int, int] = {}  # by layer, in the current step
        self._optimizer = optimizer = optimizer_for(settings.optimizer)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the pipeline's parts, and its memory use many times
            mpu = None
            if "tensor_parallel" in merged_json:
                groups._init_tp_mesh_device(tensor_model_parallel_size=layout.tensor_parallel_size)
                mpu = groups
            model = self._build(merged_json, settings.recompute, mpu)
            self._change_modules(model, settings)
            built = optimizer.build(model)
            if type(built) not in ZERO_SUPPORTED_OPTIMIZERS:  # of others DeepSpeed warns in each run: "untested optimizer"
                ZERO_SUPPORTED_OPTIMIZERS.append(type(built))
            # DeepSpeed's engine, of whose attributes few have types.
            self._deepspeed: Any = deepspeed.initialize(model=model, optimizer=built, config=merged_json, mpu=mpu)[0]
        self._model = self._deepspeed.module
        if settings.hold_zeros:
            _hold_zeros(self._model, built)
        self._teacher: Transformer | None = None
        if self._distillation.teacher and self._computes_loss:
            teacher = Teacher(self._distillation.teacher, self.config)
            self._teacher = teacher.network(self.device, next(self._model.parameters()).dtype)
        for name, layer in self._model.named_children():
            if self.config.dropout and name.isdigit():
                layer.register_forward_pre_hook(functools.partial(self._seed_dropout, int(name)))
        self._state = OptimizerState(self._deepspeed, optimizer, self._region_of, self._is_replica)
        self._built = built
        self.pieces: Pieces | None = None
        """Where the parameters of this pipeline stage are; None if the optimizer does not need it."""
        if optimizer.needs_pieces:
            held = self._state.pieces(layout.stage_place(process.rank), self._is_replica_in_stage)
            self.pieces = Pieces(self._state.tensors, held, layout, process.rank, self.device)
            optimizer.attach(built, self.pieces)
        self._squares: SquaresMeter | None = None
        if settings.log.noise_scale:  # the last hooks on parameters: they see what the others make of a gradient
            clipping = settings.optimizer.gradient_clipping
            self._squares = SquaresMeter(self._model, built, self._state, layout, clipping, is_model_parallel_parameter)

    def _build(self, merged_json: dict, recompute: bool, mpu: ModuleType | None) -> nn.Module:
        """Return the model as DeepSpeed gets it; `mpu` has the groups of tensor parallelism, if any."""
        data_group = mpu.get_data_parallel_group() if mpu else None
        with deepspeed.zero.Init(config_dict_or_path=merged_json, enabled=self.zero_stage == 3, mpu=mpu, data_parallel_group=data_group):
            model = Transformer(self.config, self._seed, recompute)
        for buffer in model.buffers():  # under ZeRO-3 DeepSpeed moves only parameters
            buffer.data = buffer.data.to(self.device)
        return model

    def _change_modules(self, model: nn.Module, settings: RunSettings) -> None:
        """Apply sequence parallelism, rounding of weights, and compilation to the modules that the settings ask for."""
        if self.layout.sequence_parallel_size > 1:
            parallel.split_sequences(model, self.config.sequence_length, self.layout, self.process.rank)
        rounding = settings.quantization
        for block in _blocks(model):
            if rounding.bits is not None:
                fake_quantize(block, Grid("int", rounding.bits, rounding.entries_per_scale, rounding.symmetric), rounding.activations)
            if settings.compile:
                block.compile()

    @property
    def _computes_loss(self) -> bool:
        """True if this rank has the model's outputs and computes the loss from them."""
        return True

    def teacher_fingerprint(self) -> str | None:
        """Return a hash of the teacher's weights, the same on every rank; None without a teacher."""
        if self._distillation.teacher is None:
            return None
        found = self.ranks.all_gather(fingerprint(self._teacher) if self._teacher is not None else None)
        return next(one for one in found if one is not None)

    def train_step(
        self,
        micro_batches: list[Batch],
        learning_rate: float,
        step: int,
        stop_asked: bool = False,
        with_scalars: bool = False,
        beta2: float | None = None,
    ) -> StepReport:
        """Take optimizer step `step` on this data rank's micro-batches of it. `beta2`, if it is given, replaces that of the step before."""
        self.current_step, self._micro_batches_seen = step, {}
        self._accumulate(len(micro_batches))
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        change_beta2(self._built, beta2, lambda: self._state.steps)
        micro_batches = [self._part_of(batch) for batch in micro_batches]
        counts = self.ranks.sum([target_tokens(micro_batches), target_classes(micro_batches)])
        parts = len(micro_batches) * self.layout.zero_size
        divisors = [torch.tensor(max(1, count / self.layout.num_replicas) / parts, device=self.device) for count in counts]
        watch = Stopwatch(self.device)
        loss_scale = self._loss_scale  # that of the gradients: the step may change it
        if self.pieces is not None:
            self.pieces.watch, self.pieces.is_reported = watch, with_scalars
        loss, gradient_norm, skipped = self._step_on(micro_batches, divisors, watch)
        if not skipped:
            count_step(self._built)
        summands = self._squares.take() if self._squares else []
        loss_sum, stops, *sums = self.ranks.sum([loss, float(stop_asked), *summands])
        squares = None
        if self._squares and not skipped:
            counts_and_scales = len(micro_batches), len(micro_batches[0].tokens), gradient_norm, loss_scale or 1.0
            squares = self._squares.squares_of(sums, *counts_and_scales)
        return StepReport(
            loss=loss_sum / self.process.world_size,
            gradient_norm=gradient_norm,
            skipped=skipped,
            stop_asked=stops > 0,
            loss_scale=self._loss_scale,
            seconds=watch.seconds(),
            scalars=self._scalars() if with_scalars and not skipped else {},
            squares=squares,
        )

    @property
    def _loss_scale(self) -> float | None:
        """Loss scale of fp16; None in other precisions."""
        return float(self._deepspeed.optimizer.loss_scale) if self._deepspeed.fp16_enabled() else None

    def _scalars(self) -> dict[str, float]:
        """Return scalars about the last step, of the parameters of all pipeline stages."""
        if self.pieces is None:
            return {}
        updates = self._optimizer.report(self._built)
        if self.layout.pipeline_stages > 1:
            of_stages = self.ranks.all_gather(updates if self.pieces.place == 0 else {})
            updates = {name: update for stage in of_stages for name, update in stage.items()}
        return scalars_of(updates)

    def _accumulate(self, num_micro_batches: int) -> None:
        """Tell DeepSpeed the number of micro-batches of the next step.

        DeepSpeed 0.19.8 counts micro-batches over all steps: without a new start it would take the next steps too early after a change.
        With offload under ZeRO-1 and -2 the optimizer has a number of its own, which decides how the gradient norm is computed.
        """
        engine = self._deepspeed
        if num_micro_batches == engine.gradient_accumulation_steps():
            return
        engine.set_train_batch_size(num_micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        engine.micro_steps = 0
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = num_micro_batches

    def _step_on(self, micro_batches: list[Batch], divisors: list[Tensor], watch: Stopwatch) -> tuple[float, float, bool]:
        """Return the loss of this rank (the mean over all ranks is the step's loss), the gradient norm, and True if no weight changed."""
        engine = self._deepspeed
        engine.train()
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            assert engine.is_gradient_accumulation_boundary() == (number == len(micro_batches)), "DeepSpeed would step too early"
            batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
            with watch.measure("forward"):
                loss = self._training_loss(engine(*batch.inputs), labels_of(batch, divisors), batch.inputs)
                total += loss.detach()
            with watch.measure("backward"):
                engine.backward(loss)
            with watch.measure("optimizer"):
                if self.zero_stage == 0 and engine.is_gradient_accumulation_boundary():
                    return (float(total) / len(micro_batches), *self._plain_step())
                engine.step()
        return (float(total) / len(micro_batches), *self._norm_and_overflow())

    def _training_loss(self, outputs: Tensor | tuple[Tensor, Tensor], labels: Labels, inputs: Sequence[Tensor]) -> Tensor:
        """Return the loss of a micro-batch; a teacher reads its inputs."""
        teaching = None
        if self._teacher is not None:
            with torch.no_grad():
                logits = self._teacher(*inputs)
            weights = self._distillation.kl_weight, self._distillation.cross_entropy_weight
            teaching = Teaching(logits, *weights, self._distillation.temperature)
        return self.task.training_loss(outputs, labels, self._loss.label_smoothing, self._loss.z_loss, teaching)

    def _norm_and_overflow(self) -> tuple[float, bool]:
        """Return the gradient norm of the last step, and True if it was not finite and the step was skipped."""
        norm = float(self._deepspeed.get_global_grad_norm())
        return norm, bool(getattr(self._deepspeed.optimizer, "overflow", False)) or not math.isfinite(norm)

    def validate(self, batches: Iterable[Batch]) -> Score:
        """Return the score over the batches of all data ranks, which have the same number of batches."""
        self._deepspeed.eval()
        return self._over_ranks(self.task.measure(self._model, map(self._part_of, batches), self.device), self.layout.num_replicas)

    def _over_ranks(self, score: Score, num_replicas: int) -> Score:
        """Return the sum of all ranks' scores, each of which `num_replicas` ranks have."""
        summed = self.ranks.sum(list(dataclasses.astuple(score)))
        token_loss, tokens, class_loss, classes, right = (total / num_replicas for total in summed)
        return Score(token_loss, round(tokens), class_loss, round(classes), round(right))

    def sample(
        self, prompt: list[int], new_tokens: int, temperature: float, seed: int, vocab_size: int, source: list[int] | None = None
    ) -> list[int]:
        """Return `new_tokens` generated token ids below `vocab_size` that follow `prompt`.

        Their number is fixed, because under ZeRO-3 every rank must run the model equally often. An encoder-decoder generates the
        target of `source`; its prompt is the start token.
        """
        self._deepspeed.eval()
        tokens = torch.tensor([prompt], device=self.device)
        read = self._read
        if source is not None:
            sources = torch.tensor([source], device=self.device)
            read = functools.partial(self._read, sources, torch.ones_like(sources))
        drawn: Iterator[Tensor] = generate(
            read,
            tokens,
            new_tokens,
            temperature=temperature,
            seed=seed,
            sequence_length=self.config.sequence_length,
            vocab_size=vocab_size,
            prefix_attention=self.config.prefix_attention,
        )
        return [int(ids[0]) for ids in drawn]

    def _read(self, *inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """Return logits [1, seq, vocab] of tokens that follow those in the cache, as `generate` needs them."""
        return self._model(*inputs, cache=cache)

    def save(self, root: Path, step: int, about: dict) -> str | None:
        """Write and publish the checkpoint of `step`, whose manifest begins with `about`. Return the error message of any rank, or None.

        A failure on any rank leaves the checkpoints as they were, and training can continue.
        """
        return saving.save(self._state, self.config, self.ranks, root, step, about)

    def load(self, folder: Path) -> None:
        """Read weights, optimizer states and loss scale from a checkpoint of any layout.

        Raises, on every rank, UserError if it does not hold this model with this optimizer, and RuntimeError if the values in memory
        then have other checksums than the saved values.
        """
        saving.load(self._state, self.config, self.ranks, folder)

    def start_from(self, weights: InitialWeights) -> str:
        """Read the weights of another model before the first step. Return a hash of the resulting weights, the same on every rank.

        Raises UserError on every rank if a shape differs.
        """
        return saving.start_from(self._state, self.config, self.ranks, weights)

    def _region_of(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], Region] | None:
        """Return the whole shape of a parameter, and the region of it that this rank has before ZeRO divides it.

        None if it is not a parameter of the model.
        """
        return parallel.region_of(parameter, self.layout.tensor_rank(self.process.rank))

    def _is_replica(self, shard_slice: ShardSlice, parameter: Any) -> bool:
        """True if another rank writes this slice into checkpoints."""
        return self._is_replica_in_stage(shard_slice)

    def _is_replica_in_stage(self, shard_slice: ShardSlice) -> bool:
        """True if a lower rank of the same pipeline stage has the same values."""
        rank, layout = self.process.rank, self.layout
        is_whole = shard_slice.region == whole_region(shard_slice.shape)
        is_zero_replica = self.zero_stage == 0 and rank // layout.tensor_parallel_size % layout.zero_size > 0
        return is_zero_replica or (is_whole and layout.tensor_rank(rank) > 0)

    def _part_of(self, batch: Batch) -> Batch:
        """Return this rank's part of the tokens and targets of each sequence. Segments stay whole, because attention needs them all."""
        if self.layout.sequence_parallel_size == 1:
            return batch
        size = batch.tokens.shape[1] // self.layout.sequence_parallel_size
        start = self.layout.sequence_rank(self.process.rank) * size
        return batch.map(lambda tensor: tensor[:, start : start + size])._replace(segments=batch.segments)

    def memory_bytes(self) -> int:
        """Return the peak memory of this rank: of its GPU's allocator or, on a CPU, of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Release DeepSpeed's resources and leave the process group."""
        self._deepspeed.destroy()
        dist.destroy_process_group()

    def _seed_dropout(self, layer: int, module: nn.Module, inputs: tuple) -> None:
        """Seed torch before a layer runs in training: its dropout depends on seed, step, micro-batch and layer, in every layout."""
        if module.training:
            seen = self._micro_batches_seen.get(layer, 0)
            self._micro_batches_seen[layer] = seen + 1
            micro_batch = seen * self.layout.data_parallel_size + self.layout.data_rank(self.process.rank)
            part = self.layout.sequence_rank(self.process.rank)
            torch.manual_seed(_seed_from(self._seed, self.current_step, micro_batch, layer, part))

    def _plain_step(self) -> tuple[float, bool]:
        """Take the step of ZeRO-0, which computes no gradient norm and would apply a NaN. Return the norm, and True if it is not finite.

        In that case the step is counted, but the optimizer is not run.
        """
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        split = [parameter.grad for parameter in parameters if is_model_parallel_parameter(parameter)]
        whole = [parameter.grad for parameter in parameters if not is_model_parallel_parameter(parameter)]
        gradients = whole + split
        squares = get_total_norm(whole) ** 2 / self.layout.tensor_parallel_size + get_total_norm(split) ** 2
        if self.layout.tensor_parallel_size > 1:
            dist.all_reduce(squares, group=groups.get_tensor_model_parallel_group())
        norm = float(squares.sqrt())
        if math.isfinite(norm):
            self._deepspeed.step()
            return norm, False
        for gradient in gradients:
            gradient.zero_()
        self._deepspeed.optimizer.step = lambda: None
        self._deepspeed.step()
        del self._deepspeed.optimizer.step
        return norm, True


def _blocks(model: nn.Module) -> list[Block]:
    """Return all blocks of a model or of a stage."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _hold_zeros(model: nn.Module, built: torch.optim.Optimizer) -> None:
    """Set the gradient to 0 for weights of the blocks' linear layers that are exactly 0, so that optimizer and decay leave them 0.

    A weight that is 0 in the optimizer's float32 is also 0 in the bf16 or fp16 that the model computes with. When the gradient of a
    weight arrives, ZeRO-3 still has the weight gathered. An optimizer that moves weights without a gradient reads "hold_zeros".
    """
    for group in built.param_groups:
        group["hold_zeros"] = True
    for block in _blocks(model):
        for weight in (parameter for parameter in block.parameters() if is_matrix(parameter)):
            weight.register_hook(lambda gradient, weight=weight: gradient.masked_fill(weight == 0, 0))


def labels_of(batch: Batch, divisors: Sequence[Tensor]) -> Labels:
    """Return the targets and classes of a batch with their divisors."""
    divisor, *class_divisors = divisors
    return Labels(batch.targets, divisor) if batch.classes is None else Labels(batch.targets, divisor, batch.classes, *class_divisors)


def _seed_from(*numbers: int) -> int:
    """Return a seed for torch that depends on all the numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
