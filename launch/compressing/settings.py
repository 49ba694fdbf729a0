"""Settings of launch/prune.py, launch/quantize.py and launch/export.py. Nothing heavy is imported here.

`complaints()` is called by data.command_line.read_settings, which raises them together with all others.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from data.command_line import describe
from data.files import output_complaint
from launch.training.settings import whole_row_as_0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """Settings that pruning and quantization share."""

    model: str
    """Run folder, a checkpoint in one, or a Hugging Face folder. With --dry_run also a named size such as llama2-7b."""
    output: str | None = None
    """New folder for safetensors, config.json, tokenizer, report.md with its pictures, and report.json. Not needed with --dry_run."""
    average: Annotated[int, Ge(1)] = 1
    """Number of the run's newest checkpoints whose weights are averaged."""
    data: str | None = None
    """Folder that data/prepare.py wrote. Its training split calibrates, its validation split measures (default: the folder that the run
    was trained on)."""
    calibration_data: str | None = None
    """Another such folder, whose training split calibrates (default: the folder of data)."""
    calibration_samples: Annotated[int, Ge(0)] = 128
    """Number of calibration samples, evenly spread over the split. 0: none, for methods that read only the weights."""
    sequence_length: Annotated[int, Ge(1)] | None = None
    """Tokens of a sample (default: the model's context, at most 2,048)."""
    test_samples: Annotated[int, Ge(0)] = 256
    """Number of validation samples on which the model is measured before and after. 0: none."""
    sensitivity_samples: Annotated[int, Ge(0)] = 8
    """Number of calibration samples on which the loss is measured with one block compressed at a time. 0: none. Their hidden states are
    kept once a block, so fewer are taken if these would need more memory than the calibration's."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of the written weights that are not quantized, and of scales."""
    ignore: tuple[str, ...] = ()
    """Matrices that stay unchanged: names such as 3.feed_forward.down (of block 3, counted from 0), or patterns such as 0.* and *.value."""
    max_shard_gib: Annotated[float, Gt(0)] = 4.0
    """Largest safetensors file, GiB."""
    max_perplexity_ratio: Annotated[float, Gt(0)] | None = None
    """Exit with status 3 if perplexity after / perplexity before is above this number. The folder is kept (default: no limit)."""
    strict: bool = False
    """Exit with status 1 if a matrix could not be compressed as requested, for example rounded to nearest because its statistics could not
    be inverted."""
    force: bool = False
    """Compress a model that is already compressed: quantized weights are dequantized, and zeros are weights like any other.
    Also allow a test text that is in the calibration text."""
    dry_run: bool = False
    """Print the plan, with memory and time, and stop."""

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is invalid."""
        found = []
        if self.output is None and not self.dry_run:
            found.append("output is missing. Give the new folder for the compressed model with --output.")
        if self.output is not None and (complaint := output_complaint(self.output)):
            found.append(complaint)
        if self.max_perplexity_ratio is not None and not self.test_samples:
            ratio, samples = describe(self, "max_perplexity_ratio"), describe(self, "test_samples")
            found.append(f"{ratio} needs a measurement, but {samples} allows none. Use --test_samples 1 or more.")
        return found

    def _only_with(self, name: str, setting: str, allowed: str) -> str:
        """Return the message that one setting applies only to some values of another."""
        return f"{describe(self, name)} applies only to {setting} {allowed}, not to {describe(self, setting)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneSettings(CompressionSettings):
    """Settings of launch/prune.py."""

    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "wanda"
    """Weights that become zero. magnitude: the smallest (needs no text). wanda: those that contribute least (arXiv 2306.11695). sparsegpt:
    those that the other weights can replace best (arXiv 2301.00774). structured removes whole neurons, heads, channels or blocks, which
    gives a smaller dense model."""
    sparsity: str | None = None
    """Share of each matrix that becomes zero, or a pattern such as 2:4, two of every four neighbouring weights (default: 0.5). Not for
    structured pruning."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """uniform: the same share in all blocks. owl: a smaller share in blocks with more outliers (arXiv 2310.05175)."""
    damping: Annotated[float, Gt(0)] = 0.01
    """SparseGPT and structured pruning: multiple of the mean diagonal that is added to the diagonal of the second moment, so that it can
    be inverted."""
    parameters: float | None = None
    """Structured pruning: share of all parameters to keep. The feed-forward width follows from it."""
    intermediate_size: Annotated[int, Ge(1)] | None = None
    """Structured pruning: feed-forward width to keep."""
    num_key_value_heads: Annotated[int, Ge(1)] | None = None
    """Structured pruning: number of key/value heads to keep, each with the query heads that read it."""
    hidden_size: Annotated[int, Ge(1)] | None = None
    """Structured pruning: width of the residual stream to keep."""
    num_layers: Annotated[int, Ge(1)] | None = None
    """Structured pruning: number of blocks to keep (in an encoder-decoder, blocks of the encoder)."""
    num_decoder_layers: Annotated[int, Ge(1)] | None = None
    """Structured pruning: number of blocks of an encoder-decoder's decoder to keep."""
    depth_by: Literal["influence", "loss"] = "influence"
    """Structured pruning: which blocks are removed. influence: those that change the residual stream least (arXiv 2403.03853). loss: those
    without which the loss rises least."""

    @property
    def sizes(self) -> dict[str, float | int | None]:
        """The sizes that structured pruning keeps, as structured.sizes_for takes them."""
        names = ("parameters", "intermediate_size", "num_key_value_heads", "hidden_size", "num_layers", "num_decoder_layers")
        return {name: getattr(self, name) for name in names}

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is invalid."""
        found, masks = super().complaints(), "magnitude, wanda or sparsegpt"
        only_structured = [*self.sizes, "depth_by"]
        not_structured = ["sparsity", "allocation", "ignore"]
        given = [name for name in only_structured + not_structured if getattr(self, name) != getattr(PruneSettings, name)]
        if self.method == "structured":
            found += [self._only_with(name, "method", masks) for name in given if name in not_structured]
        else:
            found += [self._only_with(name, "method", "structured") for name in given if name in only_structured]
        if self.allocation == "owl" and ":" in (self.sparsity or ""):
            allocation, sparsity = describe(self, "allocation"), describe(self, "sparsity")
            found.append(f"{allocation} gives blocks different shares, but {sparsity} is the same in all blocks. Use --sparsity 0.5.")
        if self.method in ("magnitude", "wanda") and self.damping != PruneSettings.damping:
            found.append(self._only_with("damping", "method", "sparsegpt or structured"))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeSettings(CompressionSettings):
    """Settings of launch/quantize.py."""

    method: Literal["rtn", "gptq"] = "gptq"
    """rtn: each weight is rounded to its nearest code (needs no text). gptq: weights are rounded so that the errors of a matrix's columns
    cancel (arXiv 2210.17323)."""
    scaling: Literal["none", "smoothquant", "awq"] = "none"
    """Factors that are moved between a matrix's inputs and its columns before rounding. smoothquant: away from inputs with outliers, for
    int8 activations (arXiv 2211.10438). awq: to the columns that matter most, found by search (arXiv 2306.00978)."""
    smoothing_strength: Annotated[float, Ge(0), Le(1)] = 0.5
    """SmoothQuant: 0 leaves all outliers in the activations, 1 moves all of them to the weights."""
    kind: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    """Number format of the quantized weights: integers, FP8 E4M3, or FP4 E2M1 with a scale for every 16 (nvfp4) or 32 (mxfp4) entries,
    as on Blackwell."""
    bits: Annotated[int, Ge(2), Le(8)] | None = None
    """Bits of an integer (default: 4). fp8 always has 8 bits, nvfp4 and mxfp4 have 4."""
    group_size: Annotated[int, Ge(-1)] | None = None
    """Entries of a row that share a scale. 0 or -1: the whole row (default: 128 for integers below 8 bits, else the row; nvfp4 16, mxfp4
    32)."""
    symmetric: bool = True
    """True if zero is the middle code; false if each group has its own zero point."""
    activations: Literal["none", "int8", "fp8"] | None = None
    """Type that the inputs of the matrices are rounded to while the network runs, with one scale a token (default: fp8 with kind fp8,
    else none). int8 with --bits 8 is W8A8."""
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    """Type in which a decoder's keys and values are cached. Each block has a fixed scale for its keys and one for its values, from the
    largest of each in the calibration text. vLLM supports only fp8."""
    damping: Annotated[float, Gt(0)] = 0.01
    """GPTQ: multiple of the mean diagonal that is added to the diagonal of the second moment, so that it can be inverted."""
    act_order: bool = False
    """GPTQ: quantize the columns with the largest inputs first."""
    average_bits: float | None = None
    """Average bits of a weight in the matrices, scales included. Each block gets 3, 4 or 8 bits, by the loss that each costs alone
    (default: the same bits in all blocks)."""
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    """Type of the written weights that are not quantized, and of scales."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_size", whole_row_as_0(self.group_size))

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is invalid."""
        found = super().complaints() + (self._complaints_about_average_bits() if self.average_bits is not None else [])
        if self.method == "rtn":
            given = [name for name in ("act_order", "damping") if getattr(self, name) != getattr(QuantizeSettings, name)]
            found += [self._only_with(name, "method", "gptq") for name in given]
        if self.scaling == "smoothquant" and self.kind == "int" and self.activations in (None, "none"):
            scaling, activations = describe(self, "scaling"), describe(self, "activations")
            found.append(f"{scaling} needs rounded inputs, but {activations} rounds none. Use --activations int8 --bits 8.")
        if self.scaling != "smoothquant" and self.smoothing_strength != QuantizeSettings.smoothing_strength:
            found.append(self._only_with("smoothing_strength", "scaling", "smoothquant"))
        if self.kv_cache != "none" and not self.calibration_samples:
            cache, samples = describe(self, "kv_cache"), describe(self, "calibration_samples")
            found.append(f"{cache} takes its scales from the calibration text, but {samples} reads none.")
        if self.kv_cache != "none" and not self.symmetric:
            cache, symmetric = describe(self, "kv_cache"), describe(self, "symmetric")
            found.append(f"{cache} needs symmetric weights, but {symmetric}: transformers reads no cache scales with asymmetric weights.")
        return found

    def _complaints_about_average_bits(self) -> list[str]:
        average, found = describe(self, "average_bits"), []
        if self.kind != "int" or self.activations not in (None, "none"):
            kind, activations = describe(self, "kind"), describe(self, "activations")
            found.append(f"{average} applies only to integer weights without rounded activations, not to {kind} with {activations}.")
        if self.bits is not None:
            found.append(f"{average} and {describe(self, 'bits')} both set the bits; give one of them.")
        if not self.symmetric:
            found.append(
                f"{average} needs symmetric integers, but {describe(self, 'symmetric')}: transformers reads no mixture of zero points."
            )
        if not (self.sensitivity_samples and self.calibration_samples):
            samples = f"{describe(self, 'sensitivity_samples')} and {describe(self, 'calibration_samples')}"
            found.append(f"{average} needs the loss that each block costs alone: {samples} must be above 0.")
        return found


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Settings of launch/export.py."""

    model: str
    """Run folder, a checkpoint in one, or an exported folder."""
    output: str
    """New folder for safetensors, config.json, generation_config.json, tokenizer and README.md; with --format gguf a new file NAME.gguf."""
    format: Literal["huggingface", "gguf"] = "huggingface"
    """huggingface: a folder for transformers and software that reads its files. gguf: a file for llama.cpp (decoders only, with the
    tokenizer)."""
    average: Annotated[int, Ge(1)] = 1
    """Number of the run's newest checkpoints whose weights are averaged."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of the written weights with --format huggingface."""
    max_shard_gib: Annotated[float, Gt(0)] = 4.0
    """Largest safetensors file, GiB."""
    type: Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"] | None = None
    """Type of the matrices with --format gguf (default: f16). q8_0 and q4_0 round to blocks of 32. q4_k_m, q5_k_m and q6_k are written by
    llama.cpp and need llama-cpp-python."""

    def complaints(self) -> list[str]:
        """Return a message for each value that is wrong whatever the model is."""
        found = []
        if complaint := output_complaint(self.output):
            found.append(complaint)
        if self.format == "huggingface" and self.type is not None:
            found.append(f"--type {self.type} applies only to --format gguf. For a Hugging Face folder use --precision.")
        if self.format == "gguf" and self.precision != "float32":
            found.append(f"--precision {self.precision} applies only to --format huggingface. For gguf use --type.")
        if self.format == "gguf" and Path(self.output).suffix != ".gguf":
            found.append(f"--output {self.output} must be a file name that ends with .gguf.")
        return found
