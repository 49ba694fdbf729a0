"""Launcher of the search's tests: runs no training but leaves what launch/pretrain.py would, in a tenth of a second.

The loss after a step is a noisy quadratic of the logarithm of the learning rate. A run resumes from its newest checkpoint, saves one after
each step, pauses at --pause_tokens and stops at SIGTERM, with the statuses of launch/pretrain.py. A rate above 1 diverges; a rate of
exactly 0.5 always crashes.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np

from data.files import lock_file
from launch.checkpoints import checkpoint
from launch.ranks.stopping import NOT_TO_BE_REQUEUED, SAVED_AND_UNFINISHED, StopRequest
from launch.training.recipe import read_run_settings


def loss(rate: float, seed: int, share: float) -> float:
    """Return the loss of a run after a share of its steps."""
    noise = np.random.default_rng([seed, round(1e6 * share)]).normal()
    return 1 + (math.log10(rate) + 2) ** 2 + 2 * (1 - share) + 0.01 * noise


def main() -> int:
    stop, settings = StopRequest(), read_run_settings(sys.argv[2:])
    folder, plan, rate = Path(settings.output), settings.batch_plan, settings.optimizer.learning_rate
    folder.mkdir(exist_ok=True)
    lock = lock_file(folder / checkpoint.LOCK_NAME, wait_seconds=5)
    assert lock is not None
    if rate == 0.5:
        raise RuntimeError("a rate of 0.5 crashes")
    newest = checkpoint.published(folder / "checkpoints")[:1]
    first, metrics = checkpoint.step_of(newest[0]) if newest else 0, folder / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    metrics.write_text("".join(f"{line}\n" for line in kept if json.loads(line)["step"] <= first))
    pause = settings.pause_step(plan)
    if first >= pause:
        return 0 if first == plan.steps else SAVED_AND_UNFINISHED
    for step in range(first + 1, plan.steps + 1):
        time.sleep(0.01)
        if rate > 1:
            print("The gradient was not finite in 50 steps in a row.")
            return NOT_TO_BE_REQUEUED
        line = {"step": step, "progress/tokens": plan.tokens_before(step)}
        line |= {
            "loss/validation": loss(rate, settings.seed, step / plan.steps),
            "accuracy/validation": 1 / (1 + (math.log10(rate) + 2) ** 2),
        }
        with open(metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        (folder / "checkpoints" / checkpoint.folder_name(step)).mkdir(parents=True)
        if (step == pause or stop.signal_name) and step < plan.steps:
            return SAVED_AND_UNFINISHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
