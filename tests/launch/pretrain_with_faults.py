"""launch/pretrain.py with a simulated fault: FAULT="rank:where:number" kills that rank with SIGKILL at that moment.

`where` is "step": before optimizer step `number`; "write": at the `number`-th write of checkpoint bytes; "publish": before the
`number`-th checkpoint gets its name. FAULT_TERMINATE="rank:number" sends SIGTERM to that rank in step `number`.
FULL_DISK="rank:number" makes the `number`-th write of checkpoint bytes fail, and none after it. MISREAD="rank" changes one
moment a little on that rank while a checkpoint is loaded. RUIN="rank:step:kind:value" sets a tensor of that rank (a weight, or
a state of the optimizer) before the checkpoint of `step` is written. COMMANDS="number:command;number:command" runs shell commands on
rank 0 before those optimizer steps. RECORD="file" adds a JSON line for each step of each rank to a file: the step, and source, epoch
and number of each sample that the rank reads.
"""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys

from data.command_line import run_script
from data.sampling.batches import TrainingBatches
from launch import pretrain
from launch.checkpoints import checkpoint
from launch.checkpoints.state import SavedState
from launch.ranks.stopping import exit_now
from launch.training import saving
from launch.training.engine import Engine


def plant_kill(fault: str) -> None:
    rank, where, number = fault.split(":")
    if os.environ["RANK"] != rank:
        return
    owner, name = {"step": (Engine, "train_step"), "write": (checkpoint.HashingFile, "write"), "publish": (checkpoint, "publish")}[where]
    original, calls = getattr(owner, name), iter(range(int(number)))

    def failing(*arguments, **more):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)

    setattr(owner, name, failing)


def plant_full_disk(order: str) -> None:
    rank, number = order.split(":")
    original, calls = checkpoint.HashingFile.write, itertools.count()

    def failing(self, data):
        if os.environ["RANK"] == rank and next(calls) == int(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, data)

    checkpoint.HashingFile.write = failing


def plant_termination(order: str) -> None:
    rank, number = order.split(":")
    original = Engine.train_step

    def interrupted(self, micro_batches, learning_rate, step, *more, **named):
        if os.environ["RANK"] == rank and step == int(number):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro_batches, learning_rate, step, *more, **named)

    Engine.train_step = interrupted


def plant_misreading(rank: str) -> None:
    original = SavedState.read

    def misread(self, wanted, kind, into):
        original(self, wanted, kind, into)
        if os.environ["RANK"] == rank and kind == "exp_avg" and wanted.name.endswith("query.weight"):
            into[-1] *= 1.0000002

    SavedState.read = misread


def plant_ruin(order: str) -> None:
    rank, ruined_step, kind, value = order.split(":")
    original = saving.save

    def ruined(current, config, ranks, root, step, about):
        if os.environ["RANK"] == rank and step == int(ruined_step):
            for shard_slice, tensors in current.visit(current.owned, keep_changes=True):
                if shard_slice.name.endswith("feed_forward.up.weight"):
                    tensors[kind].fill_(float(value))
                    break
        return original(current, config, ranks, root, step, about)

    saving.save = ruined


def plant_commands(order: str) -> None:
    commands = dict(one.split(":", 1) for one in order.split(";"))
    original = Engine.train_step

    def after_a_command(self, micro_batches, learning_rate, step, *more, **named):
        if os.environ["RANK"] == "0" and str(step) in commands:
            subprocess.run(commands[str(step)], shell=True, check=True)
        return original(self, micro_batches, learning_rate, step, *more, **named)

    Engine.train_step = after_a_command


def plant_record(file: str) -> None:
    original = TrainingBatches.step

    def recorded(self, number):
        line = {"step": number, "samples": self.step_samples(number).reshape(-1, 3).tolist()}
        with open(file, "a") as lines:  # one short write: lines of several ranks do not mix
            lines.write(json.dumps(line) + "\n")
        return original(self, number)

    TrainingBatches.step = recorded


if __name__ == "__main__":
    if "RECORD" in os.environ:
        plant_record(os.environ["RECORD"])
    if "MISREAD" in os.environ:
        plant_misreading(os.environ["MISREAD"])
    if "FAULT" in os.environ:
        plant_kill(os.environ["FAULT"])
    if "FULL_DISK" in os.environ:
        plant_full_disk(os.environ["FULL_DISK"])
    if "FAULT_TERMINATE" in os.environ:
        plant_termination(os.environ["FAULT_TERMINATE"])
    if "RUIN" in os.environ:
        plant_ruin(os.environ["RUIN"])
    if "COMMANDS" in os.environ:
        plant_commands(os.environ["COMMANDS"])
    sys.argv[0] = pretrain.__file__
    run_script(pretrain.main, exit_now)
