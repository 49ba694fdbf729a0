"""--help of every script: one line of usage, a heading for each section, a description for each option, a fast answer."""

import functools
import os
import re
import resource
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY

LONGEST_SECONDS = 1.0
"""Bound on CPU time for a slow machine. On an idle core each script takes less than half of it, also by the clock."""
LARGEST_HELP_COLUMNS = "1000"


def scripts() -> list[str]:
    """Every file that a user starts and that has settings."""
    folders = (REPOSITORY / "data", REPOSITORY / "launch", REPOSITORY / "launch" / "benchmarks")
    files = [path for folder in folders for path in sorted(folder.glob("*.py")) if "\n    run_script(main" in path.read_text()]
    return [path.relative_to(REPOSITORY).as_posix() for path in files if path.name != "demo.py"]


def run_help(script: str) -> tuple[str, float]:
    """Return what --help prints, and the seconds of CPU time that it took, which other processes do not change much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and not done.stderr, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment() -> dict[str, str]:

    return os.environ | {"COLUMNS": LARGEST_HELP_COLUMNS, "PYTHONPATH": str(REPOSITORY)}


@functools.cache
def help_of(script: str) -> str:
    return run_help(script)[0]


def entries(text: str) -> dict[str, str]:
    """Return option or argument -> its description."""
    after_usage = text.partition("\n\n")[2]
    found = re.findall(r"^  (-\S.*?|[A-Z_]+)(?:  +|\n +)(\S.*)$", after_usage, re.M)
    return {re.findall(r"--[\w.]+|^[A-Z_]+", invocation)[0]: description for invocation, description in found}


def test_all_scripts_are_found():
    assert {"data/prepare.py", "data/show.py", "launch/pretrain.py", "launch/quantize.py", "launch/benchmarks/generation.py"} <= set(
        scripts()
    )
    assert len(scripts()) >= 15


@pytest.mark.parametrize("script", scripts())
def test_usage_is_one_line(script):
    usage = help_of(script).partition("\n\n")[0]
    assert usage.startswith(f"usage: {script.rpartition('/')[2]} ") and "\n" not in usage


@pytest.mark.parametrize("script", scripts())
def test_each_section_has_a_heading(script):
    sections = {option.removeprefix("--").partition(".")[0] for option in entries(help_of(script)) if "." in option}
    for section in sections:
        assert re.search(rf"^{section}:$\n  [A-Z].*\.$", help_of(script), re.M), f"{section} has no heading with a description"


@pytest.mark.parametrize("script", scripts())
def test_each_option_has_a_description_with_its_default_stated_once(script):
    options = entries(help_of(script))
    assert len(options) == len(re.findall(r"^  (?:-|[A-Z_]+(?:  |$))", help_of(script).partition("\n\n")[2], re.M)) >= 3
    for option, description in options.items():
        assert description.endswith("."), f"{option}: {description}"
        assert ("(default: " in description) + description.count("Default: ") <= 1, f"{option}: {description}"


@pytest.mark.parametrize("script", scripts())
def test_help_is_fast(script):
    assert min(run_help(script)[1] for _ in range(3)) < LONGEST_SECONDS
