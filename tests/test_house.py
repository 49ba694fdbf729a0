"""The rules of the house: where things are, what may import what, and how the code reads."""

import ast
import fnmatch
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.training.recipe import read_run_settings
from tests.ranks import REPOSITORY

FOLDERS = {"model", "data", "ds_configs", "launch", "tests"}
NEVER_IMPORTED = {"model": {"deepspeed", "data", "launch", "tests"}, "data": {"deepspeed", "model", "launch", "tests"}, "launch": {"tests"}}
FLOORS = ("ranks", "checkpoints", "evaluation", "training", "compressing", "searching", "scripts", "benchmarks")
"""Rooms of launch/; each may import the ones before it. "scripts" are the files of launch/ itself."""
MAY_IMPORT_DEEPSPEED = {f"launch/training/{name}.py" for name in ("communication", "engine", "pipeline", "parallel", "deepspeed_json")}
BROUGHT_ALONG = {"pydantic"}  # by DeepSpeed, whose own models we use
HIDES_A_PACKAGE_THAT_NO_SCRIPT_IMPORTS = {"launch/evaluate.py"}
FRAGMENTS = ("Of", "That", "As", "By")
MOST_BEGINNING_WITH_WHAT = 19
MOST_INNER_IMPORTS = 30
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_A_SCRIPT = 60
LONGEST_TEST_NAME = 70


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def our_modules() -> frozenset[str]:
    return frozenset(module_of(path) for path in sources("model", "data", "launch"))


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Each module that a file imports anywhere, and whether the import is inside a function."""

    def visit(node: ast.AST, is_inner: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, is_inner) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)}: relative import; a file that is started as a script could not do it"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield (full if full in our_modules() else child.module or ""), is_inner
            yield from visit(child, is_inner or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return list(visit(tree_of(path), False))


def packages_imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    return {module.partition(".")[0] for module, _ in imports(path)}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def descriptions(path: Path) -> Iterator[str]:
    """Each docstring of a file, and each text below a field (the text of --help)."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            if text := ast.get_docstring(node):
                yield text
            for field, below in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
                if isinstance(field, ast.AnnAssign | ast.Assign) and is_text:
                    yield below.value.value


@pytest.mark.parametrize("folder", NEVER_IMPORTED)
def test_a_folder_imports_only_folders_below_it(folder):
    for path in sources(folder):
        assert not packages_imported(path) & NEVER_IMPORTED[folder], name_of(path)


def floor_of(module: str) -> int | None:
    """Index of the room that a module of launch/ is in; None for a module from elsewhere."""
    parts = module.split(".")
    if parts[0] != "launch" or len(parts) == 1:
        return None
    return FLOORS.index(parts[1] if parts[1] in FLOORS else "scripts")


def test_a_room_of_launch_imports_only_rooms_before_it():
    for path in sources("launch"):
        own = floor_of(module_of(path))
        for module, _ in imports(path) if own is not None else ():
            other = floor_of(module)
            assert other is None or other <= own, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("start", ["data.preparation.driver", "launch.training.setup"])
def test_preparing_and_training_do_not_import_transformers(start):
    """The import takes half a second, or more, in each process."""
    path_of = {module_of(path): path for path in sources("model", "data", "launch")}
    seen, to_visit = set(), [start]
    while to_visit:
        seen.add(module := to_visit.pop())
        found = {name for name, is_inner in imports(path_of[module]) if not is_inner} if module in path_of else set()
        assert "transformers" not in {name.partition(".")[0] for name in found}, module
        to_visit += found - seen


def test_a_script_imports_no_other_script():
    scripts = {f"launch.{path.stem}" for path in (REPOSITORY / "launch").glob("*.py") if path.stem != "__init__"}
    for path in (REPOSITORY / "launch").glob("*.py"):
        assert not scripts & {module for module, _ in imports(path)}, name_of(path)


def test_deepspeed_is_imported_only_by_the_engine_and_its_helpers():
    assert {name_of(path) for path in sources("model", "data", "launch") if "deepspeed" in packages_imported(path)} == MAY_IMPORT_DEEPSPEED


def test_no_script_hides_a_module_that_anything_imports():
    """`python data/prepare.py` puts data/ first on the import path, and so do the scripts of launch/ and launch/benchmarks/."""
    known = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | {"compression"}  # a module of Python 3.14
    folders = [REPOSITORY / folder for folder in ("data", "launch", "launch/benchmarks")]
    beside = [path for folder in folders for path in folder.iterdir() if path.suffix in (".py", "")]
    assert {name_of(path) for path in beside if path.stem in known} <= HIDES_A_PACKAGE_THAT_NO_SCRIPT_IMPORTS
    for path in sources("model", "data", "launch"):
        assert "evaluate" not in packages_imported(path), name_of(path)


def test_the_top_holds_these_folders_and_no_others():
    ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().split()]
    seen = {
        path.name
        for path in REPOSITORY.iterdir()
        if path.is_dir() and not path.name.startswith(".") and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert seen == FOLDERS


def test_every_requirement_is_pinned_and_the_project_itself_is_last():
    lines = [line.partition("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()]
    *packages, last = [line for line in lines if line]
    assert last == "-e ."
    for package in packages:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", package), package


def test_every_imported_package_is_in_the_requirements():
    """A package that another one brings along may go with it."""
    text = (REPOSITORY / "requirements.txt").read_text()
    required = {name.lower().replace("-", "_") for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    modules = importlib.metadata.packages_distributions()
    for path in sources("model", "data", "launch"):
        for module in packages_imported(path) - set(sys.stdlib_module_names) - FOLDERS - BROUGHT_ALONG:
            distributions = {name.lower().replace("-", "_") for name in modules.get(module, [module])}
            assert distributions & required, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_readable_and_sets_a_training_length(path):
    settings = read_run_settings(["--config", str(path)])
    assert settings.batch_plan.steps > 0
    read_run_settings(["--config", str(path), "--seed", "2"])


def test_every_folder_of_packages_is_installed():
    """`deepspeed launch/pretrain.py` must find the packages from any folder."""
    named = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {module_of(path) for path in sources("model", "data", "launch") if path.name == "__init__.py"}
    assert named == there


def test_there_is_no_import_circle():
    """Imports inside functions and for type checking count too."""
    graph = {
        module_of(path): {module for module, _ in imports(path) if module in our_modules()} for path in sources("model", "data", "launch")
    }
    graph = {module: targets - {module} for module, targets in graph.items()}
    while free := {module for module, targets in graph.items() if not targets}:  # remove what imports nothing, again and again
        graph = {module: targets - free for module, targets in graph.items() if module not in free}
    assert not graph, "modules in a circle, or that import one: " + ", ".join(sorted(graph))


def test_imports_stand_at_the_head_of_files():
    """Exceptions: the body of a script, so that --help and mistakes in the settings answer at once, and optional packages."""
    inner = [f"{name_of(path)}: {module}" for path in sources("model", "data", "launch") for module, is_inner in imports(path) if is_inner]
    assert len(inner) <= MOST_INNER_IMPORTS, "\n".join(inner)


def test_descriptions_begin_with_a_noun_or_a_sentence():
    beginnings = [(name_of(path), text) for path in sources("model", "data", "launch") for text in descriptions(path) if text.split()]
    fragments = [f"{name}: {text.splitlines()[0]}" for name, text in beginnings if text.split()[0] in FRAGMENTS]
    assert not fragments, "\n".join(fragments)
    with_what = [f"{name}: {text.splitlines()[0]}" for name, text in beginnings if text.split()[0] == "What"]
    assert len(with_what) <= MOST_BEGINNING_WITH_WHAT, "\n".join(with_what)


def test_every_public_function_and_class_has_a_docstring():
    missing = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in sources("model", "data", "launch")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing, "\n".join(missing)


def test_functions_and_scripts_are_short():
    long = [
        f"{name_of(path)}:{function.lineno} {function.name}"
        for path in sources("model", "data", "launch")
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]
    long += [name_of(path) for path in (REPOSITORY / "launch").glob("*.py") if len(path.read_text().splitlines()) > MOST_LINES_OF_A_SCRIPT]
    assert not long, "\n".join(long)


def test_test_names_are_short():
    names = [function.name for path in sources("tests") for function in functions(path) if function.name.startswith("test_")]
    assert not [name for name in names if len(name) > LONGEST_TEST_NAME]
