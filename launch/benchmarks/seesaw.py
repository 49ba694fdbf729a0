"""Compare a run whose learning rate falls with one whose batch grows instead (batch.ramp seesaw), on the demo's model and tokens.

The demo's batch is large already, so the runs begin with a smaller one, at which more steps are left to save.

    python data/prepare.py --output prepared --vocab_size 4096
    python launch/benchmarks/seesaw.py --data prepared --output runs/seesaw

Both read the same tokens. It is resumable: the same command resumes the runs that are not done, and prints the table of those that are.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from data.command_line import read_settings, run_script
from launch import REPOSITORY
from launch.benchmarks.settings import SeesawSettings
from launch.benchmarks.training_runs import pretrain, read_curve, unfinished, warmup_share, words_of
from launch.training.recipe import read_run_settings

CONTENDERS = ("plain", "seesaw")
RECIPE = REPOSITORY / "launch" / "recipes" / "demo.yaml"


def main(arguments: Sequence[str]) -> int:
    """Train what is missing and print the table after each seed. Return the exit status."""
    settings = read_settings(SeesawSettings, arguments, "Train the demo's model with and without batch.ramp seesaw.")
    for seed, name in itertools.product(settings.seeds, CONTENDERS):
        read_run_settings(words_of(_chosen(settings, name, seed)))  # mistakes are reported before any training
    for seed in settings.seeds:
        for name in CONTENDERS:
            _train(settings, name, seed)
        print("\n".join(table(settings)), flush=True)
    return 0


def _train(settings: SeesawSettings, name: str, seed: int) -> None:
    """Train one contender. Raises UserError if the run fails; its output is above the message."""
    output = _folder(settings, name, seed)
    if _result(output):
        return
    status = pretrain(_chosen(settings, name, seed)).returncode
    if status or not _result(output):
        raise unfinished(output, status)


def _chosen(settings: SeesawSettings, name: str, seed: int) -> dict[str, object]:
    """Return the settings of a contender's run, by name."""
    output = _folder(settings, name, seed)
    ramp = settings.ramp if name == "seesaw" else "null"
    warmup_tokens = warmup_share(read_run_settings(["--config", str(RECIPE)])) * settings.train_tokens
    chosen: dict[str, object] = {"config": RECIPE, "data.path": Path(settings.data).resolve(), "output": output}
    chosen |= {"optimizer.name": settings.optimizer, "optimizer.learning_rate": settings.learning_rate}
    chosen |= {"schedule.kind": settings.kind, "schedule.warmup_tokens": f"{warmup_tokens:.0f}", "seed": seed}
    chosen |= {"train_tokens": f"{settings.train_tokens:.0f}", "batch.global_batch_size": settings.batch_size, "batch.ramp": ramp}
    return chosen | {"log.validation_interval": 0, "log.validation_samples": 0, "log.sample_interval": 0, "checkpoint.interval": 250}


def _folder(settings: SeesawSettings, name: str, seed: int) -> Path:
    return Path(settings.output).resolve() / f"{name}_{seed}"


def _result(folder: Path) -> tuple[int, float] | None:
    """Return the steps and the last validation loss of a run; None if it has not ended."""
    losses = read_curve(folder, "loss/validation")
    return max(losses.items()) if losses else None


def table(settings: SeesawSettings) -> Iterator[str]:
    """Yield the lines of the table: a line for each seed whose two runs have ended, and their means."""
    yield "| seed | steps | steps with seesaw | ratio | validation loss | with seesaw | difference |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    differences = []
    for seed in settings.seeds:
        results = [_result(_folder(settings, name, seed)) for name in CONTENDERS]
        if results[0] is None or results[1] is None:
            continue
        (steps, loss), (fewer, other) = results[0], results[1]
        differences.append(other - loss)
        yield f"| {seed} | {steps} | {fewer} | {fewer / steps:.3f} | {loss:.4f} | {other:.4f} | {other - loss:+.4f} |"
    if differences:
        yield f"Mean difference over {len(differences)} seed(s): {mean(differences):+.4f} nats a token."


if __name__ == "__main__":
    run_script(main)
