"""Preflight: nodes that differ are named before the run starts, and ranks that cannot connect report it soon."""

import copy
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.ranks.launchers import free_port
from launch.training import preflight
from tests.ranks import REPOSITORY, clean_environment
from tests.words import over

PRETRAIN, PREFLIGHT = REPOSITORY / "launch" / "pretrain.py", REPOSITORY / "launch" / "preflight.py"
REPORT = {
    "host": "a",
    "device": "H100",
    "device_id": "",
    "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "nccl": "2.27"},
    "code": {"launch/pretrain.py": "11", "model/layers.py": "22"},
    "settings": {"data.path": ["prepared"], "seed": 1},
    "data": "0123456789",
    "free_gib": 100.0,
    "written_gb_s": 1.0,
    "building": [],
    "clock": 5.0,
    "all_reduce_gb_s": 9.0,
}


def reports(tmp_path, **other) -> list[dict]:
    """Return the reports of three equal ranks, the last one changed by `other`."""
    ranks = [copy.deepcopy(REPORT) | {"rank": rank, "host": f"n{rank}", "probe": f"p{rank}"} for rank in range(3)]
    ranks[2] |= other
    for rank in range(3):
        (tmp_path / f"p{rank}").touch()
    return ranks


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"versions": REPORT["versions"] | {"nccl": "2.26"}}, "nccl is 2.26, on rank 0 2.27"),
        ({"code": {"launch/pretrain.py": "11", "model/layers.py": "23"}}, "the code: model/layers.py"),
        ({"data": "1123456789"}, "the data: prepared is 11234567, on rank 0 01234567"),
        ({"settings": {"data.path": ["prepared"], "seed": 2}}, "the recipe: seed is 2, on rank 0 1"),
        ({"probe": "elsewhere"}, "the output must be on a disk that all nodes share"),
    ],
)
def test_rank_that_differs_is_named(tmp_path, other, words):
    assert preflight.check_consistent(reports(tmp_path), tmp_path) == ""
    message = preflight.check_consistent(reports(tmp_path, **other), tmp_path)
    assert message.startswith("Rank 2 on n2 ") and words in message and "\n" not in message


def test_folder_that_another_job_makes_meanwhile_is_no_other_disk(tmp_path):
    """Tasks of an array make their common folder between the starts of two ranks, which then probe different folders."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "p").touch()
    meanwhile = reports(tmp_path, probe=str(tmp_path / "runs" / "p"))
    assert preflight.check_consistent(meanwhile, tmp_path) == ""


def test_ranks_that_differ_in_the_same_way_are_named_together(tmp_path):
    alike = [report | {"data": "1"} if report["rank"] else report for report in reports(tmp_path)]
    message = "Ranks 1, 2 on n1, n2 differ from rank 0 on n0: the data: prepared is 1, on rank 0 01234567."
    assert preflight.check_consistent(alike, tmp_path) == message


def test_complaint_of_one_rank_names_it_and_of_all_ranks_names_none(tmp_path):
    one = reports(tmp_path, complaint="There is no data.")
    assert preflight.check_consistent(one, tmp_path) == "Rank 2 on n2: There is no data."
    assert preflight.check_consistent([report | {"complaint": "There is no data."} for report in one], tmp_path) == "There is no data."


def test_two_ranks_on_one_gpu_are_refused(tmp_path):
    shared = [report | {"host": "n0", "device_id": "GPU-1"} for report in reports(tmp_path)]
    assert "3 ranks on n0 share one GPU (GPU-1)" in preflight.check_consistent(shared, tmp_path)


def test_notes_warn_of_clock_speed_device_and_build(tmp_path):
    assert preflight.notes(reports(tmp_path)) == []
    assert "clock of Rank 2 on n2 is +60.0 s from the median" in preflight.notes(reports(tmp_path, clock=65.0))[0]
    assert (
        "Rank 2 on n2 writes to the output folder at 0.10 GB/s; the median is 1.00."
        in preflight.notes(reports(tmp_path, written_gb_s=0.1))[0]
    )
    assert "Rank 2 on n2 has A100, rank 0 has H100" in preflight.notes(reports(tmp_path, device="A100"))[0]
    assert "/x/lock exists" in preflight.notes(reports(tmp_path, building=["/x/lock"]))[0]


def test_table_has_a_line_per_rank_and_omits_empty_columns(tmp_path):
    ranks = reports(tmp_path)
    del ranks[1]["all_reduce_gb_s"]
    first, *lines = preflight.table(ranks).splitlines()
    assert first.split()[:3] == ["rank", "host", "device"] and "next stage" not in first and "all-reduce GB/s" in first
    assert [line.split()[:2] for line in lines] == [["0", "n0"], ["1", "n1"], ["2", "n2"]]
    assert len({len(line) for line in lines}) == 1


def test_job_too_short_for_a_checkpoint_is_refused(tiny):
    environment = clean_environment(SLURM_JOB_ID="1", SLURM_JOB_END_TIME=str(int(time.time())))
    done = subprocess.run([sys.executable, str(PRETRAIN), *tiny], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"The job's time limit leaves 0 s, and a checkpoint takes about .*\n", done.stderr), done.stderr


def two_nodes(tiny: list[str], script=PRETRAIN, *, seconds: int = 5, each: list[dict] | None = None, **environment: str):
    """Run two ranks that seem to be on different machines; `each` has the differences of their environments."""
    each = each or [{}, {}]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, str(script), *tiny, "--rendezvous_seconds", str(seconds)]
    started = []
    for rank, own in enumerate(each):
        own = dict(own)
        more, folder = own.pop("words", []), own.pop("cwd", None)
        environ = clean_environment(
            **(shared | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}", "OMP_NUM_THREADS": "1"} | environment | own)
        )
        process = subprocess.Popen([*words, *more], env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [process.returncode for process in started], outputs


def test_preflight_script_shows_both_nodes_and_leaves_no_files(tiny, tmp_path):
    statuses, (first, second) = two_nodes([*tiny, "--deepspeed", "ds_configs/pipeline_zero1.json"], PREFLIGHT)
    assert statuses == [0, 0], first + second
    assert "All 2 rank(s) agree." in first
    titles, first_rank, second_rank = first.splitlines()[:3]
    assert titles.endswith("all-reduce GB/s  next stage GB/s")
    assert re.search(r" n0 .* \d+\.\d\d +\d+\.\d\d$", first_rank)
    assert re.search(r" n1 .* \d+\.\d\d +$", second_rank)  # the last stage has no next stage
    assert list(tmp_path.iterdir()) == []


def test_nodes_with_different_data_do_not_begin(tiny, prepared, tmp_path):
    """Two folders have different data at the same relative path."""
    for rank in range(2):
        shutil.copytree(prepared, tmp_path / str(rank) / "prepared")
    shard = tmp_path / "1" / "prepared" / "train" / "00000.bin"
    tokens = bytearray(shard.read_bytes())
    tokens[0] ^= 1
    shard.write_bytes(tokens)
    each = [{"cwd": tmp_path / str(rank)} for rank in range(2)]
    statuses, (first, second) = two_nodes(over(tiny, ["--data", "prepared"]), each=each)
    assert statuses == [2, 2], first + second
    assert "Rank 1 on n1: " in first and "00000.bin" in first
    assert not (tmp_path / "run").exists()


def test_setting_that_one_node_refuses_is_reported_there(tiny, tmp_path):
    """The recipe exists on one of two nodes, which is found before the ranks connect."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0" / "mine.yaml").write_text("seed: 2\n")
    each = [{"cwd": tmp_path / str(rank)} for rank in range(2)]
    statuses, (first, second) = two_nodes([*tiny, "--config", "mine.yaml"], each=each)
    assert statuses == [1, 2], first + second
    assert second == "--config mine.yaml: No such file or directory.\n"


def test_files_of_an_aborted_start_do_not_stop_the_next_one(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".preflight-n1-1-1"):
        (tmp_path / "run" / name).touch()
    statuses, (first, second) = two_nodes(tiny)
    assert statuses == [0, 0], first + second
    assert not list((tmp_path / "run").glob(".preflight-*"))


def test_failing_disk_of_a_node_ends_with_status_1(tiny, tmp_path):
    """Status 1, not 2, so that a batch job is started again."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "whole = pathlib.Path.read_text\n"
        "def stale(path, *more, **named):\n"
        "    if path.name == 'manifest.json':\n"
        "        raise OSError(116, 'Stale file handle', str(path))\n"
        "    return whole(path, *more, **named)\n"
        "pathlib.Path.read_text = stale\n"
    )
    statuses, (first, second) = two_nodes(tiny, each=[{}, {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}])
    assert statuses == [1, 1], first + second
    assert "Rank 1 on n1: OSError: [Errno 116] Stale file handle" in first


def test_nodes_with_different_code_do_not_begin(tiny, tmp_path):
    for folder in ("model", "data", "launch", "ds_configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "copy" / folder)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path / "copy")
    with open(tmp_path / "copy" / "launch" / "training" / "schedule.py", "a") as file:
        file.write("# another line\n")
    statuses, (first, second) = two_nodes(tiny, each=[{}, {"PYTHONPATH": str(tmp_path / "copy")}])
    assert statuses == [2, 2], first + second
    assert "Rank 1 on n1 differs from rank 0 on n0: the code: launch/training/schedule.py." in first
    assert re.search(r"^ +1 +n1 ", first, re.M)  # the table
    assert "Rank 1 on n1 differs" in second and not (tmp_path / "run").exists()


def test_ranks_that_cannot_connect_report_it_soon(tiny):
    """The ranks get five seconds; the rest of the time is start-up of Python."""
    with socket.socket() as taken, ThreadPoolExecutor() as together:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        begun = time.monotonic()
        unresolvable = together.submit(two_nodes, tiny, MASTER_ADDR="no-such-host.invalid")
        in_use = together.submit(two_nodes, tiny, MASTER_PORT=port)
        elsewhere = together.submit(two_nodes, tiny, MASTER_ADDR="192.0.2.1")  # TEST-NET-1 (RFC 5737): an address of no machine
        other_run = together.submit(two_nodes, tiny, each=[{}, {"words": ["--seed", "2"]}])

    statuses, outputs = unresolvable.result()
    assert statuses == [2, 2]
    assert all('MASTER_ADDR "no-such-host.invalid" (port ' in output for output in outputs)

    statuses, outputs = in_use.result()
    assert statuses == [2, 1]
    assert f"Port {port} of n0 is in use" in outputs[0] and f"n1 reached 127.0.0.1:{port} but could not join" in outputs[1]

    statuses, outputs = elsewhere.result()
    assert statuses == [2, 1]
    assert "MASTER_ADDR leads to 192.0.2.1, which is not an address of n0" in outputs[0]
    assert "n1 cannot reach rank 0 at 192.0.2.1:" in outputs[1]

    statuses, outputs = other_run.result()
    assert statuses == [1, 2]
    assert (
        "Rank 1 on n1 found another run at 127.0.0.1:" in outputs[1] and "its command has `nothing` and this one `--seed 2`" in outputs[1]
    )
    assert "Rank 1 of 2 ranks did not connect to rank 0" in outputs[0]
    assert time.monotonic() - begun < 90


def test_lock_of_a_killed_build_is_named_and_not_waited_for(tiny, tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    statuses, outputs = two_nodes(tiny, each=[{}, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}])
    assert statuses == [2, 2] and f"Rank 1 on n1: {lock} is 60 minutes old" in outputs[0]
