"""How the ranks of a run share its work: pipeline stages, tensor and sequence parallelism, and data parallelism for the rest."""

import dataclasses

from data.command_line import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ranks of a run as a grid, in DeepSpeed's order.

    rank = ((stage x data_parallel_size + data rank) x sequence_parallel_size + sequence rank) x tensor_parallel_size + tensor rank.
    """

    world_size: int
    pipeline_stages: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        """Raise UserError if a size is below 1 or the number of ranks is not a multiple of their product."""
        sizes = {
            "pipeline_stages": self.pipeline_stages,
            "tensor_parallel_size": self.tensor_parallel_size,
            "sequence_parallel_size": self.sequence_parallel_size,
        }
        if wrong := [f"{name} is {size}; it must be at least 1." for name, size in sizes.items() if size < 1]:
            raise UserError("\n".join(wrong))
        if self.world_size % self.model_parallel_size:
            asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            below = self.world_size // self.model_parallel_size * self.model_parallel_size
            nearest = f"{below} or {below + self.model_parallel_size}" if below else f"{self.model_parallel_size}"
            raise UserError(f"The number of ranks, {self.world_size}, is not a multiple of {asked}. Nearest: {nearest} ranks.")

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that share one micro-batch."""
        return self.pipeline_stages * self._group

    @property
    def data_parallel_size(self) -> int:
        """Number of micro-batches that are computed at the same time."""
        return self.world_size // self.model_parallel_size

    @property
    def num_replicas(self) -> int:
        """Number of ranks that count the same tokens: pipeline stages x tensor parallelism."""
        return self.pipeline_stages * self.tensor_parallel_size

    @property
    def zero_size(self) -> int:
        """Number of ranks over which ZeRO partitions and gradients are averaged: data x sequence parallelism."""
        return self.data_parallel_size * self.sequence_parallel_size

    def data_rank(self, rank: int) -> int:
        """Index of the data-parallel group whose micro-batches a rank computes, below data_parallel_size."""
        return rank // self._group % self.data_parallel_size

    def sequence_rank(self, rank: int) -> int:
        """Index of the part of each sequence that a rank has, below sequence_parallel_size."""
        return rank // self.tensor_parallel_size % self.sequence_parallel_size

    def tensor_rank(self, rank: int) -> int:
        """Index of the part of each matrix that a rank has, below tensor_parallel_size."""
        return rank % self.tensor_parallel_size

    def sequence_groups(self) -> list[list[int]]:
        """Groups of ranks that share sequences, each in the order of the sequence's parts."""
        stride = self.tensor_parallel_size
        first = [rank for rank in range(self.world_size) if self.sequence_rank(rank) == 0]
        return [[rank + stride * part for part in range(self.sequence_parallel_size)] for rank in first]

    def stage_groups(self) -> list[list[int]]:
        """Groups of ranks that have the same layers: one for each pipeline stage."""
        size = self.world_size // self.pipeline_stages
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]

    def stage_place(self, rank: int) -> int:
        """Index of a rank among the ranks that have the same layers."""
        return rank % (self.world_size // self.pipeline_stages)

    @property
    def _group(self) -> int:
        return self.tensor_parallel_size * self.sequence_parallel_size

    def record(self, zero_stage: int, precision: str) -> dict:
        """Entry for a checkpoint's manifest; `describe_layout` reads it."""
        return dataclasses.asdict(self) | {"zero_stage": zero_stage, "precision": precision}

    def bubble(self, num_micro_batches: int) -> float:
        """Share of a step in which a pipeline stage waits, if all stages take equally long: (p - 1) / (m + p - 1).

        For p stages and m micro-batches in the one-forward-one-backward schedule: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
        """
        return (self.pipeline_stages - 1) / (num_micro_batches + self.pipeline_stages - 1)

    def __str__(self) -> str:
        parts = [f"{self.pipeline_stages} pipeline stages"] if self.pipeline_stages > 1 else []
        parts += [f"tensor parallel {self.tensor_parallel_size}"] if self.tensor_parallel_size > 1 else []
        parts += [f"sequence parallel {self.sequence_parallel_size}"] if self.sequence_parallel_size > 1 else []
        parts += [f"data parallel {self.data_parallel_size}"] if parts and self.data_parallel_size > 1 else []
        return " x ".join([f"{self.world_size} rank(s)", *parts]).replace(" x ", ": ", 1)


def describe_layout(recorded: dict) -> str:
    """Describe the layout in a checkpoint's manifest as text."""
    ranks = Layout(**{field.name: recorded[field.name] for field in dataclasses.fields(Layout)})
    return f"{ranks} under ZeRO-{recorded['zero_stage']} in {recorded['precision']}"


def min_micro_batches(stages: int) -> int:
    """Smallest number of micro-batches with a pipeline bubble below a fifth of a step: 4 a stage (Huang et al. 2018, arXiv 1811.06965)."""
    return 4 * stages if stages > 1 else 1


def largest_micro_batch_size(share: int, stages: int) -> int:
    """Largest micro-batch size that cuts a rank's `share` of sequences into min_micro_batches or more; without a pipeline the share."""
    wanted = min(share, min_micro_batches(stages))
    return next(size for size in range(share // wanted, 0, -1) if share % size == 0)
