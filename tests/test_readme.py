"""The README's commands are ones that the doors take, and the files that it names are there."""

import re
import shlex
import subprocess

import pytest

from data.command_line import read_settings
from data.preparation.settings import PrepareSettings
from data.sampling.show_settings import read_show_settings
from launch.benchmarks import settings as benchmarks
from launch.checkpoints.settings import ConvertSettings
from launch.compare import read_compare_settings
from launch.compressing.settings import ExportSettings, PruneSettings, QuantizeSettings
from launch.evaluation.settings import EvaluateSettings, GenerateSettings
from launch.training.recipe import read_run_settings
from tests.ranks import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
SCRIPTS = (".py", ".sbatch", ".sh")
DOORS = {
    "launch/evaluate.py": (EvaluateSettings, "model"),
    "launch/generate.py": (GenerateSettings, "model"),
    "launch/export.py": (ExportSettings, "model"),
    "launch/convert.py": (ConvertSettings, "checkpoint"),
    "launch/prune.py": (PruneSettings, "model"),
    "launch/quantize.py": (QuantizeSettings, "model"),
    "launch/benchmarks/generation.py": (benchmarks.GenerationSettings, None),
    "launch/benchmarks/pruning_and_quantization.py": (benchmarks.CompressionSettings, None),
    "launch/benchmarks/training_step.py": (benchmarks.TrainingStepSettings, None),
    "data/prepare.py": (PrepareSettings, None),
    "launch/benchmarks/preparation.py": (benchmarks.PreparationSettings, None),
    "launch/slurm/prepare.sbatch": (PrepareSettings, None),
}


def commands() -> list[list[str]]:
    """Every command of the README, in a block or in the text, that starts a door, as words."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|deepspeed|torchrun) [^`]*)`", README)
    lines = [line.removeprefix("$ ") for line in lines]
    in_words = [
        shlex.split(line, comments=True) for line in lines if re.match("python |deepspeed |torchrun |mpirun |sbatch |launch/slurm/", line)
    ]
    return [words for words in in_words if "..." not in words and any(word.endswith(SCRIPTS) for word in words)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_taken_by_its_door(words):
    place = next(number for number, word in enumerate(words) if word.endswith(SCRIPTS))
    door, arguments = words[place], words[place + 1 :]
    for of_earlier in ("--init", "--hold_zeros") if "--init" in arguments else ():  # weights that a command before it would have made
        if of_earlier in arguments:
            start = arguments.index(of_earlier)
            del arguments[start : start + 2]
    if door in ("launch/slurm/pretrain.sbatch", "launch/slurm/chain.sh"):
        check_batch_script(door, arguments)
    elif door in ("launch/pretrain.py", "launch/preflight.py"):
        read_run_settings(arguments)
    elif door == "data/show.py":
        read_show_settings(arguments)
    elif door == "launch/compare.py":
        read_compare_settings(arguments)
    else:
        settings, positional = DOORS[door]
        read_settings(settings, arguments, "", positional)


def check_batch_script(script: str, arguments: list[str]) -> None:
    """It takes the words, and what it would run takes its own."""
    done = subprocess.run(["bash", script, "--dry_run", *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        pretrain = [number for number, word in enumerate(words) if word.endswith(("pretrain.py", "pretrain.sbatch"))]
        if pretrain:
            read_run_settings(words[pretrain[0] + 1 :])


def test_nothing_waits_to_be_filled_in():
    assert not re.findall(r"\b[A-Z]{6,}$", README, re.M)


def test_there_are_commands_and_the_files_that_the_readme_names_are_there():
    assert len(commands()) > 8
    for name in re.findall(r"(?:launch|data|model|ds_configs|tests|\.readme)/[\w/.-]+\.\w+", README):
        assert (REPOSITORY / name).exists(), name
    assert {path.name for path in (REPOSITORY / "ds_configs").glob("*.json")} == set(re.findall(r"`((?:zero|pipeline_)\w+\.json)`", README))
