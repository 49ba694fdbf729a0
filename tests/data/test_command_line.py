"""A frozen dataclass as a command line: values arrive, and each mistake gives one helpful message."""

import ast
import dataclasses
import errno
import importlib
import inspect
import runpy
import signal
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le

import data
from data.command_line import RankError, UserError, as_text, describe, read_settings, run_script
from data.ranges import range_complaints
from tests.ranks import REPOSITORY, clean_environment


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    """Columns."""
    rate: float = 1e-3
    """A day."""


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: str = "plain"
    """Any."""
    kind: Literal["round", "square"] = "round"
    """Shape."""
    loud: bool = False
    """Shout."""
    files: tuple[str, ...] = ()
    """To read."""
    limit: int | None = None
    """Most of them (default: all)."""
    note: str | None = None
    """Any, or none."""


def read(*words: str, **how) -> Outer:
    return read_settings(Outer, words, "A test.", **how)


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns its path."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_no_arguments_give_the_defaults():
    assert read() == Outer()


@pytest.mark.parametrize("words", [["--inner.width", "7", "--inner.rate", "-2e-4"], ["--inner.width=7", "--inner.rate=-2e-4"]])
def test_dotted_names_set_the_fields_of_sections(words):
    assert read(*words) == Outer(inner=Inner(7, -2e-4))


def test_a_flag_without_a_value_is_true():
    assert read("--loud").loud and read("--loud", "true").loud and read("--loud", "--name", "x").loud
    assert not read("--loud", "false").loud and not read("--loud=false").loud


def test_a_value_may_be_the_name_of_a_setting():
    assert read("--name", "loud").name == "loud"
    assert read("--name", "files", "--files", "name", "loud").files == ("name", "loud")


@pytest.mark.parametrize("text", ["###", "--- x", "# a: b", "5", "true", "a: b", ""])
def test_a_text_value_is_not_read_as_yaml(text):
    assert read(f"--note={text}").note == text
    assert text.startswith("--") or read("--note", text).note == text
    assert read("--note", "null").note is None


def test_the_words_after_a_list_option_are_its_items():
    assert read("--files", "a", "b c", "--loud").files == ("a", "b c")
    assert read("--files").files == ()
    assert read("--files=a").files == read('--files=["a"]').files == ("a",)


def test_an_alias_sets_its_setting_and_is_in_help(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    aliases = {"--width": "--inner.width", "--inner": "--inner.width"}
    assert read("--width", "9", aliases=aliases) == read("--width=9", aliases=aliases) == read("--inner=9", aliases=aliases)
    assert read("--width", "9", aliases=aliases).inner.width == 9
    assert read("--config", recipe("width: 9\n"), aliases=aliases).inner.width == 9
    with pytest.raises(SystemExit):
        read("--help", aliases=aliases)
    assert "Columns. Default: 4. Also --width or --inner." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("joined", [True, False])
def test_the_command_line_overrides_a_recipe_wherever_it_is_named(recipe, place, joined):
    path = recipe("inner: {width: 7, rate: 0.5}\nname: of the recipe\nfiles: [a, b]\nloud: true\n")
    words = ["--inner.width", "8", "--name", "of the line"]
    words[place:place] = [f"--config={path}"] if joined else ["--config", path]
    assert read(*words) == Outer(inner=Inner(8, 0.5), name="of the line", files=("a", "b"), loud=True)


def test_a_later_recipe_overrides_an_earlier_one(recipe):
    first, second = recipe("name: first\nlimit: 1\n", "first.yaml"), recipe("name: second\n", "second.yaml")
    assert read("--config", first, "--config", second) == Outer(name="second", limit=1)
    assert read("--config", second, "--loud", "--config", first) == Outer(name="first", limit=1, loud=True)


def test_a_recipe_may_give_one_value_for_a_list(recipe):
    assert read("--config", recipe("files: a\n")).files == read("--files=a").files == ("a",)
    assert read("--config", recipe("files: a\n"), "--files", "b", "c").files == ("b", "c")


def test_a_recipe_may_be_long(recipe):
    files = [f"{number:0100d}" for number in range(1000)]
    assert read("--config", recipe("files: [" + ", ".join(f'"{file}"' for file in files) + "]\n")).files == tuple(files)


def test_a_recipe_of_comments_alone_changes_nothing(recipe):
    assert read("--config", recipe("# name: x\n")) == Outer()


def test_defaults_can_depend_on_given_values(recipe):
    def defaults(given: dict) -> dict:
        return {"inner.width": 100, "inner.rate": 0.25} if given.get("name") == "large" else {}

    assert read("--name", "large", "--inner.width", "7", defaults=defaults).inner == Inner(7, 0.25)
    assert read("--config", recipe("name: large\ninner: {rate: 0.5}\n"), defaults=defaults).inner == Inner(100, 0.5)
    assert read(defaults=defaults).inner == Inner()


def test_a_list_among_derived_defaults_becomes_a_tuple():
    assert read(defaults=lambda given: {"files": ["a", "b"]}).files == ("a", "b")
    assert read(defaults=lambda given: {"files": []}) == Outer()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nmae", "x"], 'Unknown setting "nmae". Did you mean "name"? --help lists them all.'),
        (["--nam", "x"], 'Unknown setting "nam". Did you mean "name"? --help lists them all.'),
        (["--inner.widht=3"], 'Unknown setting "inner.widht". Did you mean "inner.width"? --help lists them all.'),
        (["stray"], 'Unknown setting "stray". --help lists them all.'),
        (["--inner.width", "wide"], "inner.width is wide; it must be a whole number. Set on the command line."),
        (["--inner.width", "1.5"], "inner.width is 1.5; it must be a whole number. Set on the command line."),
        (["--limit", "x"], "limit is x; it must be a whole number or null. Set on the command line."),
        (["--inner.rate", "fast"], "inner.rate is fast; it must be a number. Set on the command line."),
        (["--loud=loudly"], "loud is loudly; it must be true or false. Set on the command line."),
        (["--kind", "squar"], 'kind is squar; it must be round or square. Did you mean "square"? Set on the command line.'),
        (["--files", "a", "--files=b"], "--files is given twice; give all its values after one --files."),
        (["--name"], "--name needs a value."),
        (["--name", "--loud"], "--name needs a value."),
        (["--config"], "--config needs a value."),
        (["--inner", "3"], "--inner is a group of settings; give one of them: --inner.width, --inner.rate."),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file or directory."),
        (["--config", "/"], "--config /: Is a directory."),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(words, message):
    with pytest.raises(UserError) as refused:
        read(*words)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        ("nmae: x", '{path}: unknown setting "nmae". Did you mean "name"? --help lists them all.'),
        ("inner: {widht: 3}", '{path}: unknown setting "inner.widht". Did you mean "inner.width"? --help lists them all.'),
        ("config: x", '{path}: unknown setting "config". --help lists them all.'),
        ("7: x", '{path}: unknown setting "7". --help lists them all.'),
        ("inner: 3", '{path}: "inner" is a group of settings: inner.width, inner.rate.'),
        ("inner:", '{path}: "inner" is a group of settings: inner.width, inner.rate.'),
        ("inner: {width: wide}", "inner.width is wide; it must be a whole number. Set in {path}."),
        ("name: 5", "name is 5; it must be text. Set in {path}."),
        ("files: [3]", "files is 3; it must be a list of texts. Set in {path}."),
        ("files:", "files is null; it must be a list of texts. Set in {path}."),
        ("limit: 3\nname:", "name is null; it must be text. Set in {path}."),
        ("[1, 2]", "--config {path} holds a list; a recipe is names with values."),
    ],
)
def test_a_mistake_in_a_recipe_is_one_message_that_names_the_file(recipe, text, message):
    path = recipe(text)
    with pytest.raises(UserError) as refused:
        read("--loud", "--config", path)
    assert str(refused.value) == message.format(path=path)


def test_a_recipe_that_is_not_yaml_is_refused_with_line_and_column(recipe, tmp_path):
    with pytest.raises(UserError, match=r"recipe\.yaml is not YAML: .* line 1, column 8"):
        read("--config", recipe("inner: [3\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"bytes\.yaml is not YAML: "):
        read("--config", str(tmp_path / "bytes.yaml"))


def test_a_wrong_value_names_the_place_where_it_was_set(recipe):
    with pytest.raises(UserError) as refused:
        read("--config", recipe("limit: 3\n"), "--limit", "x")
    assert str(refused.value) == "limit is x; it must be a whole number or null. Set on the command line."


@dataclasses.dataclass(frozen=True)
class Section:
    size: int = 1
    """Even or 1."""
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of all."""

    def __post_init__(self) -> None:
        if self.size > 1 and self.size % 2:
            raise ValueError(f"section.size {self.size} is odd. Nearest: {self.size + 1}.")


@dataclasses.dataclass(frozen=True)
class Checked:
    section: Section = dataclasses.field(default_factory=Section)
    steps: Annotated[int, Ge(0)] | None = None
    """Steps."""
    warmup: int = 3
    """Steps of warm-up."""
    weights: tuple[Annotated[float, Gt(0)], ...] = ()
    """Weights."""

    def complaints(self) -> list[str]:
        steps, warmup = describe(self, "steps"), describe(self, "warmup")
        found = [f"{warmup} must be below {steps}."] if self.steps is not None and self.warmup >= self.steps else []
        return found + ([f"{describe(self, 'section.size')} is too small."] if self.section.size < 2 else [])


def complaints_of(*words: str) -> list[str]:
    """Return the lines that these words are refused with."""
    with pytest.raises(UserError) as refused:
        read_settings(Checked, words, "A test.")
    return str(refused.value).splitlines()


def test_a_value_in_its_range_is_accepted():
    words = ["--section.size", "2", "--section.share", "1", "--steps", "4", "--weights", "1", "0.5"]
    assert read_settings(Checked, words, "A test.") == Checked(Section(2, 1.0), 4, 3, (1.0, 0.5))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--section.share", "0"], "section.share is 0; it must be above 0 and at most 1. Set on the command line."),
        (["--section.share", "1.5"], "section.share is 1.5; it must be above 0 and at most 1. Set on the command line."),
        (["--section.share", ".nan"], "section.share is nan; it must be a finite number. Set on the command line."),
        (["--steps=-1"], "steps is -1; it must be at least 0. Set on the command line."),
        (["--weights", "1", "-2"], "weights is 1 -2; it must be above 0. Set on the command line."),
        (["--weights", "1", ".inf"], "weights is 1 inf; it must be a finite number. Set on the command line."),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(words, message):
    assert complaints_of("--section.size=2", *words) == [message]


def test_a_value_out_of_range_in_a_recipe_names_the_file(recipe):
    path = recipe("section: {size: 2, share: 2.0}\n")
    assert complaints_of("--config", path) == [f"section.share is 2; it must be above 0 and at most 1. Set in {path}."]


def test_an_invalid_combination_names_the_place_of_each_value(recipe):
    path = recipe("steps: 3\nsection: {size: 2}\n")
    assert complaints_of("--config", path) == [f"warmup 3 (default) must be below steps 3 ({path})."]
    assert complaints_of("--config", path, "--steps", "2") == ["warmup 3 (default) must be below steps 2 (command line)."]


def test_what_a_section_refuses_names_the_place_of_each_value(recipe):
    assert complaints_of("--section.size", "3") == ["section.size 3 (command line) is odd. Nearest: 4."]


def test_complaints_of_all_layers_come_together():
    """Complaints that follow from a wrong value are left out: section.size is not reported as too small."""
    words = ["--section.size=3", "--section.share=0", "--weights=-1", "--steps=1"]
    assert complaints_of(*words) == [
        "section.share is 0; it must be above 0 and at most 1. Set on the command line.",
        "weights is -1; it must be above 0. Set on the command line.",
        "section.size 3 (command line) is odd. Nearest: 4.",
        "warmup 3 (default) must be below steps 1 (command line).",
    ]


def test_all_values_of_a_wrong_type_are_named(recipe):
    path = recipe("steps: few\n")
    assert complaints_of("--config", path, "--warmup=x", "--section.size=y") == [
        f"steps is few; it must be a whole number or null. Set in {path}.",
        "warmup is x; it must be a whole number. Set on the command line.",
        "section.size is y; it must be a whole number. Set on the command line.",
    ]


def test_ranges_are_checked_without_a_command_line_too():
    assert range_complaints(Checked(Section(1, 2.0), -1)) == [
        "section.share is 2.0; it must be above 0 and at most 1.",
        "steps is -1; it must be at least 0.",
    ]


def test_a_default_that_depends_on_a_setting_names_that_setting():
    def defaults(given: dict) -> dict:
        return {"warmup": 9} if given.get("steps") else {}

    with pytest.raises(UserError, match=r"^warmup 9 \(steps 5\) must be below steps 5 \(command line\)\.$"):
        read_settings(Checked, ["--section.size=2", "--steps=5"], "A test.", defaults=defaults, defaults_from=("steps",))


def settings_classes() -> list[tuple[str, str]]:
    """Return module and name of every settings dataclass of data/ and launch/."""
    found = []
    for path in sorted([*REPOSITORY.glob("launch/**/*.py"), *REPOSITORY.glob("data/**/*.py")]):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        found += [(module, name) for name in classes if name.endswith("Settings") and name != "WorkerSettings"]
    return found


def documented_fields(settings: type, prefix: str = "") -> dict[str, tuple[str, object]]:
    """Dotted name -> (the string literal below the field, its default), read from the source text."""
    bases = [base for base in settings.__mro__ if dataclasses.is_dataclass(base)]
    body = [line for base in reversed(bases) for line in ast.parse(inspect.getsource(base)).body[0].body]
    below = {
        field.target.id: after.value.value
        for field, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    found = {}
    for field in dataclasses.fields(settings):
        kind = typing.get_type_hints(settings)[field.name]
        if dataclasses.is_dataclass(kind):
            found |= documented_fields(kind, f"{prefix}{field.name}.")
        else:
            assert field.name in below, f"{settings.__name__}.{field.name} has no docstring"
            found[prefix + field.name] = below[field.name], field.default
    return found


@pytest.mark.parametrize("module, name", settings_classes())
def test_help_shows_every_setting_with_its_docstring_and_default(module, name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    settings = getattr(importlib.import_module(module), name)
    fields = documented_fields(settings)
    positional = "model" if fields.get("model", ("", None))[1] is dataclasses.MISSING else None
    with pytest.raises(SystemExit) as ended:
        read_settings(settings, ["--help"], "A script.", positional=positional)
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for field, (docstring, default) in fields.items():
        option = field.upper() if field == positional else f"--{field} "
        assert option in shown, field
        assert " ".join(docstring.split()) in shown, field
        if default not in (dataclasses.MISSING, None, (), "") and "(default: " not in docstring:
            value = str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
            value = " ".join(map(as_text, value)) if isinstance(value, tuple) else value
            assert f"{' '.join(docstring.split())} Default: {value}." in shown, field


@pytest.fixture
def own_ctrl_c():
    """Restore what Ctrl-C does, which run_script changes at the end of a process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"])
def test_a_user_error_is_printed_once_a_machine_with_status_2(name, own_ctrl_c, capsys, monkeypatch):
    for kind, rank, printed in ((UserError, "0", "That cannot be.\n"), (UserError, "1", ""), (RankError, "1", "That cannot be.\n")):

        def main(arguments, kind=kind):
            raise kind("That cannot be.")

        for other in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, rank)
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert ended.value.code == 2
        assert capsys.readouterr() == ("", printed)


def test_the_status_of_main_is_the_exit_status(own_ctrl_c):
    for returned, status in ((None, 0), (0, 0), (85, 85)):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda arguments, returned=returned: returned)
        assert ended.value.code == status


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"), 2, "out/model.safetensors: No space left on device.\n"),
        (PermissionError(errno.EACCES, "Permission denied"), 2, "Permission denied.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (KeyboardInterrupt("Stopped. Run it again."), 130, "Stopped. Run it again.\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_error_of_the_system_and_ctrl_c_end_with_one_sentence(error, status, printed, own_ctrl_c, capsys):
    def main(arguments):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert (ended.value.code, capsys.readouterr().err) == (status, printed)


def test_ctrl_c_that_a_library_reports_as_another_error_is_ctrl_c(own_ctrl_c, capsys):
    """transformers reports an interrupted import as a missing module, which verification reports as a model that is read otherwise."""

    def main(arguments):
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise ModuleNotFoundError("Could not import module 'LlamaConfig'.")  # noqa: B904
        except ModuleNotFoundError as error:
            raise UserError("transformers does not read this model as we do.") from error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, "Interrupted.\n")


def test_mistake_of_ours_ends_with_its_traceback(own_ctrl_c, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda arguments: Path("/nowhere/of/ours").read_text())
    assert ended.value.code == 1 and "Traceback" in capsys.readouterr().err


def test_import_keeps_the_hook_of_a_debugger_for_other_errors(monkeypatch, capsys):
    others: list[type] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: others.append(kind))
    runpy.run_path(data.__file__)
    for error in (ValueError(), KeyboardInterrupt()):
        sys.excepthook(type(error), error, None)
    assert others == [ValueError] and capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("moment", ["import", "work"])
def test_ctrl_c_that_a_library_catches_before_it_fails_is_ctrl_c(moment, tmp_path):
    """torch catches an interrupted import of numpy, which later fails as a module without its last names."""
    swallow = (
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\nexcept KeyboardInterrupt:\n    pass\n"
        "raise AttributeError('module numpy has no attribute matrix')\n"
    )
    in_main = f"def main(arguments):\n{textwrap.indent(swallow, '    ')}run_script(main)\n"
    script = tmp_path / "script.py"
    script.write_text("import os, signal, time\nfrom data.command_line import run_script\n" + (swallow if moment == "import" else in_main))
    ended = subprocess.run([sys.executable, script], env=clean_environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize("kept", ["signal.SIG_IGN", "lambda number, frame: None"])
def test_import_keeps_what_somebody_else_does_on_ctrl_c(kept):
    program = (
        f"import signal; kept = {kept}; signal.signal(signal.SIGINT, kept); import data; assert signal.getsignal(signal.SIGINT) is kept"
    )
    subprocess.run([sys.executable, "-c", program], env=clean_environment(), check=True)


def test_import_keeps_ctrl_c_of_a_python_prompt():
    typed = "import signal\nimport data\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    ended = subprocess.run([sys.executable, "-i"], input=typed, env=clean_environment(), capture_output=True, text=True)
    assert ended.stdout == "True\n", ended


def test_ctrl_c_in_a_callback_that_cannot_raise_it_is_not_lost(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time, weakref\n"
        "from data.command_line import run_script\n"
        "def main(arguments):\n"
        "    value = {1}\n"
        "    reference = weakref.ref(value, lambda _: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.01)))\n"
        "    del value\n"
        "    time.sleep(10)\n"
        "run_script(main)\n"
    )
    ended = subprocess.run([sys.executable, script], env=clean_environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")
