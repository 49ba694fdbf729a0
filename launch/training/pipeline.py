"""The engine of a pipeline: its layers are divided among stages. It has the same list of layers, the same loss and the same methods."""

import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from data.sampling.batches import Batch
from launch.checkpoints.state import Region, ShardSlice
from launch.evaluation.score import Score
from launch.ranks.layout import Layout
from launch.training import parallel
from launch.training.engine import Engine, labels_of
from launch.training.stopwatch import Stopwatch
from model.cache import KeyValueCache
from model.layers import Stream
from model.loss import IGNORED, Labels
from model.transformer import layers, select_outputs

_PLACEHOLDER = "placeholder_"
"""Beginning of the names of parameters that are not the model's."""
PART_OF = {
    schedule.LoadMicroBatch: "forward",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.SendActivation: "passing",
    schedule.RecvActivation: "passing",
    schedule.SendGrad: "passing",
    schedule.RecvGrad: "passing",
    schedule.CommitP2P: "passing",
    schedule.ReduceTiedGrads: "optimizer",
    schedule.ReduceGrads: "optimizer",
    schedule.OptimizerStep: "optimizer",
}
"""The part of a step as which each of DeepSpeed's instructions is timed."""


def engine_for(layout: Layout) -> type[Engine]:
    """Return the class of the engine for a layout."""
    return PipelinedEngine if layout.pipeline_stages > 1 else Engine


class PipelinedEngine(Engine):
    """The engine's methods, executed by pipeline stages."""

    _shaped_like: Batch
    """The last micro-batch of training, whose shape all others must have."""
    _tokens_so_far: tuple[Tensor, Tensor]
    """The tokens and segments that the text in generation has until now.  [1, seq]"""

    def _build(self, merged_json: dict, recompute: bool, mpu: ModuleType | None) -> nn.Module:
        section = merged_json["pipeline"]
        kind = _DualPipeV if section["schedule"] == "dualpipev" else _Pipeline
        specs = [
            LayerSpec(layer.module, *layer.arguments)
            if layer.tied_key is None
            else TiedLayerSpec(layer.tied_key, layer.module, *layer.arguments, forward_fn=layer.forward)
            for layer in layers(self.config, self._seed, recompute)
        ]
        topology = PipeModelDataParallelTopology(self.layout.pipeline_stages, self.layout.tensor_parallel_size, self.layout.zero_size)
        module: Any = kind(specs, topology=topology, loss_fn=self._loss_of, partition_method=section["partition"])
        if self.layout.tensor_parallel_size > 1:
            parallel.split_matrices(module, self.layout.tensor_parallel_size, module.mpu().get_slice_parallel_group())
        return module

    def _loss_of(self, tensors: tuple[Tensor, ...], label_tensors: tuple[Tensor, ...]) -> Tensor:
        """Return what the last stage computes for a micro-batch: in training its loss, otherwise its sums_of.  -> scalar or [3]"""
        outputs = select_outputs(self.config, Stream.from_tensors(tensors))
        if torch.is_grad_enabled() and self._teacher is not None:  # its inputs come after the labels, which have no classes
            targets, divisor, *inputs = label_tensors
            return self._training_loss(outputs, Labels(targets, divisor), inputs)
        labels = Labels(*label_tensors)
        if torch.is_grad_enabled():
            return self._training_loss(outputs, labels, ())
        return self.task.sums_of(outputs, labels.targets, labels.classes)

    def _step_on(self, micro_batches: list[Batch], divisors: list[Tensor], watch: Stopwatch) -> tuple[float, float, bool]:
        engine, self._shaped_like = self._deepspeed, micro_batches[0]
        assert engine.micro_batches == len(micro_batches), "DeepSpeed would step too early"
        methods = type(engine)._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {instruction: _timed(method, watch, PART_OF[instruction]) for instruction, method in methods.items()}
        for name, parameter in self._model.named_parameters():
            if name.startswith(_PLACEHOLDER):  # a stage of which no parameter has a gradient would have no norm
                parameter.grad = torch.zeros_like(parameter)
        has_teacher = bool(self._distillation.teacher)
        data = ((batch.inputs, labels_of(batch, divisors).tensors() + (batch.inputs if has_teacher else ())) for batch in micro_batches)
        return (float(engine.train_batch(data)), *self._norm_and_overflow())

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Score:
        """Return the score over the batches of all data ranks, which have the same number of batches."""
        batches = [self._part_of(batch) for batch in batches]
        size = self._evaluation_batches or len(batches)
        total = Score()
        for group in (batches[first : first + size] for first in range(0, len(batches), size)):
            losses, _ = self._evaluate(group + [_padding_like(group[0])] * (size - len(group)))
            if losses:  # this is the last stage
                total += self.task.score_of(torch.stack(losses).sum(dim=0), group)
        return self._over_ranks(total, self.layout.tensor_parallel_size)

    def _evaluate(self, batches: list[Batch], keep_outputs: bool = False) -> tuple[list[Tensor], tuple[Tensor, ...] | None]:
        """Return the sums of each batch and, if asked for, the outputs of the last batch; on other stages than the last, nothing."""
        self._deepspeed.total_loss = None  # a scalar left by training, to which DeepSpeed would add
        evaluated = self._deepspeed.eval_batch(
            ((batch.inputs, labels_of(batch, [torch.ones((), device=self.device)] * 2).tensors()) for batch in batches),
            return_logits=keep_outputs,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(batches),
        )
        losses, outputs = evaluated if keep_outputs else (evaluated, None)
        return losses or [], outputs

    @torch.no_grad()
    def _read(self, *inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits after the last token. A pipeline has no cache: all tokens so far are read again, in a micro-batch's shape."""
        *source, tokens, segments = inputs
        if cache.length:
            tokens, segments = (torch.cat(both, dim=1) for both in zip(self._tokens_so_far, (tokens, segments), strict=True))
        self._tokens_so_far = tokens, segments
        cache.length = length = tokens.shape[1]
        empty = torch.zeros_like(self._shaped_like.segments)  # whole, whereas tokens and targets are this rank's part of the sequence
        batch = _padding_like(self._shaped_like)._replace(tokens=empty, targets=torch.full_like(empty, IGNORED))
        for whole, row in zip(batch.inputs, (*source, tokens, segments), strict=True):
            whole[:1, : row.shape[1]] = row
        batch = self._part_of(batch)
        _, outputs = self._evaluate([batch] * (self._evaluation_batches or 1), keep_outputs=True)
        row, rank = torch.zeros(self.config.vocab_size, device=self.device), self.process.rank
        part, position = divmod(length - 1, batch.tokens.shape[1])
        has_logits = (self.layout.data_rank(rank), self.layout.sequence_rank(rank), self.layout.tensor_rank(rank)) == (0, part, 0)
        if outputs is not None and has_logits:
            row.copy_(Stream.from_tensors(outputs).hidden[0, position])
        self.ranks.sum_in_place([row])
        return row[None, None]

    @property
    def _computes_loss(self) -> bool:
        # The V of DualPipeV begins and ends on the first stage.
        last = 0 if isinstance(self._model, DualPipeVModule) else self.layout.pipeline_stages - 1
        return self._deepspeed.stage_id == last

    @property
    def _evaluation_batches(self) -> int | None:
        """Number of micro-batches of each evaluation, None for any: DualPipeV's buffers need as many as in training (DeepSpeed 0.19.8)."""
        return self._deepspeed.gradient_accumulation_steps() if isinstance(self._model, DualPipeVModule) else None

    def _region_of(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], Region] | None:
        return None if name.startswith(_PLACEHOLDER) else super()._region_of(name, parameter)

    def _is_replica(self, shard_slice: ShardSlice, parameter: Any) -> bool:
        return parameter.ds_pipe_replicated or super()._is_replica(shard_slice, parameter)  # the second copy of a tied module


class _AnyStages(nn.Module):
    """Changes to DeepSpeed's pipeline modules, which allow a stage to have any layers and any tensors to pass between stages."""

    # Attributes of DeepSpeed's PipelineModule: the first layer of this stage, the first after it, and the number of all layers.
    _local_start: int
    _local_stop: int
    _num_layers: int

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the layers of this stage. DeepSpeed passes plain tuples of tensors between stages; the layers pass a Stream.

        Between two stages all floating tensors are one, followed by a table of their positions and shapes. With several, DeepSpeed
        0.19.8 would run a backward pass for each, expect a gradient for each (no layer after the last cross-attention uses the
        source's encoding), and receive them into buffers of any type that are large enough.
        """
        if self._local_start > 0:
            tensors = self._unpacked(tensors)
        outputs = super().forward(Stream.from_tensors(tensors)).tensors()  # type: ignore[misc]  # PipelineModule's forward
        return outputs if self._local_stop == self._num_layers else self._packed(outputs)

    def _packed(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return (floating tensors as one [values], their positions and shapes [tensors, 4], the others); a single one is unchanged."""
        positions = [position for position, tensor in enumerate(tensors) if tensor.is_floating_point()]
        if len(positions) == 1:
            return tensors
        if self._local_stop not in self._sent:
            rows = [[position, *tensors[position].shape] for position in positions]
            self._sent[self._local_stop] = torch.tensor([row + [-1] * (4 - len(row)) for row in rows], device=tensors[0].device)
        flat = torch.cat([tensors[position].flatten() for position in positions])
        return flat, self._sent[self._local_stop], *(tensor for tensor in tensors if not tensor.is_floating_point())

    def _unpacked(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the tensors that the stage before packed."""
        if tensors[0].dim() > 1:
            return tensors
        flat, table, *whole = tensors
        if self._local_start not in self._received:  # read from the device once: it is always the same between two stages
            self._received[self._local_start] = [(row[0], [size for size in row[1:] if size >= 0]) for row in table.tolist()]
        rows = self._received[self._local_start]
        for (position, shape), values in zip(rows, flat.split([math.prod(shape) for _, shape in rows]), strict=True):
            whole.insert(position, values.view(shape))
        return tuple(whole)

    def _count_layer_params(self) -> list[int]:
        """Count parameters without their values: DeepSpeed would build every layer on every rank for it."""
        with torch.device("meta"):
            return super()._count_layer_params()  # type: ignore[misc]

    def _build(self) -> None:
        """Build the layers of this stage, and give each stage both parameter groups, matrices and vectors.

        ZeRO-1 sums gradient norms over all stages, one parameter group after the other, and hangs if a stage lacks one of the groups.
        A stage without parameters of a kind gets one that is 0 and that nothing uses.
        """
        super()._build()  # type: ignore[misc]
        self._sent: dict[int, Tensor] = {}  # positions and shapes of the tensors, by the layer that receives them
        self._received: dict[int, list[tuple[int, list[int]]]] = {}
        for shape in ((1, 1), (1,)):
            if not any(min(own.dim(), 2) == len(shape) for own in self.parameters()):
                parameter = nn.Parameter(torch.zeros(shape))
                parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]  # DeepSpeed's own attribute
                self.register_parameter(f"{_PLACEHOLDER}{len(shape)}", parameter)


class _Pipeline(_AnyStages, PipelineModule):
    pass


class _DualPipeV(_AnyStages, DualPipeVModule):
    pass


def _padding_like(like: Batch) -> Batch:
    """Return a batch of the same shape that consists of padding."""
    padding = like.map(torch.zeros_like)
    classes = None if like.classes is None else torch.full_like(like.classes, IGNORED)
    return padding._replace(targets=torch.full_like(like.targets, IGNORED), classes=classes)


def _timed(method: Callable, watch: Stopwatch, part: str) -> Callable:
    """Return a method that measures its time as `part`."""

    def instruction(*arguments, **keywords):
        """Run the method."""
        with watch.measure(part):
            return method(*arguments, **keywords)

    return instruction
