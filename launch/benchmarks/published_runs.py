"""Published measurements of training runs, and what the planner computes about each before anything is fitted.

The rows are in published_runs.csv: numbers only, each with its source. Other systems keep other bytes than ours, so their model states and
logits are described here; activations, work and the form of the step time are the planner's own.
"""

import csv
import dataclasses
import math
from pathlib import Path

from launch.ranks.layout import Layout
from launch.training.planning.activations import block_bytes, block_input_bytes
from launch.training.planning.memory import micro_batches_in_flight
from launch.training.planning.step_time import Work, work_of
from model.config import ModelConfig, count_parameters

FILE = Path(__file__).with_name("published_runs.csv")
SOURCES = {
    "bloom": "github.com/bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md at 053adaf (Megatron-DeepSpeed, A100)",
    "llm-foundry": "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md at 8c8dd48 (FSDP, A100 and H100)",
    "nanotron": "github.com/huggingface/nanotron, docs/benchmark_summary.svg at 2411b02 (H100)",
    "torchtitan": "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md at b5bcd76 (H100, 96 GB)",
}
"""The page of each source."""
_FAMILIES: dict[str, dict] = {
    "bloom": {"norm": "layernorm", "positions": "sinusoidal", "activation": "gelu_tanh", "biases": True},
    "llm-foundry": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "biases": False},
    "nanotron": {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "biases": False},
    "torchtitan": {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "biases": False},
}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """One row of the file."""

    id: str
    source: str
    model: ModelConfig
    device: str
    layout: Layout
    context: int
    """Ranks that share each sequence."""
    zero_stage: int
    micro_batch: int
    """Sequences per forward pass; for torchtitan's pipelines those of all micro-batches of a step."""
    accumulation: int
    precision: str
    recompute: str
    """none, selective or full."""
    seconds: float | None
    """Seconds of a step."""
    tokens_per_second: float | None
    """Tokens a second of one device."""
    mfu: float | None
    """Model FLOPs utilisation, all keys of attention counted; 1 is the peak."""
    memory: float | None
    """Memory of a device as printed, in GB."""
    ran_out_of_memory: bool
    is_doubted: bool
    """True if a note of the source doubts the row's memory."""

    @property
    def name(self) -> str:
        """Device and precision, by which speeds are fitted."""
        return f"{self.device} fp8" if self.precision == "fp8" else self.device


def read_runs(source: str) -> list[PublishedRun]:
    """Return the rows of a source."""
    with FILE.open(encoding="utf-8") as file:
        return [_run_of(row) for row in csv.DictReader(file) if row["source"] == source]


def _run_of(row: dict[str, str]) -> PublishedRun:
    number = {name: int(value) for name, value in row.items() if value.isdecimal()}
    real = {name: float(row[name]) if row[name] else None for name in ("seconds", "tokens_per_second", "mfu_percent", "memory_gb")}
    model = ModelConfig(
        vocab_size=number["vocabulary"],
        sequence_length=number["tokens"],
        hidden_size=number["hidden"],
        num_layers=number["layers"],
        num_attention_heads=number["heads"],
        num_key_value_heads=number["kv_heads"],
        head_size=number["hidden"] // number["heads"],
        intermediate_size=number["intermediate"],
        tie_embeddings=row["tied"] == "yes",
        **_FAMILIES[row["source"]],
    )
    layout = Layout(number["data"] * number["tensor"] * number["pipeline"], number["pipeline"], number["tensor"])
    return PublishedRun(
        row["id"],
        row["source"],
        model,
        row["device"],
        layout,
        number["context"],
        number["zero"],
        number["micro_batch"],
        number["accumulation"],
        row["precision"],
        row["recompute"],
        real["seconds"],
        real["tokens_per_second"],
        None if real["mfu_percent"] is None else real["mfu_percent"] / 100,
        real["memory_gb"],
        row["out_of_memory"] == "yes",
        row["doubted"] == "yes",
    )


def work_of_run(run: PublishedRun) -> Work:
    """Return the work of a rank of a run."""
    return work_of(run.model, run.micro_batch, run.recompute == "full", run.layout, run.zero_stage, "bf16", split_head=True)


def memory_of_run(run: PublishedRun) -> float:
    """Return the bytes of a rank's tensors, in the unit that the source prints."""
    return {"bloom": _bloom, "nanotron": _nanotron, "torchtitan": _torchtitan}[run.source](run)


def _bloom(run: PublishedRun) -> float:
    """Return GB of the first stage, with the logits as Megatron keeps them: 10 bytes each.

    fp16: weights and gradients of 2 bytes, and 16 bytes over the data ranks. BF16_Optimizer: 4 bytes more, for float32 gradients. It was
    used with a partition that counts embedding and head as layers.
    """
    model, layout, is_bf16 = run.model, run.layout, run.precision == "bf16-float32-gradients"
    embedding = model.vocab_size * model.hidden_size / layout.tensor_parallel_size
    of_a_block = (count_parameters(model) / layout.tensor_parallel_size - embedding) / model.num_layers
    stages = layout.pipeline_stages
    blocks = (model.num_layers + 2) / stages if is_bf16 else math.ceil(model.num_layers / stages)
    owned = blocks - (is_bf16 and stages > 1)
    states = ((8 if is_bf16 else 4) + 16 / layout.data_parallel_size) * (owned * of_a_block + embedding)
    tokens, flight = model.sequence_length, micro_batches_in_flight(run.accumulation, stages)
    kept = blocks * flight * block_input_bytes(model, run.micro_batch, tokens)
    kept += block_bytes(model, run.micro_batch, tokens, tensor_parallel_size=layout.tensor_parallel_size)
    logits = 10 * run.micro_batch * tokens * model.vocab_size / layout.tensor_parallel_size
    return (states + kept + logits) / 1e9


def _nanotron(run: PublishedRun) -> float:
    """Return GiB of the first stage. Its tensor parallelism divides whole activations. Bytes a parameter: 18, or 6 + 12 over data ranks.

    Gradients are summed in float32. Logits count 8 bytes each where one stage has all layers.
    """
    model, layout = run.model, run.layout
    tensor, stages, tokens = layout.tensor_parallel_size, layout.pipeline_stages, run.model.sequence_length
    states = 18 if run.zero_stage == 0 else 6 + 12 / layout.data_parallel_size
    kept = (
        micro_batches_in_flight(run.accumulation, stages) * model.num_layers / stages * block_bytes(model, run.micro_batch, tokens) / tensor
    )
    logits = 8 * run.micro_batch * tokens * model.vocab_size / tensor if stages == 1 else 0.0
    return (states * _of_first_stage(run) + kept + logits) / GIB


def _torchtitan(run: PublishedRun) -> float:
    """Return GiB. FSDP divides 16 bytes a parameter; its tensor parallelism divides whole activations; logits count 12 bytes each.

    In a pipeline weights and float32 gradients are whole, and a step has as many micro-batches as stages. Selective recomputation keeps
    a block's input, the result of attention and of every second product.
    """
    model, layout = run.model, run.layout
    tensor, stages, tokens = layout.tensor_parallel_size, layout.pipeline_stages, run.model.sequence_length // run.context
    sequences = run.micro_batch // stages
    owned = _of_first_stage(run)
    of_a_block = (count_parameters(model) - 2 * model.vocab_size * model.hidden_size) / model.num_layers / tensor
    states = 16 * owned / (layout.data_parallel_size * run.context) + (6 * owned if stages > 1 else 4 * of_a_block)
    kept: float = block_input_bytes(model, sequences, tokens)
    if run.recompute == "selective":
        keys = model.num_key_value_heads * model.head_size
        kept = 2 * (4 * model.hidden_size + keys + model.intermediate_size) * sequences * tokens
    blocks = (kept * model.num_layers + block_bytes(model, sequences, tokens)) / tensor  # stages x micro-batches in flight = layers
    logits = 12 * sequences * tokens * model.vocab_size / tensor
    without = (states + blocks) / GIB
    last = (states + (kept * model.num_layers / stages + block_bytes(model, sequences, tokens)) / tensor + logits) / GIB
    return max(without, last)


def _of_first_stage(run: PublishedRun) -> float:
    """Return the parameters of a rank of the first stage, which has the embedding; without a pipeline the head too."""
    model, layout = run.model, run.layout
    embedding, tensor = model.vocab_size * model.hidden_size, layout.tensor_parallel_size
    tables = 1 if model.tie_embeddings else 2
    blocks = (count_parameters(model) - tables * embedding) / tensor / layout.pipeline_stages
    return blocks + embedding * (1 if layout.pipeline_stages > 1 else tables) / tensor
