"""The variables of every launcher give the same process; missing and invalid ones are refused."""

import os

import pytest

from data.command_line import RankError
from launch.ranks import processes
from launch.ranks.processes import Process, find_process, first_host

LAUNCHED = {
    "torchrun": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "h", "29500"),
    "deepspeed": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, "h", "29500"),
    "mpirun": (
        {
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            "SLURM_STEP_NUM_TASKS": "2",  # mpirun starts its daemons with srun
            "SLURM_LOCALID": "0",
            "SLURM_PROCID": "1",
        },
        "h",
        "29500",
    ),
    "mpiexec": ({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}, "h", "29500"),
    "srun": (
        {
            "SLURM_PROCID": "5",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            "SLURM_JOB_ID": "12345",
            "SLURM_STEP_ID": "1",
            "SLURM_STEP_NODELIST": "gpu[07-08]",
        },
        "gpu07",
        str(20000 + (12345 + 1009) % 10000),
    ),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*ours, *(name for name in os.environ if name.startswith(("SLURM", "OMPI", "PMI", "MPI")))):
        monkeypatch.setenv(name, "")  # set, so that it is put back afterwards
        monkeypatch.delenv(name)


def launched_by(monkeypatch, launcher: str, **more: str) -> None:
    variables, _, _ = LAUNCHED[launcher]
    for name, value in (variables | more).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_every_launcher_gives_the_same_process(monkeypatch, launcher):
    given = {} if launcher == "srun" else {"MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    launched_by(monkeypatch, launcher, **given)
    assert find_process() == Process(5, 8, 1, 4)
    _, host, port = LAUNCHED[launcher]
    variables_of_torch = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert variables_of_torch == ["5", "8", "1", host, port]


def test_process_without_launcher_is_rank_0_of_1_also_in_a_batch_script(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert find_process() == Process(0, 1, 0, 1)


def test_master_address_and_port_of_the_user_are_kept(monkeypatch):
    launched_by(monkeypatch, "srun", MASTER_ADDR="10.0.0.1", MASTER_PORT="4242")
    find_process()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "4242")


def test_mpirun_on_one_machine_needs_no_master_address(monkeypatch):
    launched_by(monkeypatch, "mpirun", OMPI_COMM_WORLD_LOCAL_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="5")
    assert find_process() == Process(5, 8, 5, 8)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(os.environ["MASTER_PORT"]) < 30000


@pytest.mark.parametrize(
    ("launcher", "more", "message"),
    [
        ("torchrun", {}, "MASTER_ADDR, MASTER_PORT"),
        ("mpirun", {}, "-x MASTER_ADDR=HOST"),
        ("torchrun", {"MASTER_ADDR": "h", "MASTER_PORT": "x"}, 'MASTER_PORT is "x"'),
        (
            "torchrun",
            {"MASTER_ADDR": "h", "MASTER_PORT": "1", "RANK": "8"},
            'RANK is "8"; the launcher must set a whole number, at least 0 and',
        ),
        ("torchrun", {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "0"}, 'WORLD_SIZE is "0"'),
    ],
)
def test_missing_or_invalid_variable_is_refused_by_name(monkeypatch, launcher, more, message):
    launched_by(monkeypatch, launcher, **more)
    with pytest.raises(RankError, match=message):
        find_process()


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[01-04,7],m1", "n01"), ("rack[2-3]n[5,6]x", "rack2n5x"), ("a-b[9]", "a-b9")]
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_number_of_tasks_may_differ_between_nodes(monkeypatch):
    launched_by(monkeypatch, "srun", SLURM_STEP_TASKS_PER_NODE="3(x2),2", SLURM_NODEID="2")
    assert find_process().local_world_size == 2


@pytest.mark.parametrize(
    ("given", "slurm", "threads"),
    [(None, {}, 4), ("3", {}, None), (None, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "7"}, 7)],
    ids=["part of the cores", "set by the user", "bound by srun"],
)
def test_ranks_of_a_machine_share_its_cores_unless_the_user_sets_threads(given, slurm, threads, monkeypatch):
    set_to: list[int] = []
    monkeypatch.setattr(processes.torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    processes.share_cores(Process(1, 4, 1, 2))
    assert set_to == ([] if threads is None else [threads])


def with_gpus(monkeypatch, number: int) -> None:
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: number)


def test_fewer_gpus_than_ranks_are_refused_unless_srun_bound_each_rank(monkeypatch):
    with_gpus(monkeypatch, 4)
    assert processes.device_index(Process(5, 8, 1, 4)) == 1
    with_gpus(monkeypatch, 1)
    with pytest.raises(RankError, match=r"Rank 5 on .* has local rank 1 of 4, but its machine has 1 GPU\(s\): fewer devices than ranks"):
        processes.device_index(Process(5, 8, 1, 4))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert processes.device_index(Process(5, 8, 1, 4)) == 0 and os.environ["LOCAL_RANK"] == "0"


def test_job_whose_gpus_torch_does_not_find_is_refused(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RankError, match=r"GPU 0,1 .*finds none"):
        processes.device_name()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert processes.device_name() == "cpu"
