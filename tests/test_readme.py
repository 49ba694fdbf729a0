"""The pages are true: their commands are valid, the files and links that they name exist, and they are short and plain enough."""

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
from launch.searching.settings import read_search_settings
from launch.training.planning.settings import read_plan_settings
from launch.training.recipe import read_run_settings
from tests.ranks import REPOSITORY

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(REPOSITORY.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(REPOSITORY).parts)
}
ROOMS = ("model", "data", "ds_configs", "launch", "launch/recipes", "launch/compressing", "launch/searching", "launch/benchmarks")
MOST_BYTES_OF_THE_FRONT_PAGE = 12_000
LONGEST_LINE = 300
SCRIPTS = (".py", ".sbatch", ".sh")
SETTINGS = {
    "launch/evaluate.py": (EvaluateSettings, "model"),
    "launch/generate.py": (GenerateSettings, "model"),
    "launch/export.py": (ExportSettings, "model"),
    "launch/convert.py": (ConvertSettings, "checkpoint"),
    "launch/prune.py": (PruneSettings, "model"),
    "launch/quantize.py": (QuantizeSettings, "model"),
    "launch/benchmarks/generation.py": (benchmarks.GenerationSettings, None),
    "launch/benchmarks/pruning_and_quantization.py": (benchmarks.CompressionSettings, None),
    "launch/benchmarks/training_step.py": (benchmarks.TrainingStepSettings, None),
    "launch/benchmarks/optimizers.py": (benchmarks.OptimizersSettings, None),
    "launch/benchmarks/seesaw.py": (benchmarks.SeesawSettings, None),
    "launch/benchmarks/planner.py": (benchmarks.PlannerSettings, None),
    "data/prepare.py": (PrepareSettings, None),
    "launch/benchmarks/preparation.py": (benchmarks.PreparationSettings, None),
    "launch/slurm/prepare.sbatch": (PrepareSettings, None),
}


def commands(text: str) -> list[list[str]]:
    """Every command of a page that starts a script, in a block or in the text, as words."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|deepspeed|torchrun) [^`]*)`", text)
    lines = [line.removeprefix("$ ") for line in lines]
    starts = re.compile("python |deepspeed |torchrun |mpirun |sbatch |bash launch|launch/slurm/")
    in_words = [shlex.split(line, comments=True) for line in lines if starts.match(line)]
    return [words for words in in_words if "--help" not in words and any(word.endswith(SCRIPTS) for word in words)]


COMMANDS = list({" ".join(words): words for text in PAGES.values() for words in commands(text)}.values())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_accepted_by_its_script(words):
    place = next(number for number, word in enumerate(words) if word.endswith(SCRIPTS))
    script, arguments = words[place], words[place + 1 :]
    for of_earlier in ("--init", "--hold_zeros") if "--init" in arguments else ():  # weights that a command before it would have made
        if of_earlier in arguments:
            start = arguments.index(of_earlier)
            del arguments[start : start + 2]
    if script in ("launch/slurm/pretrain.sbatch", "launch/slurm/chain.sh"):
        check_batch_script(script, arguments)
    elif script in ("launch/pretrain.py", "launch/preflight.py"):
        read_run_settings(arguments)
    elif script == "launch/plan.py":
        read_plan_settings(arguments)
    elif script == "data/show.py":
        read_show_settings(arguments)
    elif script in ("launch/search.py", "launch/slurm/search.sbatch"):
        read_search_settings(arguments)
    elif script == "launch/compare.py":
        read_compare_settings(arguments)
    else:
        settings, positional = SETTINGS[script]
        read_settings(settings, arguments, "", positional)


def check_batch_script(script: str, arguments: list[str]) -> None:
    """The script accepts the arguments, and each command that it would run accepts its own."""
    done = subprocess.run(["bash", script, "--dry_run", *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        command = shlex.split(line)
        pretrain = [number for number, word in enumerate(command) if word.endswith(("pretrain.py", "pretrain.sbatch"))]
        if pretrain:
            read_run_settings(command[pretrain[0] + 1 :])


def test_every_room_has_a_page_with_commands_where_it_has_scripts():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"{room}/README.md" for room in ROOMS)} <= PAGES.keys()
    for page in ("README.md", "data/README.md", "launch/README.md", "launch/compressing/README.md", "launch/benchmarks/README.md"):
        assert len(commands(PAGES[page])) > 3, page


def test_no_page_has_a_placeholder():
    for page, text in PAGES.items():
        assert not re.findall(r"\b(?:TODO|FIXME|XXX|TBD)\b", text), page


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_link_that_a_page_names_exists(page):
    for name in re.findall(r"(?<![\w/.-])(?:launch|data|model|ds_configs|tests|\.readme)/[\w/.-]+\.\w+", PAGES[page]):
        moved = page == "CHANGELOG.md"  # it names files that have moved
        assert moved or (REPOSITORY / name).exists(), name
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        if not link.startswith("http"):
            target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
            assert target.exists(), link
            assert not heading or heading in headings(target.read_text(encoding="utf-8")), link


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_ds_configs_are_listed_on_the_front_page_and_on_their_own():
    files = {path.name for path in (REPOSITORY / "ds_configs").glob("*.json")}
    for page in ("README.md", "ds_configs/README.md"):
        assert files == set(re.findall(r"^\| `((?:zero|pipeline_)\w+\.json)`", PAGES[page], re.M)), page


def test_recipes_are_listed_on_their_page():
    files = {path.name for path in (REPOSITORY / "launch" / "recipes").glob("*.yaml")}
    assert files == set(re.findall(r"^\| `([\w-]+\.yaml)`", PAGES["launch/recipes/README.md"], re.M))


def test_the_front_page_is_short_and_no_line_is_long():
    assert len(PAGES["README.md"].encode()) <= MOST_BYTES_OF_THE_FRONT_PAGE
    for page, text in PAGES.items():
        in_block = False
        for line in text.splitlines():
            in_block ^= line.startswith("```")
            assert in_block or line.startswith("|") or len(line) <= LONGEST_LINE, f"{page}: {line[:80]}"
