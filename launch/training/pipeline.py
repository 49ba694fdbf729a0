"""The engine whose layers are spread over stages: DeepSpeed's pipeline over the same list of layers, the same loss, the same verbs."""

from collections.abc import Iterable, Iterator
from types import ModuleType

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from data.batches import Batch, target_tokens
from launch.training import parallel
from launch.training.engine import Engine, Stopwatch
from launch.training.layout import Layout
from launch.training.state import Box, Stretch
from model.layers import KeyValueCache, Passed
from model.loss import IGNORED, training_loss
from model.transformer import layers

_STAND_IN = "stand_in_"
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
"""What each of DeepSpeed's instructions is timed as."""


def engine_for(layout: Layout) -> type[Engine]:
    return PipelinedEngine if layout.pipeline_stages > 1 else Engine


class PipelinedEngine(Engine):
    """Engine's verbs, carried out stage by stage."""

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
        module = kind(specs, topology=topology, loss_fn=_loss, partition_method=section["partition"])
        if self.layout.tensor_parallel_size > 1:
            parallel.split_matrices(module, self.layout.tensor_parallel_size, module.mpu().get_slice_parallel_group())
        return module

    def _step_on(self, micro_batches: list[Batch], divisor: Tensor, watch: Stopwatch) -> tuple[float, float, bool]:
        engine = self._deepspeed
        methods = type(engine)._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {instruction: _timed(method, watch, PART_OF[instruction]) for instruction, method in methods.items()}
        for name, parameter in self._model.named_parameters():
            if name.startswith(_STAND_IN):  # without a gradient, a stage whose weights all count elsewhere has no norm at all
                parameter.grad = torch.zeros_like(parameter)
        return (float(engine.train_batch(_fed(micro_batches, divisor))), *self._norm_and_overflow())

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        batches = [self._part_of(batch) for batch in batches]
        size = self._at_once or len(batches)
        mine = [0.0, 0]
        for some in (batches[first : first + size] for first in range(0, len(batches), size)):
            filled = some + [_nothing(some[0])] * (size - len(some))
            losses = self._deepspeed.eval_batch(
                _fed(filled, torch.ones((), device=self.device)), reduce_output=None, bcast_loss=False, num_micro_batches=size
            )
            if losses:  # the last stage's
                mine = [mine[0] + float(torch.stack(losses).double().sum()), mine[1] + target_tokens(some)]
        total, count = self._sum_over_ranks(mine)
        return total / self.layout.tensor_parallel_size, int(count) // self.layout.tensor_parallel_size

    @torch.no_grad()
    def _read(self, tokens: Tensor, segments: Tensor, cache: KeyValueCache) -> Tensor:
        """The logits behind the last token. A pipeline keeps no keys: everything so far is read again, in the shape of a micro-batch."""
        self._so_far = torch.cat((self._so_far, tokens), dim=1) if cache.length else tokens
        cache.length = length = self._so_far.shape[1]
        shape = self._deepspeed.train_micro_batch_size_per_gpu(), self.config.sequence_length
        padded = torch.zeros(shape, dtype=torch.int64, device=self.device)
        padded[0, :length] = self._so_far[0]
        batch = self._part_of(Batch(padded, torch.ones_like(padded), torch.full_like(padded, IGNORED)))
        _, outputs = self._deepspeed.eval_batch(
            _fed([batch] * (self._at_once or 1), torch.ones((), device=self.device)),
            return_logits=True,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=self._at_once or 1,
        )
        row, rank = torch.zeros(self.config.vocab_size, device=self.device), self.process.rank
        part, place = divmod(length - 1, batch.tokens.shape[1])
        is_speaker = (self.layout.data_rank(rank), self.layout.sequence_place(rank), self.layout.tensor_place(rank)) == (0, part, 0)
        if outputs is not None and is_speaker:
            row.copy_(outputs[0][0, place])
        dist.all_reduce(row)
        return row[None, None]

    @property
    def _at_once(self) -> int | None:
        """Micro-batches that an evaluation must have: DualPipeV finds its buffers with as many as in training alone (DeepSpeed 0.19.8)."""
        return self._deepspeed.gradient_accumulation_steps() if isinstance(self._model, DualPipeVModule) else None

    def _box_of(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], Box] | None:
        return None if name.startswith(_STAND_IN) else super()._box_of(name, parameter)

    def _is_copy(self, stretch: Stretch, parameter: nn.Parameter) -> bool:
        return parameter.ds_pipe_replicated or super()._is_copy(stretch, parameter)  # a tied module's second home


class _Mended:
    """What DeepSpeed's modules need for stages of any cut."""

    def _count_layer_params(self) -> list[int]:
        """DeepSpeed builds every layer on every rank to count its parameters; shapes are enough for that."""
        with torch.device("meta"):
            return super()._count_layer_params()  # type: ignore[misc]

    def _build(self) -> None:
        """A stage may have matrices alone, or norms alone. ZeRO-1 sums the norms of one parameter group after the other over all
        stages, and hangs where they have not equally many: each stage gets both kinds, if need be a zero that nothing uses.
        """
        super()._build()  # type: ignore[misc]
        for shape in ((1, 1), (1,)):
            if not any(min(own.dim(), 2) == len(shape) for own in self.parameters()):
                parameter = nn.Parameter(torch.zeros(shape))
                parameter.ds_pipe_replicated = False
                self.register_parameter(f"{_STAND_IN}{len(shape)}", parameter)


class _Pipeline(_Mended, PipelineModule):
    pass


class _DualPipeV(_Mended, DualPipeVModule):
    pass


def _loss(outputs: Passed, labels: tuple[Tensor, Tensor]) -> Tensor:
    return training_loss(outputs[0], labels)


def _fed(batches: list[Batch], divisor: Tensor) -> Iterator[tuple]:
    """What DeepSpeed's pipeline reads: (inputs of the first layer, labels of the loss)."""
    return (((batch.tokens, batch.segments), (batch.targets, divisor)) for batch in batches)


def _nothing(like: Batch) -> Batch:
    return Batch(torch.zeros_like(like.tokens), torch.zeros_like(like.segments), torch.full_like(like.targets, IGNORED))


def _timed(method, watch: Stopwatch, part: str):
    def instruction(*arguments, **more):
        with watch.measure(part):
            return method(*arguments, **more)

    return instruction
