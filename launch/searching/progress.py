"""The line about a search that a worker prints whenever a run ends."""

import math
import time

from launch.searching.search import Search


class Progress:
    """How far a search is, and how fast it went since this worker began."""

    def __init__(self, search: Search):
        self._search, self._start = search, time.monotonic()
        self._tokens_before = self._tokens()

    def _tokens(self) -> float:
        """Tokens of all rungs that runs have reached."""
        rungs = self._search.rungs
        records = [run.record for trial in self._search.wanted for run in trial.runs]
        return sum(rungs[len(record.metrics) - 1] for record in records if record.metrics)

    def _all_tokens(self) -> float:
        """Tokens of the whole search: all trials at the first rung, and at each further one the share that goes on."""
        settings, tokens, before = self._search.settings, 0.0, 0.0
        for rung, end in enumerate(self._search.rungs):
            tokens += self._search.num_trials // settings.rungs.factor**rung * (end - before)
            before = end
        return tokens * settings.repeat

    def line(self, running: int) -> str:
        """Return the line. `running` is the number of runs of this worker."""
        search, trials = self._search, self._search.wanted
        records = [run.record for trial in trials for run in trial.runs]
        if len(search.rungs) == 1:
            done = sum(not any(run.record.has_work for run in trial.runs) for trial in trials)
            counts = [f"{done} of {search.num_trials} trials done"]
        else:
            reached = [sum(len(record.metrics) > rung for record in records) for rung in range(len(search.rungs))]
            counts = [f"{len(trials)} of {search.num_trials} trials begun", f"{', '.join(map(str, reached))} at each rung"]
        counts += [f"{running} running here"] if running else []
        states = [record.state for record in records]
        counts += [f"{states.count(state)} {state}" for state in ("diverged", "failed") if state in states]
        return " | ".join([", ".join(counts), *self._best(), *self._left()])

    def _best(self) -> list[str]:
        found = [(-len(scores), scores[-1], trial.number, trial) for trial in self._search.wanted if (scores := self._search.scores(trial))]
        found = [one for one in found if math.isfinite(one[1])]
        if not found:
            return []
        _, score, number, trial = min(found, key=lambda one: one[:3])
        values = ", ".join(f"{name} {value}" for name, value in (trial.values or {}).items())
        return [f"best: {-score if self._search.settings.maximize else score:.4f} (trial {number}: {values})"]

    def _left(self) -> list[str]:
        done = self._tokens()
        seconds, gained = time.monotonic() - self._start, done - self._tokens_before
        left = max(self._all_tokens() - done, 0.0)
        if not gained or not left:
            return []
        minutes, seconds = divmod(round(left * seconds / gained), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"left: about {hours}:{minutes:02}:{seconds:02}" if hours else f"left: about {minutes}:{seconds:02}"]
