"""State on NVMe gives the same numbers, and its checkpoints resume in memory and back. DeepSpeed compiles its reader for it."""

import shutil
from pathlib import Path

import pytest

from launch.checkpoints.checkpoint import folder_name
from launch.checkpoints.opening import AveragedState
from tests.launch.training.layout_cases import case_of
from tests.launch.training.layouts_on_ranks import STEPS, results_of_ranks, train_plain
from tests.launch.training.optimizer_references import REFERENCES

MISSING = [name for name in ("g++", "ninja") if not shutil.which(name)] + ([] if Path("/usr/include/libaio.h").exists() else ["libaio-dev"])


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Where DeepSpeed's reader is compiled, once for all optimizers: elsewhere a start killed while it compiles would leave a lock."""
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions"))}


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"DeepSpeed needs them to compile its reader, and they are missing: {', '.join(MISSING)}")
@pytest.mark.parametrize("optimizer", REFERENCES)
def test_state_on_nvme_matches_plain_pytorch_and_resumes_in_memory(optimizer, environment, tmp_path):
    zero = {
        "sub_group_size": 6000,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 4, "fast_init": False},
        "offload_param": {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 30, "buffer_size": 100_000, "max_in_cpu": 0},
    }
    on_nvme = case_of("zero3_nvme", {}, "llama", zero=zero, aio_bytes=4096, optimizer=optimizer)
    in_memory = case_of("zero1", {}, "llama", optimizer=optimizer)
    (tmp_path / "saved").mkdir()

    def job(case: dict, first: int, load: str | None, save: str | None) -> dict:
        checkpoint = str(tmp_path / "saved" / load / folder_name(STEPS)) if load else None
        saved = str(tmp_path / "saved" / save) if save else None
        return {"case": case, "first": first, "steps": STEPS, "load": checkpoint, "init": None, "save": saved}

    jobs = [
        job(on_nvme, 0, None, "nvme"),
        job(in_memory, 0, None, "memory"),
        job(in_memory, STEPS, "nvme", None),
        job(on_nvme, STEPS, "memory", None),
    ]
    history, weights = train_plain(in_memory)
    answers = results_of_ranks(2, jobs, tmp_path, timeout_seconds=900, **environment)[0]
    for each, measured in zip(jobs, answers, strict=True):
        for (loss, norm), (plain_loss, plain_norm) in zip(measured["history"], history[each["first"] : each["first"] + STEPS], strict=True):
            assert loss == pytest.approx(plain_loss, abs=1e-5)
            assert norm == pytest.approx(plain_norm, rel=1e-5)
    ours = AveragedState([tmp_path / "saved" / "nvme" / folder_name(STEPS)])
    assert all(float((ours[name] - tensor).abs().max()) < 1e-5 for name, tensor in weights.items())
