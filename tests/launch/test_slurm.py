"""The batch scripts on a real SLURM: disturbed jobs requeue, go on and end with the numbers of a job that nobody disturbed."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.training import checkpoint
from tests.launch.slurm_cluster import SLURM_SCRIPTS, Cluster, await_, cluster, job_log
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slow

PRETRAIN = str(SLURM_SCRIPTS / "pretrain.sbatch")
LAYOUTS = {"zero3": ("n1", "n2"), "pipeline_zero1": ("n3", "n4")}
"""DeepSpeed's JSON, and the nodes on which its jobs run: beside one another, because a job that is requeued mostly waits."""
NUM_STEPS = 120


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm"), num_nodes=4) as started:
        yield started


def recipe(prepared: Path, steps: int = NUM_STEPS) -> list[str]:
    """The demo recipe, narrowed and shortened."""
    model = {"vocab_size": 800, "sequence_length": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    words = ["--precision", "float32", "--data", str(prepared), "--train_steps", str(steps), "--schedule.warmup_steps", "2"]
    for name, value in model.items():
        words += [f"--model.{name}", str(value)]
    words += ["--log.validation_interval", "0", "--log.validation_samples", "4", "--log.sample_interval", "0"]
    return [*words, "--checkpoint.interval", "20"]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; a step that stands there twice would be a fault."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "loss/train" in entry]
    assert steps == sorted(set(steps))
    return {entry["step"]: entry["loss/train"] for entry in entries if "loss/train" in entry}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of the real script, submitted in a folder of its own."""

    slurm: Cluster
    id: str
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "x"

    @property
    def about(self) -> dict[str, str]:
        return self.slurm.about(self.id)

    def await_end(self) -> str:
        return self.slurm.await_end(self.id)

    def await_checkpoint(self) -> None:
        await_(lambda: bool(checkpoint.published(self.run / "checkpoints")), 60, "the first checkpoint", self.everything_said)

    def everything_said(self) -> str:
        logs = sorted((self.folder / "logs").rglob("*.log"))
        return job_log(self.about) + "".join(f"\n--- {path.relative_to(self.folder)}\n{path.read_text()}" for path in logs)


def train(slurm: Cluster, folder: Path, layout: str, *words: str, options: tuple[str, ...] = (), **environment: str) -> Job:
    """Submit a job that trains on the two nodes of a layout."""
    engine = ["--deepspeed", str(REPOSITORY / "ds_configs" / f"{layout}.json")]
    options = (f"--nodelist={','.join(LAYOUTS[layout])}", "--exclusive", "--time=5", *options)
    folder.mkdir(exist_ok=True)
    return Job(slurm, slurm.submit(*options, PRETRAIN, *engine, "--output", "runs/x", *words, cwd=folder, **environment), folder)


def beside_one_another(do: Callable[[str], None]) -> None:
    """The same with each layout."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(do, LAYOUTS))


@pytest.fixture(scope="module")
def undisturbed(slurm, prepared, tmp_path_factory):
    """The losses of each layout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}

    def run(layout: str) -> None:
        job = train(slurm, folder / layout, layout, *recipe(prepared))
        assert job.await_end() == "COMPLETED", job.everything_said()
        assert job.about["Restarts"] == "0", job.everything_said()
        found[layout] = losses(job.run)
        assert sorted(found[layout]) == list(range(1, NUM_STEPS + 1))

    beside_one_another(run)
    return found


def signal_to_rank(rank: int, number: signal.Signals) -> Callable[[Job, tuple[str, str]], None]:
    return lambda job, nodes: os.kill(job.slurm.ranks_of(job.id)[rank], number)


def scancel(*options: str) -> Callable[[Job, tuple[str, str]], None]:
    return lambda job, nodes: job.slurm.say("scancel", *options, job.id)


def more_important_job(job: Job, nodes: tuple[str, str]) -> None:
    options = ["--partition=high", "--exclusive", "--nodes=2", f"--nodelist={','.join(nodes)}", "--time=1", "--output=other.out"]
    other = job.slurm.submit(*options, "--wrap=sleep 1", cwd=job.folder)
    assert job.slurm.await_end(other) == "COMPLETED"


def death_of_node(number: int) -> Callable[[Job, tuple[str, str]], None]:
    def disturb(job: Job, nodes: tuple[str, str]) -> None:
        job.slurm.kill_node(nodes[number])
        await_(lambda: "DOWN" in job.slurm.say("sinfo", "-h", "-n", nodes[number], "-o", "%T").upper(), 90, "the death of a node")
        job.slurm.start_node(nodes[number])

    return disturb


DISTURBANCES = {
    "SIGUSR1 to rank 1": ("main", signal_to_rank(1, signal.SIGUSR1)),
    "SIGTERM to rank 0": ("main", signal_to_rank(0, signal.SIGTERM)),
    "SIGKILL to rank 1": ("main", signal_to_rank(1, signal.SIGKILL)),
    "scancel --signal=USR1": ("main", scancel("--signal=USR1")),
    "scancel --batch --signal=USR1": ("main", scancel("--batch", "--signal=USR1")),
    "scancel --batch --signal=TERM": ("main", scancel("--batch", "--signal=TERM")),
    "a job of a higher partition": ("main", more_important_job),
    "a job of a higher partition, no grace": ("hasty", more_important_job),
    "a node dies": ("main", death_of_node(1)),
    "the node of the batch script dies": ("main", death_of_node(0)),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_disturbed_job_of_each_layout_ends_with_the_losses_of_an_undisturbed_one(disturbance, slurm, undisturbed, prepared, tmp_path):
    partition, disturb = DISTURBANCES[disturbance]

    def run(layout: str) -> None:
        job = train(slurm, tmp_path / layout, layout, *recipe(prepared), options=(f"--partition={partition}",))
        job.await_checkpoint()
        disturb(job, LAYOUTS[layout])
        assert job.await_end() == "COMPLETED", job.everything_said()
        assert job.about["Restarts"] == "1", job.everything_said()
        assert losses(job.run) == undisturbed[layout]
        print(job.everything_said())

    beside_one_another(run)
