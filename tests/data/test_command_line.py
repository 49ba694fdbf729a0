"""A frozen dataclass as a command line: what is given arrives, and every mistake is one sentence that helps."""

import ast
import dataclasses
import importlib
import inspect
import typing
from typing import Literal

import pytest

from data.command_line import RankError, UserError, read_settings, run_script
from tests.ranks import REPOSITORY


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


def test_nothing_given_is_the_defaults():
    assert read() == Outer()


@pytest.mark.parametrize("words", [["--inner.width", "7", "--inner.rate", "-2e-4"], ["--inner.width=7", "--inner.rate=-2e-4"]])
def test_dotted_names_reach_inner_settings(words):
    assert read(*words) == Outer(inner=Inner(7, -2e-4))


def test_a_bare_claim_is_true_and_a_spelt_one_is_what_it_says():
    assert read("--loud").loud and read("--loud", "true").loud and read("--loud", "--name", "x").loud
    assert not read("--loud", "false").loud and not read("--loud=false").loud


def test_a_value_that_is_the_name_of_a_setting_stays_a_value():
    assert read("--name", "loud").name == "loud"
    assert read("--name", "files", "--files", "name", "loud").files == ("name", "loud")


@pytest.mark.parametrize("text", ["###", "--- x", "# a: b", "5", "true", "a: b", ""])
def test_a_text_that_yaml_would_read_otherwise_stays_what_it_is(text):
    assert read(f"--note={text}").note == text
    assert text.startswith("--") or read("--note", text).note == text
    assert read("--note", "null").note is None


def test_the_words_behind_a_list_are_its_items():
    assert read("--files", "a", "b c", "--loud").files == ("a", "b c")
    assert read("--files").files == ()
    assert read("--files=a").files == read('--files=["a"]').files == ("a",)


def test_an_alias_is_its_setting():
    aliases = {"--width": "--inner.width", "--inner": "--inner.width"}
    assert read("--width", "9", aliases=aliases) == read("--width=9", aliases=aliases) == read("--inner=9", aliases=aliases)
    assert read("--width", "9", aliases=aliases).inner.width == 9


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("joined", [True, False])
def test_a_recipe_lies_under_the_command_line_wherever_it_is_named(recipe, place, joined):
    path = recipe("inner: {width: 7, rate: 0.5}\nname: of the recipe\nfiles: [a, b]\nloud: true\n")
    words = ["--inner.width", "8", "--name", "of the line"]
    words[place:place] = [f"--config={path}"] if joined else ["--config", path]
    assert read(*words) == Outer(inner=Inner(8, 0.5), name="of the line", files=("a", "b"), loud=True)


def test_a_later_recipe_lies_over_an_earlier_one(recipe):
    first, second = recipe("name: first\nlimit: 1\n", "first.yaml"), recipe("name: second\n", "second.yaml")
    assert read("--config", first, "--config", second) == Outer(name="second", limit=1)
    assert read("--config", second, "--loud", "--config", first) == Outer(name="first", limit=1, loud=True)


def test_one_value_for_a_list_is_a_list_of_it_in_a_recipe_too(recipe):
    assert read("--config", recipe("files: a\n")).files == read("--files=a").files == ("a",)
    assert read("--config", recipe("files: a\n"), "--files", "b", "c").files == ("b", "c")


def test_a_recipe_may_be_long(recipe):
    files = [f"{number:0100d}" for number in range(1000)]
    assert read("--config", recipe("files: [" + ", ".join(f'"{file}"' for file in files) + "]\n")).files == tuple(files)


def test_a_recipe_of_comments_alone_changes_nothing(recipe):
    assert read("--config", recipe("# name: x\n")) == Outer()


def test_defaults_may_follow_from_what_is_given(recipe):
    def defaults(given: dict) -> dict:
        return {"inner.width": 100, "inner.rate": 0.25} if given.get("name") == "large" else {}

    assert read("--name", "large", "--inner.width", "7", defaults=defaults).inner == Inner(7, 0.25)
    assert read("--config", recipe("name: large\ninner: {rate: 0.5}\n"), defaults=defaults).inner == Inner(100, 0.5)
    assert read(defaults=defaults).inner == Inner()


@pytest.mark.parametrize(
    "words, sentence",
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
def test_a_mistake_on_the_command_line_is_one_sentence(words, sentence):
    with pytest.raises(UserError) as refused:
        read(*words)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("nmae: x", '{path}: unknown setting "nmae". Did you mean "name"? --help lists them all.'),
        ("inner: {widht: 3}", '{path}: unknown setting "inner.widht". Did you mean "inner.width"? --help lists them all.'),
        ("config: x", '{path}: unknown setting "config". --help lists them all.'),
        ("7: x", '{path}: unknown setting "7". --help lists them all.'),
        ("inner: 3", '{path}: "inner" is a group of settings: inner.width, inner.rate.'),
        ("inner:", '{path}: "inner" is a group of settings: inner.width, inner.rate.'),
        ("inner: {width: wide}", "inner.width is wide; it must be a whole number. Set in {path}."),
        ("name: 5", "name is 5; it must be text. Set in {path}."),
        ("files: [3]", "files is 3; it must be a list. Set in {path}."),
        ("files:", "files is null; it must be a list. Set in {path}."),
        ("limit: 3\nname:", "name is null; it must be text. Set in {path}."),
        ("[1, 2]", "--config {path} holds a list; a recipe is names with values."),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_that_names_the_file(recipe, text, sentence):
    path = recipe(text)
    with pytest.raises(UserError) as refused:
        read("--loud", "--config", path)
    assert str(refused.value) == sentence.format(path=path)


def test_a_file_that_is_no_yaml_is_refused_with_the_place(recipe, tmp_path):
    with pytest.raises(UserError, match=r"recipe\.yaml is not YAML: .* line 1, column 8"):
        read("--config", recipe("inner: [3\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"bytes\.yaml is not YAML: "):
        read("--config", str(tmp_path / "bytes.yaml"))


def test_a_wrong_value_on_the_line_does_not_blame_the_recipe(recipe):
    with pytest.raises(UserError) as refused:
        read("--config", recipe("limit: 3\n"), "--limit", "x")
    assert "Set in" not in str(refused.value)


def settings_of_doors() -> list[tuple[str, str]]:
    """Module and name of every settings dataclass that a door reads."""
    found = [("launch.training.settings", "RunSettings")]
    for path in sorted([*REPOSITORY.glob("launch/*.py"), *REPOSITORY.glob("data/*.py")]):
        classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        found += [(f"{path.parent.name}.{path.stem}", name) for name in classes if name.endswith("Settings")]
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


@pytest.mark.parametrize("module, name", settings_of_doors())
def test_help_shows_every_setting_with_its_docstring_and_default(module, name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    settings = getattr(importlib.import_module(module), name)
    fields = documented_fields(settings)
    positional = "model" if fields.get("model", ("", None))[1] is dataclasses.MISSING else None
    with pytest.raises(SystemExit) as ended:
        read_settings(settings, ["--help"], "A door.", positional=positional)
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for field, (docstring, default) in fields.items():
        option = field.upper() if field == positional else f"--{field} "
        assert option in shown, field
        assert " ".join(docstring.split()) in shown, field
        if default not in (dataclasses.MISSING, None, (), ""):
            value = str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
            value = " ".join(value) if isinstance(value, tuple) else value
            assert f"{' '.join(docstring.split())} Default: {value}." in shown, field


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"])
def test_a_door_prints_the_sentence_once_a_machine_and_ends_with_status_2(name, capsys, monkeypatch):
    for kind, rank, printed in ((UserError, "0", "That cannot be.\n"), (UserError, "1", ""), (RankError, "1", "That cannot be.\n")):

        def door(arguments, kind=kind):
            raise kind("That cannot be.")

        monkeypatch.setenv(name, rank)
        with pytest.raises(SystemExit) as ended:
            run_script(door)
        assert ended.value.code == 2
        assert capsys.readouterr() == ("", printed)


def test_the_status_of_a_door_is_the_status_of_the_process():
    for returned, status in ((None, 0), (0, 0), (85, 85)):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda arguments, returned=returned: returned)
        assert ended.value.code == status
