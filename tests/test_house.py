"""The house: what lies where, what may import what, and that its files can be read."""

import ast
import fnmatch
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from launch.training.settings import read_run_settings
from tests.ranks import REPOSITORY

FOLDERS = {"model", "data", "ds_configs", "launch", "tests"}
NEVER_IMPORTED = {"model": {"deepspeed", "data", "launch", "tests"}, "data": {"deepspeed", "model", "launch", "tests"}, "launch": {"tests"}}
MAY_IMPORT_DEEPSPEED = {f"launch/training/{name}.py" for name in ("communication", "engine", "pipeline", "parallel", "deepspeed_config")}
BROUGHT_ALONG = {"pydantic"}  # by DeepSpeed, whose own models we ask
HIDES_A_PACKAGE_THAT_NO_DOOR_IMPORTS = {"launch/evaluate.py"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import; a door that is started as a script could not do it"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("folder", NEVER_IMPORTED)
def test_a_folder_imports_only_what_lies_below_it(folder):
    for path in sources(folder):
        assert not imported(path) & NEVER_IMPORTED[folder], name_of(path)


def test_deepspeed_is_imported_by_the_engine_and_what_stands_beside_it_alone():
    assert {name_of(path) for path in sources("model", "data", "launch") if "deepspeed" in imported(path)} == MAY_IMPORT_DEEPSPEED


def test_no_door_hides_a_module_that_anything_imports():
    """`python data/prepare.py` puts data/ first on the import path, and so do the doors of launch/."""
    known = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    beside_doors = [path for folder in ("data", "launch") for path in (REPOSITORY / folder).iterdir() if path.suffix in (".py", "")]
    assert {name_of(path) for path in beside_doors if path.stem in known} <= HIDES_A_PACKAGE_THAT_NO_DOOR_IMPORTS
    for path in sources("model", "data", "launch"):
        assert "evaluate" not in imported(path), name_of(path)


def test_the_top_holds_these_folders_and_no_others():
    ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().split()]
    seen = {
        path.name
        for path in REPOSITORY.iterdir()
        if path.is_dir() and not path.name.startswith(".") and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert seen == FOLDERS


def test_everything_that_a_run_stands_on_is_pinned_and_the_house_itself_comes_last():
    lines = [line.partition("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()]
    *packages, last = [line for line in lines if line]
    assert last == "-e ."
    for package in packages:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", package), package


def test_what_is_imported_is_in_the_requirements():
    """Of modules from elsewhere; a package that another one brings along may go with it."""
    text = (REPOSITORY / "requirements.txt").read_text()
    required = {name.lower().replace("-", "_") for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    modules = importlib.metadata.packages_distributions()
    for path in sources("model", "data", "launch"):
        for module in imported(path) - set(sys.stdlib_module_names) - FOLDERS - BROUGHT_ALONG:
            distributions = {name.lower().replace("-", "_") for name in modules.get(module, [module])}
            assert distributions & required, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "recipes").glob("*")), ids=lambda path: path.name)
def test_every_recipe_is_readable_and_says_how_long_to_train(path):
    settings = read_run_settings(["--config", str(path)])
    assert settings.batch_plan.steps > 0
    read_run_settings(["--config", str(path), "--seed", "2"])


def test_every_folder_of_packages_is_installed():
    """What pyproject.toml names is what there is: `deepspeed launch/pretrain.py` finds it from any folder."""
    named = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {name_of(path.parent).replace("/", ".") for path in sources("model", "data", "launch") if path.name == "__init__.py"}
    assert named == there
