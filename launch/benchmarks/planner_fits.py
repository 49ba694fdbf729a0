"""Fits of the planner's speeds and of its memory to published runs, and their errors on runs that the fit has not seen."""

import dataclasses
import random
from collections.abc import Callable, Sequence

import numpy as np

from launch.benchmarks.published_runs import PublishedRun, memory_of_run, read_runs, work_of_run
from launch.training.planning.devices import DEVICES, NETWORKS, PASSES
from launch.training.planning.step_time import Cluster, step_time
from model.config import flops_per_token

MOST_DEVICES = 64
"""Devices of the largest run of nanotron whose MFU is compared."""
_ROUNDS = 40
_SMALLEST_ERROR = 0.01
"""Relative error below which a row has no more weight in a fit."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors of predictions: predicted / published - 1."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the absolute errors."""
        return float(np.median(np.abs(self.values)))

    @property
    def worst(self) -> float:
        """Largest absolute error."""
        return float(np.max(np.abs(self.values)))

    @property
    def lowest(self) -> float:
        """The error of the row that is predicted farthest below its published value; positive if none is below."""
        return float(np.min(self.values))

    def within(self, bound: float) -> float:
        """Return the share of rows with an absolute error of at most `bound`."""
        return float(np.mean(np.abs(self.values) <= bound))


@dataclasses.dataclass(frozen=True)
class Check:
    """One quantity of one source: published values, and predictions by a fit on a part of the rows."""

    name: str
    runs: tuple[PublishedRun, ...]
    published: tuple[float, ...]
    predicted: tuple[float, ...]
    is_fitted: tuple[bool, ...]
    """True for the rows that the fit has seen."""
    constants: dict[str, float]
    """The fitted numbers by name."""

    @property
    def errors(self) -> Errors:
        """Errors on the rows that the fit has not seen."""
        rows = zip(self.predicted, self.published, self.is_fitted, strict=True)
        return Errors(tuple(predicted / published - 1 for predicted, published, is_fitted in rows if not is_fitted))


def fit(features: np.ndarray, published: np.ndarray, known: np.ndarray | float = 0.0) -> np.ndarray:
    """Return non-negative factors of the features [rows, features] with the least mean of absolute relative errors.

    `known` is a part of each prediction that is not fitted. Least squares with weights 1 / error, over and over; a feature whose factor
    would be negative is left out.
    """
    relative, wanted = features / published[:, None], 1 - known / published
    weights, factors = np.ones(len(published)), np.zeros(features.shape[1])
    for _ in range(_ROUNDS):
        kept, root = [index for index in range(features.shape[1]) if np.any(relative[:, index])], np.sqrt(weights)
        while True:
            solved = np.linalg.lstsq(relative[:, kept] * root[:, None], wanted * root, rcond=None)[0]
            if np.all(solved >= 0):
                break
            kept = [index for index, value in zip(kept, solved, strict=True) if value >= 0]
        factors = np.zeros(features.shape[1])
        factors[kept] = solved
        weights = 1 / np.maximum(np.abs(relative @ factors - wanted), _SMALLEST_ERROR)
    return factors


def sample(number: int, share: float, seed: int) -> np.ndarray:
    """Return True for a random `share` of `number` rows."""
    chosen = random.Random(seed).sample(range(number), max(1, round(number * share)))
    return np.isin(np.arange(number), chosen)


def bloom_time(seed: int, share: float = 0.25) -> Check:
    """Check BLOOM's seconds of a step, fitted on a random `share` of its rows: the share of the peak, and the speeds of both
    exchanges."""
    runs = [run for run in read_runs("bloom") if run.seconds]
    features = []
    for run in runs:
        work, times = work_of_run(run), run.accumulation + run.layout.pipeline_stages - 1
        flops = work.factor * (work.products + work.attention)
        # Its gradients are fp16 and are summed whole: 4 bytes sent for each, where our gradients in float32 and new weights are 6.
        features.append([times * flops / (DEVICES[run.device].tflops * 1e12), times * work.exchanged / 1e9, work.gradients * 4 / 6 / 1e9])
    published = np.array([run.seconds for run in runs], dtype=float)
    return _check("BLOOM, seconds a step", runs, np.array(features), published, sample(len(runs), share, seed), _speeds_of_bloom)


def _speeds_of_bloom(factors: np.ndarray) -> dict[str, float]:
    return dict(zip(("share of the peak", "exchange, GB/s", "gradients, GB/s"), _inverses(factors), strict=True))


def bloom_memory(seed: int, share: float = 0.25) -> Check:
    """Check BLOOM's memory, fitted on a random `share` of the rows that no note doubts: a factor, and a base in GB."""
    runs, features, published = _memory_rows("bloom")
    doubted = np.array([run.is_doubted for run in runs])
    seen = sample(len(runs), share, seed) & ~doubted
    return _check("BLOOM, memory", runs, features, published, seen, _factor_and_base)


def left_out_memory(source: str) -> Check:
    """Check a source's memory, each row predicted by a fit to all others: a factor, and a base in GiB."""
    runs, features, published = _memory_rows(source)
    predicted = []
    for index in range(len(runs)):
        others = np.arange(len(runs)) != index
        predicted.append(float(features[index] @ fit(features[others], published[others])))
    constants = _factor_and_base(fit(features, published))
    return Check(f"{source}, memory", tuple(runs), tuple(published), tuple(predicted), (False,) * len(runs), constants)


def _memory_rows(source: str) -> tuple[list[PublishedRun], np.ndarray, np.ndarray]:
    runs = [run for run in read_runs(source) if run.memory]
    return runs, np.array([[memory_of_run(run), 1.0] for run in runs]), np.array([run.memory for run in runs], dtype=float)


def _factor_and_base(factors: np.ndarray) -> dict[str, float]:
    return {"factor": float(factors[0]), "base": float(factors[1])}


def foundry(seed: int, share: float = 0.25) -> list[Check]:
    """Check llm-foundry's MFU for each device, fitted on a random `share` of its rows: three speeds.

    The seven runs in FP8 take the speeds of the H100 in bf16, but for products, whose speed is fitted on half of them.
    """
    runs = [run for run in read_runs("llm-foundry") if run.tokens_per_second]
    checks: list[Check] = []
    speeds = np.zeros(3)
    for name in ("a100-40gb", "a100-80gb", "h100", "h100 fp8"):
        own = [run for run in runs if run.name == name]
        features, moved = np.array([_foundry_features(run) for run in own]), np.array([_seconds_of_moving(run) for run in own])
        published = np.array([run.micro_batch * run.model.sequence_length / (run.tokens_per_second or 1) for run in own])
        seen = sample(len(own), max(0.5, share) if name == "h100 fp8" else share, seed)
        if name == "h100 fp8":
            known = moved + features[:, 1:] @ speeds[1:]
            speeds = np.array([*fit(features[seen, :1], published[seen], known[seen]), *speeds[1:]])
        else:
            speeds = fit(features[seen], published[seen], moved[seen])
        predicted = features @ speeds + moved
        mfu = np.array([run.mfu or 0.0 for run in own])  # which is work / time
        constants = dict(zip(("products", "attention", "gather, GB/s"), _inverses(speeds), strict=True))
        label = f"llm-foundry, MFU of {name.replace('h100 fp8', 'h100 in FP8')}"
        checks.append(Check(label, tuple(own), tuple(mfu), tuple(mfu * published / predicted), tuple(map(bool, seen)), constants))
    return checks


def _foundry_features(run: PublishedRun) -> list[float]:
    """Return the seconds of a micro-batch by part, at the data sheet's speeds; gathering at 1 GB/s."""
    work, peak = work_of_run(run), DEVICES[run.device].tflops * 1e12
    return [work.products / peak, work.attention / peak, work.gathered / 1e9]


def _seconds_of_moving(run: PublishedRun) -> float:
    """Return the seconds of a micro-batch in which kept bytes move."""
    return work_of_run(run).kept * PASSES / DEVICES[run.device].memory_bandwidth


def nanotron_mfu() -> Check:
    """Check the MFU of nanotron's runs of up to 64 devices by the speeds of launch/training/planning/devices.py; nothing is fitted here.

    More devices are left out: the source kept 256 sequences a step on 512 devices, which its own text calls bound by communication.
    """
    runs = [run for run in read_runs("nanotron") if run.layout.world_size <= MOST_DEVICES]
    cluster = Cluster(DEVICES["h100"], NETWORKS["infiniband-400"], 8)
    predicted = []
    for run in runs:
        sequences = run.micro_batch * run.accumulation * run.layout.data_parallel_size
        seconds = step_time(work_of_run(run), run.accumulation, run.layout, cluster).total
        flops = flops_per_token(run.model, causal=False) * sequences * run.model.sequence_length
        predicted.append(flops / (seconds * run.layout.world_size * cluster.device.tflops * 1e12))
    published = tuple(run.mfu or 0.0 for run in runs)
    return Check("nanotron, MFU (not fitted)", tuple(runs), published, tuple(predicted), (False,) * len(runs), {})


def _inverses(factors: np.ndarray) -> list[float]:
    return [float(1 / factor) if factor else float("inf") for factor in factors]


def _check(
    name: str,
    runs: Sequence[PublishedRun],
    features: np.ndarray,
    published: np.ndarray,
    seen: np.ndarray,
    describe: Callable[[np.ndarray], dict[str, float]],
) -> Check:
    factors = fit(features[seen], published[seen])
    predicted = features @ factors
    return Check(name, tuple(runs), tuple(published), tuple(predicted), tuple(map(bool, seen)), describe(factors))


def flagged(check: Check, capacity: float) -> tuple[list[str], list[str]]:
    """Return the ids of BLOOM's rows that ran out of memory and are predicted above `capacity` GB, and of those that are not."""
    lost = [run for run in read_runs("bloom") if run.ran_out_of_memory]
    over = [check.constants["factor"] * memory_of_run(run) + check.constants["base"] > capacity for run in lost]
    return [run.id for run, is_over in zip(lost, over, strict=True) if is_over], [
        run.id for run, is_over in zip(lost, over, strict=True) if not is_over
    ]
