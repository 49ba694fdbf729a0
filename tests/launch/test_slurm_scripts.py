"""Decisions of the batch scripts, with stubs in place of SLURM: srun ends with a given status, scontrol prints given values."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, clean_environment

SCRIPTS = REPOSITORY / "launch" / "slurm"
SRUN = """#!/bin/bash
for word in "$@"; do [[ $word != --output=* ]] || start=$(dirname "${word#--output=}"); done
printf '%s\\n' "$RANK_LOG" >"$start/rank_0.log"
printf '%s\\n' "another line" >"$start/rank_1.log"
printf '%s\\n' "$@" >"$start/arguments"
env >"$start/environment"
printf '%s' "$SRUN_STDERR" >&2
exit "$STATUS"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show job") echo "JobId=7 JobState=$STATE Reason=${REASON:-None} Restarts=$RESTARTS EndTime=2030-01-01T00:00:00 Command=/nowhere" ;;
"show hostnames") printf '%s\\n' first second ;;
"show node") echo "NodeName=first NodeAddr=10.0.0.1 NodeHostName=first" ;;
requeue*) echo "$2" >>requeued; exit "${REFUSED:-0}" ;;
esac
"""
SAVED = "step: 8 | checkpoint saved in 0.3 s"


@pytest.fixture
def slurm(tmp_path):
    """A folder to submit from, with stubs of SLURM's commands in its bin/."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def run(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in clean_environment().items() if not name.startswith(("SLURM", "TORCH", "TRITON"))}
    environment["PATH"] = f"{folder}/bin:{environment['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments], cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=60
    )


def run_job(folder: Path, *arguments: str, restart: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run one start of a job of two nodes whose step ends as the variables say."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "pretrain"}
    job |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
    answers = {"STATUS": "0", "STATE": "RUNNING", "RESTARTS": str(restart), "RANK_LOG": SAVED, "SRUN_STDERR": ""}
    return run(folder, "pretrain.sbatch", *arguments, **(job | answers | variables))


DECISIONS = [
    ("done", {"STATUS": "0"}, 0, False, "Done."),
    ("saved and unfinished", {"STATUS": "85"}, 85, True, "Requeued: restart 1"),
    ("a user's mistake", {"STATUS": "2"}, 93, False, "Not requeued: the next start would end with the same mistake."),
    ("not to be requeued", {"STATUS": "93"}, 93, False, "Not requeued"),
    ("a failure", {"STATUS": "1"}, 85, True, "status 1. Last lines of their logs"),
    ("killed", {"STATUS": "137"}, 85, True, "Requeued"),
    ("no such program", {"STATUS": "127", "RANK_LOG": ""}, 85, True, "Requeued"),
    (
        "one rank's mistake, for which the others were ended",
        {"STATUS": "143", "SRUN_STDERR": "srun: error: n2: tasks 0-3: Exited with exit code 2\nsrun: error: n1: task 4: Terminated\n"},
        93,
        False,
        "the next start would end with the same mistake",
    ),
    ("refused", {"STATUS": "85", "REFUSED": "1"}, 85, True, "SLURM refuses to requeue"),
    ("cancelled", {"STATUS": "85", "STATE": "COMPLETING"}, 85, False, "cancelled: not requeued"),
    ("at the time limit", {"STATUS": "85", "STATE": "COMPLETING", "REASON": "TimeLimit"}, 85, True, "Requeued"),
    ("preempted without grace, or a node died", {"STATUS": "85", "STATE": "COMPLETING", "RESTARTS": "1"}, 85, False, "SLURM has requeued"),
]


@pytest.mark.parametrize(
    ("variables", "status", "is_requeued", "message"), [row[1:] for row in DECISIONS], ids=[row[0] for row in DECISIONS]
)
def test_status_of_a_start_decides_whether_it_is_requeued(variables, status, is_requeued, message, slurm):
    done = run_job(slurm, **variables)
    assert done.returncode == status, done
    assert (slurm / "requeued").exists() == is_requeued
    assert message in done.stdout
    assert not done.stderr


def test_job_is_requeued_at_most_max_restarts_times(slurm):
    assert run_job(slurm, "--max_restarts", "3", restart=2, STATUS="85").returncode == 85
    (slurm / "requeued").unlink()
    last = run_job(slurm, "--max_restarts", "3", restart=3, STATUS="85")
    assert last.returncode == 93
    assert "Not requeued: --max_restarts 3 is reached." in last.stdout
    assert not (slurm / "requeued").exists()


def test_three_starts_without_a_checkpoint_end_the_job(slurm):
    starts = [run_job(slurm, restart=restart, STATUS="1", RANK_LOG="Traceback") for restart in range(3)]
    assert [start.returncode for start in starts] == [85, 85, 93]
    assert "none of the last three starts saved a checkpoint" in starts[-1].stdout


def test_checkpoint_allows_three_more_starts(slurm):
    says = ["Traceback", SAVED, "Traceback", "Traceback", "Traceback"]
    starts = [run_job(slurm, restart=restart, STATUS="1", RANK_LOG=arguments) for restart, arguments in enumerate(says)]
    assert [start.returncode for start in starts] == [85, 85, 85, 85, 93]


def test_failure_shows_the_last_log_lines_and_the_log_files(slurm):
    done = run_job(slurm, STATUS="1", RANK_LOG="Traceback\n[rank0]: RuntimeError: no")
    assert "1 RuntimeError: no\n" in done.stdout
    assert "1 another line\n" in done.stdout
    assert "logs/pretrain-7/start_0/rank_<rank>.log" in done.stdout


def srun_arguments(folder: Path, start: str = "logs/pretrain-7/start_0") -> list[str]:
    return (folder / start / "arguments").read_text().splitlines()


def environment_of(folder: Path) -> dict[str, str]:
    lines = (folder / "logs/pretrain-7/start_0/environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_arguments_reach_the_ranks_unchanged(slurm):
    given = ["--config", "a b.yaml", "--note", "it's $HOME *", "", "--seed=3"]
    assert run_job(slurm, *given).returncode == 0
    arguments = srun_arguments(slurm)
    assert arguments[arguments.index(str(REPOSITORY / "launch" / "pretrain.py")) + 1 :] == given


def test_variables_of_an_outer_launcher_are_removed(slurm):
    left = {"RANK": "3", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_RANK": "3", "SLURM_JOB_END_TIME": "1"}
    assert run_job(slurm, **left, SLURM_CPUS_PER_TASK="6").returncode == 0
    environment = environment_of(slurm)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK"} & environment.keys()
    assert environment["MASTER_ADDR"] == "10.0.0.1"  # the name of the first node is not known here
    assert environment["MASTER_PORT"] == "20007"
    assert int(environment["SLURM_JOB_END_TIME"]) > 1_800_000_000
    assert not environment["TORCH_EXTENSIONS_DIR"].startswith(os.path.expanduser("~"))
    assert "--cpus-per-task=6" in srun_arguments(slurm)


def test_variables_that_a_user_has_set_are_kept(slurm):
    own = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "29400", "TORCH_EXTENSIONS_DIR": "/scratch/extensions"}
    assert run_job(slurm, **own).returncode == 0
    assert own.items() <= environment_of(slurm).items()


def test_array_task_takes_its_recipe_and_requeues_itself(slurm):
    for name in ("one.yaml", "two words.yaml"):
        (slurm / name).write_text("")
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "STATUS": "85"}
    done = run_job(slurm, "--output", "runs", "--recipes", "one.yaml", "two words.yaml", "--seed", "2", **array)
    assert done.returncode == 85
    arguments = srun_arguments(slurm, "logs/pretrain-7_1/start_0")
    assert arguments[-6:] == ["--seed", "2", "--config", "two words.yaml", "--output", "runs/two words"]
    assert (slurm / "requeued").read_text() == "7_1\n"  # "7" would requeue every task


MISTAKES = [
    (["--recipes", "one.yaml"], {"SLURM_ARRAY_TASK_ID": "1"}, "Array index 1 has no recipe: --recipes has 1"),
    (["--recipes", "one.yaml"], {}, "submit with sbatch --array 0-0"),
    (["--recipes", "nowhere.yaml"], {"SLURM_ARRAY_TASK_ID": "0"}, "nowhere.yaml: no such file"),
    (["--recipes", "one.yaml", "--config", "x"], {"SLURM_ARRAY_TASK_ID": "0"}, "--recipes and --config both"),
    (["--recipes", "one.yaml", "a/one.yml"], {"SLURM_ARRAY_TASK_ID": "0"}, "Two recipes have the name one"),
    (["--recipes", "--seed", "1"], {}, "--recipes needs at least one file"),
    (["--max_restarts", "many"], {}, "--max_restarts is many; it must be a whole number"),
    (["--ranks_per_node", "0"], {}, "--ranks_per_node is 0"),
    (["--ranks_per_node=2"], {"SLURM_NTASKS_PER_NODE": "4"}, "--ranks_per_node needs --ntasks-per-node 1 (got 4)"),
    (["--container", "x.sif", "--container_runtime", "docker"], {}, "it must be pyxis or apptainer"),
    (["--mounts", "/a:/b"], {}, "give --container too"),
    (["--container", "x", "--mounts", "/a"], {}, "--mounts is /a; it must be OUTSIDE:INSIDE"),
    (["--logs"], {}, "--logs needs a value"),
    (["--logs", "one.yaml"], {}, "the folder one.yaml/pretrain-7/start_0 cannot be created"),
]


@pytest.mark.parametrize(("arguments", "variables", "message"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistake_gives_one_message(arguments, variables, message, slurm):
    (slurm / "one.yaml").write_text("")
    in_job = run_job(slurm, *arguments, **variables)
    assert in_job.returncode == 93, in_job
    assert message in in_job.stderr.splitlines()[-1]
    if "cannot be created" not in message:
        assert len(in_job.stderr.splitlines()) == 1
        outside = run(slurm, "pretrain.sbatch", *arguments, **variables)
        assert (outside.returncode, outside.stderr) == (2, in_job.stderr)


def test_batch_script_outside_of_a_job_starts_nothing(slurm):
    done = run(slurm, "pretrain.sbatch")
    assert done.returncode == 2
    assert "This is a batch script" in done.stderr


def dry_run(folder: Path, *arguments: str) -> list[str]:
    """The arguments of the srun line."""
    done = run(folder, "pretrain.sbatch", "--dry_run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["bin"]
    return shlex.split(next(line for line in done.stdout.splitlines() if line.startswith("srun ")))


def test_dry_run_needs_no_slurm_and_changes_nothing(slurm):
    arguments = dry_run(slurm, "--deepspeed", "x y.json", "--logs", "elsewhere")
    assert arguments[-2:] == ["--deepspeed", "x y.json"]
    assert "--kill-on-bad-exit=0" in arguments
    assert "--output=elsewhere/pretrain-JOB/start_0/rank_%t.log" in arguments


def test_ranks_per_node_starts_the_ranks_from_one_task(slurm):
    arguments = dry_run(slurm, "--ranks_per_node", "8")
    assert arguments[-6:-2] == ["bash", str(SCRIPTS / "node.sh"), "8", "logs/pretrain-JOB/start_0"]
    assert "--ntasks-per-node=1" in arguments


def test_container_sees_repository_submit_folder_and_mounts(slurm):
    mounts = f"{REPOSITORY}:{REPOSITORY},{slurm}:{slurm},/data:/data"
    given = ["--container", "image.sqsh", "--mounts", "/data:/data"]
    arguments = dry_run(slurm, *given)
    assert {"--container-image=image.sqsh", f"--container-mounts={mounts}", "--no-container-mount-home"} < set(arguments)
    assert arguments[-2:] == ["python", str(REPOSITORY / "launch" / "pretrain.py")]
    arguments = dry_run(slurm, *given, "--container_runtime", "apptainer", "--ranks_per_node", "2")
    at = arguments.index("apptainer")
    assert arguments[at : at + 2] == ["apptainer", "exec"]
    assert arguments[arguments.index("--bind") + 1] == mounts
    assert arguments.index("image.sqsh") < arguments.index("bash") < arguments.index("python")


@pytest.mark.parametrize(("statuses", "status"), [("0 0", 0), ("85 85", 85), ("0 1", 1), ("2 143", 2), ("85 93", 93)])
def test_status_of_a_node_follows_its_ranks(statuses, status, tmp_path):
    ends = "import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE'])\n"
    ends += "sys.exit(int(sys.argv[1].split()[int(os.environ['LOCAL_RANK'])]))"
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}
    done = run(tmp_path, "node.sh", "2", str(tmp_path), "python", "-c", ends, statuses, **task)
    assert done.returncode == status
    assert (tmp_path / "rank_3.log").read_text() == "3 6\n"


def test_chain_is_submitted_with_dependencies(slurm):
    arguments = [
        "--account",
        "lab",
        "--stage",
        "--cpus-per-task=4",
        "prepare",
        "--input",
        "a b",
        "--stage",
        "--nodes=8",
        "pretrain",
        "--seed",
        "2",
    ]
    arguments += ["--stage", "evaluate", "runs/x", "--stride", "8"]
    done = run(slurm, "chain.sh", "--dry_run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    prepare, pretrain, evaluate = [shlex.split(line) for line in done.stdout.splitlines()]
    start = ["sbatch", "--parsable"]
    assert prepare == [*start, "--job-name=prepare", "--account", "lab", "--cpus-per-task=4", f"{SCRIPTS}/prepare.sbatch", "--input", "a b"]
    assert {"--dependency=afterok:ID_OF_PREPARE", "--kill-on-invalid-dep=yes", "--nodes=8"} < set(pretrain)
    assert pretrain[-3:] == [f"{SCRIPTS}/pretrain.sbatch", "--seed", "2"]
    assert "--nodes=8" not in evaluate
    assert evaluate[-5:] == [f"{SCRIPTS}/door.sbatch", "launch/evaluate.py", "runs/x", "--stride", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No --stage is given"),
        (["--stage"], "A --stage has no name"),
        (["--stage", "prepare", "--stage", "--stage", "export"], "A --stage has no name"),
        (["--stage", "prepare", "--stage", "distill"], 'There is no stage "distill"; stages are: prepare pretrain'),
        (["--stage", "--nodes", "8", "pretrain"], 'There is no stage "8"'),
    ],
)
def test_invalid_chain_is_refused_before_anything_is_submitted(arguments, message, slurm):
    sbatch = slurm / "bin" / "sbatch"
    sbatch.write_text("#!/bin/bash\ntouch submitted; echo 1\n")
    sbatch.chmod(0o755)
    done = run(slurm, "chain.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (slurm / "submitted").exists()


def test_chain_that_slurm_refuses_in_the_middle_is_cancelled(slurm):
    for name, text in {"sbatch": '[[ "$*" != *evaluate* ]] && echo "5;cluster"', "scancel": 'echo "$@" >cancelled'}.items():
        (slurm / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (slurm / "bin" / name).chmod(0o755)
    done = run(slurm, "chain.sh", "--stage", "prepare", "--stage", "evaluate", "runs/x")
    assert done.returncode == 2
    assert "sbatch refuses the stage evaluate" in done.stderr
    assert (slurm / "cancelled").read_text() == "5\n"


def test_preparation_has_a_worker_per_core_of_its_task(tmp_path, slurm):
    arguments = ["--input", "nowhere.txt", "--output", "prepared"]
    done = run(slurm, "prepare.sbatch", *arguments, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="3")
    assert "prepare.py --workers 3 --input" in done.stdout
    assert done.returncode == 93  # no such input
    assert "prepare.py --workers=5 --input" in run(slurm, "prepare.sbatch", "--workers=5", *arguments, SLURM_JOB_ID="7").stdout


def test_preparation_on_several_nodes_has_a_task_per_node(slurm):
    arguments = ["--dry_run", "--input", "a b", "--output", "prepared"]
    done = run(slurm, "prepare.sbatch", *arguments, SLURM_JOB_NUM_NODES="3", SLURM_CPUS_PER_TASK="8")
    assert shlex.split(done.stdout)[:7] == ["srun", "--nodes", "3", "--ntasks-per-node", "1", "--cpus-per-task", "8"]
    assert shlex.split(done.stdout)[-6:] == ["--workers", "8", "--input", "a b", "--output", "prepared"]
    assert "srun" not in run(slurm, "prepare.sbatch", *arguments).stdout


def test_missing_script_gives_one_message(slurm):
    done = run(slurm, "door.sbatch", "launch/nowhere.py", SLURM_JOB_ID="7")
    assert (done.returncode, done.stderr) == (93, f"There is no launch/nowhere.py in {REPOSITORY}.\n")
