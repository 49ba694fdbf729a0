"""The state of a search and its next piece of work, read from the trials' folders each time."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import BinaryIO

from data.command_line import UserError, describe, flatten, nearest
from launch.searching import halving
from launch.searching.branch import checkpoint_at, create_branch
from launch.searching.critical_batch import branches, read_parent, words_of_parent
from launch.searching.presets import Point, expand
from launch.searching.proposals import Known, propose
from launch.searching.settings import DEFAULT_TRIALS, METHODS_THAT_LEARN, SearchSettings
from launch.searching.space import Dimension, Values, grid, words_of
from launch.searching.trials import Record, Trial, TrialRun, Trials, check_record
from launch.training.recipe import read_run_settings
from launch.training.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Work:
    """A run that this worker has locked, and may start."""

    run: TrialRun
    values: Values
    record: Record
    lock: BinaryIO


class Search:
    """A search: what was asked, and the folder with everything that has been done."""

    def __init__(self, settings: SearchSettings):
        """Raises UserError for invalid settings of the trials, and if the folder has another search."""
        self.settings, self.folder = settings, Path(settings.output)
        branch = settings.branch
        self.parent = read_parent(Path(branch.parent), branch.step) if branch.parent is not None else None
        self.base = self._read(*self._length_of_branches)
        self.space, self.points = self._read_space()
        self.tokens = self.base.batch_plan.tokens_before(self.base.batch_plan.steps)
        self.rungs = self._read_rungs()
        self.trials = Trials(self.folder, self.base.seed, settings.repeat)
        for values in self._points_to_check():
            self._check_values(values)
        check_record(self.folder, self._what_decides())

    def _read_space(self) -> tuple[list[Dimension], list[Point] | None]:
        """Return the settings that are searched, and all trials if they are known before the search begins."""
        chosen = self.settings
        if chosen.preset:
            preset = branches(self.parent, chosen.branch.tokens or 0) if self.parent else expand(chosen.preset, self.base)
            return preset.space, preset.points
        space = chosen.dimensions
        return space, [Point(values) for values in grid(space)[: chosen.trials]] if chosen.method == "grid" else None

    @property
    def num_trials(self) -> int:
        """Number of trials of the search."""
        return self.settings.trials or DEFAULT_TRIALS if self.points is None else len(self.points)

    def _read(self, *words: str) -> RunSettings:
        """Return the settings of a run that has not begun, with more options. Raises UserError for invalid ones."""
        return read_run_settings([*self._common_words, *words, f"--output={self.folder / 'trials'}"])

    @property
    def _common_words(self) -> list[str]:
        words = words_of_parent(self.parent) if self.parent else ["--config", self.settings.recipe]
        for text in self.settings.settings:
            name, *values = shlex.split(text)
            words += [f"--{name.removeprefix('--')}", *values]
        return words

    @property
    def _length_of_branches(self) -> list[str]:
        """Length of a branch from step 0 on, which a recipe has already."""
        return [f"--train_tokens={self.parent.tokens + (self.settings.branch.tokens or 0):.0f}"] if self.parent else []

    def prepare(self, work: Work) -> list[str]:
        """Create what a run needs before its start, and return the command line of launch/pretrain.py for it."""
        run, values, target = work.run, work.values, work.record.target
        if self.parent and not run.folder.exists():
            create_branch(self.parent.folder, self.parent.origin, run.folder)
        if not self.decays_now(work):
            return self.words(run, values, target)
        if not (branch := run.branch(target)).folder.exists():
            create_branch(run.folder, checkpoint_at(run.folder, None), branch.folder)
        return self._words_of_decay(run, values, target)

    def decays_now(self, work: Work) -> bool:
        """True if the next start of a run is the branch that decays, because the run itself has reached its rung."""
        target = work.record.target
        return self.settings.rungs.decay > 0 and target + 1 < len(self.rungs) and work.run.has_saved(self.rungs[target])

    def _words_of_decay(self, run: TrialRun, values: Values, target: int) -> list[str]:
        """Return the command line of the branch of a run that decays after the rung `target`."""
        words, share, reached = self.words(run, values, len(self.rungs) - 1), self.settings.rungs.decay, run.last_metrics()
        tokens = reached["progress/tokens"]
        return [
            *words,
            f"--output={run.branch(target).folder}",
            "--schedule.kind=wsd",
            f"--schedule.decay_fraction={share / (1 + share):.9f}",
            f"--schedule.warmup_steps={read_run_settings(words).warmup_steps}",
            "--schedule.warmup_tokens=null",
            "--train_steps=null",
            f"--train_tokens={tokens * (1 + share):.0f}",
            "--log.validation_interval=0",
            "--checkpoint.interval=0",
            "--allow_changes",
        ]

    def words(self, run: TrialRun, values: Values, target: int) -> list[str]:
        """Return the command line of launch/pretrain.py for a run that trains to the rung `target`."""
        more = words_of(self.points[run.trial.number].more) if self.points else []
        words = [*self._common_words, *more, *words_of(values), f"--seed={run.seed}", f"--output={run.folder}"]
        return words + ([f"--pause_tokens={self.rungs[target]:.0f}"] if target + 1 < len(self.rungs) else [])

    def _read_rungs(self) -> list[float]:
        """Return the tokens of each rung; the last is the whole run."""
        first = self.settings.rungs.first_tokens
        if first is None:
            return [self.tokens]
        if first >= self.tokens:
            raise UserError(
                f"{describe(self.settings, 'rungs.first_tokens')} must be below the length of a run, which is {self.tokens:,} tokens."
            )
        if self.base.schedule.kind not in ("constant", "wsd"):
            raise UserError(
                f"{describe(self.settings, 'rungs.first_tokens')} needs a learning rate that stays constant up to the rungs: with "
                f"{describe(self.base, 'schedule.kind')} a rung would compare unfinished decays. Add 'schedule.kind wsd' to settings."
            )
        if self.settings.method == "gp":
            raise UserError(f"{describe(self.settings, 'method')} is not supported with rungs. Use tpe, random, qmc or grid.")
        return halving.rungs(first, self.settings.rungs.factor, self.tokens)

    def _points_to_check(self) -> list[Values]:
        """Return the points of a grid; of another space the ends of each setting, with the first values of all others."""
        if self.points is not None:
            return [point.more | point.values for point in self.points]
        first = {one.name: one.ends[0] for one in self.space}
        return [first | {one.name: value} for one in self.space for value in one.ends]

    def _check_values(self, values: Values) -> None:
        try:
            self._read(*words_of(values))
        except UserError as error:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(f"A trial with {shown} is invalid: {error}") from error

    def _what_decides(self) -> dict:
        """Return what decides the trials, by name, for search.json. Another objective only ranks the same runs anew."""
        names = ("preset", "space", "method", "seed", "repeat")
        decides: dict = {name: getattr(self.settings, name) for name in names}
        left_out = {"output", "deepspeed", "pause_tokens"} | {f"log.{name}" for name in ("interval", "sample_interval", "sample_prompt")}
        recipe = {name: value for name, value in flatten(dataclasses.asdict(self.base)).items() if name not in left_out}
        decides |= {"rungs": self.rungs[:-1]} | {f"recipe, {name}": value for name, value in recipe.items()}
        return json.loads(json.dumps(decides))  # as it is read again

    def score(self, metrics: dict[str, float]) -> float:
        """Return the score of a run's metrics, lower is better. Raises UserError if they lack the objective."""
        name = self.settings.objective
        if name not in metrics:
            written = sorted(metrics.keys() - {"step"})
            known = f"{nearest(name, written)} They write: {', '.join(written)}."
            raise UserError(f"{describe(self.settings, 'objective')} is not a curve of these runs.{known}")
        return -metrics[name] if self.settings.maximize and math.isfinite(metrics[name]) else metrics[name]

    def scores(self, trial: Trial) -> list[float]:
        """Return the score of a trial at each rung that all its runs have reached; infinite from where one failed or diverged."""
        found: list[float] = []
        records = [run.record for run in trial.runs]
        for rung in range(len(self.rungs)):
            if any(record.state in ("failed", "diverged") and len(record.metrics) <= rung for record in records):
                return [*found, math.inf]
            if any(len(record.metrics) <= rung for record in records):
                break
            found.append(sum(self.score(record.metrics[rung]) for record in records) / len(records))
        return found

    @property
    def wanted(self) -> list[Trial]:
        """The trials so far, without those beyond a number of trials that was lowered."""
        return [trial for trial in self.trials if trial.number < self.num_trials]

    def next_work(self) -> Work | None:
        """Lock a run and return it: an interrupted one, a promoted one, or that of a new trial. None if there is none for this worker."""
        while True:
            trials = self.wanted
            for trial in trials:
                if work := self._unfinished(trial, trials):
                    return work
            if work := self._promoted(trials):
                return work
            if len(trials) == self.num_trials:
                return None
            self.trials.create(len(trials))  # this worker or another one then locks its run

    def _unfinished(self, trial: Trial, trials: list[Trial]) -> Work | None:
        for run in trial.runs:
            if run.record.has_work and (lock := run.lock()):
                values, record = trial.values, run.record
                if values is None and run.seed == trial.seeds[0]:
                    trial.write(values := self._propose(trial, trials))
                if values is not None and record.has_work:
                    return Work(run, values, record, lock)
                lock.close()
        return None

    def _propose(self, trial: Trial, trials: list[Trial]) -> Values:
        """Return the values of a new trial."""
        if self.points is not None:
            return self.points[trial.number].values
        known = self._known(trials, trial) if self.settings.method in METHODS_THAT_LEARN else []
        return propose(self.space, self.settings.method, self.settings.seed, trial.number, known)

    def _promoted(self, trials: list[Trial]) -> Work | None:
        """Lock the run of the next trial to be promoted, and give it its next rung."""
        scores: list[dict[int, float]] = [{} for _ in self.rungs]
        promoted: list[set[int]] = [set() for _ in self.rungs]
        for trial in trials if len(self.rungs) > 1 else ():
            for rung, score in enumerate(self.scores(trial)):
                scores[rung][trial.number] = score
            for rung in range(trial.runs[0].record.target):
                promoted[rung].add(trial.number)
        while best := halving.promotable(scores, promoted, self.settings.rungs.factor):
            number, rung = best
            promoted[rung].add(number)
            trial = self.trials[number]
            (run,) = trial.runs
            values = trial.values
            assert values is not None
            if lock := run.lock():
                if (record := run.record).target == rung and record.state == "open":
                    run.write(record := dataclasses.replace(record, target=rung + 1))
                    return Work(run, values, record, lock)
                lock.close()
        return None

    def _known(self, trials: list[Trial], but: Trial) -> list[Known]:
        """Return every trial but one for the proposal of that one."""
        known = []
        for trial in trials:
            values = trial.values if trial.number != but.number else None
            if values is not None:
                scores = self.scores(trial)
                rung = len(scores) - 1 if 0 < len(scores) < len(self.rungs) else None
                known.append(Known(values, scores[-1] if scores else None, rung))
        return known

    def is_done(self) -> bool:
        """True if every trial has been proposed and no run has work left."""
        trials = self.wanted
        return len(trials) == self.num_trials and not any(run.record.has_work for trial in trials for run in trial.runs)
