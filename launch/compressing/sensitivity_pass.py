"""Passes over the unchanged model that measure its blocks. Results are stored next to the layers and reused when a run resumes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from launch.compressing.driver import gathered
from launch.compressing.layer_store import Parts
from launch.compressing.setup import Job
from launch.evaluation.evaluation_sets import first_inputs
from model.compression import sensitivity, structured
from model.compression.allocation import outlier_ratio
from model.compression.sensitivity import Change
from model.compression.statistics import Matrix

Found = TypeVar("Found")


def divergences(job: Job, parts: Parts, changes: Sequence[Change]) -> list[list[float]] | None:
    """Return the mean KL to the unchanged model when one block alone is changed, nats per token.  -> [blocks][changes]

    None if sensitivity_samples or the calibration text are missing.
    """
    if job.calibration is None or not job.settings.sensitivity_samples:
        return None
    variants = job.config.total_blocks * len(changes)
    wanted = max(1, min(job.settings.sensitivity_samples, job.calibration.num_samples // variants))
    batches = job.calibration.beginning(wanted)

    def find() -> list[list[float]]:
        job.say(f"Measuring each block alone on {wanted} of the calibration samples.")
        samples = first_inputs(job.workers.share(batches), job.workers.device)
        sums, tokens = sensitivity.divergences(job.config, job.opened.state, samples, changes, job.workers.device)
        counted = torch.tensor(float(tokens), dtype=torch.float64, device=job.workers.device)
        job.workers.sum_in_place([sums, counted])
        return (sums / counted).tolist()

    return _noted(job, parts, "sensitivity", find)


def outlier_ratios(job: Job, parts: Parts, chosen: Mapping[str, Matrix]) -> list[float]:
    """Return the outlier ratio of the chosen matrices of each block; model.compression.allocation defines it."""

    def find() -> list[float]:
        job.say("Measuring the outliers of each block: a pass over the unchanged model.")
        ratios = []
        for step, statistics in gathered(job.config, job.opened.state, job.samples, job.workers):
            here = [(linear, group) for group in statistics for linear in group.linears if f"{step.name}.{linear}.weight" in chosen]
            weights = [step.module.get_submodule(linear).weight for linear, _ in here]
            ratios.append(outlier_ratio(weights, [statistics[group] for _, group in here]) if here else 0.0)
        return ratios

    return _noted(job, parts, "outliers", find)


def importance(job: Job, parts: Parts, by: str) -> Tensor:
    """Return the importance of each block: its influence, or the rise of the calibration loss without it.  -> [blocks]"""
    device, state = job.workers.device, job.opened.state

    def influences() -> list[float]:
        sums = structured.influences(job.config, state, job.samples, device)
        job.workers.sum_in_place([sums])
        return sums.tolist()

    def rises() -> list[float]:
        assert job.calibration is not None
        # The hidden states of these samples are kept once for each block.
        batches = job.workers.share(job.calibration.beginning(max(1, job.calibration.num_samples // job.config.total_blocks)))
        samples, task = first_inputs(batches, device), job.calibration.task

        def loss(outputs: Tensor | tuple[Tensor, Tensor], number: int) -> Tensor:
            batch = batches[number].map(lambda tensor: tensor.to(device))
            return task.sums_of(outputs, batch.targets, batch.classes)[:2].sum()

        losses = structured.losses_without_each_block(job.config, state, samples, loss, device)
        job.workers.sum_in_place([losses])
        return (losses[1:] - losses[0]).tolist()

    return torch.tensor(_noted(job, parts, "importance", influences if by == "influence" else rises), dtype=torch.float64)


def _noted(job: Job, parts: Parts, name: str, find: Callable[[], Found]) -> Found:
    """Return the stored result of an earlier start, or compute and store it. It is the same on all ranks."""
    known = job.workers.run_on_rank0(lambda: parts.known(name))
    if known is None:
        known = find()
        job.workers.run_on_rank0(lambda: parts.note(name, known))
    return known
