"""Each script and each mistake: one sentence, status 2 (130 after Ctrl-C), nothing left behind and nothing overwritten.

A cell of the table is a command line of a script, in which one thing is wrong. NOT_APPLICABLE gives the reason for each empty cell.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.command_line import run_script
from tests.disk import no_larger_files
from tests.launch.scene import SHAPE, write_model, write_run, write_tokenizer
from tests.model.both_sides import MARIAN
from tests.ranks import REPOSITORY, clean_environment

TRAINING = "--data {data} --output {new} --config {recipe} --deepspeed {deepspeed}"
COMPRESSION = "{model} --data {data} --output {new} --calibration_samples 8 --test_samples 8 --sensitivity_samples 0"


@dataclasses.dataclass(frozen=True)
class Script:
    """A script with a command line that works; names in braces are the paths of the scene."""

    module: str
    words: str
    work: str = ""
    """Function that begins the work; what can be known before is reported before it is called."""


SCRIPTS = {
    "prepare": Script("data.prepare", "--input {text} --tokenizer {tokenizer} --output {new} --workers 1"),
    "show": Script("data.show", "{data} --model.sequence_length 32 --batch.global_batch_size 2"),
    "show a run": Script("data.show", "--run {run}"),
    "pretrain": Script("launch.pretrain", TRAINING, "launch.training.assembly.assemble"),
    "pretrain --init": Script("launch.pretrain", f"{TRAINING} --init {{model}}", "launch.training.assembly.assemble"),
    "preflight": Script("launch.preflight", TRAINING),
    "search": Script("launch.search", "--recipe {recipe} --preset rate --output {new}", "launch.searching.driver.Slot"),
    "plan": Script("launch.plan", f"{TRAINING} --gpus 2", "launch.training.planning.report.candidates"),
    "evaluate": Script("launch.evaluate", "{model} --data {data}", "launch.checkpoints.opening.Transformer.from_state"),
    "evaluate a run": Script("launch.evaluate", "{run}", "launch.checkpoints.opening.Transformer.from_state"),
    "generate": Script(
        "launch.generate",
        "{model} --prompt abc --max_new_tokens 2 --tokenizer {tokenizer}",
        "launch.checkpoints.opening.Transformer.from_state",
    ),
    "generate lines": Script(
        "launch.generate", "{marian} --input {lines} --output {new}", "launch.checkpoints.opening.Transformer.from_state"
    ),
    "compare": Script(
        "launch.compare", "{model} {other} --data {data} --output {new}", "launch.checkpoints.opening.Transformer.from_state"
    ),
    "export": Script("launch.export", "{model} --output {new}", "launch.compressing.exporting.new_folder"),
    "export a run": Script("launch.export", "{run} --output {new}", "launch.compressing.exporting.new_folder"),
    "export GGUF": Script("launch.export", "{model} --output {new}.gguf --format gguf", "launch.compressing.exporting.new_file"),
    "prune": Script("launch.prune", f"{COMPRESSION} --method magnitude", "launch.compressing.setup.find_workers"),
    "quantize": Script("launch.quantize", f"{COMPRESSION} --method rtn --group_size 32", "launch.compressing.setup.find_workers"),
    "convert": Script("launch.convert", "{run} --output {new}", "launch.checkpoints.conversion._damage"),
    "demo": Script("launch.demo", ""),
    "benchmark of generation": Script("launch.benchmarks.generation", "--model {model} --new_tokens 2 --rounds 1"),
    "benchmark of compression": Script("launch.benchmarks.pruning_and_quantization", "--model {model} --data {data} --only methods"),
    "benchmark of preparation": Script("launch.benchmarks.preparation", "--input {text} --only huggingface --rounds 1"),
    "benchmark of the training step": Script("launch.benchmarks.training_step", ""),
    "benchmark of seesaw": Script("launch.benchmarks.seesaw", ""),
    "benchmark of optimizers": Script("launch.benchmarks.optimizers", ""),
    "benchmark of the planner": Script("launch.benchmarks.planner", ""),
}
FOLDERS = ("data", "model", "other", "marian", "run")
FILES = ("text", "lines", "recipe", "deepspeed", "tokenizer")

WRITES_NOTHING = "writes no file"
READS_NO_WEIGHTS = "reads no weights"
FIXED_INPUT = "a benchmark, which writes only into temporary folders, and whose input is ours"
NOT_APPLICABLE = {
    "demo": "takes no settings; each script that it starts has its own row",
    "benchmark of the training step": "reads and writes no file",
    "benchmark of the planner": "reads its own file of published runs",
    "benchmark of optimizers": "starts launch/pretrain.py, which has its own row, with the paths that it is given",
    "benchmark of seesaw": "starts launch/pretrain.py, which has its own row, with the paths that it is given",
    **{(mistake, name): FIXED_INPUT for mistake in ("not UTF-8", "no permission to read") for name in SCRIPTS if "benchmark" in name},
    **{(mistake, name): WRITES_NOTHING
       for mistake in ("output exists", "output under a file", "no permission to write", "full disk")
       for name in ("show", "show a run", "plan", "evaluate", "evaluate a run", "generate",
                    *(name for name in SCRIPTS if "benchmark" in name))},
    ("output exists", "prepare"): "returns the folder if its content is the same; tests/data/test_prepare.py",
    ("output exists", "pretrain"): "resumes the run; tests/launch/test_doors.py has a folder of another run",
    ("output exists", "pretrain --init"): "as pretrain",
    ("output exists", "preflight"): "as pretrain",
    ("full disk", "prepare"): "test_full_disk_at_any_write_loses_nothing in tests/data/preparation/test_crash.py",
    ("full disk", "pretrain"): "tests/launch/training/test_resume.py: training continues",
    ("full disk", "pretrain --init"): "as pretrain",
    ("full disk", "preflight"): "writes one empty file, which must be writable",
    ("full disk", "search"): "starts launch/pretrain.py, which has its own row",
    **{(mistake, name): READS_NO_WEIGHTS
       for mistake in ("NaN weights", "other tokenizer")
       for name in ("show", "show a run", "plan", "pretrain", "preflight", "search", "benchmark of preparation")},
    ("NaN weights", "prepare"): READS_NO_WEIGHTS,
    ("NaN weights", "pretrain --init"): "read after the ranks are connected; tests/launch/training/test_resume.py",
    ("not UTF-8", "evaluate a run"): "reads no JSON but the checkpoint's manifest, which has a hash",
    ("NaN weights", "convert"): "copies bits and judges no weights",
    ("other tokenizer", "prepare"): "prepares with any tokenizer",
    ("other tokenizer", "convert"): "copies the tokenizer of the run",
    ("other tokenizer", "benchmark of compression"): "opens the model as evaluate does",
}  # fmt: skip
"""Reasons for the empty cells: of a script's whole row, or of one cell."""


@pytest.fixture(scope="module")
def scene(prepared) -> Iterator[dict[str, Path]]:
    """Small right inputs for every script by name, and broken ones of each kind, in a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (public := root / "public").mkdir()
        public.chmod(0o777)
        data = shutil.copytree(prepared, root / "data")
        tokenizer, shape = data / "tokenizer.model", {name: SHAPE[name] for name in SHAPE}
        (root / "text.txt").write_text("some words to read\n" * 50)
        (root / "lines.txt").write_text("abc\nde\n")
        model = "".join(f"  {name}: {value}\n" for name, value in shape.items())
        batch = "batch:\n  global_batch_size: 8\n  micro_batch_size: 2\n"
        (root / "recipe.yaml").write_text(f"model:\n{model}{batch}train_steps: 2\nschedule:\n  warmup_steps: 1\n")
        shutil.copy(REPOSITORY / "ds_configs" / "zero1.json", root / "deepspeed.json")

        def nan(name, weight):
            return weight * float("nan") if "up" in name else weight

        def large(name, weight):
            return weight + 1e6 if "up" in name else weight

        yield {
            "root": root,
            "data": data,
            "tokenizer": tokenizer,
            "text": root / "text.txt",
            "lines": root / "lines.txt",
            "recipe": root / "recipe.yaml",
            "deepspeed": root / "deepspeed.json",
            "model": write_model(root / "model", tokenizer),
            "other": write_model(root / "other", tokenizer, lambda name, weight: 0.9 * weight),
            "marian": write_model(root / "marian", tokenizer, **MARIAN),
            "run": write_run(root / "run", tokenizer, data),
            "public": public,
            "NaN model": write_model(root / "nan-model", tokenizer, nan),
            "NaN other": write_model(root / "nan-other", tokenizer, nan),
            "NaN marian": write_model(root / "nan-marian", tokenizer, nan, **MARIAN),
            "NaN run": write_run(root / "nan-run", tokenizer, data, nan),
            "large model": write_model(root / "large-model", tokenizer, large),
            "large tokenizer": write_tokenizer(root / "large-tokenizer", 1000),
        }


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a script ended."""

    status: int
    said: str
    """What it printed to standard error."""


@pytest.fixture
def start(scene, tmp_path, monkeypatch, capsys):
    """Return a function that runs a script in this process, and checks that it left no file and changed none."""

    def call(name: str, *more: str, leaves: str = "", inside: contextlib.AbstractContextManager | None = None, **changes: object) -> Ended:
        script = SCRIPTS[name]
        paths = {name: str(path) for name, path in (scene | {"new": tmp_path / "out"} | changes).items()}
        monkeypatch.setattr(sys, "argv", [script.module, *(word.format(**paths) for word in script.words.split()), *more])
        main = importlib.import_module(script.module).main

        def contents() -> dict[str, str]:
            found = files(scene["root"]) | files(tmp_path)
            return {path: content for path, content in found.items() if not leaves or not path.startswith(str(tmp_path / leaves))}

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before = contents()
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended, inside or contextlib.nullcontext():
                run_script(main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        after = contents()
        assert after == before, sorted(after.keys() ^ before.keys())
        return Ended(ended.value.code, capsys.readouterr().err)

    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "x")  # so that monkeypatch restores what a script sets
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    return call


def files(folder: Path) -> dict[str, str]:
    """Return what is below a folder: a hash of each file by its path; of a folder its kind."""
    found = sorted(folder.rglob("*"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder" for path in found}


def refused(ended: Ended, *named: object) -> None:
    """Check that a script ended with status 2 and one sentence that names what is wrong."""
    lines = [line for line in ended.said.splitlines() if not re.search(r"\.\.\.$|\rLoading|Loading weights", line)]
    assert ended.status == 2 and len(lines) == 1 and re.search(r"[.)]$", lines[0]), ended
    for one in named:
        assert str(one) in lines[0], ended


def fields(name: str, of: tuple[str, ...]) -> list[str]:
    """Return the paths in a script's command line that are of some kind."""
    return [field for field in of if f"{{{field}}}" in SCRIPTS[name].words]


@contextlib.contextmanager
def without_permission(path: Path, mode: int) -> Iterator[None]:
    """Take permissions from a path, and those of root from this process, which would ignore them."""
    before, is_root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(mode)
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        path.chmod(before)


class Mistakes:
    """One method for each column of the table."""

    def __init__(self, name: str, start: Callable[..., Ended], scene: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.name, self.start, self.scene, self.tmp_path, self.monkeypatch = name, start, scene, tmp_path, monkeypatch

    def before_the_work(self) -> None:
        """Let the script fail with a traceback if it begins its work."""
        if work := SCRIPTS[self.name].work:
            self.monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))

    def missing_path(self) -> None:
        self.before_the_work()
        for field in fields(self.name, FOLDERS + FILES):
            refused(self.start(self.name, **{field: self.tmp_path / "nowhere"}), "nowhere")

    def file_for_a_folder(self) -> None:
        self.before_the_work()
        for field in fields(self.name, FOLDERS):
            refused(self.start(self.name, **{field: self.scene["lines"]}), self.scene["lines"])

    def folder_for_a_file(self) -> None:
        self.before_the_work()
        for field in fields(self.name, FILES):
            (self.tmp_path / field).mkdir()
            refused(self.start(self.name, **{field: self.tmp_path / field}), self.tmp_path / field)

    def not_utf8(self) -> None:
        if self.name != "generate lines":  # which reads a line when it needs it
            self.before_the_work()
        for field in fields(self.name, FILES):
            wrong = self.tmp_path / f"{field}{self.scene[field].suffix}"
            wrong.write_bytes(b"\xff\xfe{" + self.scene[field].read_bytes())
            refused(self.start(self.name, leaves="out.partial", **{field: wrong}), wrong)
        for field in fields(self.name, FOLDERS):
            wrong = shutil.copytree(self.scene[field], self.tmp_path / field) / NOT_UTF8[field]
            wrong.write_bytes(b'{"\xff": 1}')
            refused(self.start(self.name, **{field: wrong.parent}), wrong)

    def no_permission_to_read(self) -> None:
        self.missing_path()  # imports what it needs
        output = self.scene["public"] / "out"
        for field in fields(self.name, FOLDERS + FILES):
            path = self.scene[field]
            refused(self.start(self.name, inside=without_permission(path, 0), new=output), path, "ermission")

    def output_exists(self) -> None:
        self.before_the_work()
        for output in (self.tmp_path / "out", self.tmp_path / "out.gguf"):
            output.write_text("of a year's work")
        refused(self.start(self.name), self.tmp_path / "out", "nothing is overwritten")

    def output_under_a_file(self) -> None:
        self.before_the_work()
        refused(self.start(self.name, new=self.scene["lines"] / "out"), f"{self.scene['lines']} is a file")

    def no_permission_to_write(self) -> None:
        self.missing_path()
        root = self.scene["root"]
        refused(self.start(self.name, inside=without_permission(root, 0o555), new=root / "out"), root, "writable")

    def full_disk(self) -> None:
        unfinished = "out.unfinished" if self.name in ("prune", "quantize") else ""
        limit = {"generate lines": 1, "compare": 5_000}.get(self.name, 50_000)
        ended = self.start(self.name, inside=no_larger_files(limit), leaves=unfinished)
        refused(ended, self.tmp_path / "out", "could not be written: " if self.name != "convert" else ": File too large")

    def nan_weights(self) -> None:
        for field in fields(self.name, ("model", "other", "marian", "run")):
            refused(self.start(self.name, **{field: self.scene[f"NaN {field}"]}), "feed_forward.up.weight", "not finite")

    def other_tokenizer(self) -> None:
        self.before_the_work()
        large = self.scene["large tokenizer"]
        if fields(self.name, ("tokenizer",)):
            refused(self.start(self.name, tokenizer=large), large, "another model")
        for field in fields(self.name, ("model", "other", "marian", "run")):
            model = shutil.copytree(self.scene[field], self.tmp_path / field)
            shutil.copy(large, model)
            refused(self.start(self.name, **{field: model}), model, "another model")


NOT_UTF8 = {"data": "manifest.json", "model": "config.json", "other": "config.json", "marian": "config.json", "run": "run.json"}
"""A file of each folder that every script reads first."""
MISTAKES = {
    "missing path": Mistakes.missing_path,
    "file for a folder": Mistakes.file_for_a_folder,
    "folder for a file": Mistakes.folder_for_a_file,
    "not UTF-8": Mistakes.not_utf8,
    "no permission to read": Mistakes.no_permission_to_read,
    "output exists": Mistakes.output_exists,
    "output under a file": Mistakes.output_under_a_file,
    "no permission to write": Mistakes.no_permission_to_write,
    "full disk": Mistakes.full_disk,
    "NaN weights": Mistakes.nan_weights,
    "other tokenizer": Mistakes.other_tokenizer,
}


def reason(mistake: str, name: str) -> str | None:
    """Return why a cell is empty."""
    kinds = {"file for a folder": FOLDERS, "folder for a file": FILES}
    if not fields(name, kinds.get(mistake, FOLDERS + FILES)):
        return NOT_APPLICABLE.get(name, "its command line names no such path")
    return NOT_APPLICABLE.get((mistake, name))


CELLS = [(mistake, name) for mistake in MISTAKES for name in SCRIPTS if not reason(mistake, name)]


@pytest.mark.parametrize(("mistake", "name"), CELLS, ids=[f"{mistake}-{name}" for mistake, name in CELLS])
def test_mistake_gives_one_sentence_and_leaves_nothing(mistake, name, start, scene, tmp_path, monkeypatch):
    MISTAKES[mistake](Mistakes(name, start, scene, tmp_path, monkeypatch))


def test_every_script_is_in_the_table():
    scripts = [path for folder in ("data", "launch", "launch/benchmarks") for path in (REPOSITORY / folder).glob("*.py")]
    modules = {
        path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        for path in scripts
        if "\n    run_script(main" in path.read_text()
    }
    assert modules == {script.module for script in SCRIPTS.values()}


def test_every_reason_is_for_an_empty_cell_of_the_table():
    assert all(key in SCRIPTS or (key[0] in MISTAKES and key[1] in SCRIPTS) for key in NOT_APPLICABLE)


# ----- Ctrl-C -----

IN_THE_WORK = {
    "show": ("data.sampling.showing._describe_sample",),
    "pretrain": (),
    "evaluate": ("launch.evaluation.tasks.task.Task.measure",),
    "generate": ("launch.evaluation.predictions.generate",),
    "generate lines": ("launch.evaluation.predictions.beam_search", "data.files.publish_file"),
    "compare": ("launch.evaluation.comparing.token_logits", "launch.evaluation.comparing.pictures.save"),
    "export": ("model.huggingface.folder._write_shard", "model.huggingface.folder._write_json", "data.files.publish_folder"),
    "export GGUF": ("launch.compressing.exporting.gguf_tokenizer", "model.compression.gguf_file._encoded", "data.files.publish_file"),
    "prune": ("launch.compressing.setup._check_weights", "launch.compressing.driver._compress_block", "data.files.publish_folder"),
    "quantize": ("launch.compressing.layer_store.save_file", "launch.compressing.result.huggingface.export", "data.files.publish_folder"),
    "convert": ("launch.checkpoints.conversion._damage", "launch.checkpoints.state.write", "launch.checkpoints.checkpoint.publish"),
    "demo": ("subprocess.run",),
}
"""Functions of the work and of the writing of each script, at whose call Ctrl-C is pressed."""
OWN_TESTS_OF_CTRL_C = {
    "prepare": "tests/data/preparation/test_crash.py",
    "pretrain": "saves and ends with status 85; tests/launch/test_doors.py",
    "search": "saves its runs; tests/launch/searching/test_driver.py",
}
MOMENTS = [(name, moment) for name, moments in IN_THE_WORK.items() for moment in moments]


def press_ctrl_c(monkeypatch, moment: str, *, after: bool = False) -> None:
    """Press Ctrl-C at the first call of the function `moment`: before its work, or after it."""
    original, pressed = pkgutil.resolve_name(moment), []

    def press() -> None:
        if not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted(*arguments, **more):
        if not after:
            press()
        result = original(*arguments, **more)
        if after:
            press()
        return result

    monkeypatch.setattr(moment, interrupted)


@pytest.mark.parametrize(("name", "moment"), MOMENTS)
def test_ctrl_c_in_the_work_gives_one_sentence_and_leaves_nothing(name, moment, start, monkeypatch):
    start(name, *(["--nonsense"] if name != "demo" else ["nonsense"]))  # imports the script
    press_ctrl_c(monkeypatch, moment)
    keeps = name in ("prune", "quantize") and moment != "launch.compressing.setup._check_weights"
    ended = start(name, leaves="out.unfinished" if keeps else "")
    last = ended.said.splitlines()[-1]
    assert ended.status == 130 and last.startswith("Interrupted.") and "Traceback" not in ended.said, ended
    assert ("out.unfinished; the same command resumes" in last) == keeps


PUBLICATION = {
    "generate lines": "data.files.publish_file",
    "compare": "data.files.publish_folder",
    "export": "data.files.publish_folder",
    "export GGUF": "data.files.publish_file",
    "prune": "data.files.publish_folder",
    "quantize": "data.files.publish_folder",
    "convert": "launch.checkpoints.conversion.publish_folder",
}
"""Function that gives the output of each script its final name."""


@pytest.mark.parametrize("name", PUBLICATION)
def test_ctrl_c_after_the_last_write_keeps_the_complete_output(name, start, monkeypatch):
    start(name, "--nonsense")  # imports the script
    press_ctrl_c(monkeypatch, PUBLICATION[name], after=True)
    output = "out.gguf" if name == "export GGUF" else "out"
    ended = start(name, leaves=output)
    last = ended.said.splitlines()[-1]
    assert ended.status == 130 and last.startswith("Interrupted.") and last.endswith(f"/{output} is complete."), ended


@pytest.mark.parametrize("name", ["prune", "quantize"])
def test_ctrl_c_while_layers_are_deleted_keeps_the_complete_folder(name, start, monkeypatch):
    start(name, "--nonsense")  # imports the script
    press_ctrl_c(monkeypatch, "launch.compressing.layer_store.LayerStore.remove")
    ended = start(name, leaves="out")
    last = ended.said.splitlines()[-1]
    assert ended.status == 130 and last.startswith("Interrupted.") and last.endswith("/out is complete."), ended


ROWS = [name for name in SCRIPTS if name not in ("show a run", "evaluate a run", "export a run", "pretrain --init")]


@pytest.mark.parametrize(("name", "module"), [*((name, "docstring_parser") for name in ROWS), ("export", "torch"), ("prune", "torch")])
def test_ctrl_c_while_modules_are_imported_gives_no_traceback(module, name, scene, tmp_path):
    script = SCRIPTS[name]
    (tmp_path / f"{module}.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    words = [word.format(**scene, new=tmp_path / "out") for word in script.words.split()]
    command = [sys.executable, f"{script.module.replace('.', '/')}.py", *words]
    environment = clean_environment(PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode in (130, -signal.SIGINT) and ended.stderr == "Interrupted.\n", ended
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "generate", "compare", "export", "export GGUF", "prune", "quantize", "convert"])
def test_ctrl_c_at_any_moment_gives_no_traceback(name, scene, tmp_path):
    script = SCRIPTS[name]

    def begin(output: Path) -> subprocess.Popen:
        words = [word.format(**scene | {"new": output}) for word in script.words.split()]
        command = [sys.executable, f"{script.module.replace('.', '/')}.py", *words]
        return subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start = time.monotonic()
    assert begin(tmp_path / "undisturbed").wait() == 0
    seconds = time.monotonic() - start
    for moment in (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.97):
        process = begin(tmp_path / str(moment))
        time.sleep(moment * seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in said, said
        left = {path.name for path in tmp_path.glob(f"*{moment}*")}
        allowed = {f"{moment}.unfinished"} if name in ("prune", "quantize") else set()
        if f"{tmp_path / str(moment)} is complete." in said:  # Ctrl-C after the last write
            allowed = {str(moment)}
        is_done = not process.returncode or (process.returncode == -signal.SIGINT and not said)  # killed while Python ended
        assert "Interrupted" not in said if is_done else left <= allowed, (left, said)
