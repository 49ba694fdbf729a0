"""Settings of launch/prune.py, launch/quantize.py and launch/export.py. Nothing heavy is imported here."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    model: str
    """Run folder, a checkpoint in one, or a Hugging Face folder; with --dry_run also a size such as llama2-7b."""
    output: str | None = None
    """New folder: safetensors, config.json, tokenizer, report.md with its pictures, report.json. --dry_run needs none."""
    average: int = 1
    """Mean of the weights of the newest so many checkpoints."""
    data: str | None = None
    """Folder that data/prepare.py wrote: its training split calibrates, its validation split measures (default: the run's own)."""
    calibration_data: str | None = None
    """Another such folder, whose training split calibrates."""
    calibration_samples: int = 128
    """Samples that calibrate, evenly spread; 0: none, for methods that look at weights alone."""
    sequence_length: int | None = None
    """Tokens of a sample (default: the model's context, at most 2,048)."""
    test_samples: int = 256
    """Samples of the validation split on which the model is measured before and after; 0: none."""
    sensitivity_samples: int = 8
    """Calibration samples on which each block is measured compressed alone; 0: none. Their hidden states are kept once a block, so there
    are fewer where these would be more than the calibration's."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of what is written and not quantized, and of scales."""
    ignore: tuple[str, ...] = ()
    """Matrices that stay as they are: names such as 3.feed_forward.down (of block 3, from 0), or patterns such as 0.* and *.value."""
    max_shard_gib: float = 4.0
    """Largest safetensors file, GiB."""
    max_perplexity_ratio: float | None = None
    """Status 3 where perplexity after / before is above this; the folder is kept (default: no limit)."""
    strict: bool = False
    """Status 1 where a matrix went otherwise than asked, such as rounded because its statistics could not be inverted."""
    force: bool = False
    """Compress what is compressed already, its codes as the numbers that they stand for and its zeros as weights like others; and
    measure on text that calibrated."""
    dry_run: bool = False
    """Print the plan, with memory and time, and stop."""

    def complaints(self) -> list[str]:
        """A sentence for each setting that cannot be, or contradicts another."""
        counts = ("calibration_samples", "test_samples", "sensitivity_samples")
        found = [f"{name} is {getattr(self, name)}; it may not be negative." for name in counts if getattr(self, name) < 0]
        if self.output is None and not self.dry_run:
            found.append("output is not given: name the new folder that the compressed model goes into.")
        if not self.max_shard_gib > 0:
            found.append(f"max_shard_gib is {self.max_shard_gib:g}; it must be above 0.")
        if self.max_perplexity_ratio is not None and not self.max_perplexity_ratio > 0:
            found.append(f"max_perplexity_ratio is {self.max_perplexity_ratio:g}; it must be above 0.")
        if self.max_perplexity_ratio is not None and not self.test_samples:
            found.append("max_perplexity_ratio needs a measurement; test_samples is 0.")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneSettings(CompressionSettings):
    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "wanda"
    """Which weights become zero: the smallest (needs no text), those that contribute least (arXiv 2306.11695), or those for which the
    others can best make up (arXiv 2301.00774). structured takes whole neurons, heads, channels or blocks out: a smaller dense model."""
    sparsity: str | None = None
    """Share of each matrix that becomes zero, or a pattern such as 2:4, two of each four neighbours (default: 0.5; not of structured)."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """The same share in all blocks, or less in those with more outliers (arXiv 2310.05175)."""
    damping: float = 0.01
    """Of sparsegpt and structured: share of the mean diagonal that is added to the second moment's, so that it can be inverted."""
    parameters: float | None = None
    """Of structured: share of all parameters that is left; the feed-forward's width follows from it."""
    intermediate_size: int | None = None
    """Of structured: width of the feed-forward that is left."""
    num_key_value_heads: int | None = None
    """Of structured: key/value heads that are left, each with the query heads that read it."""
    hidden_size: int | None = None
    """Of structured: width of the residual stream that is left."""
    num_layers: int | None = None
    """Of structured: blocks that are left (of an encoder-decoder those of its encoder)."""
    num_decoder_layers: int | None = None
    """Of structured: blocks of an encoder-decoder's decoder that are left."""
    depth_by: Literal["influence", "loss"] = "influence"
    """Of structured: blocks go that change what passes through them least (arXiv 2403.03853), or without which the loss rises least."""

    @property
    def sizes(self) -> dict[str, float | int | None]:
        """What structured pruning is to leave, as structured.sizes_for takes it."""
        names = ("parameters", "intermediate_size", "num_key_value_heads", "hidden_size", "num_layers", "num_decoder_layers")
        return {name: getattr(self, name) for name in names}

    def complaints(self) -> list[str]:
        found = super().complaints()
        given = [name for name in (*self.sizes, "depth_by") if getattr(self, name) != getattr(PruneSettings, name)]
        if self.method == "structured":
            if self.sparsity is not None or self.allocation != "uniform":
                found.append("sparsity and allocation are of masks; method structured takes sizes.")
            if self.ignore:
                found.append("ignore is of masks; method structured has one shape in all blocks.")
        elif given:
            found.append(f"{', '.join(given)}: of method structured; method is {self.method}.")
        if self.allocation == "owl" and ":" in (self.sparsity or ""):
            found.append(f"allocation owl gives blocks different shares; sparsity {self.sparsity} is the same in all.")
        if self.method in ("magnitude", "wanda") and self.damping != PruneSettings.damping:
            found.append(f"damping is of sparsegpt and structured; method is {self.method}.")
        if not self.damping > 0:
            found.append(f"damping is {self.damping:g}; it must be above 0.")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeSettings(CompressionSettings):
    method: Literal["rtn", "gptq"] = "gptq"
    """Each weight to its nearest code (needs no text), or so that the errors of a matrix's columns cancel (arXiv 2210.17323)."""
    scaling: Literal["none", "smoothquant", "awq"] = "none"
    """Before that, factors move between a matrix's inputs and its columns: from inputs with outliers, for int8 activations
    (arXiv 2211.10438), or to columns that matter, found by search (arXiv 2306.00978)."""
    smoothing_strength: float = 0.5
    """Of smoothquant: 0 leaves all outliers to the activations, 1 to the weights."""
    kind: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    """What weights become: integers, E4M3, or E2M1 with a scale each 16 (nvfp4) or 32 (mxfp4) entries, as on Blackwell."""
    bits: int | None = None
    """Of an integer, 2 to 8 (default: 4); 8 of fp8 and 4 of the others."""
    group_size: int | None = None
    """Entries of a row that share a scale; 0: the whole row (default: 128 of integers below 8 bits, else the row; nvfp4 16, mxfp4 32)."""
    symmetric: bool = True
    """Zero is a code's middle; else each group has its own zero point."""
    activations: Literal["none", "int8", "fp8"] | None = None
    """What goes into the matrices is rounded too, each token by a scale of its own, while the network runs (default: fp8 beside fp8, else
    none). int8 beside --bits 8 is W8A8."""
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    """Type in which a decoder's keys and values are cached: each block has a fixed scale for its keys and one for its values, from the
    largest of each in the calibration text. vLLM knows fp8 alone."""
    damping: float = 0.01
    """Of gptq: share of the mean diagonal that is added to the second moment's, so that it can be inverted."""
    act_order: bool = False
    """Of gptq: columns with the largest inputs first."""
    average_bits: float | None = None
    """Bits a weight of the matrices on average, with their scales: each block gets 3, 4 or 8, by what it costs alone (default: --bits)."""
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    """Type of what is not quantized, and of scales."""

    def complaints(self) -> list[str]:
        found = super().complaints()
        if self.average_bits is not None:
            if self.kind != "int" or self.activations not in (None, "none"):
                found.append("average_bits is for integer weights without rounded activations.")
            if self.bits is not None:
                found.append("average_bits chooses bits: give one of them.")
            if not self.symmetric:
                found.append("average_bits is for symmetric integers: transformers reads no mixture with zero points.")
            if not (self.sensitivity_samples and self.calibration_samples):
                found.append("average_bits needs what each block costs alone: sensitivity_samples and calibration_samples above 0.")
        if self.bits is not None and not 2 <= self.bits <= 8:
            found.append(f"bits is {self.bits}; it must be 2 to 8.")
        if self.method == "rtn" and (self.act_order or self.damping != QuantizeSettings.damping):
            found.append("act_order and damping are gptq's; method is rtn.")
        if self.scaling == "smoothquant" and self.kind == "int" and self.activations in (None, "none"):
            found.append("smoothquant moves outliers out of inputs that are rounded; here none are: give activations int8 and bits 8.")
        if self.scaling != "smoothquant" and self.smoothing_strength != QuantizeSettings.smoothing_strength:
            found.append(f"smoothing_strength is of scaling smoothquant; scaling is {self.scaling}.")
        if self.kv_cache != "none" and not self.calibration_samples:
            found.append(f"kv_cache {self.kv_cache} takes its scales from the calibration text; calibration_samples is 0.")
        if self.kv_cache != "none" and not self.symmetric:
            found.append(f"kv_cache {self.kv_cache} is for symmetric weights: beside asymmetric ones transformers reads no scales of it.")
        if not 0 <= self.smoothing_strength <= 1:
            found.append(f"smoothing_strength is {self.smoothing_strength:g}; it must be from 0 to 1.")
        if not self.damping > 0:
            found.append(f"damping is {self.damping:g}; it must be above 0.")
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
    """Maximum size of a safetensors file, GiB."""
    type: Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"] | None = None
    """Type of the matrices with --format gguf (default: f16). q8_0 and q4_0 round to blocks of 32. q4_k_m, q5_k_m and q6_k are written by
    llama.cpp and need llama-cpp-python."""

    def complaints(self) -> list[str]:
        """Return an error message for each value that is wrong whatever the model is."""
        complaints = []
        if Path(self.output).exists():
            complaints.append(f"--output {self.output} already exists; nothing is overwritten. Give another name.")
        if self.format == "huggingface" and self.type is not None:
            complaints.append(f"--type {self.type} applies only to --format gguf. For a Hugging Face folder use --precision.")
        if self.format == "gguf" and self.precision != "float32":
            complaints.append(f"--precision {self.precision} applies only to --format huggingface. For gguf use --type.")
        if self.format == "gguf" and Path(self.output).suffix != ".gguf":
            complaints.append(f"--output {self.output} must be a file name that ends with .gguf.")
        return complaints
