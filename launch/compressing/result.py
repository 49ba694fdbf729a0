"""End of a compression: the result is measured, written, read by other software, and reported."""

import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from data.command_line import UserError, flatten
from data.files import new_folder, sha256_of
from data.tokenization.loading import load_tokenizer
from launch.checkpoints.run_record import versions
from launch.compressing import report
from launch.compressing.beside_weights import special_tokens, write_tokenizer_of
from launch.compressing.layer_store import DequantizedWeights, LayerStore
from launch.compressing.setup import Job
from launch.compressing.streamed import StreamedModel, compare, perplexity_of
from launch.evaluation.quality import Quality
from launch.ranks.processes import peak_memory_bytes
from model import huggingface
from model.compression.activations import rounding
from model.compression.grids import Quantized
from model.compression.packed import CacheScheme, Scheme
from model.config import ModelConfig
from model.generation import tokens_per_second
from model.transformer import Transformer

_PROOF_TOKENS = 16_384
_PROOF_BOUND = 1e-5
# If activations, or keys and values, are rounded, the last bit of float32 decides between two codes. transformers computes zero points in
# the type of the scales, and E2M1 in bf16.
_PROOF_BOUND_OF_ROUNDED = 1e-4
_SPEED_TOKENS, _SPEED_ROUNDS = 24, 3


@dataclasses.dataclass(frozen=True)
class Result:
    """A compressed model."""

    config: ModelConfig
    state: Mapping[str, Tensor | Quantized]
    artefact: report.Artefact
    method: str
    """Description of the method."""
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    kv_cache: CacheScheme | None = None
    divergences: Sequence[float] | None = None
    """KL of each block compressed alone; report.BlockReport describes it."""


def finish(job: Job, result: Result, store: LayerStore) -> int:
    """Compare with the dense model, write the folder, read it with transformers, and report; return the exit status.

    Raises UserError if the disk is full, and RuntimeError if transformers reads something else in the folder than we wrote. There is no
    folder then, but `store` is kept.
    """
    workers, opened, settings = job.workers, job.opened, job.settings
    after = StreamedModel(result.config, DequantizedWeights(result.state), rounding(result.schemes, result.kv_cache))
    quality = None
    if job.test:
        job.log(f"Measuring: {job.test.num_samples:,} samples of {job.test.description}, before and after.")
        before = StreamedModel(opened.config, opened.state, rounding(opened.schemes, opened.kv_cache))
        quality = compare(before, after, workers.share(job.test.batches), workers).quality(job.test.bytes_per_token)
    workers.leave_group()
    if not workers.is_first:
        return 0
    assert opened.tokenizer is not None
    tokenizer = load_tokenizer(opened.tokenizer)
    tokens = special_tokens(opened, tokenizer)
    job.log(f"Writing {job.output}, and reading it with transformers.")
    try:
        with new_folder(job.output, store.whole) as folder:
            shard_bytes = int(settings.max_shard_gib * 2**30)
            arguments = result.config, result.state, folder, tokens, job.dtype, shard_bytes
            huggingface.export(*arguments, schemes=result.schemes, kv_cache=result.kv_cache)
            write_tokenizer_of(opened, tokenizer, folder)
            finished = _report(job, result, after, store, quality, _proof(job, result, after, folder), folder)
            report.write(finished, folder)
    except (ValueError, OSError) as error:  # new_folder has named the output in errors of the operating system
        message = str(error) if isinstance(error, UserError) else f"{job.output} could not be written: {error}."
        raise UserError(f"{message} {store.how_to_resume}") from error
    store.remove()
    print("\n" + (job.output / "report.md").read_text(encoding="utf-8").split("\n## ")[0].rstrip())
    print(f"\n{job.output}: transformers loads it with no missing or unexpected key. The full report is {job.output}/report.md.")
    return _status(job, finished)


def _status(job: Job, finished: report.Report) -> int:
    limit, quality = job.settings.max_perplexity_ratio, finished.quality
    if limit is not None and quality is not None and not quality.ratio.value <= limit:
        print(
            f"Perplexity after / before, {quality.ratio.value:.4f}, is above --max_perplexity_ratio {limit:g}. {job.output} is kept.",
            file=sys.stderr,
        )
        return 3
    if job.settings.strict and (noted := [linear.name for linear in finished.linears if linear.notes]):
        print(
            f"--strict: {len(noted)} matrices were not compressed as requested, first {noted[0]}. {job.output} is kept; see its report.md.",
            file=sys.stderr,
        )
        return 1
    return 0


def _proof(job: Job, result: Result, after: StreamedModel, folder: Path) -> report.Proof:
    """Read the folder with transformers: no missing or unexpected key, and our perplexity or, without text, our logits."""
    version, device = transformers.__version__, job.workers.device
    if job.test is None or result.config.architecture != "decoder" or result.config.document_mask:
        difference = huggingface.verify(folder, result.config, result.state, schemes=result.schemes, kv_cache=result.kv_cache)
        return report.Proof("transformers", version, "logits", difference, 1e-4)
    samples = max(1, _PROOF_TOKENS // job.test.batches[0].tokens.shape[1])
    batches = job.test.first_samples(samples)
    theirs = huggingface.perplexity_by_transformers(folder, result.config, [(batch.tokens, batch.targets) for batch in batches], device)
    ours = perplexity_of(after, batches, device)
    schemes = result.schemes.values()
    is_exact = result.kv_cache is None and all(
        one.activations == "none" and one.grid.symmetric and one.grid.kind != "nvfp4" for one in schemes
    )
    bound = _PROOF_BOUND if is_exact else _PROOF_BOUND_OF_ROUNDED
    proof = report.Proof("transformers", version, "perplexity", abs(theirs - ours) / ours, bound, theirs, ours)
    if not proof.difference <= proof.bound:
        raise RuntimeError(
            f"{folder}: the perplexity by transformers is {theirs:.5f}, ours is {ours:.5f}. They differ by more than {bound:g} of ours. "
            f"{job.output} was not written."
        )
    return proof


def _report(
    job: Job, result: Result, after: StreamedModel, store: LayerStore, quality: Quality | None, proof: report.Proof, folder: Path
) -> report.Report:
    opened, test, calibration = job.opened, job.test, job.calibration
    assert opened.tokenizer is not None
    basis = None
    if test is not None:
        length = test.batches[0].tokens.shape[1]
        basis = report.Basis(
            text=test.description,
            fingerprint=test.fingerprint,
            objective=test.task.description,
            sequence_length=length,
            stride=length if test.task.predicts_every_token else None,
            tokenizer=sha256_of(opened.tokenizer),
            bytes_per_token=test.bytes_per_token,
        )
    kinds = report.kinds_of_tensors(result.config)
    tensors = tuple(_tensor_report(name, kinds[name], result.state[name], job.dtype.itemsize) for name in kinds)
    num_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    blocks = [layer for number in range(store.find_finished_layers()) if (layer := store.read_report(number))]
    divergences: Sequence[float | None] = result.divergences or [None] * len(blocks)
    speeds = _speeds(job, result, after)
    return report.Report(
        name=job.output.name,
        model=job.settings.model,
        artefact=result.artefact,
        bits=tuple(sorted({scheme.grid.bits for scheme in result.schemes.values()})),
        kv_cache=_cache_report(result, job.dtype) if result.kv_cache else None,
        method=result.method,
        settings=flatten(dataclasses.asdict(job.settings)),
        command=shlex.join(["python", f"launch/{job.script}.py", *job.arguments]),
        before=job.before,
        after=report.Weights(num_bytes, tensors),
        seconds=time.perf_counter() - job.start_time,
        peak_memory_bytes=peak_memory_bytes(),
        device=str(job.workers.device),
        versions=versions() | {"transformers": proof.version},
        linears=tuple(report.LinearReport(**linear | {"notes": tuple(linear["notes"])}) for block in blocks for linear in block["linears"]),
        blocks=tuple(report.BlockReport(block["block"], block["seconds"], divergences[block["block"]]) for block in blocks),
        basis=basis,
        quality=quality,
        calibration=None
        if calibration is None
        else report.Calibration(calibration.description, calibration.num_samples, calibration.tokens, calibration.fingerprint),
        speeds=speeds,
        proof=proof,
    )


def _cache_report(result: Result, dtype: torch.dtype) -> report.CacheReport:
    assert result.kv_cache is not None
    config = result.config
    numbers = 2 * config.total_blocks * config.num_key_value_heads * config.head_size
    return report.CacheReport(result.kv_cache.kind, numbers * dtype.itemsize, numbers)


def _speeds(job: Job, result: Result, after: StreamedModel) -> tuple[report.Speed, ...]:
    """Return the speed of our generation for a smaller model. Only llama.cpp can compute with codes and zeros as such."""
    if result.artefact != "structured" or result.config.architecture != "decoder":
        return ()
    new_tokens = min(_SPEED_TOKENS, result.config.sequence_length // 2)
    speeds = []
    for config, state in ((job.opened.config, job.opened.state), (result.config, after.state)):  # one in memory at a time
        network = Transformer.from_state(config, state, dtype=torch.bfloat16).requires_grad_(False)
        speeds.append(statistics.median(tokens_per_second(network, new_tokens) for _ in range(_SPEED_ROUNDS)))
    return (report.Speed(f"our generation, bf16, {torch.get_num_threads()} threads", *speeds),)


def _tensor_report(name: str, kind: str, stored: Tensor | Quantized, item_bytes: int) -> report.TensorReport:
    if isinstance(stored, Quantized):
        pieces = [piece for piece in (stored.scale, stored.zero_point, stored.global_scale) if piece is not None]
        num_bytes = stored.codes.numel() * stored.grid.bits // 8 + sum(piece.nbytes for piece in pieces)
        stored = stored.weight()
    else:
        num_bytes = stored.numel() * item_bytes
    return report.TensorReport(name, kind, stored.numel(), int((stored == 0).sum()), num_bytes)
