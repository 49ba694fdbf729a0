"""How the ranks of a run share its work: pipeline stages, tensor and sequence parallelism, and data parallelism with the rest."""

import dataclasses

from data.command_line import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ranks of a run as a grid, numbered as DeepSpeed does: rank = ((stage x data_parallel_size + data rank) x
    sequence_parallel_size + sequence place) x tensor_parallel_size + tensor place.
    """

    world_size: int
    pipeline_stages: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        """Raises UserError where the ranks do not divide."""
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
            raise UserError(f"{self.world_size} rank(s) do not divide into {asked}. Nearest: {nearest} ranks.")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one micro-batch."""
        return self.pipeline_stages * self._group

    @property
    def data_parallel_size(self) -> int:
        """Micro-batches that are computed side by side."""
        return self.world_size // self.model_parallel_size

    @property
    def num_replicas(self) -> int:
        """Ranks that compute the same tokens, or other layers of them: stages times tensor parallelism."""
        return self.pipeline_stages * self.tensor_parallel_size

    @property
    def zero_size(self) -> int:
        """Ranks among which ZeRO divides, and over which gradients are averaged: data times sequence parallelism."""
        return self.data_parallel_size * self.sequence_parallel_size

    def data_rank(self, rank: int) -> int:
        """Whose micro-batches a rank works on."""
        return rank // self._group % self.data_parallel_size

    def sequence_rank(self, rank: int) -> int:
        """Which part of the sequences a rank has."""
        return rank // self.tensor_parallel_size % self.sequence_parallel_size

    def tensor_rank(self, rank: int) -> int:
        """Which part of the matrices a rank has."""
        return rank % self.tensor_parallel_size

    def sequence_groups(self) -> list[list[int]]:
        """The ranks that share sequences."""
        stride = self.tensor_parallel_size
        first = [rank for rank in range(self.world_size) if self.sequence_rank(rank) == 0]
        return [[rank + stride * place for place in range(self.sequence_parallel_size)] for rank in first]

    @property
    def _group(self) -> int:
        return self.tensor_parallel_size * self.sequence_parallel_size

    def record(self, zero_stage: int, precision: str) -> dict:
        """What a checkpoint's manifest says of how it was trained; `describe_layout` reads it."""
        return dataclasses.asdict(self) | {"zero_stage": zero_stage, "precision": precision}

    def bubble(self, num_micro_batches: int) -> float:
        """The share of a step in which a stage waits, if all take equally long: (p - 1) / (m + p - 1).

        Of p stages and m micro-batches under one-forward-one-backward: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
        """
        return (self.pipeline_stages - 1) / (num_micro_batches + self.pipeline_stages - 1)

    def __str__(self) -> str:
        parts = [f"{self.pipeline_stages} pipeline stages"] if self.pipeline_stages > 1 else []
        parts += [f"tensor parallel {self.tensor_parallel_size}"] if self.tensor_parallel_size > 1 else []
        parts += [f"sequence parallel {self.sequence_parallel_size}"] if self.sequence_parallel_size > 1 else []
        parts += [f"data parallel {self.data_parallel_size}"] if parts and self.data_parallel_size > 1 else []
        return " x ".join([f"{self.world_size} rank(s)", *parts]).replace(" x ", ": ", 1)


def describe_layout(recorded: dict) -> str:
    """A checkpoint's layout, as its manifest has it, for a person."""
    ranks = Layout(**{field.name: recorded[field.name] for field in dataclasses.fields(Layout)})
    return f"{ranks} under ZeRO-{recorded['zero_stage']} in {recorded['precision']}"


def min_micro_batches(stages: int) -> int:
    """From where on the bubble of a pipeline is small, under a fifth of a step: four a stage (Huang et al. 2018, arXiv 1811.06965)."""
    return 4 * stages if stages > 1 else 1


def largest_micro_batch_size(share: int, stages: int) -> int:
    """The largest size that cuts a rank's `share` of sequences into enough micro-batches for the stages (without them: the share)."""
    wanted = min(share, min_micro_batches(stages))
    return next(size for size in range(share // wanted, 0, -1) if share % size == 0)
