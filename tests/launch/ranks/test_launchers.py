"""Every launcher gives the same numbers: two ranks exactly those of any other launcher, one process the same up to rounding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks.launchers import free_port
from tests.launch.slurm_cluster import cluster
from tests.launch.training.test_resume import curves
from tests.ranks import REPOSITORY, clean_environment, finish, start_ranks

DOOR = "launch/pretrain.py"


@pytest.fixture
def options(tiny):
    return [*tiny, "--deepspeed", "ds_configs/zero3.json", "--precision", "float32"]


@pytest.fixture
def of_two_ranks(options, tmp_path_factory):
    """Curves of two ranks that the tests started without a launcher; run once."""
    folder = tmp_path_factory.getbasetemp() / "two_ranks"
    if not folder.exists():
        finish(start_ranks(2, REPOSITORY / DOOR, *options, "--output", str(folder), OMP_NUM_THREADS="1"))
    return curves(folder)


def launch(*commands: list[str], **more: str) -> list[str]:
    """Run launcher commands at the same time, one for each node; return the output of each."""
    environment = clean_environment(OMP_NUM_THREADS="1", **more)
    del environment["GLOO_SOCKET_IFNAME"]  # launch/ranks/rendezvous.py sets it
    return finish(
        [
            subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands
        ]
    )


def run_folder(options: list[str]) -> Path:
    return Path(options[options.index("--output") + 1])


def on_two_nodes(commands) -> list[list[str]]:
    """Each node's command on a core of its own: two nodes that both believe in all cores would crowd each other out."""
    cores = sorted(os.sched_getaffinity(0))
    return [["taskset", "--cpu-list", str(core), *command] for core, command in zip((cores[0], cores[-1]), commands, strict=True)]


def need(program: str) -> None:
    if shutil.which(program) is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"{program} is not installed")


def test_deepspeed_launcher_on_one_machine(options, of_two_ranks):
    launch(["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), DOOR, *options])
    assert curves(run_folder(options)) == of_two_ranks


def test_torchrun_on_one_machine(options, of_two_ranks):
    launch(["torchrun", "--standalone", "--nproc_per_node", "2", DOOR, *options])
    assert curves(run_folder(options)) == of_two_ranks


def test_mpirun_on_one_machine(options, of_two_ranks):
    need("mpirun")
    launch(["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, DOOR, *options])
    assert curves(run_folder(options)) == of_two_ranks


def test_one_process_gives_the_numbers_of_two_ranks_to_rounding(options, of_two_ranks):
    launch([sys.executable, DOOR, *options])
    alone = curves(run_folder(options))
    assert alone.keys() == of_two_ranks.keys()
    for name, curve in of_two_ranks.items():
        assert alone[name] == pytest.approx(curve, rel=1e-5), name  # gradients are summed in another order


@pytest.mark.slow
def test_deepspeed_launcher_without_ssh_on_two_nodes(options, of_two_ranks, tmp_path):
    (tmp_path / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
    start = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--no_ssh"]
    address_options = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    launch(*on_two_nodes([*start, "--node_rank", node, *address_options, DOOR, *options] for node in "01"))
    assert curves(run_folder(options)) == of_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_on_two_nodes(rendezvous, options, of_two_ranks):
    port = str(free_port())
    if rendezvous == "static":
        address_options = [["--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port] for node in "01"]
    else:
        address_options = [["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "a-run"]] * 2
    launch(*on_two_nodes(["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *where, DOOR, *options] for where in address_options))
    assert curves(run_folder(options)) == of_two_ranks


@pytest.mark.slow
def test_srun_and_deepspeeds_slurm_launcher_on_two_nodes(options, of_two_ranks, tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    srun = ["srun", "--nodes", "2", "--ntasks", "2", sys.executable, DOOR]
    # --master_addr spares it an ssh to n1; it does not tell the ranks.
    deepspeed = ["deepspeed", "--launcher", "slurm", "--hostfile", str(tmp_path / "hosts"), "--no_ssh_check"]
    deepspeed += ["--master_addr", "127.0.0.1", "--num_nodes", "2", DOOR]
    (tmp_path / "slurm").mkdir()
    with cluster(tmp_path / "slurm", num_nodes=2) as slurm:
        found = {name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")}
        for command in (srun, deepspeed):
            run = tmp_path / command[0]
            # The ranks take the first node's name and a port by the job's number; these nodes' names are known to SLURM alone, and another
            # SLURM on this machine has the same numbers.
            launch([*command, *options, "--output", str(run)], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **found)
            assert curves(run) == of_two_ranks, command[0]
