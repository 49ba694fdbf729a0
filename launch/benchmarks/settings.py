"""Settings of the benchmarks."""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from data.command_line import UserError, nearest


@dataclasses.dataclass(frozen=True)
class TrainingStepSettings:
    """Settings of launch/benchmarks/training_step.py."""

    hidden_size: Annotated[int, Ge(1)] = 384
    """Hidden size."""
    num_layers: Annotated[int, Ge(1)] = 6
    """Number of blocks."""
    num_attention_heads: Annotated[int, Ge(1)] = 6
    """Number of attention heads."""
    intermediate_size: Annotated[int, Ge(1)] = 1024
    """Feed-forward width."""
    vocab_size: Annotated[int, Ge(1)] = 8192
    """Rows of the embedding and of the head, which are not tied."""
    sequence_length: Annotated[int, Ge(1)] = 256
    """Tokens per sequence."""
    micro_batch_size: Annotated[int, Ge(1)] = 16
    """Sequences per forward pass."""
    accumulation: Annotated[int, Ge(2)] = 2
    """Micro-batches per step, at least 2."""
    rounds: Annotated[int, Ge(1)] = 3
    """How many times each contender is started."""
    steps: Annotated[int, Ge(1)] = 4
    """Steps that are measured in each round, after two warm-up steps."""
    only: tuple[str, ...] = ()
    """Contenders to measure (default: all)."""
    contender: str | None = None
    """Measure only this contender, in this process, and print its seconds per step. The benchmark starts its processes with it."""


@dataclasses.dataclass(frozen=True)
class PreparationSettings:
    """Settings of launch/benchmarks/preparation.py."""

    input: tuple[str, ...] = ()
    """JSON Lines files with the text in the field "text" (default: the source of Python's standard library, 3,000 characters each)."""
    megabytes: Annotated[float, Gt(0)] = 40.0
    """Megabytes of JSON Lines to tokenize. A shorter input is repeated."""
    peer_python: str | None = None
    """Python of an environment that has datatrove (default: none, and data/prepare.py is measured alone)."""
    rounds: Annotated[int, Gt(0)] = 2
    """How many times each contender runs."""
    index_documents: Annotated[int, Gt(0)] = 1_000_000
    """Documents of 300 tokens that are written as one shard."""
    blend_samples: Annotated[int, Gt(0)] = 1_000_000_000
    """Samples in the blend of two sources."""
    set_tokens: Annotated[int, Gt(0)] = 2_000_000_000
    """Tokens in the set from which random samples are read. Documents have 500 tokens on average; the file is sparse and uses no disk."""
    only: tuple[str, ...] = ()
    """Rows to measure (default: all)."""


@dataclasses.dataclass(frozen=True)
class CompressionSettings:
    """Settings of launch/benchmarks/pruning_and_quantization.py."""

    model: str = "runs/demo"
    """Run folder, checkpoint in a run folder, or exported folder of a decoder. Its weights are used in float32."""
    data: str = "prepared"
    """Folder written by data/prepare.py. Its training split is the calibration text, its whole validation split is the test text."""
    calibration_samples: Annotated[int, Ge(1)] = 128
    """Calibration samples for both contenders."""
    peer_python: str | None = None
    """Python of an environment that has llm-compressor (default: none, and ours is measured alone)."""
    rounds: Annotated[int, Ge(1)] = 5
    """How many times the speed of generation is measured."""
    only: tuple[str, ...] = ()
    """Parts to measure (default: all)."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of launch/benchmarks/generation.py."""

    model: str | None = None
    """Run folder, checkpoint in a run folder, or exported folder of a decoder (default: random weights of --size)."""
    size: str = "llama-160m"
    """Named size of the random weights."""
    types: tuple[Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"], ...] = ("f16", "q8_0", "q4_0", "q4_k_m")
    """GGUF types to measure with llama.cpp, as --type of launch/export.py. Not used if llama-cpp-python is not installed."""
    new_tokens: Annotated[int, Ge(1)] = 64
    """Tokens that are generated in each round."""
    rounds: Annotated[int, Ge(1)] = 3
    """How many times each contender is measured, after a warm-up round."""


@dataclasses.dataclass(frozen=True)
class OptimizersSettings:
    """Settings of launch/benchmarks/optimizers.py."""

    output: str = "runs/optimizers"
    """Folder of the runs and of the measured seconds."""
    data: str = "prepared"
    """Folder written by data/prepare.py."""
    recipe: str = "launch/recipes/demo.yaml"
    """Recipe that every run has in common. Its tokens, and the share of warm-up steps, hold at every batch size."""
    optimizers: tuple[str, ...] = ("adamw", "muon")
    """Optimizers to compare: values of --optimizer.name of launch/pretrain.py."""
    rates: tuple[Annotated[float, Gt(0)], ...] = (2.5e-3, 5e-3, 1e-2, 2e-2)
    """Learning rates that every optimizer is trained with at the first of --batch_sizes."""
    batch_sizes: tuple[Annotated[int, Ge(1)], ...] = (8, 64, 256)
    """Sequences per step."""
    micro_batch_size: Annotated[int, Ge(1)] = 16
    """Most sequences per forward pass."""
    seeds: Annotated[int, Ge(1)] = 3
    """Seeds that the best rate is trained with."""
    train: bool = True
    """False: train nothing, and report what is finished."""
    timing: bool = False
    """Measure the seconds of a step on an idle machine instead of training."""
    timing_steps: Annotated[int, Ge(1)] = 8
    """Steps that are timed in each round, after two warm-up steps."""
    timing_rounds: Annotated[int, Ge(1)] = 3
    """How many times each optimizer is timed."""


@dataclasses.dataclass(frozen=True)
class SeesawSettings:
    """Settings of launch/benchmarks/seesaw.py."""

    data: str = "prepared"
    """Prepared folder."""
    output: str = "runs/seesaw"
    """Folder of the runs, one for each seed and contender."""
    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    """Schedule of the learning rate."""
    ramp: str = "seesaw:32:4"
    """batch.ramp of the runs whose batch grows: seesaw, seesaw:SIZE or seesaw:SIZE:STEP."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Sequences per step of the other runs, and of the first steps under the ramp."""
    optimizer: str = "adamw"
    """Value of --optimizer.name of launch/pretrain.py."""
    learning_rate: Annotated[float, Gt(0)] = 5e-3
    """Peak rate at batch_size."""
    train_tokens: Annotated[float, Gt(0)] = 3_072_000.0
    """Length of each run in tokens (the demo's: 375 steps of 32 sequences)."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds to train with."""


@dataclasses.dataclass(frozen=True)
class PlannerSettings:
    """Settings of launch/benchmarks/planner.py."""

    seed: int = 1
    """Seed of the random part of the runs that constants are fitted on."""
    splits: Annotated[int, Ge(1)] = 20
    """Random parts, with the seeds from 1 on, over which the errors of those fits are averaged in the table's last columns."""
    picture: str | None = None
    """SVG file to draw the picture into: predicted against published values (default: no picture)."""


def chosen(kind: str, known: Sequence[str], only: Sequence[str]) -> list[str]:
    """Return the names to measure, in the order of `known`; all of them if `only` is empty. Raises UserError for an unknown `kind`."""
    for name in only:
        if name not in known:
            raise UserError(f'Unknown {kind} "{name}".{nearest(name, list(known))} {kind.capitalize()}s: {", ".join(known)}.')
    return [name for name in known if name in (only or known)]


def refuse_missing_python(peer_python: str | None) -> None:
    """Raise UserError if the Python of the peer's environment does not exist."""
    if peer_python is not None and not shutil.which(peer_python):
        raise UserError(f"--peer_python {peer_python} is not a program.")
