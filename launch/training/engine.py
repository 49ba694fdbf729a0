"""DeepSpeed, behind a few verbs: train_step, validate, sample, save, load. Nothing else trains with it."""

import contextlib
import dataclasses
import io
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from data.batches import Batch, target_tokens
from launch.training import checkpoint
from launch.training.config import OptimizerSettings
from launch.training.processes import Process, device_name
from model.config import ModelConfig
from model.generation import generate
from model.loss import token_losses, training_loss
from model.transformer import Transformer

SAFE_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""The only classes that DeepSpeed's checkpoints need; a file with any other is refused, not run."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; the same on every rank but for the times."""

    loss: float
    """Mean nats per target token of the global batch."""
    gradient_norm: float
    """Of the whole gradient, before clipping."""
    skipped: bool
    """A gradient was not finite: no weight was changed."""
    stop_asked: bool
    """Some rank was told to stop."""
    loss_scale: float | None
    """Under fp16."""
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


def initialize_communication(process: Process) -> None:
    """Join the process group, quietly."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed|torch.distributed")
    # Without this a CPU start compiles a C++ helper: two minutes once, and, killed meanwhile, a lock that hangs all later starts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device_name() == "cuda":
        torch.cuda.set_device(process.local_rank)
    backend = "nccl" if device_name() == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(minutes=30), verbose=False)


class Engine:
    """A model that trains. One object stands for all ranks: every verb is called by every rank."""

    def __init__(
        self,
        config: ModelConfig,
        merged_json: dict,
        optimizer: OptimizerSettings,
        process: Process,
        seed: int,
        recompute: bool = False,
        compile_blocks: bool = False,
    ):
        self.config = config
        self.process = process
        self.device = torch.device(device_name(), process.local_rank) if device_name() == "cuda" else torch.device("cpu")
        self.zero_stage = merged_json["zero_optimization"].get("stage", 0)
        self._seed = seed
        with deepspeed.zero.Init(config_dict_or_path=merged_json, enabled=self.zero_stage == 3):
            model = Transformer(config, seed, recompute)
        for buffer in model.buffers():  # under ZeRO-3 DeepSpeed moves parameters only
            buffer.data = buffer.data.to(self.device)
        if compile_blocks:
            for block in model.blocks():
                block.compile()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use at every turn
            self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model, optimizer), config=merged_json)
        self._files = HashedFiles()
        self._deepspeed.checkpoint_engine = self._files
        # It would copy its own converter there, outside the checkpoint engine; it cannot read ZeRO-1 in bf16, and weights.py does.
        self._deepspeed._copy_recovery_script = lambda folder: None
        self._model = self._deepspeed.module

    def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int, stop_asked: bool = False) -> StepReport:
        """One optimizer step on this rank's micro-batches of global step `step`."""
        engine = self._deepspeed
        engine.train()
        torch.manual_seed(_stream(self._seed, step, self.process.rank))  # dropout's numbers are a function of seed, step and rank
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        num_targets = int(self._sum_over_ranks([target_tokens(micro_batches)])[0])
        divisor = torch.tensor(max(1, num_targets) / (len(micro_batches) * self.process.world_size), device=self.device)
        watch = Stopwatch(self.device)
        total = torch.zeros((), device=self.device)
        skipped = False
        for batch in micro_batches:
            tokens, segments, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            with watch.measure("forward"):
                loss = training_loss(engine(tokens, segments), (targets, divisor))
                total += loss.detach()
            with watch.measure("backward"):
                engine.backward(loss)
            with watch.measure("optimizer"):
                if self.zero_stage == 0 and engine.is_gradient_accumulation_boundary():
                    gradient_norm, skipped = self._plain_step()
                else:
                    engine.step()
        loss_sum, stops = self._sum_over_ranks([float(total), float(stop_asked)])
        if self.zero_stage > 0:
            gradient_norm = float(engine.get_global_grad_norm())
            skipped = bool(getattr(engine.optimizer, "overflow", False)) or not math.isfinite(gradient_norm)
        return StepReport(
            loss=loss_sum / (len(micro_batches) * self.process.world_size),
            gradient_norm=gradient_norm,
            skipped=bool(skipped),
            stop_asked=stops > 0,
            loss_scale=float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None,
            **{f"{part}_seconds": watch.seconds(part) for part in ("forward", "backward", "optimizer")},
        )

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed loss in nats and number of target tokens over all ranks' batches; each rank gives equally many."""
        self._deepspeed.eval()
        loss_sum, num_targets = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            tokens, segments, targets = (tensor.to(self.device) for tensor in batch)
            loss_sum += token_losses(self._model(tokens, segments), targets).double().sum().cpu()
            num_targets += target_tokens([batch])
        total, count = self._sum_over_ranks([float(loss_sum), num_targets])
        return total, int(count)

    def sample(self, prompt: list[int], new_tokens: int, temperature: float, seed: int, vocab_size: int) -> list[int]:
        """Token ids below `vocab_size` that follow `prompt`, always so many: under ZeRO-3 every rank must take every step."""
        self._deepspeed.eval()
        tokens = torch.tensor([prompt], device=self.device)
        drawn: Iterator[Tensor] = generate(
            self._model,
            tokens,
            new_tokens,
            temperature=temperature,
            seed=seed,
            sequence_length=self.config.sequence_length,
            vocab_size=vocab_size,
        )
        return [int(ids[0]) for ids in drawn]

    def save(self, root: Path, step: int, about: dict) -> str | None:
        """Write and publish the checkpoint of `step`. Returns what went wrong, the same sentence on every rank, or None.

        A failure on any rank leaves what was there before, and the run can go on.
        """
        self._files.begin()
        folder = root / f"{checkpoint.name_of(step)}.tmp-{about['run_id']}"
        if self.process.is_first:
            self._files.attempt(lambda: checkpoint.begin(root, step, about["run_id"]))
        if not self.agree(self._files.failure is None):
            return self.first_sentence(self._files.failure)
        self._deepspeed.save_checkpoint(str(root), tag=folder.name, save_latest=False)
        self._files.attempt(lambda: checkpoint.write_part(folder, self.process.rank, self._files.written))
        if self.agree(self._files.failure is None) and self.process.is_first:
            self._files.attempt(lambda: checkpoint.publish(folder, step, about))
        if self.agree(self._files.failure is None):
            return None
        if self.process.is_first:
            checkpoint.discard(folder)
        return self.first_sentence(self._files.failure)

    def load(self, folder: Path) -> None:
        """Take weights, optimizer and loss scale from a checkpoint of the same layout."""
        loaded, _ = self._deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        assert loaded is not None, folder

    def agree(self, claim: bool) -> bool:
        """True where the claim holds on every rank."""
        return self._sum_over_ranks([0 if claim else 1])[0] == 0

    def first_sentence(self, sentence: str | None, length: int = 1000) -> str | None:
        """The sentence of the lowest rank that has one, on every rank."""
        mine = torch.tensor(list((sentence or "").encode()[:length].ljust(length)), dtype=torch.uint8, device=self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.process.world_size)]
        dist.all_gather(all_of_them, mine)
        sentences = [bytes(one.tolist()).decode(errors="replace").strip() for one in all_of_them]
        return next((one for one in sentences if one), None)

    def memory_bytes(self) -> int:
        """Peak memory of this rank: of its GPU's allocator, or, on a CPU, of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        self._deepspeed.destroy()
        dist.destroy_process_group()

    def _sum_over_ranks(self, numbers: list[float]) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.process.world_size > 1:
            dist.all_reduce(summed)
        return summed.tolist()

    def _plain_step(self) -> tuple[float, bool]:
        """ZeRO-0 knows no gradient norm and would apply a NaN: measure it, and take the step without the update where it is one."""
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self._deepspeed.step()
            return norm, False
        for gradient in gradients:
            gradient.zero_()
        self._deepspeed.optimizer.step = lambda: None
        self._deepspeed.step()
        del self._deepspeed.optimizer.step
        return norm, True


def _adamw(model: Transformer, numbers: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with decay on matrices only. Under ZeRO-3 a parameter's own shape is that of its partition; ds_shape is the whole."""
    matrices = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": numbers.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(numbers.beta1, numbers.beta2), eps=numbers.epsilon, fused=True)


def _stream(seed: int, step: int, rank: int) -> int:
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63


class HashedFiles(CheckpointEngine):
    """Writes DeepSpeed's files atomically and hashed, reads them without unpickling anything but tensors and plain data.

    An error while writing is kept, not raised: the other ranks are on their way to a barrier. `Engine.save` tells them.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.written: dict[str, dict] = {}
        self.failure: str | None = None

    def attempt(self, write) -> None:
        try:
            write()
        except (OSError, RuntimeError) as error:
            # Of a full disk torch says "unexpected pos"; what the disk said lies under it.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failure = self.failure or f"{type(cause).__name__}: {cause}."

    def create(self, info) -> None:
        pass

    def makedirs(self, path, exist_ok=False) -> None:
        self.attempt(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict, path: str) -> None:
        def write() -> None:
            file = checkpoint.HashingFile(Path(path))
            torch.save(state_dict, file)
            self.written[Path(path).name] = file.finish()

        self.attempt(write)

    def load(self, path: str, map_location=None):
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info) -> bool:
        dist.barrier()
        return True


class Stopwatch:
    """Seconds spent in named parts of a step; on a GPU between events on its stream, so that nothing waits."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple]] = {}

    def measure(self, part: str) -> "_Span":
        return _Span(self._spans.setdefault(part, []), self._on_gpu)

    def seconds(self, part: str) -> float:
        spans = self._spans.get(part, [])
        if self._on_gpu:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)


class _Span:
    def __init__(self, spans: list, on_gpu: bool):
        self._spans, self._on_gpu = spans, on_gpu

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_) -> None:
        self._spans.append((self._start, self._now()))

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
