"""What launch/prune.py and launch/quantize.py share: what they are asked, what they refuse, and how a compression ends."""

import dataclasses
import fnmatch
import hashlib
import math
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.command_line import UserError, flatten, nearest
from data.huggingface_tokenizer import padding, write_tokenizer
from data.tokenizer import load_tokenizer
from launch.answers import names_of
from launch.compressing import report
from launch.compressing.driver import Side, compare, gathered
from launch.compressing.parts import Parts, Weights
from launch.compressing.samples import Text, calibration_text, first_inputs, paths_for, refuse_the_same_text, test_text
from launch.compressing.settings import CompressionSettings
from launch.compressing.workers import Workers, find_workers
from launch.training.processes import peak_memory_bytes
from launch.training.run_folder import ground_of, versions
from launch.training.score import sums_of
from launch.training.weights import OpenedModel, open_model
from model import huggingface
from model.compression import sensitivity, structured
from model.compression.activations import rounding_inputs
from model.compression.allocation import outlier_ratio, owl_sparsities
from model.compression.grids import Quantized
from model.compression.packed import Scheme
from model.compression.pruning import Sparsity
from model.compression.sensitivity import Change
from model.compression.statistics import Matrix, matrices
from model.config import ModelConfig
from model.loss import IGNORED
from model.transformer import Transformer

_PROOF_TOKENS = 16_384
_PROOF_BOUND = 1e-3
_MOST_ZEROS = 0.05  # of a matrix that was trained and not pruned: there are none at all
_NOT_IN_THE_WEIGHTS = ("output", "test_samples", "max_shard_gib", "max_perplexity_ratio", "strict", "force", "dry_run")
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Job:
    """A model that is to be compressed, and the text for it; everything that could be refused has been."""

    settings: CompressionSettings
    door: str
    arguments: Sequence[str]
    opened: OpenedModel
    workers: Workers
    calibration: Text | None
    test: Text | None
    dtype: torch.dtype
    """Of what is written and not quantized."""
    before: report.Weights
    begun: float

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    @property
    def samples(self) -> list[tuple[Tensor, ...]]:
        """This rank's share of the calibration text, as the first layer takes it."""
        batches = self.workers.share(self.calibration.batches) if self.calibration else []
        return first_inputs(batches, self.workers.device)

    @property
    def plan(self) -> dict:
        """What tells this compression from another one: an earlier start is gone on with where it is the same."""
        written = flatten(dataclasses.asdict(self.settings))
        unimportant = (
            "output",
            "test_samples",
            "sensitivity_samples",
            "max_shard_gib",
            "max_perplexity_ratio",
            "strict",
            "force",
            "dry_run",
        )
        calibration = self.calibration.fingerprint if self.calibration else None
        wanted = {name: value for name, value in written.items() if name not in unimportant}
        return {"door": self.door, "model": str(self.opened.folder), "calibration": calibration} | {"settings": _as_json(wanted)}

    def say(self, text: str) -> None:
        if self.workers.is_first:
            print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was made of a model."""

    config: ModelConfig
    state: Mapping[str, "Tensor | Quantized"]
    artefact: report.Artefact
    method: str
    """In words."""
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    linears: tuple[report.LinearReport, ...] = ()
    blocks: tuple[report.BlockReport, ...] = ()


def open_job(settings: CompressionSettings, door: str, arguments: Sequence[str], needs_calibration: bool) -> Job:
    """Find the ranks, the model and the text. Raises UserError, before any long work, for whatever cannot be."""
    begun = time.perf_counter()
    _refuse_numbers(settings)
    output = Path(settings.output)
    if output.exists():
        raise UserError(f"--output {output} is there already; nothing is overwritten. Give another name.")
    opened = open_model(settings.model, settings.average)
    if opened.tokenizer is None:
        raise UserError(f"No tokenizer.model, tokenizer.json or .tiktoken file lies beside {settings.model}.")
    if opened.schemes and not settings.force:
        opened.refuse_quantized("what is compressed twice loses twice. --force does it all the same")
    try:
        huggingface.architecture(opened.config)
    except ValueError as error:
        raise UserError(str(error)) from error
    if needs_calibration and not settings.calibration_samples:
        raise UserError("calibration_samples is 0; this method looks at what goes into each matrix. Give some, 128 for example.")
    calibration = test = None
    if settings.calibration_samples or settings.test_samples:
        paths = paths_for(opened, settings.data, settings.model)
        length = settings.sequence_length
        if settings.calibration_samples:
            of_calibration = [settings.calibration_data] if settings.calibration_data else paths
            calibration = calibration_text(opened, settings.model, of_calibration, settings.calibration_samples, length)
        if settings.test_samples:
            test = test_text(opened, settings.model, paths, settings.test_samples, length)
        if calibration and test and not settings.force:
            refuse_the_same_text(calibration, test)
    dtype = _DTYPES[settings.precision]
    _refuse_full_disk(output, opened, dtype)
    workers = find_workers(arguments)
    before = _weights_before(opened, workers, settings)
    job = Job(settings, door, tuple(arguments), opened, workers, calibration, test, dtype, before, begun)
    if calibration:
        widest = max(matrix.shape[1] for matrix in matrices(opened.config).values())
        if calibration.tokens < widest:
            job.say(
                f"Note: {calibration.tokens:,} calibration tokens for matrices of up to {widest:,} inputs: with fewer tokens than inputs "
                "the statistics leave directions open. Give more --calibration_samples."
            )
    return job


def chosen_matrices(config: ModelConfig, ignore: Sequence[str]) -> dict[str, Matrix]:
    """Those of all blocks but what patterns such as "0.*" or "*.down" name. Raises UserError for a pattern that names none."""
    there = matrices(config)
    names = [str(matrix) for matrix in there.values()]
    for pattern in ignore:
        if not fnmatch.filter(names, pattern):
            kinds = ", BLOCK.".join(dict.fromkeys(matrix.linear for matrix in there.values()))
            raise UserError(f"--ignore {pattern} names no matrix.{nearest(pattern, names)} They are called BLOCK.{kinds}.")
    return {name: matrix for name, matrix in there.items() if not any(fnmatch.fnmatchcase(str(matrix), pattern) for pattern in ignore)}


def divergences(job: Job, changes: Sequence[Change]) -> Tensor | None:
    """Mean KL to the model as it is, where one block alone is changed: nats a token.  -> [blocks, changes], on all ranks the same

    None where no samples are given for it.
    """
    wanted = job.settings.sensitivity_samples
    if job.calibration is None or not wanted:
        return None
    batches = job.calibration.batches[: max(1, wanted // len(job.calibration.batches[0].tokens))]
    job.say(f"Each block alone: {sum(len(batch.tokens) for batch in batches)} calibration samples.")
    samples = first_inputs(job.workers.share(batches), job.workers.device)
    sums = sensitivity.divergences(job.opened.config, job.opened.state, samples, changes, job.workers.device)
    tokens = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    return torch.stack(job.workers.gather(sums)).sum(dim=0) / max(1, tokens)


def allocated(job: Job, sparsity: Sparsity, allocation: str, chosen: Mapping[str, Matrix]) -> list[Sparsity]:
    """Of each block. By outliers it takes a walk over the model as it is; a pattern leaves nothing to share out."""
    blocks = range(job.opened.config.total_blocks)
    if allocation == "uniform":
        return [sparsity for _ in blocks]
    job.say("Outliers of each block: a walk over the model as it is.")
    ratios, sizes = [], []
    for step, statistics in gathered(job.opened.config, job.opened.state, job.samples, job.workers):
        here = [(linear, group) for group in statistics for linear in group.linears if f"{step.name}.{linear}.weight" in chosen]
        weights = [step.module.get_submodule(linear).weight for linear, _ in here]
        ratios.append(outlier_ratio(weights, [statistics[group] for _, group in here]) if here else 0.0)
        sizes.append(sum(weight.numel() for weight in weights))
    shares = owl_sparsities(ratios, sizes, sparsity.fraction)
    job.say("Sparsities of the blocks: " + " ".join(f"{share:.3f}" for share in shares))
    return [dataclasses.replace(sparsity, fraction=share) for share in shares]


def importance_of_blocks(job: Job, by: str) -> Tensor:
    """What is lost without each block: its influence, or how much the calibration text's loss rises.  -> [blocks]"""
    config, state, device = job.opened.config, job.opened.state, job.workers.device
    if by == "influence":
        sums = structured.influences(config, state, job.samples, device)
        job.workers.add_up([sums])
        return sums
    batches = job.workers.share(job.calibration.batches)

    def loss(said, number: int) -> Tensor:
        return sums_of(said, batches[number].targets.to(device))[0]

    losses = structured.losses_without_each_block(config, state, job.samples, loss, device)
    job.workers.add_up([losses])
    return losses[1:] - losses[0]


def parts_of(job: Job) -> Parts:
    """What has been done of this job before, and will be."""
    return Parts(job.output, job.plan)


def reports(parts: Parts, divergences: Sequence[float] | None) -> tuple[tuple[report.LinearReport, ...], tuple[report.BlockReport, ...]]:
    """What was told of every layer, on the rank that has written them."""
    told = [one for number in range(parts.find()) if (one := parts.told(number))]
    linears = tuple(report.LinearReport(**linear | {"notes": tuple(linear["notes"])}) for one in told for linear in one["linears"])
    known = divergences or [None] * len(told)
    return linears, tuple(report.BlockReport(one["block"], one["seconds"], known[one["block"]]) for one in told)


def finish(job: Job, result: Result, parts: Parts) -> int:
    """Compare with the dense model, write the folder, have transformers read it, report; the status of the door.

    Raises RuntimeError, and leaves no folder, where transformers does not find in it what we wrote.
    """
    workers, opened, settings = job.workers, job.opened, job.settings
    dense = Side(opened.config, opened.state)
    after = Side(result.config, Weights(result.state), rounding_inputs(result.schemes))
    quality = None
    if job.test:
        job.say(f"Measuring: {job.test.num_samples:,} samples of {job.test.what}, before and after.")
        compared = compare(dense, after, workers.share(job.test.batches), workers)
        quality = compared.quality(job.test.bytes_per_token)
    workers.part()
    if not workers.is_first:
        return 0
    tokenizer, names = load_tokenizer(opened.tokenizer), names_of(opened)
    made: list[report.Report] = []

    def complete(unfinished: Path) -> None:
        marks = opened.config.architecture, names.class_token, names.mask_token
        write_tokenizer(opened.tokenizer, unfinished, opened.config.sequence_length, None, *marks)
        proof = _proof(job, result, after, unfinished)
        made.append(_report(job, result, quality, proof, unfinished))
        report.write(made[0], unfinished)

    tokens = huggingface.SpecialTokens(tokenizer.end_of_text, padding(tokenizer)[1], names.labels, opened.start_token(tokenizer))
    job.say(f"Writing {job.output}, and reading it with transformers.")
    try:
        shard = int(settings.max_shard_gib * 2**30)
        huggingface.export(result.config, result.state, job.output, tokens, job.dtype, shard, complete, result.schemes)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        sentence = f"{job.output}: {error.strerror or error}. What was compressed is kept; the same command writes it again."
        raise UserError(sentence) from error
    parts.remove()
    return _say_result(job, made[0])


def _say_result(job: Job, made: report.Report) -> int:
    print("\n" + (job.output / "report.md").read_text(encoding="utf-8").split("\n## ")[0].rstrip())
    print(f"\n{job.output}: transformers loads it with no missing or unexpected key. {job.output}/report.md has the rest.")
    limit, quality = job.settings.max_perplexity_ratio, made.quality
    if limit is not None and quality is not None and not quality.ratio.value <= limit:
        print(f"Perplexity x{quality.ratio.value:.4f} is above --max_perplexity_ratio {limit:g}; {job.output} is kept.", file=sys.stderr)
        return 3
    if job.settings.strict and (noted := [linear.name for linear in made.linears if linear.notes]):
        print(f"--strict: {len(noted)} matrices went otherwise than asked, {noted[0]} first; {job.output} is kept.", file=sys.stderr)
        return 1
    return 0


def _proof(job: Job, result: Result, after: Side, folder: Path) -> report.Proof:
    """transformers reads the folder: no key missing or unexpected, and the perplexity that we find, or, without text, the logits."""
    import transformers

    version = transformers.__version__
    if job.test is None or result.config.architecture != "decoder" or result.config.document_mask:
        difference = huggingface.verify(folder, result.config, result.state, schemes=result.schemes)
        return report.Proof("transformers", version, "logits", difference, 1e-4)
    chosen, tokens = [], 0
    for batch in job.test.batches:
        if tokens < _PROOF_TOKENS:
            chosen.append(batch)
            tokens += batch.tokens.numel()
    of_texts = [(batch.tokens, batch.targets) for batch in chosen]
    theirs = huggingface.perplexity_by_transformers(folder, result.config, of_texts, job.workers.device)
    ours = compare(after, after, chosen, job.workers.alone).quality().perplexity_after.value
    proof = report.Proof("transformers", version, "perplexity", abs(theirs - ours) / ours, _PROOF_BOUND, theirs, ours)
    if not proof.difference <= proof.bound:
        raise RuntimeError(
            f"{folder}: transformers finds perplexity {theirs:.5f} where ours is {ours:.5f}: further apart than {_PROOF_BOUND:g} of it. "
            f"{job.output} was not written."
        )
    return proof


def _report(job: Job, result: Result, quality, proof: report.Proof, folder: Path) -> report.Report:
    opened, settings, test, calibration = job.opened, job.settings, job.test, job.calibration
    basis = None
    if test is not None:
        length, is_causal = test.batches[0].tokens.shape[1], test.bytes_per_token is not None
        basis = report.Basis(
            text=test.what,
            fingerprint=test.fingerprint,
            objective="the next token" if is_causal else "what the model was trained for",
            sequence_length=length,
            stride=length if is_causal else None,
            tokenizer=hashlib.sha256(opened.tokenizer.read_bytes()).hexdigest(),
            bytes_per_token=test.bytes_per_token,
        )
    kinds = report.kinds_of_tensors(result.config)
    tensors = tuple(_tensor_report(name, kinds[name], result.state[name], job.dtype) for name in kinds)
    num_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    return report.Report(
        name=job.output.name,
        model=settings.model,
        artefact=result.artefact,
        bits=tuple(sorted({scheme.grid.bits for scheme in result.schemes.values()})),
        method=result.method,
        settings=flatten(dataclasses.asdict(settings)),
        command=shlex.join(["python", f"launch/{job.door}.py", *job.arguments]),
        before=job.before,
        after=report.Weights(num_bytes, tensors),
        seconds=time.perf_counter() - job.begun,
        peak_memory_bytes=peak_memory_bytes(),
        device=str(job.workers.device),
        versions=versions() | {"transformers": proof.version},
        linears=result.linears,
        blocks=result.blocks,
        basis=basis,
        quality=quality,
        calibration=calibration
        and report.Calibration(calibration.what, calibration.num_samples, calibration.tokens, calibration.fingerprint),
        proof=proof,
    )


def _tensor_report(name: str, kind: str, stored: "Tensor | Quantized", dtype: torch.dtype) -> report.TensorReport:
    if isinstance(stored, Quantized):
        pieces = [piece for piece in (stored.scale, stored.zero_point, stored.global_scale) if piece is not None]
        num_bytes = stored.codes.numel() * stored.grid.bits // 8 + sum(piece.nbytes for piece in pieces)
        weight = stored.weight()
    else:
        weight = stored.to(dtype)
        num_bytes = weight.nbytes
    return report.TensorReport(name, kind, weight.numel(), int((weight == 0).sum()), num_bytes)


def _weights_before(opened: OpenedModel, workers: Workers, settings: CompressionSettings) -> report.Weights:
    """Look at every weight once. Raises UserError for one that is not finite, and for a model that is pruned already."""
    kinds, tensors, complaints = report.kinds_of_tensors(opened.config), [], []
    linears = matrices(opened.config)
    for name in workers.share(list(kinds)):
        weight = opened.state[name]
        zeros = int((weight == 0).sum())
        tensors.append(report.TensorReport(name, kinds[name], weight.numel(), zeros, weight.nbytes))
        if not weight.isfinite().all():
            complaints.append(f"{opened.folder}: {name} holds numbers that are not finite: it is damaged, or its training has failed.")
        elif name in linears and zeros > _MOST_ZEROS * weight.numel() and not settings.force:
            complaints.append(
                f"{opened.folder}: {zeros / weight.numel():.0%} of {name} are zero: it is pruned already, and what is compressed twice "
                "loses twice. --force does it all the same."
            )
    if complaints := [one for rank in workers.gather(complaints) for one in rank]:
        raise UserError(complaints[0] + (f" So are {len(complaints) - 1} more." if complaints[1:] else ""))
    by_name = {tensor.name: tensor for rank in workers.gather(tensors) for tensor in rank}
    return report.Weights(report.weights_bytes(opened), tuple(by_name[name] for name in kinds))


def _refuse_numbers(settings: CompressionSettings) -> None:
    for name in ("calibration_samples", "test_samples", "sensitivity_samples"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it may not be negative.")
    if not settings.max_shard_gib > 0:
        raise UserError(f"max_shard_gib is {settings.max_shard_gib:g}; it must be above 0.")
    if settings.max_perplexity_ratio is not None and not settings.max_perplexity_ratio > 0:
        raise UserError(f"max_perplexity_ratio is {settings.max_perplexity_ratio:g}; it must be above 0.")


def _refuse_full_disk(output: Path, opened: OpenedModel, dtype: torch.dtype) -> None:
    """The layers as they are done, and then the folder: twice the weights at most."""
    ground = ground_of(output.parent)
    needed = 2 * dtype.itemsize * sum(math.prod(shape) for shape in _shapes(opened.config))
    free = shutil.disk_usage(ground).free
    if free < needed:
        raise UserError(f"{ground} has {free / 2**30:.2f} GiB free; --output {output} needs {needed / 2**30:.2f}.")


def _shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in Transformer(config).parameters()]


def _as_json(values: Mapping) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
