"""The comparison of launch/benchmarks/optimizers.py: selection of rates, results and table."""

import dataclasses
import json
import statistics
from collections.abc import Mapping

from launch.benchmarks.measurement import Spread, describe_machine
from launch.benchmarks.optimizer_runs import Runs, Trained, three_digits
from launch.benchmarks.settings import OptimizersSettings

_FIRST_SEED = 1
_SECONDS = "seconds_per_step.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """An optimizer at one batch size."""

    rates: Mapping[float, float]
    """Last bits per byte on the first seed by rate."""
    best: float
    """The rate with the fewest."""
    curves: list[dict[int, float]]
    """Bits per byte by step of each seed that is finished, at the best rate."""

    @property
    def curve(self) -> dict[int, float]:
        """Mean bits per byte over the seeds by step."""
        return {step: statistics.mean(curve[step] for curve in self.curves) for step in self.curves[0]}

    @property
    def last(self) -> Spread:
        """Bits per byte at the end, over the seeds."""
        return Spread.of([curve[max(curve)] for curve in self.curves])

    @property
    def mean(self) -> float:
        """Mean bits per byte at the end."""
        return self.curve[max(self.curve)]


def compare(settings: OptimizersSettings) -> int:
    """Train what is missing and print the table. Return the exit status."""
    runs = Runs(settings)
    if settings.timing:
        (runs.folder / _SECONDS).write_text(json.dumps(_measure_steps(runs, settings), indent=1))
    elif settings.train:
        _train(runs, settings)
    results, seconds = read_results(runs, settings), read_seconds(runs)
    for batch_size, contenders in results.items():
        _print_table(runs, batch_size, contenders, seconds)
    print(f"\n{describe_machine('one process for each run')}" if results else f"No run in {runs.folder} is finished.")
    return 0


def read_results(runs: Runs, settings: OptimizersSettings) -> dict[int, dict[str, Result]]:
    """Return what is finished, by batch size and optimizer."""
    results: dict[int, dict[str, Result]] = {}
    for batch_size in settings.batch_sizes:
        found = {name: _read(runs, name, batch_size, settings.seeds) for name in settings.optimizers}
        if contenders := {name: result for name, result in found.items() if result}:
            results[batch_size] = contenders
    return results


def read_seconds(runs: Runs) -> dict[tuple[str, int], float]:
    """Return the measured seconds of a step by optimizer and batch size; empty without --timing true."""
    path = runs.folder / _SECONDS
    measured = json.loads(path.read_text()) if path.exists() else []
    return {(name, batch_size): statistics.median(seconds) for name, batch_size, seconds in measured}


def _train(runs: Runs, settings: OptimizersSettings) -> None:
    """Train what is missing: the rates of every optimizer at every batch size, then the other seeds of the best rates."""
    contenders = [(optimizer, batch_size) for batch_size in settings.batch_sizes for optimizer in settings.optimizers]
    for optimizer, batch_size in contenders:
        _search_rate(runs, optimizer, batch_size)
    for optimizer, batch_size in contenders:
        best = _best(runs.finished(optimizer, batch_size, _FIRST_SEED))
        for seed in range(_FIRST_SEED + 1, _FIRST_SEED + settings.seeds):
            runs.train(Trained(optimizer, batch_size, best, seed))


def _search_rate(runs: Runs, optimizer: str, batch_size: int) -> None:
    """Train with each rate on the first seed, and with further rates while the best one is the lowest or the highest."""
    tried = {rate: runs.train(Trained(optimizer, batch_size, rate, _FIRST_SEED)) for rate in runs.rates(batch_size)}
    while len(tried) > 1 and (best := _best(tried)) in (min(tried), max(tried)):
        further = three_digits(best / 2 if best == min(tried) else best * 2)
        tried[further] = runs.train(Trained(optimizer, batch_size, further, _FIRST_SEED))


def _best(tried: Mapping[float, float]) -> float:
    return min(tried, key=tried.__getitem__)


def _measure_steps(runs: Runs, settings: OptimizersSettings) -> list[tuple[str, int, list[float]]]:
    """Return the seconds of a step, of each optimizer at each batch size, in rounds in turn."""
    measured: dict[tuple[str, int], list[float]] = {(name, size): [] for size in settings.batch_sizes for name in settings.optimizers}
    for _ in range(settings.timing_rounds):
        for (name, batch_size), seconds in measured.items():
            seconds.append(runs.seconds_per_step(name, batch_size, settings.timing_steps))
    return [(name, batch_size, seconds) for (name, batch_size), seconds in measured.items()]


def _read(runs: Runs, optimizer: str, batch_size: int, seeds: int) -> Result | None:
    """Return what is finished of an optimizer at a batch size, None if nothing is."""
    rates = runs.finished(optimizer, batch_size, _FIRST_SEED)
    if not rates:
        return None
    best = _best(rates)
    all_curves = [runs.curve(Trained(optimizer, batch_size, best, seed)) for seed in range(_FIRST_SEED, _FIRST_SEED + seeds)]
    return Result(rates, best, [curve for curve in all_curves if curve])


def steps_to_reach(curve: Mapping[int, float], target: float) -> float | None:
    """Return the step at which a curve first reaches `target`, interpolated between its points; None if it does not."""
    before: tuple[int, float] | None = None
    for step, value in sorted(curve.items()):
        if value <= target:
            return step if before is None else before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = step, value
    return None


def _print_table(runs: Runs, batch_size: int, contenders: Mapping[str, Result], seconds: Mapping[tuple[str, int], float]) -> None:
    """Print a Markdown table of one batch size."""
    steps, slowest = runs.steps(batch_size), max(result.mean for result in contenders.values())
    print(f"\nBatch of {batch_size} sequences, {batch_size * runs.tokens_per_sequence:,} tokens per step, {steps:,} steps\n")
    print("| | best rate | bits per byte | least to most | seeds | every rate, first seed | steps to the worst end | seconds per step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, result in contenders.items():
        rates = ", ".join(f"{rate:.3g}: {last:.3f}" for rate, last in result.rates.items())
        reached, spread = steps_to_reach(result.curve, slowest), result.last
        timed = seconds.get((name, batch_size))
        cells = [
            name,
            f"{result.best:.3g}",
            f"{result.mean:.3f}",
            f"{spread.least:.3f} to {spread.most:.3f}",
            str(len(result.curves)),
            rates,
            "never" if reached is None else f"{reached / steps:.0%}",
            f"{timed:.3f}" if timed else "not measured",
        ]
        print(f"| {' | '.join(cells)} |")
