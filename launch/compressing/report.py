"""Report on a compression and its cost: report.json for programs, report.md and pictures for people."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from launch.compressing import pictures
from launch.evaluation.pictures import save
from launch.evaluation.quality import Estimate, Quality
from launch.evaluation.tables import size_text, table
from model.compression.grids import Byte
from model.config import ModelConfig
from model.layers import Classifier, Head, HeadBias, LayerNorm, RMSNorm, TokenTransform
from model.transformer import Block, Transformer

Artefact = Literal[
    "zeros",
    "2:4",
    "structured",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
]
"""Kinds of written models: zeros without a pattern that hardware supports, and with one; a smaller dense model; a format of
compressed-tensors."""


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """A parameter on disk."""

    name: str
    """Our name."""
    kind: str
    """Kind, as kinds_of_tensors returns it."""
    parameters: int
    zeros: int
    """Number of its parameters that are exactly 0."""
    bytes: int
    """Size with scales and zero points."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters; tied ones are counted once."""

    bytes: int
    """Size as launch.checkpoints.opening.weights_bytes counts it."""
    tensors: tuple[TensorReport, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def zeros(self) -> int:
        """Number of parameters that are exactly 0."""
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def by_kind(self) -> dict[str, "Weights"]:
        """The parameters of each kind; their bytes are the tensors' own."""
        groups = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.kind].append(tensor)
        return {kind: Weights(sum(tensor.bytes for tensor in group), tuple(group)) for kind, group in groups.items()}


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """A linear layer whose weight was changed."""

    name: str
    """Our name of its weight, without ".weight"."""
    block: int
    """Index of the block, from 0."""
    linear: str
    """Its name in the block."""
    error: float | None = None
    """||change X|| / ||weight X||, Frobenius norm, over the calibration tokens; None without any."""
    damping: float | None = None
    """Share of the mean diagonal that was added to the Hessian's diagonal; None if none was needed."""
    notes: tuple[str, ...] = ()
    """Differences from the requested method."""


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """A block that was compressed."""

    block: int
    seconds: float
    divergence: float | None = None
    """Mean KL to the dense model with only this block rounded to nearest or pruned by magnitude, nats per token; None: not measured."""


@dataclasses.dataclass(frozen=True)
class Basis:
    """The text on which perplexities were measured. Only numbers with the same basis can be compared."""

    text: str
    """Split and prepared folders."""
    fingerprint: str
    """Hash of all samples."""
    objective: str
    sequence_length: int
    """Length of a window or sample, tokens."""
    stride: int | None
    """Distance between the starts of two windows, tokens; None if the samples are not windows."""
    tokenizer: str
    """SHA-256 of the tokenizer's file."""
    bytes_per_token: float | None
    """UTF-8 bytes per token; None if the model does not predict all of its text."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text of the statistics."""

    text: str
    """Split and prepared folders."""
    samples: int
    tokens: int
    fingerprint: str
    """Hash of all samples."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of generation with one engine on the machine of the report."""

    engine: str
    """Name of the engine with its version, type of weights and number of threads."""
    before: float | None
    """Speed of the dense model, tokens per second; None if the engine has not run it."""
    after: float


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """Keys and values that are stored as codes."""

    kind: Byte
    bytes_before: int
    """Bytes per token in the type of weights that are not quantized."""
    bytes_after: int
    """Bytes per token as our own generation stores them."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """The check of the written model by other software, which found no missing and no unexpected tensor."""

    engine: str
    version: str
    measure: str
    """The compared quantity: "perplexity" or "logits"."""
    difference: float
    """Difference of perplexities relative to ours; of logits the largest difference."""
    bound: float
    """Largest allowed difference; for logits it is multiplied by the largest of them."""
    theirs: float | None = None
    """Perplexity by the other software."""
    ours: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All measurements; None or empty if a compression does not have them."""

    name: str
    model: str
    """The compressed model, as given."""
    artefact: Artefact
    bits: tuple[int, ...]
    """Different widths of the codes of quantized weights."""
    method: str
    """Description such as "GPTQ, int4, groups of 128"."""
    settings: Mapping[str, Any]
    """Settings of the script by dotted name."""
    command: str
    before: Weights
    after: Weights
    seconds: float
    """Total time of compressing, measuring and checking."""
    peak_memory_bytes: int
    """Largest resident set of one process."""
    device: str
    versions: Mapping[str, str]
    linears: tuple[LinearReport, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    basis: Basis | None = None
    quality: Quality | None = None
    calibration: Calibration | None = None
    speeds: tuple[Speed, ...] = ()
    kv_cache: CacheReport | None = None
    proof: Proof | None = None


def kinds_of_tensors(config: ModelConfig) -> dict[str, str]:
    """Return the group of each parameter by name: "embedding", "attention", "feed-forward", "norm" or "head"."""
    with torch.device("meta"):
        network = Transformer(config)
    kinds = {}
    for path, module in network.named_modules():
        owner = network.get_submodule(path.split(".")[0])
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, LayerNorm | RMSNorm):
                kind = "norm"
            elif isinstance(owner, Block):
                kind = "feed-forward" if "feed_forward" in path else "attention"
            else:
                kind = "head" if isinstance(owner, Head | HeadBias | TokenTransform | Classifier) else "embedding"
            kinds[f"{path}.{name}"] = kind
    return kinds


def describe_serving(artefact: Artefact, bits: Sequence[int] = (), kv_cache: Byte | None = None) -> str:
    """Return a sentence on the software that can serve a model, and another one for keys and values stored as codes.

    We run transformers and llama.cpp ourselves. For vLLM and for kernels on GPUs we have only their documentation.
    """
    has_kernels = artefact != "pack-quantized" or set(bits) <= {4, 8}
    if kv_cache is not None:
        kept = f"Keys and values: launch/generate.py keeps them as {kv_cache}, transformers rounds them and keeps its own type"
        if kv_cache == "int8":
            return (
                "Not for vLLM, which supports only FP8 keys and values and may read the int8 scales as such; transformers reads it, on a "
                f"CPU as a dense model; llama.cpp does not, because it reads only GGUF. {kept}."
            )
        return f"{describe_serving(artefact, bits)} {kept}{', vLLM keeps them as fp8 (its documentation)' if has_kernels else ''}."
    if artefact == "structured":
        return "Can be served like any dense model of this architecture: by transformers, by vLLM, and as GGUF by llama.cpp."
    if artefact == "zeros":
        return (
            "For research and sparse fine-tuning: the zeros make it neither smaller nor faster in any engine, and transformers, vLLM and "
            "llama.cpp (as GGUF) read it as a dense model."
        )
    if artefact == "2:4":
        return (
            "For research, sparse fine-tuning and PyTorch's own 2:4 kernels on NVIDIA GPUs from Ampere on (to_sparse_semi_structured); "
            "vLLM has removed its 2:4 kernels (vllm#36799), so for vLLM and transformers it has the size and speed of a dense model."
        )
    if not has_kernels:
        return "transformers reads it as a dense model; vLLM's kernels support only 4 and 8 bits, and llama.cpp reads only GGUF."
    hardware = {
        "pack-quantized": "Turing on",
        "int-quantized": "Turing on, and on x86 CPUs",
        "float-quantized": "Ada Lovelace and Hopper on",
    }.get(artefact, "Blackwell on")
    loaded = "" if "fp4" not in artefact else ", loaded as bfloat16"
    return (
        f"Can be served by vLLM (its documentation; not proven here) on NVIDIA GPUs from {hardware}; transformers reads it{loaded}, on a "
        "CPU as a dense model; llama.cpp does not, because it reads only GGUF."
    )


def write(report: Report, folder: Path) -> None:
    """Add report.json, report.md and its pictures to a folder. The same report gives the same bytes."""
    contents = dataclasses.asdict(report) | {"served": _describe_serving(report)}
    (folder / "report.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    figures = dict(_pictures(report))
    for name, figure in figures.items():
        save(figure, folder / name)
    sections = [
        _head(report),
        _numbers(report),
        _sizes(report, figures),
        _over_depth(report, figures),
        _how_measured(report),
        _every_tensor(report),
    ]
    (folder / "report.md").write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def is_in(folder: Path) -> bool:
    """Return True if `folder` has a report, which is the last part of a compressed model to be written."""
    return (folder / "report.md").is_file()


def bits_per_weight(weights: Weights) -> str:
    """Return 8 x bytes / parameters as text."""
    return f"{8 * weights.bytes / weights.parameters:.2f}"


def _pictures(report: Report) -> Iterator[tuple[str, Any]]:
    yield "sizes.svg", pictures.sizes({name: _bytes_by_kind(weights) for name, weights in _both(report).items()})
    errors: dict[str, dict[int, float]] = defaultdict(dict)
    for linear in report.linears:
        if linear.error is not None:
            errors[linear.linear][linear.block] = linear.error
    if errors:
        yield "errors.svg", pictures.errors_over_depth(errors)
    if divergences := {block.block: block.divergence for block in report.blocks if block.divergence is not None}:
        yield "sensitivity.svg", pictures.sensitivity(divergences)


def _both(report: Report) -> dict[str, Weights]:
    return {"before": report.before, "after": report.after}


def _bytes_by_kind(weights: Weights) -> dict[str, int]:
    return {kind: group.bytes for kind, group in weights.by_kind.items()}


def _head(report: Report) -> str:
    old, new = report.before, report.after
    lines = [f"# {report.name}\n"]
    if (quality := report.quality) is not None:
        change = f"**Perplexity ×{quality.ratio.value:.4f}** (± {quality.ratio.standard_error:.4f})"
        lines.append(f"{change}: {_perplexity(quality.perplexity_before)} → {_perplexity(quality.perplexity_after)}.")
    lines.append(
        f"**Size ×{new.bytes / old.bytes:.3f}**: {size_text(old.bytes)} → {size_text(new.bytes)}, {bits_per_weight(new)} bits a weight; "
        f"{new.zeros / new.parameters:.1%} of {new.parameters:,} parameters are 0."
    )
    lines.append(f"{report.method}, of {report.model}.\n")
    lines.append(_describe_serving(report))
    return "\n".join(lines)


def _describe_serving(report: Report) -> str:
    return describe_serving(report.artefact, report.bits, report.kv_cache.kind if report.kv_cache else None)


def _numbers(report: Report) -> str:
    old, new = report.before, report.after
    rows = []
    if (quality := report.quality) is not None:
        rows.append(["perplexity a token", _perplexity(quality.perplexity_before), _perplexity(quality.perplexity_after)])
        rows.append(["loss, nats a token", f"{quality.loss_before.value:.5f}", f"{quality.loss_after.value:.5f}"])
        if quality.bits_per_byte_before is not None:
            rows.append(["bits per byte", f"{quality.bits_per_byte_before:.4f}", f"{quality.bits_per_byte_after:.4f}"])
        rows.append(["KL to the dense model, nats a token: mean", "", _estimate(quality.divergence, ".5f")])
        rows.append(["KL to the dense model: 99th percentile", "", f"{quality.divergence_p99:.5f}"])
        rows.append(["same likeliest token", "", _estimate(quality.agreement, ".2%")])
    rows.append(["weights on disk, bytes", f"{old.bytes:,}", f"{new.bytes:,}"])
    rows.append(["bits a weight", bits_per_weight(old), bits_per_weight(new)])
    rows.append(["parameters", f"{old.parameters:,}", f"{new.parameters:,}"])
    rows.append(["zeros", f"{old.zeros / old.parameters:.2%}", f"{new.zeros / new.parameters:.2%}"])
    if (cache := report.kv_cache) is not None:
        rows.append(["keys and values of a token, bytes", f"{cache.bytes_before:,}", f"{cache.bytes_after:,}"])
    for speed in report.speeds:
        rows.append([f"tokens/s, {speed.engine}", "" if speed.before is None else f"{speed.before:.1f}", f"{speed.after:.1f}"])
    text = table(["", "before", "after"], rows)
    if (basis := report.basis) is not None and quality is not None:
        moved = "" if basis.stride is None else f", {basis.stride:,} apart"
        of_text = "" if basis.bytes_per_token is None else f" of {basis.bytes_per_token:.2f} bytes"
        text += (
            f"\n\nMeasured on {quality.tokens:,} tokens{of_text}, {basis.text}: {basis.objective}, windows of {basis.sequence_length:,} "
            f"tokens{moved}; hash {basis.fingerprint[:12]}, tokenizer {basis.tokenizer[:12]}. Standard errors treat tokens as "
            "independent."
        )
    return text


def _sizes(report: Report, figures: Mapping[str, Any]) -> str:
    old, new = report.before.by_kind, report.after.by_kind
    rows = [
        [
            kind,
            f"{old[kind].parameters:,}",
            f"{new[kind].parameters:,}",
            bits_per_weight(old[kind]),
            bits_per_weight(new[kind]),
            f"{new[kind].zeros / new[kind].parameters:.2%}",
        ]
        for kind in new
    ]
    header = ["", "parameters before", "after", "bits a weight before", "after", "zeros after"]
    return (
        f"## Size by kind of tensor\n\n{_image('sizes.svg', figures, 'Bytes by kind of tensor, before and after')}\n\n{table(header, rows)}"
    )


def _over_depth(report: Report, figures: Mapping[str, Any]) -> str:
    sections = []
    if "errors.svg" in figures:
        with_errors = [linear for linear in report.linears if linear.error is not None]
        worst = max(with_errors, key=lambda linear: linear.error or 0.0)
        sections.append("## Error of each layer's outputs")
        sections.append(_image("errors.svg", figures, "Relative output error of each linear layer over depth"))
        sections.append(f"Largest: {worst.linear} of block {worst.block}, {worst.error:.4f}.")
    if with_notes := [linear for linear in report.linears if linear.notes]:
        sections.append("## Differences from the request")
        sections.append("\n".join(f"- {linear.linear} of block {linear.block}: {' '.join(linear.notes)}" for linear in with_notes))
    if "sensitivity.svg" in figures:
        sections.append("## Cost of each block compressed alone")
        sections.append(_image("sensitivity.svg", figures, "KL to the dense model when one block alone is compressed"))
    return "\n\n".join(sections)


def _how_measured(report: Report) -> str:
    lines = ["## How it was made", "", "```", report.command, "```", ""]
    if (calibration := report.calibration) is not None:
        read = f"{calibration.samples:,} samples, {calibration.tokens:,} tokens, {calibration.text}"
        lines.append(f"- calibration: {read}; hash {calibration.fingerprint[:12]}")
    of_blocks = f", {sum(block.seconds for block in report.blocks):,.1f} s of it in the blocks" if report.blocks else ""
    lines.append(
        f"- time: {report.seconds:,.1f} s{of_blocks}; peak memory of a process: {size_text(report.peak_memory_bytes)}; {report.device}"
    )
    lines.append("- " + ", ".join(f"{name} {number}" for name, number in report.versions.items()))
    if (proof := report.proof) is not None:
        values = "" if proof.theirs is None else f" {proof.theirs:.6g}, ours {proof.ours:.6g}"
        lines.append(
            f"- proof: {proof.engine} {proof.version} loads it with no missing or unexpected key; {proof.measure}{values}: "
            f"largest difference {proof.difference:.1e}, bound {proof.bound:.0e}"
        )
    lines += ["", "<details><summary>Settings</summary>", ""]
    lines += [table(["", "value"], [[name, str(value)] for name, value in report.settings.items()]), "", "</details>"]
    return "\n".join(lines)


def _every_tensor(report: Report) -> str:
    linears = {f"{linear.name}.weight": linear for linear in report.linears}
    rows = []
    for tensor in report.after.tensors:
        linear = linears.get(tensor.name)
        numbers = [None, None] if linear is None else [linear.error, linear.damping]
        rows.append(
            [
                tensor.name,
                f"{tensor.parameters:,}",
                f"{8 * tensor.bytes / tensor.parameters:.2f}",
                f"{tensor.zeros / tensor.parameters:.2%}",
                *("" if number is None else f"{number:.4g}" for number in numbers),
            ]
        )
    header = ["", "parameters", "bits a weight", "zeros", "error", "damping"]
    return f"<details><summary>Every tensor</summary>\n\n{table(header, rows)}\n\n</details>"


def _image(name: str, figures: Mapping[str, Any], description: str) -> str:
    return f"![{description}]({name})" if name in figures else ""


def _perplexity(estimate: Estimate) -> str:
    return _estimate(estimate, ".3f")


def _estimate(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ± {estimate.standard_error:{form}}"
