"""DeepSpeed, behind a few verbs: train_step, validate, sample, save, load. Nothing else trains with it."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from data.command_line import UserError
from data.sampling.batches import Batch, target_classes, target_tokens
from launch.checkpoints import checkpoint, state
from launch.checkpoints.initial import InitialWeights
from launch.evaluation.score import Score
from launch.evaluation.tasks.table import task_named
from launch.ranks.collectives import CollectedError, Ranks
from launch.ranks.layout import Layout
from launch.ranks.processes import Process, device_index, device_name
from launch.training import parallel
from launch.training.deepspeed_state import OptimizerState
from launch.training.optimizers import optimizer_for
from launch.training.optimizers.base import is_matrix
from launch.training.settings import RunSettings
from launch.training.stopwatch import Stopwatch
from launch.training.teacher import Teacher, fingerprint
from model.cache import KeyValueCache
from model.compression.fake_quantization import fake_quantize
from model.compression.grids import Grid
from model.generation import generate
from model.loss import Teaching
from model.transformer import Block, Transformer, parameter_shapes


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; the same on every rank but for the times."""

    loss: float
    """Mean nats per target token of the global batch, and beside it, where it has classes, per class; with smoothing, z-loss and what
    a teacher says."""
    gradient_norm: float
    """Of the whole gradient, before clipping."""
    skipped: bool
    """A gradient was not finite: no weight was changed."""
    stop_asked: bool
    """Some rank was told to stop."""
    loss_scale: float | None
    """Under fp16."""
    seconds: dict[str, float]
    """Of this rank, by part: forward, backward, optimizer; in a pipeline also passing: sending, receiving and waiting for both."""


class Engine:
    """A model that trains. One object stands for all ranks: every verb is called by every rank."""

    def __init__(self, settings: RunSettings, merged_json: dict, process: Process, layout: Layout):
        self.config = settings.model
        self.process = process
        self.layout = layout
        self.device = torch.device(device_name(), device_index(process)) if device_name() == "cuda" else torch.device("cpu")
        self.ranks = Ranks(process, self.device)
        self.zero_stage = merged_json["zero_optimization"].get("stage", 0)
        self._seed = settings.seed
        self._loss, self._distillation = settings.loss, settings.distillation
        self.task = task_named(settings.data.objective, settings.model.architecture)
        self.step_in_hand = 0
        self._micro_batches_seen: dict[int, int] = {}  # by each layer, in this step
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the pipeline's parts, and its memory use at every turn
            mpu = None
            if "tensor_parallel" in merged_json:
                groups._init_tp_mesh_device(tensor_model_parallel_size=layout.tensor_parallel_size)
                mpu = groups
            model = self._build(merged_json, settings.recompute, mpu)
            if layout.sequence_parallel_size > 1:
                parallel.spread_sequences(model, self.config.sequence_length, layout, process.rank)
            for block in _blocks(model):
                if settings.quantization.bits is not None:
                    chosen = settings.quantization
                    fake_quantize(block, Grid("int", chosen.bits, chosen.entries_per_scale, chosen.symmetric), chosen.activations)
                if settings.compile:
                    block.compile()
            optimizer = optimizer_for(settings.optimizer)
            built = optimizer.build(model)
            self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=built, config=merged_json, mpu=mpu)
        self._model = self._deepspeed.module
        if settings.hold_zeros:
            _hold_zeros(self._model)
        self._teacher: Transformer | None = None
        if self._distillation.teacher and self._computes_loss:
            teacher = Teacher(self._distillation.teacher, self.config)
            self._teacher = teacher.network(self.device, next(self._model.parameters()).dtype)
        for name, layer in self._model.named_children():
            if self.config.dropout and name.isdigit():
                layer.register_forward_pre_hook(functools.partial(self._begin_stream, int(name)))
        self._state = OptimizerState(self._deepspeed, optimizer, self._region_of, self._is_replica)

    def _build(self, merged_json: dict, recompute: bool, mpu: ModuleType | None) -> nn.Module:
        data_group = mpu.get_data_parallel_group() if mpu else None
        with deepspeed.zero.Init(config_dict_or_path=merged_json, enabled=self.zero_stage == 3, mpu=mpu, data_parallel_group=data_group):
            model = Transformer(self.config, self._seed, recompute)
        for buffer in model.buffers():  # under ZeRO-3 DeepSpeed moves parameters only
            buffer.data = buffer.data.to(self.device)
        return model

    @property
    def _computes_loss(self) -> bool:
        return True

    def teacher_fingerprint(self) -> str | None:
        """A hash of the weights that are learnt from, the same on every rank; None without a teacher."""
        if self._distillation.teacher is None:
            return None
        found = self.ranks.all_gather(fingerprint(self._teacher) if self._teacher is not None else None)
        return next(one for one in found if one is not None)

    def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int, stop_asked: bool = False) -> StepReport:
        """One optimizer step on this data rank's micro-batches of global step `step`."""
        self.step_in_hand, self._micro_batches_seen = step, {}
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        micro_batches = [self._part_of(batch) for batch in micro_batches]
        counts = self.ranks.sum([target_tokens(micro_batches), target_classes(micro_batches)])
        parts = len(micro_batches) * self.layout.zero_size
        divisors = [torch.tensor(max(1, count / self.layout.num_replicas) / parts, device=self.device) for count in counts]
        watch = Stopwatch(self.device)
        loss, gradient_norm, skipped = self._step_on(micro_batches, divisors, watch)
        loss_sum, stops = self.ranks.sum([loss, float(stop_asked)])
        return StepReport(
            loss=loss_sum / self.process.world_size,
            gradient_norm=gradient_norm,
            skipped=skipped,
            stop_asked=stops > 0,
            loss_scale=float(self._deepspeed.optimizer.loss_scale) if self._deepspeed.fp16_enabled() else None,
            seconds=watch.seconds(),
        )

    def _step_on(self, micro_batches: list[Batch], divisors: list[Tensor], watch: Stopwatch) -> tuple[float, float, bool]:
        """The loss of this rank (its mean over all ranks is the step's), the gradient norm, and whether the update was left out."""
        engine = self._deepspeed
        engine.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
            with watch.measure("forward"):
                loss = self._training_loss(engine(*batch.inputs), self._labels_of_training(batch, divisors))
                total += loss.detach()
            with watch.measure("backward"):
                engine.backward(loss)
            with watch.measure("optimizer"):
                if self.zero_stage == 0 and engine.is_gradient_accumulation_boundary():
                    return (float(total) / len(micro_batches), *self._plain_step())
                engine.step()
        return (float(total) / len(micro_batches), *self._norm_and_overflow())

    def _training_loss(self, outputs: Tensor | tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        """Of what _labels_of_training gives."""
        teaching = None
        if self._teacher is not None:
            labels, inputs = labels[:2], labels[2:]
            with torch.no_grad():
                logits = self._teacher(*inputs)
            weights = self._distillation.kl_weight, self._distillation.cross_entropy_weight
            teaching = Teaching(logits, *weights, self._distillation.temperature)
        return self.task.training_loss(outputs, labels, self._loss.label_smoothing, self._loss.z_loss, teaching)

    def _labels_of_training(self, batch: Batch, divisors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """labels_of, and behind them the batch's inputs where there is a teacher to read them."""
        return labels_of(batch, divisors) + (batch.inputs if self._distillation.teacher else ())

    def _norm_and_overflow(self) -> tuple[float, bool]:
        norm = float(self._deepspeed.get_global_grad_norm())
        return norm, bool(getattr(self._deepspeed.optimizer, "overflow", False)) or not math.isfinite(norm)

    def validate(self, batches: Iterable[Batch]) -> Score:
        """Of all data ranks' batches together; each gives equally many."""
        self._deepspeed.eval()
        return self._over_ranks(self.task.measure(self._model, map(self._part_of, batches), self.device), self.layout.num_replicas)

    def _over_ranks(self, mine: Score, num_replicas: int) -> Score:
        """From each rank's share, which so many ranks have alike."""
        summed = self.ranks.sum(list(dataclasses.astuple(mine)))
        token_loss, tokens, class_loss, classes, right = (total / num_replicas for total in summed)
        return Score(token_loss, round(tokens), class_loss, round(classes), round(right))

    def sample(
        self, prompt: list[int], new_tokens: int, temperature: float, seed: int, vocab_size: int, source: list[int] | None = None
    ) -> list[int]:
        """Token ids below `vocab_size` that follow `prompt`, always so many: under ZeRO-3 every rank must take every step.

        An encoder-decoder writes the target of `source` so, behind a prompt that is its start token.
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
        """What `generate` asks for: logits [1, seq, vocab] of tokens that follow those in the cache."""
        return self._model(*inputs, cache=cache)

    def save(self, root: Path, step: int, about: dict) -> str | None:
        """Write and publish the checkpoint of `step`. Returns what went wrong, the same sentence on every rank, or None.

        A failure on any rank leaves what was there before, and the run can go on.
        """
        collected = CollectedError()
        folder = root / f"{checkpoint.folder_name(step)}.tmp-{about['run_id']}"
        if self.process.is_first:
            collected.run(lambda: checkpoint.begin(root, step, about["run_id"]))
        if error := self.ranks.first_error_of_any_rank(collected.message):
            return error
        collected.run(lambda: self._write(folder))
        checksums = self._checksums()
        if self.ranks.all_ranks(collected.message is None) and self.process.is_first:
            counters = {"steps": self._state.steps, "loss_scaler": self._state.loss_scaler}
            about = about | self._state.optimizer.record() | {"optimizer": counters, "checksums": checksums}
            collected.run(lambda: checkpoint.publish(folder, step, about))
        if (error := self.ranks.first_error_of_any_rank(collected.message)) and self.process.is_first:
            checkpoint.discard(folder)
        return error

    def _write(self, folder: Path) -> None:
        written = {}
        if self._state.owned:
            file = checkpoint.HashingFile(folder / f"rank_{self.process.rank:05d}.safetensors")
            kinds = self._state.optimizer.kinds
            state.write(file, self._state.owned, kinds, self._state.visit(self._state.owned))
            written[file.path.name] = file.finish()
        checkpoint.write_part(folder, self.process.rank, written)

    def begin_from(self, weights: InitialWeights) -> str:
        """Take weights of another model, before the first step; a hash of what all ranks have then. Raises UserError on every rank."""
        collected = CollectedError()
        collected.run(lambda: self._state.read(weights))
        if error := self.ranks.first_error_of_any_rank(collected.message):
            raise UserError(error)
        self._state.resume(0, None)
        return hashlib.sha256(repr(self._checksums()).encode()).hexdigest()

    def load(self, folder: Path) -> None:
        """Take weights, moments and loss scale from a checkpoint of any layout.

        Raises UserError where it does not hold this model, and RuntimeError where what is then in memory has other checksums than
        what was saved; on every rank.
        """
        manifest = checkpoint.read_manifest(folder)
        collected = CollectedError()
        collected.run(lambda: self._state.read(state.SavedState(folder)))
        if error := self.ranks.first_error_of_any_rank(collected.message):
            raise UserError(error)
        self._state.resume(**manifest["optimizer"])
        wrong = [name for name, sums in self._checksums().items() if sums != manifest["checksums"].get(name)]
        if wrong:
            raise RuntimeError(f"{folder} was read, but {len(wrong)} parameters have other checksums than were saved, {wrong[0]} first.")

    def _checksums(self) -> dict[str, list[int]]:
        """Return the checksums of each parameter, one for each kind of tensor; the same on every rank."""
        kinds = self._state.optimizer.kinds
        rows = {name: row for row, name in enumerate(parameter_shapes(self.config))}
        sums = torch.zeros(len(rows), len(kinds), dtype=torch.int64)
        for shard_slice, tensors in self._state.visit(self._state.owned):
            sums[rows[shard_slice.name]] += torch.tensor([state.checksum(tensors[kind], shard_slice) for kind in kinds])
        sums = sums.to(self.device)
        self.ranks.sum_in_place([sums])
        return dict(zip(rows, sums.tolist(), strict=True))

    def _region_of(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], state.Region] | None:
        """The whole shape of a parameter, and the part of it that this rank has, not counting what ZeRO cuts; None: not the model's."""
        return parallel.region_of(parameter, self.layout.tensor_rank(self.process.rank))

    def _is_replica(self, shard_slice: state.ShardSlice, parameter: nn.Parameter) -> bool:
        """Whether a checkpoint has these numbers from another rank."""
        rank, layout = self.process.rank, self.layout
        on_all_tensor_places = shard_slice.region == state.whole_region(shard_slice.shape)
        in_all_of_zero = self.zero_stage == 0 and rank // layout.tensor_parallel_size % layout.zero_size > 0
        return in_all_of_zero or (on_all_tensor_places and layout.tensor_rank(rank) > 0)

    def _part_of(self, batch: Batch) -> Batch:
        """The tokens and targets that this rank has of each sequence; segments stay whole, for attention sees them all."""
        if self.layout.sequence_parallel_size == 1:
            return batch
        size = batch.tokens.shape[1] // self.layout.sequence_parallel_size
        start = self.layout.sequence_rank(self.process.rank) * size
        return batch.map(lambda tensor: tensor[:, start : start + size])._replace(segments=batch.segments)

    def memory_bytes(self) -> int:
        """Peak memory of this rank: of its GPU's allocator, or, on a CPU, of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        self._deepspeed.destroy()
        dist.destroy_process_group()

    def _begin_stream(self, layer: int, module: nn.Module, inputs: tuple) -> None:
        """Before a layer is run in training: its dropout is a function of seed, step, micro-batch and layer, whatever the layout."""
        if module.training:
            seen = self._micro_batches_seen.get(layer, 0)
            self._micro_batches_seen[layer] = seen + 1
            micro_batch = seen * self.layout.data_parallel_size + self.layout.data_rank(self.process.rank)
            torch.manual_seed(_stream(self._seed, self.step_in_hand, micro_batch, layer, self.layout.sequence_rank(self.process.rank)))

    def _plain_step(self) -> tuple[float, bool]:
        """ZeRO-0 knows no gradient norm and would apply a NaN: measure it, and take the step without the update where it is one."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        cut = [parameter.grad for parameter in parameters if is_model_parallel_parameter(parameter)]
        whole = [parameter.grad for parameter in parameters if not is_model_parallel_parameter(parameter)]
        gradients = whole + cut
        squares = get_total_norm(whole) ** 2 / self.layout.tensor_parallel_size + get_total_norm(cut) ** 2
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
    return [module for module in model.modules() if isinstance(module, Block)]


def _hold_zeros(model: nn.Module) -> None:
    """Weights of the blocks' linear layers that are exactly 0 get no gradient: without one, AdamW and its decay leave them 0.

    Where weights are kept in bf16 or fp16, what is 0 in the optimizer's float32 is 0 there too. At its gradient's arrival ZeRO-3
    still has a weight gathered.
    """
    for block in _blocks(model):
        for weight in (parameter for parameter in block.parameters() if is_matrix(parameter)):
            weight.register_hook(lambda gradient, weight=weight: gradient.masked_fill(weight == 0, 0))


def labels_of(batch: Batch, divisors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the loss is measured against: targets and classes, each with the number that its sum is divided by."""
    return (batch.targets, divisors[0]) + (() if batch.classes is None else (batch.classes, divisors[1]))


def _stream(*place: int) -> int:
    """A seed for torch from numbers."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1
