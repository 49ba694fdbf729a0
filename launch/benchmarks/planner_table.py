"""The comparisons of launch/benchmarks/planner.py, their table, and notes on single runs and constants."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from launch.benchmarks.planner_fits import Check, bloom_memory, bloom_time, flagged, foundry, left_out_memory, nanotron_mfu
from launch.benchmarks.planner_picture import draw
from launch.benchmarks.settings import PlannerSettings
from launch.evaluation.pictures import save

CAPACITY_GB = 85.9
"""Memory of BLOOM's devices, A100 80GB: 81,920 MiB."""


def compare(settings: PlannerSettings) -> None:
    """Print the table and the notes, and draw the picture if it is wanted."""
    checks = all_checks(settings.seed)
    print("\n".join([*table(checks, settings.splits), "", *notes(settings.seed)]))
    if settings.picture:
        save(draw(checks), Path(settings.picture))


def all_checks(seed: int, share: float = 0.25) -> list[Check]:
    """Return every comparison; `share` of the runs are fitted where the others are checked."""
    fitted = [bloom_time(seed, share), bloom_memory(seed, share), *foundry(seed, share)]
    return [*fitted, left_out_memory("nanotron"), left_out_memory("torchtitan"), nanotron_mfu()]


def table(checks: Sequence[Check], splits: int) -> Iterator[str]:
    """Yield the lines of the table: for each comparison the errors on runs that were not fitted, and in the last columns their means
    over `splits` random parts."""
    yield "| | runs | median error | within 10 % | within 15 % | largest | farthest below | mean median | mean within 10 % |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    repeated = [all_checks(seed) for seed in range(1, splits + 1)]
    for index, check in enumerate(checks):
        errors, several = check.errors, [other[index].errors for other in repeated]
        below = f"{-errors.lowest:.1%}" if errors.lowest < 0 else "none"
        cells = [check.name, len(errors.values), f"{errors.median:.1%}", f"{errors.within(0.10):.0%}", f"{errors.within(0.15):.0%}"]
        cells += [f"{errors.worst:.1%}", below, f"{mean(one.median for one in several):.1%}"]
        cells.append(f"{mean(one.within(0.10) for one in several):.0%}")
        yield f"| {' | '.join(map(str, cells))} |"


def notes(seed: int) -> Iterator[str]:
    """Yield lines about the runs that ran out of memory, and about the constants of a fit to all runs."""
    over, missed = flagged(bloom_memory(seed), CAPACITY_GB)
    yield f"Out of memory: {len(over)} of {len(over) + len(missed)} are predicted above {CAPACITY_GB} GB" + (
        f"; not {', '.join(missed)}." if missed else "."
    )
    false = [run.id for run, value in _predicted(bloom_memory(seed)) if value > CAPACITY_GB]
    yield f"Runs with a published memory that are predicted above {CAPACITY_GB} GB: {', '.join(false) or 'none'}."
    low = [f"{run.id} ({error:.0%})" for run, error in _errors(bloom_memory(seed)) if error < -0.12]
    yield f"BLOOM's memory predicted more than 12 % too low: {', '.join(low) or 'none'}."
    for check in all_checks(seed, 1.0):
        if check.constants:
            constants = ", ".join(f"{name} {value:.3g}" for name, value in check.constants.items())
            yield f"Fit to all runs of {check.name}: {constants}."


def _predicted(check: Check) -> Iterator[tuple]:
    yield from zip(check.runs, check.predicted, strict=True)


def _errors(check: Check) -> Iterator[tuple]:
    values = zip(check.runs, check.predicted, check.published, strict=True)
    yield from ((run, predicted / published - 1) for run, predicted, published in values)
