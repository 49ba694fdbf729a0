"""A preparation that is stopped at any moment and started again loses nothing, and writes the bytes of an undisturbed one."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.files
import data.preparation.merging
import data.preparation.work_units
import data.shards
from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.preparation.standard_library import embedded_documents
from tests.ranks import REPOSITORY, clean_environment


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About two megabytes of JSON Lines with duplicates and an invalid line, and the tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [document.text[:3000] for document in embedded_documents()]
    lines = [json.dumps({"text": text}) for text in texts + texts[:20]]
    random.Random(0).shuffle(lines)
    (folder / "a.jsonl").write_text("\n".join([*lines[:300], "no json", *lines[300:]]))
    prepare(PrepareSettings(output=str(folder / "learnt"), input=(str(folder / "a.jsonl"),), on_error="skip", vocab_size=2000))
    return folder


def settings_for(corpus: Path, output: Path) -> dict:
    return {
        "input": (str(corpus / "a.jsonl"),),
        "tokenizer": str(corpus / "learnt" / "tokenizer.model"),
        "output": str(output),
        "on_error": "quarantine",
        "near_duplicates": "drop",
        "unit_megabytes": 0.1,
        "shard_tokens": 100_000,
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(corpus):
    return files(prepare(PrepareSettings(**settings_for(corpus, corpus / "undisturbed"), workers=1), lambda line: None).folder)


def start(corpus: Path, output: Path, workers: int, *more: str) -> subprocess.Popen:
    words = []
    for name, value in settings_for(corpus, output).items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    command = [sys.executable, REPOSITORY / "data/prepare.py", *words, "--workers", str(workers), *more]
    return subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=output.parent
    )


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def kill_until_done(corpus: Path, output: Path, kills: int, dice: random.Random) -> int:
    """Start, and kill -9 the parent or a worker at a random moment, until it is done. Return the number of kills."""
    killed = 0
    longest = 1.2
    while True:
        process = start(corpus, output, dice.choice([1, 2, 3]))
        moment = time.monotonic() + dice.uniform(0.3, longest)
        while killed < kills and process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        if killed < kills and process.poll() is None:
            workers = children_of(process.pid)
            os.kill(dice.choice([process.pid, *workers]), signal.SIGKILL)
            killed += 1
        said = process.communicate(timeout=120)[0]
        if process.returncode == 0:
            return killed
        assert process.returncode in (-signal.SIGKILL, 1), said
        assert process.returncode != 1 or "A worker process died" in said, said
        longest = min(3.0, longest * 1.1)  # so that later moments are reached too


def test_output_is_the_same_after_kills_and_restarts(corpus, undisturbed, tmp_path):
    assert kill_until_done(corpus, tmp_path / "prepared", 4, random.Random(1)) > 0
    assert files(tmp_path / "prepared") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


@pytest.mark.slow
def test_output_is_the_same_after_forty_kills(corpus, undisturbed, tmp_path):
    dice, killed, rounds = random.Random(2), 0, 0
    while killed < 40:
        killed += kill_until_done(corpus, tmp_path / str(rounds), 10, dice)
        assert files(tmp_path / str(rounds)) == undisturbed
        rounds += 1
    print(f"{killed} times killed in {rounds} preparations")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 3])
def test_output_is_the_same_if_one_of_several_nodes_is_killed(corpus, undisturbed, tmp_path, nodes):
    ranks = [start(corpus, tmp_path / "prepared", 1, "--rank", str(rank), "--world_size", str(nodes)) for rank in range(nodes)]
    time.sleep(1.5)
    ranks[1].kill()
    assert [rank.wait(timeout=120) for rank in ranks][2:] == [0] * (nodes - 2)
    for rank in ranks:
        rank.stdout.close()
    again = start(corpus, tmp_path / "prepared", 1, "--rank", "1", "--world_size", str(nodes))
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert files(tmp_path / "prepared") == undisturbed


def test_workers_exit_when_their_parent_is_killed(corpus, tmp_path):
    process = start(corpus, tmp_path / "prepared", 2)
    deadline = time.monotonic() + 30
    while not (workers := children_of(process.pid)) or not list((tmp_path / "prepared.partial/units").glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.02)


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_with_a_message_and_the_same_command_resumes(corpus, undisturbed, tmp_path, sent, status):
    process = start(corpus, tmp_path / "prepared", 2)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "prepared.partial/units").glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children_of(process.pid)
    process.send_signal(sent)
    said = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == status, said
    assert said[-1].startswith("Stopped") and said[-1].endswith("prepared.partial; give the same command again to resume.")
    assert "Traceback" not in "".join(said) and not any(Path(f"/proc/{worker}/exe").exists() for worker in workers)
    assert start(corpus, tmp_path / "prepared", 2).communicate(timeout=60) and files(tmp_path / "prepared") == undisturbed


def test_full_disk_at_any_write_loses_nothing(corpus, undisturbed, tmp_path, monkeypatch):
    publish = data.files.publish_file
    left = 0

    def full(file, path, sync_folder=True):
        nonlocal left
        left -= 1
        if left < 0:
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        publish(file, path, sync_folder)

    for module in (data.files, data.shards, data.preparation.work_units, data.preparation.merging):
        monkeypatch.setattr(module, "publish_file", full)
    settings = PrepareSettings(**settings_for(corpus, tmp_path / "prepared"), workers=1)
    done = attempts = 0
    while not (tmp_path / "prepared").exists():
        left, attempts = 14, attempts + 1
        assert attempts < 100, "every attempt must make progress"
        try:
            prepare(settings, lambda line: None)
        except UserError as error:
            kept = len(list((tmp_path / "prepared.partial/units").glob("*.json")))
            assert "prepared cannot be written: No space left on device. Finished work is kept in" in str(error)
            assert kept >= done
            done = kept
    assert attempts > 5
    assert files(tmp_path / "prepared") == undisturbed
