"""Passes over the unchanged model that measure its blocks. Results are stored next to the layers and reused when a run resumes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from launch.compressing.driver import gather_each_block
from launch.compressing.layer_store import LayerStore
from launch.compressing.setup import Job
from launch.evaluation.evaluation_sets import first_inputs
from model.compression import sensitivity, structured
from model.compression.allocation import outlier_ratio
from model.compression.sensitivity import Change
from model.compression.statistics import Matrix

Value = TypeVar("Value")


def divergences(job: Job, store: LayerStore, changes: Sequence[Change]) -> list[list[float]] | None:
    """Return the mean KL to the unchanged model when one block alone is changed, nats per token.  -> [blocks][changes]

    None if sensitivity_samples or the calibration text are missing.
    """
    if job.calibration is None or not job.settings.sensitivity_samples:
        return None
    variants = job.config.total_blocks * len(changes)
    num_samples = max(1, min(job.settings.sensitivity_samples, job.calibration.num_samples // variants))
    batches = job.calibration.first_samples(num_samples)

    def measure() -> list[list[float]]:
        """Return the divergences over the samples of all ranks."""
        job.log(f"Measuring each block alone on {num_samples} of the calibration samples.")
        samples = first_inputs(job.workers.share(batches), job.workers.device)
        sums, tokens = sensitivity.divergences(job.config, job.opened.state, samples, changes, job.workers.device)
        counted = torch.tensor(float(tokens), dtype=torch.float64, device=job.workers.device)
        job.workers.sum_in_place([sums, counted])
        return (sums / counted).tolist()

    return _stored_or_measured(job, store, "sensitivity", measure)


def outlier_ratios(job: Job, store: LayerStore, chosen: Mapping[str, Matrix]) -> list[float]:
    """Return the outlier ratio of the chosen matrices of each block; model.compression.allocation defines it."""

    def measure() -> list[float]:
        """Return the ratios, from the statistics of all ranks' samples."""
        job.log("Measuring the outliers of each block: a pass over the unchanged model.")
        ratios = []
        for step, statistics in gather_each_block(job.config, job.opened.state, job.samples, job.workers):
            chosen_here = [(linear, group) for group in statistics for linear in group.linears if f"{step.name}.{linear}.weight" in chosen]
            weights = [step.module.get_parameter(f"{linear}.weight").data for linear, _ in chosen_here]
            ratios.append(outlier_ratio(weights, [statistics[group] for _, group in chosen_here]) if chosen_here else 0.0)
        return ratios

    return _stored_or_measured(job, store, "outliers", measure)


def importance(job: Job, store: LayerStore, by: str) -> Tensor:
    """Return the importance of each block: its influence, or the rise of the calibration loss without it.  -> [blocks]"""
    device, state = job.workers.device, job.opened.state

    def measure_influences() -> list[float]:
        """Return how much each block changes the residual stream."""
        sums = structured.influences(job.config, state, job.samples, device)
        job.workers.sum_in_place([sums])
        return sums.tolist()

    def measure_rises() -> list[float]:
        """Return how much the loss rises without each block."""
        assert job.calibration is not None
        # The hidden states of these samples are kept once for each block.
        batches = job.workers.share(job.calibration.first_samples(max(1, job.calibration.num_samples // job.config.total_blocks)))
        samples, task = first_inputs(batches, device), job.calibration.task

        def loss(outputs: Tensor | tuple[Tensor, Tensor], number: int) -> Tensor:
            """Return the loss of the batch with this number, summed over its targets."""
            batch = batches[number].map(lambda tensor: tensor.to(device))
            return task.sums_of(outputs, batch.targets, batch.classes)[:2].sum()

        losses = structured.losses_without_each_block(job.config, state, samples, loss, device)
        job.workers.sum_in_place([losses])
        return (losses[1:] - losses[0]).tolist()

    return torch.tensor(
        _stored_or_measured(job, store, "importance", measure_influences if by == "influence" else measure_rises), dtype=torch.float64
    )


def _stored_or_measured(job: Job, store: LayerStore, name: str, measure: Callable[[], Value]) -> Value:
    """Return the stored result of an earlier start, or compute and store it. It is the same on all ranks."""
    value = job.workers.run_on_rank0(lambda: store.read_result(name))
    if value is None:
        value = measure()
        job.workers.run_on_rank0(lambda: store.write_result(name, value))
    return value
