"""A converted checkpoint holds the same values in other files, a run resumes from it, and a damaged checkpoint is refused."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from data.command_line import UserError
from data.recorded_paths import record_path
from launch.checkpoints import checkpoint, state
from launch.checkpoints.conversion import convert
from launch.checkpoints.settings import ConvertSettings
from launch.checkpoints.state import SavedState, ShardSlice, whole_region
from launch.convert import main
from launch.ranks.layout import describe_layout
from tests.ranks import REPOSITORY, clean_environment, finish, start_ranks

SCRIPT = REPOSITORY / "launch" / "convert.py"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES = {
    "0.weight": (50, 12),
    "1.attention.query.weight": (12, 12),
    "1.norm.weight": (12,),
    "2.down.weight": (12, 40),
    "10.weight": (50, 12),
}


def cut_as_one_vector(shapes: dict, world_size: int) -> list[list[ShardSlice]]:
    """Return each rank's shard slices if all parameters are one vector that is cut, as in ZeRO-1 and -2."""
    total = sum(math.prod(shape) for shape in shapes.values())
    borders = [total * rank // world_size for rank in range(world_size + 1)]
    ranks: list[list[ShardSlice]] = []
    for first, end in itertools.pairwise(borders):
        ranks.append([])
        begins = 0
        for name, shape in shapes.items():
            start, stop = max(first - begins, 0), min(end - begins, math.prod(shape))
            if start < stop:
                ranks[-1].append(ShardSlice(name, shape, whole_region(shape), start, stop - start))
            begins += math.prod(shape)
    return ranks


def cut_each_parameter(shapes: dict, world_size: int) -> list[list[ShardSlice]]:
    """Return each rank's shard slices if every parameter is cut, as in ZeRO-3."""
    cut = [cut_as_one_vector({name: shape}, world_size) for name, shape in shapes.items()]
    return [[shard_slice for ranks in cut for shard_slice in ranks[rank]] for rank in range(world_size)]


def cut_rows_or_columns(shapes: dict, world_size: int) -> list[list[ShardSlice]]:
    """Return each rank's shard slices if matrices are cut as in tensor parallelism. One rank has the vectors."""
    ranks: list[list[ShardSlice]] = [[] for _ in range(world_size)]
    for number, (name, shape) in enumerate(shapes.items()):
        dimension = number % len(shape)
        for rank in range(world_size if len(shape) > 1 else 1):
            region = list(whole_region(shape))
            if len(shape) > 1:
                region[dimension] = (shape[dimension] * rank // world_size, shape[dimension] * (rank + 1) // world_size)
            ranks[rank].append(ShardSlice(name, shape, tuple(region), 0, math.prod(end - first for first, end in region)))
    return ranks


CUTS = [cut_as_one_vector, cut_each_parameter, cut_rows_or_columns]


def checksum(numbers: torch.Tensor) -> int:
    """Return the checksum of a whole parameter by its formula: bits times odd numbers, in 64 bits that wrap around."""
    bits = numbers.reshape(-1).numpy().view(np.int32).astype(np.int64)
    return int((bits * (2 * np.arange(len(bits)) + 1)).sum())


def random_values(shapes: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Return random bits, among them NaN, infinities and negative zeros."""
    dice = np.random.default_rng(0)
    bits = lambda shape: dice.integers(-(2**31), 2**31, shape, np.int64).astype(np.int32)  # noqa: E731
    return {name: {kind: torch.from_numpy(bits(shape).view(np.float32)) for kind in KINDS} for name, shape in shapes.items()}


def save(root: Path, step: int, ranks: list[list[ShardSlice]], numbers: dict, **more) -> Path:
    kinds = list(next(iter(numbers.values())))
    folder = checkpoint.begin(root, step, "run")
    for rank, slices in enumerate(ranks):
        file = checkpoint.HashingFile(folder / f"rank_{rank:05d}.safetensors")

        def values(slices=slices):
            for shard_slice in slices:
                part = tuple(slice(first, end) for first, end in shard_slice.region)
                place = slice(shard_slice.start, shard_slice.start + shard_slice.count)
                yield shard_slice, {kind: numbers[shard_slice.name][kind][part].reshape(-1)[place].contiguous() for kind in kinds}

        state.write(file, slices, kinds, values())
        checkpoint.write_part(folder, rank, {file.path.name: file.finish()})
    layout = {"world_size": len(ranks), "pipeline_stages": 1, "tensor_parallel_size": 1, "sequence_parallel_size": 1}
    about = {
        "run_id": "run",
        "layout": layout | {"zero_stage": 1, "precision": "bf16"},
        "versions": {"megabatch": "0.1.0"},
        "optimizer": {"steps": step, "loss_scaler": None},
        "checksums": {name: [checksum(tensor) for tensor in tensors.values()] for name, tensors in numbers.items()},
    }
    about |= more
    return checkpoint.publish(folder, step, {name: value for name, value in about.items() if value is not None})


def make_run(folder: Path, cut: Callable = cut_as_one_vector, world_size: int = 4, shapes: dict = SHAPES, **more) -> Path:
    """Create a run folder with a checkpoint of step 7."""
    folder.mkdir()
    (folder / "run.json").write_text('{"run_id": "run"}')
    (folder / "tokenizer.json").write_text('{"pieces": 3}')
    save(folder / "checkpoints", 7, cut(shapes, world_size), random_values(shapes), **more)
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def converted(source: Path, output: Path, **more) -> Path:
    """Convert a checkpoint; return the new one."""
    settings = ConvertSettings(str(source), str(output), **more)
    return convert(Path(settings.checkpoint), Path(settings.output), settings.file_gib * 2**30, lambda line: None).checkpoint


def assert_same_state(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same bits."""
    ours, theirs = SavedState(one), SavedState(other)
    assert ours.shapes == theirs.shapes
    for name, kind in itertools.product(ours.names(), KINDS):
        assert torch.equal(ours.whole(name, kind).view(torch.int32), theirs.whole(name, kind).view(torch.int32)), (name, kind)


def refusal(source: Path, output: Path, **more) -> str:
    """Return the message that refuses a conversion, after checking that no file of the test has changed."""
    ground = next(path for path in source.parents if path.name.startswith("test_"))
    before = files_of(ground)
    with pytest.raises(UserError) as refused:
        converted(source, output, **more)
    assert files_of(ground) == before
    return str(refused.value).replace(f"{ground}/", "")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.mark.parametrize("cut", CUTS)
def test_conversion_keeps_every_bit_and_does_not_change_the_source(cut, tmp_path):
    run = make_run(tmp_path / "run", cut)
    before = files_of(run)
    folder = converted(run, tmp_path / "whole")
    assert folder == tmp_path / "whole" / "checkpoints" / "step_00000007"
    assert checkpoint.find_damage(folder) is None
    assert_same_state(folder, run / "checkpoints" / "step_00000007")
    for name, kinds in random_values(SHAPES).items():
        for kind in KINDS:
            assert torch.equal(SavedState(folder).whole(name, kind).view(torch.int32), kinds[kind].view(torch.int32))
    assert files_of(run) == before


def test_conversion_copies_the_states_that_the_manifest_records(tmp_path):
    kinds = ("weight", "momentum")
    values = {name: dict(zip(kinds, tensors.values(), strict=False)) for name, tensors in random_values(SHAPES).items()}
    (tmp_path / "run").mkdir()
    source = save(
        tmp_path / "run" / "checkpoints", 7, cut_as_one_vector(SHAPES, 2), values, optimizer_name="other", optimizer_states=["momentum"]
    )
    for name in ("run.json", "tokenizer.json"):
        (tmp_path / "run" / name).write_text("{}")
    folder = converted(source, tmp_path / "whole")
    assert state.kinds_in(checkpoint.read_manifest(folder)) == kinds
    for name, tensors in values.items():
        for kind in kinds:
            assert torch.equal(SavedState(folder).whole(name, kind).view(torch.int32), tensors[kind].view(torch.int32))
    with pytest.raises(Exception, match="exp_avg"):
        SavedState(folder).whole("0.weight", "exp_avg")


def test_the_new_manifest_differs_only_in_layout_files_and_origin(run, tmp_path):
    old = checkpoint.read_manifest(run / "checkpoints" / "step_00000007")
    new = checkpoint.read_manifest(converted(run, tmp_path / "whole"))
    origin = {"checkpoint": str(run / "checkpoints" / "step_00000007"), "layout": old["layout"], "files": 4}
    assert new == old | {"layout": new["layout"], "files": new["files"], "converted_from": origin}
    assert list(new["files"]) == ["state_00000.safetensors"]
    assert describe_layout(new["layout"]) == "1 rank(s) under ZeRO-0 in bf16"
    for name in ("run.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (run / name).read_bytes()
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"run.json", "tokenizer.json", "checkpoints"}


def test_paths_of_a_converted_run_lead_to_the_same_places(run, tmp_path):
    (run.parent / "prepared").mkdir()
    recorded = {"paths": {"data.path": [record_path(str(run.parent / "prepared"), run)]}, "recipe": {}}
    (run / "run.json").write_text(json.dumps(recorded))
    converted(run, tmp_path / "deeper" / "still" / "whole")
    (place,) = json.loads((tmp_path / "deeper" / "still" / "whole" / "run.json").read_text())["paths"]["data.path"]
    whole = tmp_path / "deeper" / "still" / "whole"
    assert (whole / place["relative"]).resolve() == (run.parent / "prepared").resolve()


def test_files_respect_file_gib_unless_one_parameter_is_larger(run, tmp_path):
    whole = converted(run, tmp_path / "whole")
    folder = converted(run, tmp_path / "several", file_gib=8000 / 2**30)
    files = [safetensors.safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    names = [set(json.loads(file.metadata()["stretches"])) for file in files]
    assert names == [{"0.weight"}, {"1.attention.query.weight", "1.norm.weight", "2.down.weight"}, {"10.weight"}]
    assert_same_state(folder, whole)
    assert len(list(converted(run, tmp_path / "many", file_gib=1e-9).glob("*.safetensors"))) == len(SHAPES)


def test_converting_twice_gives_the_same_files(run, tmp_path):
    once, twice = converted(run, tmp_path / "once"), converted(tmp_path / "once", tmp_path / "twice")
    assert (once / "state_00000.safetensors").read_bytes() == (twice / "state_00000.safetensors").read_bytes()


def test_the_newest_undamaged_or_the_given_checkpoint_is_converted(run, tmp_path):
    root = run / "checkpoints"
    for step in (8, 9):
        shutil.copytree(save(root, step, cut_as_one_vector(SHAPES, 2), random_values(SHAPES)), tmp_path / f"step {step}")
    (root / "step_00000009" / "rank_00001.safetensors").write_bytes(b"zero")
    before, said = files_of(run), []
    done = convert(run, tmp_path / "newest", 2**32, said.append)
    assert (done.checkpoint.name, done.source.name, done.files_before, done.files) == ("step_00000008", "step_00000008", 2, 1)
    assert "rank_00001.safetensors has 4 bytes" in said[0] and "Trying the one before" in said[0]
    assert converted(root / "step_00000007", tmp_path / "given").name == "step_00000007"
    assert files_of(run) == before, "the damaged one keeps its name"


def test_an_empty_output_folder_is_accepted(run, tmp_path):
    (tmp_path / "whole").mkdir()
    assert checkpoint.find_damage(converted(run, tmp_path / "whole")) is None


def replace_run_by_an_export(disk: Path) -> None:
    shutil.rmtree(disk / "run")
    (disk / "run").mkdir()
    (disk / "run" / "config.json").write_text("{}")


def put_a_file_into_the_output(disk: Path) -> None:
    (disk / "whole").mkdir()
    (disk / "whole" / "thesis.tex").write_text("years")


MISTAKES: dict[str, tuple[Callable[[Path], object], str, dict, str]] = {
    "no folder": (
        lambda disk: shutil.rmtree(disk / "run"),
        "whole",
        {},
        r"^run is not a folder\. Give a run folder or a checkpoint in one\.$",
    ),
    "an export": (replace_run_by_an_export, "whole", {}, "^run is an exported model: training cannot resume from weights alone"),
    "no checkpoints": (lambda disk: shutil.rmtree(disk / "run" / "checkpoints"), "whole", {}, "^run contains no checkpoint"),
    "none yet": (
        lambda disk: shutil.rmtree(disk / "run" / "checkpoints" / "step_00000007"),
        "whole",
        {},
        "has not written a checkpoint yet",
    ),
    "no run.json": (lambda disk: (disk / "run" / "run.json").unlink(), "whole", {}, r"^run lacks run\.json or the tokenizer, which"),
    "no tokenizer": (lambda disk: (disk / "run" / "tokenizer.json").unlink(), "whole", {}, "^run lacks run.json or the tokenizer"),
    "a file there": (lambda disk: (disk / "whole").touch(), "whole", {}, "^--output whole already exists; nothing is overwritten"),
    "files there": (put_a_file_into_the_output, "whole", {}, "^--output whole already exists; nothing is overwritten"),
    "a file above": (lambda disk: (disk / "above").touch(), "above/whole", {}, "^--output above/whole: above is a file, not a folder"),
    "inside the run": (lambda disk: None, "run/checkpoints/whole", {}, "is inside run, which must not change"),
}


@pytest.mark.parametrize(("change", "output", "more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_arguments_are_refused_before_any_file_is_read(change, output, more, message, run, tmp_path, monkeypatch):
    change(tmp_path)
    monkeypatch.setattr(checkpoint, "find_damage", lambda *_: pytest.fail("files were read"))
    assert re.search(message, refusal(run, tmp_path / output, **more))


def test_file_gib_must_be_positive(run, tmp_path):
    with pytest.raises(UserError, match=r"^file_gib is 0; it must be above 0\. Set on the command line\.$"):
        main([str(run), "--output", str(tmp_path / "whole"), "--file_gib", "0"])
    assert not (tmp_path / "whole").exists()


def test_a_mount_point_is_refused_as_output(run, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda folder: True)
    assert refusal(run, tmp_path / "disk") == "--output disk is a mount point. Give a folder inside it."


def test_too_little_disk_space_is_refused_before_any_file_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_damage", lambda *_: pytest.fail("files were read"))
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"The disk of .* has 19\.53 KiB free; --output deep/whole needs \d+\.\d\d KiB\. Give a folder on another disk\."
    assert re.fullmatch(message, refusal(run, tmp_path / "deep" / "whole"))


def test_a_checkpoint_of_an_unsupported_version_is_refused(tmp_path):
    run = make_run(tmp_path / "run", checksums=None)
    assert "was written by Megabatch before 0.2, in DeepSpeed's own files" in refusal(run, tmp_path / "whole")


def test_a_flipped_bit_is_refused_with_the_name_of_its_file(run, tmp_path):
    path = run / "checkpoints" / "step_00000007" / "rank_00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert "rank_00002.safetensors is damaged" in refusal(path.parent, tmp_path / "whole")
    assert "has no undamaged checkpoint" in refusal(run, tmp_path / "whole")


@pytest.mark.parametrize("name", ["0.weight", "10.weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_checksum_is_refused_with_the_name_of_the_tensor(name, kind, tmp_path):
    sums = {name: [checksum(kinds[kind]) for kind in KINDS] for name, kinds in random_values(SHAPES).items()}
    sums[name][KINDS.index(kind)] ^= 1
    run = make_run(tmp_path / "run", checksums=sums)
    assert refusal(run, tmp_path / "whole").endswith(f"{name}.{kind} does not have the checksum it was saved with.")


def test_a_checkpoint_with_missing_values_is_refused(tmp_path):
    ranks = cut_as_one_vector(SHAPES, 4)
    run = make_run(tmp_path / "run", lambda shapes, world_size: ranks[:-1])
    assert "values of 10.weight.weight" in refusal(run, tmp_path / "whole")
    run = make_run(tmp_path / "other", lambda shapes, world_size: cut_as_one_vector(shapes, 2)[:1])
    assert "its files and its manifest's checksums have different parameters, for example 10.weight" in refusal(run, tmp_path / "whole")


@pytest.mark.parametrize("operation", ["write", "finish"])
@pytest.mark.parametrize("number", [0, 3])
def test_a_failed_write_leaves_no_files(operation, number, run, tmp_path, monkeypatch):
    calls, whole = iter(range(number)), getattr(checkpoint.HashingFile, operation)

    def failing(*arguments):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        return whole(*arguments)

    monkeypatch.setattr(checkpoint.HashingFile, operation, failing)
    message = refusal(run, tmp_path / "whole", file_gib=1e-9)
    assert message.endswith("No space left on device. Nothing was converted.")


def convert_script(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *words], env=clean_environment(), cwd=REPOSITORY, capture_output=True, text=True)


def test_the_script_reports_its_work_and_exits_with_2_when_refused(run, tmp_path):
    done = convert_script(run, "--output", tmp_path / "whole")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 files -> 1" in done.stdout and "peak memory" in done.stdout
    again = convert_script(run, "--output", tmp_path / "whole")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"--output {tmp_path / 'whole'} already exists; nothing is overwritten. Give another name.\n"


def test_memory_does_not_grow_with_the_checkpoint(run, tmp_path):
    """It may grow by the largest parameter, 2 MB, and 8 MiB for each file that is read; the checkpoint has 96 MB."""
    large = make_run(tmp_path / "large", world_size=2, shapes={f"{layer}.weight": (1000, 500) for layer in range(16)})
    peaks = [
        int(convert_script(one, "--output", tmp_path / f"{one.name} whole").stdout.split()[-2].replace(",", "")) for one in (run, large)
    ]
    assert peaks[1] - peaks[0] < 2 + 2 * 8.4 + 10, peaks  # 10 MB: how much starts of Python differ


def test_a_run_resumes_from_a_converted_checkpoint_with_equal_results(tiny, tmp_path):
    words = [*tiny, "--deepspeed", "ds_configs/zero1.json"]
    pretrain = Path(__file__).parents[1] / "pretrain_with_faults.py"
    finish(start_ranks(1, pretrain, *words, OMP_NUM_THREADS="1"))
    whole = tmp_path / "whole"
    converted(tmp_path / "run" / "checkpoints" / "step_00000008", whole)
    (output,) = finish(start_ranks(1, pretrain, *words, "--output", str(whole), "--resume", OMP_NUM_THREADS="1"))
    assert "Resuming from step 8 of 12" in output
    assert_same_state(*(folder / "checkpoints" / "step_00000012" for folder in (whole, tmp_path / "run")))


@pytest.mark.slow
@pytest.mark.alone
def test_a_conversion_takes_about_as_long_as_three_copies(tmp_path):
    """Measure three rounds of both on a gigabyte from eight ranks; `pytest -m slow -s` shows the seconds."""
    shapes = {f"{layer}.{name}.weight": shape for layer in range(8) for name, shape in {"up": (1024, 4096), "down": (4096, 1536)}.items()}
    source = make_run(tmp_path / "run", cut_as_one_vector, 8, shapes)
    ratios = []
    for number in range(3):
        begun = time.perf_counter()
        for path in source.glob("checkpoints/*/*.safetensors"):
            copy = tmp_path / f"copy_{path.name}"
            with open(path, "rb") as whole, open(copy, "wb") as file:
                while piece := whole.read(2**20):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        copied = time.perf_counter() - begun
        done = convert(source, tmp_path / f"whole_{number}", 2**32, print)
        ratios.append(done.seconds / copied)
        print(f"{done.bytes / 1e9:.2f} GB: converted in {done.seconds:.2f} s, copied in {copied:.2f} s, ratio {ratios[-1]:.2f}")
        shutil.rmtree(tmp_path / f"whole_{number}")
    assert min(ratios) < 8  # below 3 on a quiet machine; on a busy one (seen: 4) hashing and counting suffer more than copying
