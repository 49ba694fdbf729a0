"""What ranks exchange reaches all of them: over the store alone, and with a process group of gloo."""

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.command_line import UserError
from launch.ranks.collectives import (
    CollectedError,
    Ranks,
    RanksMissing,
    broadcast_from_rank0,
    describe_lost_ranks,
    gather_on_rank0,
    join_process_group,
    list_ranks,
)
from launch.ranks.processes import Process, find_process
from launch.ranks.rendezvous import connect
from tests.ranks import answer, answers_of_ranks

WORLD_SIZE = 2


def refuse():
    raise UserError("rank 0 refuses")


def on_each_rank() -> dict:
    """Every collective once; the result of each on this rank."""
    process = find_process()
    store, rank = connect(process, 30, ["test"]), process.rank
    found = {
        "gathered": gather_on_rank0(store, process, "reports", {"rank": rank}, 30),
        "text": broadcast_from_rank0(store, process, "text", f"from rank {rank}", 30),
    }
    join_process_group(store, process, "cpu", timedelta(seconds=30))
    ranks = Ranks(process, torch.device("cpu"))
    tensor = torch.tensor([1.0 + rank, 5.0 - rank])
    largest = tensor.clone()
    ranks.sum_in_place([tensor])
    ranks.max_in_place(largest)
    found |= {
        "sum": ranks.sum([0.1, rank]),
        "sum in place": tensor.tolist(),
        "max": largest.tolist(),
        "all": [ranks.all_ranks(True), ranks.all_ranks(rank == 0), ranks.all_ranks(False)],
        "all_gather": ranks.all_gather({"rank": rank}),
        "errors": [ranks.first_error_of_any_rank(error) for error in (None, f"error of {rank}", "late" if rank else None, "x" * 5000)],
        "broadcast": [ranks.broadcast([rank, "a"]), ranks.broadcast(rank, source=1)],
        "run": ranks.run_on_rank0(lambda: f"result of {rank}"),
    }
    try:
        ranks.run_on_rank0(refuse)
    except UserError as error:
        found["refused"] = str(error)
    dist.destroy_process_group()
    return found


def test_every_collective_gives_its_result_on_every_rank():
    answers = answers_of_ranks(WORLD_SIZE, __file__)
    assert [one.pop("gathered") for one in answers] == [[{"rank": 0}, {"rank": 1}], []]
    assert answers[0] == answers[1]
    assert answers[0] == {
        "text": "from rank 0",
        "sum": [0.2, 1],
        "sum in place": [3, 9],
        "max": [2, 5],
        "all": [True, False, False],
        "all_gather": [{"rank": 0}, {"rank": 1}],
        "errors": [None, "error of 0", "late", "x" * 5000],
        "broadcast": [[0, "a"], 1],
        "run": "result of 0",
        "refused": "rank 0 refuses",
    }


def test_one_rank_needs_no_process_group():
    ranks = Ranks(Process(0, 1, 0, 1), torch.device("cpu"))
    assert ranks.sum([1.5, 2]) == [1.5, 2] and ranks.all_gather("a") == ["a"] and ranks.broadcast("b") == "b"
    assert ranks.all_ranks(True) and not ranks.all_ranks(False)
    assert ranks.first_error_of_any_rank(None) is None and ranks.first_error_of_any_rank("wrong") == "wrong"
    assert ranks.run_on_rank0(lambda: 7) == 7
    with pytest.raises(UserError, match="rank 0 refuses"):
        ranks.run_on_rank0(refuse)


def test_silent_ranks_are_listed_after_the_time_limit():
    store, first, second = dist.HashStore(), Process(0, 3, 0, 3), Process(1, 3, 1, 3)
    start = time.monotonic()
    with pytest.raises(RanksMissing, match=r"^Ranks 1, 2 did not respond during start-up \(machines; waited 0.2 s\)"):
        gather_on_rank0(store, first, "machines", {}, 0.2)
    with pytest.raises(RanksMissing, match=r"^Rank 0 did not respond during start-up \(folder; waited 0.2 s\)"):
        broadcast_from_rank0(store, second, "folder", "", 0.2)
    assert time.monotonic() - start < 10
    assert list_ranks([f"name/{rank}" for rank in range(9)]) == "Ranks 0, 1, 2, 3, 4, 5, 6, 7, ..."


def test_rank_0_waits_until_all_ranks_have_read_its_text():
    store, read = dist.HashStore(), []
    reader = threading.Thread(
        target=lambda: (time.sleep(0.5), read.append(broadcast_from_rank0(store, Process(1, 2, 1, 2), "text", "", 10))), daemon=True
    )
    reader.start()
    broadcast_from_rank0(store, Process(0, 2, 0, 2), "text", "last message", 10)
    reader.join(10)
    assert read == ["last message"]


def test_the_first_error_of_several_operations_is_kept():
    collected, done = CollectedError(), []
    collected.run(lambda: done.append(1))
    assert collected.message is None
    collected.run(Path("/does/not/exist").read_bytes)
    collected.run(refuse)
    collected.run(lambda: done.append(2))
    assert collected.message == "FileNotFoundError: [Errno 2] No such file or directory: '/does/not/exist'." and done == [1, 2]
    with pytest.raises(ZeroDivisionError):
        collected.run(lambda: 1 / 0)


def test_only_an_error_of_communication_means_lost_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert describe_lost_ranks(RanksMissing("Rank 1 ended."), 5) == "Rank 1 ended."
    assert describe_lost_ranks(RuntimeError("shapes differ"), 5) is None
    assert describe_lost_ranks(RuntimeError("Gloo cannot allocate"), 5) is None
    error = RuntimeError("[pair.cc:5] Gloo: Timed out waiting 5000ms for recv operation to complete")
    assert str(describe_lost_ranks(error, 5)).endswith("lost the other ranks during start-up: no answer for 5 s (--communication_timeout).")
    error.add_note("in step 7")
    message = str(describe_lost_ranks(error, 5))
    assert message.startswith("Rank 3 on ") and "lost the other ranks in step 7: " in message


if __name__ == "__main__":
    answer(on_each_rank())
