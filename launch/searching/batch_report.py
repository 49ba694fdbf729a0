"""What the presets batch_and_rate and critical_batch say about the batch: a picture and a paragraph for the report."""

import dataclasses
import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from launch.evaluation.pictures import COLOURS, new_figure
from launch.searching.critical_batch import LEAST_STEPS, Parent, critical_batch
from launch.searching.hyperbola import first_to_reach, fit
from launch.searching.search import Search


@dataclasses.dataclass(frozen=True)
class Reached:
    """The fewest steps in which a batch size reached the loss that all sizes reached."""

    batch: int
    steps: float
    sequences: float


def batch_section(search: Search) -> tuple[str, str, Figure | None, str] | None:
    """Return name, title, picture and note for the report of a search with such a preset; None for another search."""
    if search.settings.preset == "batch_and_rate":
        return "batch", "Steps against tokens for the same loss", *_steps_against_tokens(search)
    if search.parent:
        return "batch", "The critical batch", *_loss_against_batch(search, search.parent)
    return None


def _steps_against_tokens(search: Search) -> tuple[Figure | None, str]:
    reached, loss = steps_for_the_same_loss(search)
    if len(reached) < 3:
        return None, "Fewer than three batch sizes have a curve yet."
    length = search.base.model.sequence_length
    figure, axes = new_figure(7.0, 4.0, grid="both")
    for one in reached:
        axes.plot(one.sequences * length, one.steps, "o", color=COLOURS[0])
        axes.annotate(str(one.batch), (one.sequences * length, one.steps), xytext=(6, 4), textcoords="offset points", fontsize=9)
    note = (
        f"Each dot is a batch size, in sequences, with its best rate: the first time that {search.settings.objective} reaches {loss:.4f}."
    )
    found = fit([one.steps for one in reached], [one.sequences for one in reached])
    if found is None:
        note += " The dots lie on no hyperbola, so no critical batch follows: take larger batches, or longer runs."
    else:
        batches = [reached[0].batch / 2 * 2 ** (power / 8) for power in range(8 * (len(reached) + 1) + 1)]
        sequences = [found.min_examples + batch * found.min_steps for batch in batches]
        axes.plot([one * length for one in sequences], [found.steps(one) for one in sequences], color=COLOURS[1], linewidth=1.2)
        note += (
            f" The line is the hyperbola of McCandlish et al. 2018 (arXiv 1812.06162) with at least {found.min_steps:,.0f} steps and "
            f"{found.min_examples * length:,.0f} tokens. Its critical batch is {found.critical_batch:,.0f} sequences "
            f"({found.critical_batch * length:,.0f} tokens): it needs twice as many steps and twice as many tokens as these."
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="steps")
    return figure, note


def steps_for_the_same_loss(search: Search) -> tuple[list[Reached], float]:
    """Return the fewest steps of each batch size for the lowest loss that every size reached, and that loss.

    A size whose runs have no curve yet is left out.
    """
    curves: dict[int, list[list[tuple[float, float]]]] = {}
    for trial in search.trials:
        if (values := trial.values) and search.scores(trial):
            size = int(values["batch.global_batch_size"])
            curves.setdefault(size, []).extend(curve for run in trial.runs if len(curve := run.curve(search.settings.objective)) > 1)
    lowest = [min(loss for curve in found for _, loss in curve) for found in curves.values() if found]
    loss, length = max(lowest, default=math.nan), search.base.model.sequence_length
    reached = []
    for size, found in sorted(curves.items()):
        tokens = [first for curve in found if (first := first_to_reach(curve, loss)) is not None]
        if tokens:
            reached.append(Reached(size, min(tokens) / (size * length), min(tokens) / length))
    return reached, loss


def _loss_against_batch(search: Search, parent: Parent) -> tuple[Figure | None, str]:
    scored = [(trial, scores[-1]) for trial in search.trials if (scores := search.scores(trial)) and math.isfinite(scores[-1])]
    losses = {int((trial.values or {})["batch.global_batch_size"]): loss for trial, loss in scored}
    if len(losses) < 2:
        return None, "Fewer than two branches have ended."
    tolerance, length = search.settings.branch.tolerance, search.base.model.sequence_length
    best, sizes = critical_batch(losses, tolerance), sorted(losses)
    figure, axes = new_figure(7.0, 3.6, grid="both")
    limits = [min(losses[other] for other in sizes if other <= size) for size in sizes]
    axes.fill_between(sizes, limits, [limit + tolerance for limit in limits], color=COLOURS[2], alpha=0.2, label=f"tolerance {tolerance:g}")
    axes.plot(sizes, [losses[size] for size in sizes], "o-", color=COLOURS[0], label="branches")
    axes.axvline(best, color=COLOURS[1], linewidth=1, linestyle="--", label=f"{best} sequences")
    axes.set(xscale="log", xlabel="batch, sequences", ylabel=search.settings.objective)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=9)
    steps = int(float(search.settings.branch.tokens or 0) // (sizes[-1] * length))
    if steps < LEAST_STEPS:
        return figure, (
            f"The branches are too short for a critical batch: the one of {sizes[-1]} sequences has {steps} steps, and {LEAST_STEPS} are "
            f"needed. Raise branch.tokens to {LEAST_STEPS * sizes[-1] * length:,} or more."
        )
    return figure, _verdict(parent, best, sizes, tolerance, length)


def _verdict(parent: Parent, best: int, sizes: list[int], tolerance: float, length: int) -> str:
    note = (
        f"At {parent.tokens:,} tokens the critical batch is {best} sequences ({best * length:,} tokens): the largest whose loss is at most "
        f"{tolerance:g} above that of every smaller batch."
    )
    if best == sizes[-1]:
        note += " It is the largest that was tried, so the critical batch may be larger."
    if best > parent.batch:
        starts = " ".join([*(f"{one.first_position * length}:{one.size}" for one in parent.segments), f"{parent.tokens}:{best}"])
        note += f' A run like the parent can grow its batch there: --batch.ramp "{starts}" --batch.global_batch_size {best}.'
        note += f" Give --optimizer.learning_rate for {best} sequences, and measure again later in the run: the critical batch grows."
    return note
