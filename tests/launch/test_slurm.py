"""The batch scripts on a real SLURM: disturbed jobs requeue, resume and end with the numbers of an undisturbed job."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from launch.checkpoints import checkpoint
from tests.launch.searching.searches import runs, words
from tests.launch.slurm_cluster import SLURM_SCRIPTS, Cluster, await_, cluster, job_log
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.slow

PRETRAIN = str(SLURM_SCRIPTS / "pretrain.sbatch")
LAYOUTS = {"zero3": ("n1", "n2"), "pipeline_zero1": ("n3", "n4")}
"""DeepSpeed's JSON, and the nodes of its jobs. Both layouts run at the same time, because a requeued job mostly waits."""
NUM_STEPS = 100


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm"), num_nodes=4) as started:
        yield started


def recipe(prepared: Path, steps: int = NUM_STEPS) -> list[str]:
    """Return arguments for the demo recipe with a smaller model, fewer and shorter steps."""
    model = {"vocab_size": 800, "sequence_length": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    arguments = ["--precision", "float32", "--data", str(prepared), "--train_steps", str(steps), "--schedule.warmup_steps", "2"]
    arguments += ["--optimizer.name", "adamw", "--batch.global_batch_size", "8"]
    for name, value in model.items():
        arguments += [f"--model.{name}", str(value)]
    arguments += ["--log.validation_interval", "0", "--log.validation_samples", "4", "--log.sample_interval", "0"]
    return [*arguments, "--checkpoint.interval", "10"]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss by step, after checking that no step is there twice."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "loss/train" in entry]
    assert steps == sorted(set(steps))
    return {entry["step"]: entry["loss/train"] for entry in entries if "loss/train" in entry}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of pretrain.sbatch, submitted in a folder of its own."""

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
        await_(lambda: bool(checkpoint.published(self.run / "checkpoints")), 120, "the first checkpoint", self.all_logs)

    def all_logs(self) -> str:
        logs = sorted((self.folder / "logs").rglob("*.log"))
        return job_log(self.about) + "".join(f"\n--- {path.relative_to(self.folder)}\n{path.read_text()}" for path in logs)


def engine(layout: str) -> list[str]:
    return ["--deepspeed", str(REPOSITORY / "ds_configs" / f"{layout}.json")]


def train(slurm: Cluster, folder: Path, layout: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> Job:
    """Submit a job that trains on the two nodes of a layout."""
    options = (f"--nodelist={','.join(LAYOUTS[layout])}", "--exclusive", "--time=5", *options)
    folder.mkdir(exist_ok=True)
    return Job(
        slurm, slurm.submit(*options, PRETRAIN, *engine(layout), "--output", "runs/x", *arguments, cwd=folder, **environment), folder
    )


def with_each_layout(do: Callable[[str], None]) -> None:
    """Call a function with each layout, all at the same time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(do, LAYOUTS))


@pytest.fixture(scope="module")
def undisturbed(slurm, prepared, tmp_path_factory):
    """Losses of an undisturbed job of each layout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}

    def run(layout: str) -> None:
        job = train(slurm, folder / layout, layout, *recipe(prepared))
        assert job.await_end() == "COMPLETED", job.all_logs()
        assert job.about["Restarts"] == "0", job.all_logs()
        found[layout] = losses(job.run)
        assert sorted(found[layout]) == list(range(1, NUM_STEPS + 1))

    with_each_layout(run)
    return found


def signal_to_rank(rank: int, number: signal.Signals) -> Callable[[Job, tuple[str, str]], None]:
    return lambda job, nodes: os.kill(job.slurm.ranks_of(job.id)[rank], number)


def scancel(*options: str) -> Callable[[Job, tuple[str, str]], None]:
    return lambda job, nodes: job.slurm.command("scancel", *options, job.id)


def more_important_job(job: Job, nodes: tuple[str, str]) -> None:
    options = ["--partition=high", "--exclusive", "--nodes=2", f"--nodelist={','.join(nodes)}", "--time=1", "--output=other.out"]
    other = job.slurm.submit(*options, "--wrap=sleep 1", cwd=job.folder)
    assert job.slurm.await_end(other) == "COMPLETED"


def death_of_node(number: int) -> Callable[[Job, tuple[str, str]], None]:
    def disturb(job: Job, nodes: tuple[str, str]) -> None:
        job.slurm.kill_node(nodes[number])
        await_(lambda: "DOWN" in job.slurm.command("sinfo", "-h", "-n", nodes[number], "-o", "%T").upper(), 90, "the death of a node")
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
def test_disturbed_job_ends_with_the_losses_of_an_undisturbed_one(disturbance, slurm, undisturbed, prepared, tmp_path):
    partition, disturb = DISTURBANCES[disturbance]

    def run(layout: str) -> None:
        job = train(slurm, tmp_path / layout, layout, *recipe(prepared), options=(f"--partition={partition}",))
        job.await_checkpoint()
        disturb(job, LAYOUTS[layout])
        assert job.await_end() == "COMPLETED", job.all_logs()
        assert job.about["Restarts"] == "1", job.all_logs()
        assert losses(job.run) == undisturbed[layout]
        print(job.all_logs())

    with_each_layout(run)


def test_cancelled_job_saves_a_checkpoint_and_stays_cancelled(slurm, prepared, tmp_path):
    job = train(slurm, tmp_path, "zero3", *recipe(prepared, steps=2000))
    job.await_checkpoint()
    slurm.command("scancel", job.id)
    assert job.await_end() == "CANCELLED", job.all_logs()
    await_(lambda: "cancelled: not requeued" in job.all_logs(), 10, "the last message", job.all_logs)
    newest = checkpoint.published(job.run / "checkpoints")[0]
    assert checkpoint.find_damage(newest, 0, 1) is None
    assert checkpoint.step_of(newest) == max(losses(job.run))  # of the step at which it was cancelled, not of the interval
    assert (job.about["JobState"], job.about["Restarts"]) == ("CANCELLED", "0")


def test_job_that_slurm_refuses_to_requeue_saves_and_reports_it(slurm, prepared, tmp_path):
    """A user stops a job for good in this way if its checkpoint takes longer than SLURM's KillWait."""
    job = train(slurm, tmp_path, "zero3", *recipe(prepared, steps=2000))
    job.await_checkpoint()
    slurm.command("scontrol", "update", f"jobid={job.id}", "requeue=0")
    slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    assert job.await_end() == "FAILED", job.all_logs()
    assert (job.about["ExitCode"], job.about["Restarts"]) == ("85:0", "0")
    assert "SLURM refuses to requeue the job" in job_log(job.about)
    assert checkpoint.step_of(checkpoint.published(job.run / "checkpoints")[0]) == max(losses(job.run))


def test_job_without_progress_ends_after_three_starts(slurm, prepared, tmp_path):
    job = train(slurm, tmp_path, "zero3", *recipe(prepared), PYTHONHOME="/nowhere")  # Python itself cannot start
    assert job.await_end() == "FAILED", job.all_logs()
    assert (job.about["ExitCode"], job.about["Restarts"]) == ("93:0", "2")
    assert "none of the last three starts saved a checkpoint" in job_log(job.about)


def test_job_near_its_time_limit_saves_and_resumes(slurm, prepared, tmp_path):
    """SLURM counts limits in minutes and warns up to a minute early, so the limit is longer before the second start.

    The steps take about a minute, so that the warning finds the job training.
    """
    job = train(slurm, tmp_path, "zero3", *recipe(prepared, steps=1000), options=("--time=1", "--signal=B:USR1@30"))
    await_(lambda: "SIGUSR1 received" in job_log(job.about), 100, "the warning", job.all_logs)
    slurm.command("scontrol", "update", f"jobid={job.id}", "timelimit=10")
    assert job.await_end() == "COMPLETED", job.all_logs()
    assert job.about["Restarts"] == "1", job.all_logs()
    assert sorted(losses(job.run)) == list(range(1, 1001))


def test_one_task_per_node_starts_the_ranks_and_needs_no_home(slurm, undisturbed, prepared, tmp_path):
    """Two ranks on one node give the losses of two nodes with a rank each; four ranks on two nodes stop together."""

    def on_one_node() -> None:
        arguments = [*recipe(prepared), "--ranks_per_node", "2"]
        job = train(slurm, tmp_path / "one", "zero3", *arguments, options=("--nodes=1", "--nodelist=n1"), HOME="/nowhere")
        job.await_checkpoint()
        slurm.command("scancel", "--batch", "--signal=USR1", job.id)
        assert job.await_end() == "COMPLETED", job.all_logs()
        assert job.about["Restarts"] == "1", job.all_logs()
        assert losses(job.run) == undisturbed["zero3"]
        assert sorted(path.name for path in (tmp_path / "one" / "logs").glob("*/start_1/rank_*")) == ["rank_0.log", "rank_1.log"]

    def on_two_nodes() -> None:
        arguments = [*recipe(prepared, steps=20), "--ranks_per_node", "2"]
        job = train(slurm, tmp_path / "two", "pipeline_zero1", *arguments, HOME="/nowhere")
        assert job.await_end() == "COMPLETED", job.all_logs()
        assert len(losses(job.run)) == 20
        assert len(list((tmp_path / "two" / "logs").glob("*/start_0/rank_*"))) == 4

    with ThreadPoolExecutor() as pool:
        for started in [pool.submit(on_one_node), pool.submit(on_two_nodes)]:
            started.result()
    assert not Path("/nowhere").exists()


def test_array_trains_a_recipe_per_task_and_refuses_others(slurm, prepared, tmp_path):
    for name, seed in {"first": 1, "second": 2}.items():
        (tmp_path / f"{name}.yaml").write_text(f"seed: {seed}\nbatch:\n  global_batch_size: 8\n")
    arguments = ["--recipes", "first.yaml", "second.yaml", "--output", "runs", *engine("zero3"), *recipe(prepared, steps=10)]
    array = slurm.submit("--array=0-2", "--exclusive", "--time=5", PRETRAIN, *arguments, cwd=tmp_path)
    jobs = [Job(slurm, f"{array}_{task}", tmp_path) for task in range(3)]
    assert [job.await_end() for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED"], jobs[0].all_logs()
    assert jobs[2].about["ExitCode"] == "93:0"
    assert "Array index 2 has no recipe: --recipes has 2, counted from 0." in job_log(jobs[2].about)
    first, second = (losses(tmp_path / "runs" / name) for name in ("first", "second"))
    assert len(first) == len(second) == 10
    assert first[1] != second[1]


def test_mistake_ends_the_job_with_a_message_and_no_requeue(slurm, prepared, tmp_path):
    mistakes = {"zero3": (["--train_stepz", "3"], "train_steps"), "pipeline_zero1": (["--tensor_parallel_size", "3"], "3")}

    def run(layout: str) -> None:
        arguments, hint = mistakes[layout]
        job = train(slurm, tmp_path / layout, layout, *recipe(prepared), *arguments)
        assert job.await_end() == "FAILED", job.all_logs()
        assert (job.about["ExitCode"], job.about["Restarts"]) == ("93:0", "0")
        output = job_log(job.about)
        assert hint in output
        assert "Not requeued" in output

    with_each_layout(run)


def test_job_whose_gpus_torch_does_not_see_does_not_train(slurm, prepared, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    job = train(slurm, tmp_path, "zero3", *recipe(prepared), options=("--gres=gpu:1",))
    assert job.await_end() == "FAILED", job.all_logs()
    assert (job.about["ExitCode"], job.about["Restarts"]) == ("93:0", "0")
    assert "SLURM gave this task on n1 GPU 0 (CUDA_VISIBLE_DEVICES)" in job.all_logs()
    assert not job.run.exists()


def test_chain_prepares_trains_and_evaluates_despite_a_requeue(slurm, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(120):  # enough to learn 800 pieces from
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} is a number, and {number + 1} is the next one.\n" * 40)
    prepare = ["prepare", "--input", "text", "--vocab_size", "800", "--held_out", "0.2", "--output", "prepared"]
    pretrain = ["pretrain", *engine("zero3"), *recipe(Path("prepared")), "--output", "runs/x"]
    chain = [str(SLURM_SCRIPTS / "chain.sh"), "--time=5", "--stage", *prepare, "--stage", "--exclusive", *pretrain]
    output = slurm.command(*chain, "--stage", "evaluate", "runs/x", cwd=tmp_path)
    jobs = [Job(slurm, line.split()[1].removesuffix(":"), tmp_path) for line in output.splitlines()]
    jobs[1].await_checkpoint()
    slurm.command("scancel", "--batch", "--signal=USR1", jobs[1].id)
    assert [job.await_end() for job in jobs] == ["COMPLETED"] * 3, "".join(job_log(job.about) for job in jobs)
    assert jobs[1].about["Restarts"] == "1"
    assert "bits per byte" in job_log(jobs[2].about)


def test_corpus_prepared_on_three_nodes_equals_that_of_one(slurm, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(str(number * word) for word in range(800)))
    arguments = [str(SLURM_SCRIPTS / "prepare.sbatch"), "--input", "text", "--vocab_size", "600", "--unit_megabytes", "0.02", "--output"]
    for nodes in ("1", "3"):
        job = slurm.submit("--nodes", nodes, *arguments, nodes, cwd=tmp_path)
        assert slurm.await_end(job) == "COMPLETED", job_log(slurm.about(job))
    assert "finishes last writes the shards" in job_log(slurm.about(job))
    folders = (tmp_path / "1", tmp_path / "3")
    one, three = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} for folder in folders)
    assert len(one) > 6 and one == three


def test_an_array_of_four_workers_searches_on_although_a_node_dies(slurm, tmp_path):
    """14 trials of 3 seconds. The worker of the dead node is requeued, and some worker resumes its run."""
    arguments = words(tmp_path / "search", settings=["train_steps 300"])
    array = slurm.submit("--array=0-3", "--exclusive", "--time=5", str(SLURM_SCRIPTS / "search.sbatch"), *arguments, cwd=tmp_path)
    workers = [f"{array}_{task}" for task in range(4)]
    await_(lambda: len(list(tmp_path.glob("search/trials/*/seed_1/checkpoints"))) > 4, 120, "the second runs of the workers")
    node = slurm.about(workers[1])["NodeList"]
    death_of_node(int(node.removeprefix("n")) - 1)(Job(slurm, workers[1], tmp_path), ("n1", "n2", "n3", "n4"))
    logs = "".join(job_log(slurm.about(worker)) for worker in workers)
    assert [slurm.await_end(worker) for worker in workers] == ["COMPLETED"] * 4, logs
    assert slurm.about(workers[1])["Restarts"] == "1", logs
    found = runs(arguments)
    assert len(found) == 14 and {run.record.state for run in found} == {"finished"}
    for run in found:
        assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 301))
