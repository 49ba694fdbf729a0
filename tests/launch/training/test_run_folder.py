"""A folder belongs to one run: it goes on, or it is refused and nothing in it changes."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data.command_line import UserError
from launch.checkpoints import checkpoint, run_record
from launch.ranks.layout import describe
from launch.training import run_folder
from launch.training.settings import DataSettings, LogSettings, OptimizerSettings, RunSettings
from model.config import ModelConfig

MERGED = {"zero_optimization": {"stage": 1}, "communication_data_type": "fp32"}
LAYOUT = {"world_size": 2, "pipeline_stages": 1, "tensor_parallel_size": 1, "sequence_parallel_size": 1}
LAYOUT |= {"zero_stage": 1, "precision": "bf16"}


def tree(folder: Path) -> dict[str, str]:
    """Every path below, with the hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


class Run:
    """A run as a first start leaves it, and what a second start says to it."""

    def __init__(self, folder: Path):
        self.output = folder / "run"
        self.root = self.output / "checkpoints"
        self.settings = RunSettings(
            output=str(self.output), model=ModelConfig(hidden_size=64), train_steps=100, data=DataSettings(("old",))
        )
        self.tokenizer = folder / "tokenizer.model"
        self.tokenizer.write_bytes(b"pieces")

    def start(self, fingerprint: str = "f" * 64, merged: dict | None = None, **changes) -> run_folder.Start:
        return run_folder.inspect(dataclasses.replace(self.settings, **changes), fingerprint, merged or MERGED)

    def record(self, start: run_folder.Start | None = None) -> str:
        start = start or self.start()
        run_folder.record(self.settings, MERGED, start, "f" * 64, self.tokenizer)
        return start.run_id

    def save(self, step: int, by_this_version: bool = True) -> Path:
        about = {"model": dataclasses.asdict(self.settings.model), "layout": LAYOUT}
        about |= {"checksums": {}} if by_this_version else {"versions": {"megabatch": "0.0.9"}}
        folder = checkpoint.begin(self.root, step, "run")
        for rank in range(LAYOUT["world_size"]):
            checkpoint.write_part(folder, rank, {})
        return checkpoint.publish(folder, step, about)

    def refusal(self, **changes) -> str:
        """The sentence of a start that is refused; nothing in the folder has changed."""
        before = tree(self.output.parent)
        with pytest.raises(UserError) as refused:
            self.start(**changes)
        assert tree(self.output.parent) == before
        return str(refused.value).replace(str(self.output), "RUN")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture
def saved(run):
    run.record()
    run.save(10)
    return run


def test_a_fresh_start_is_recorded_before_the_first_step(run):
    start = run.start()
    assert (start.goes_on, start.notes) == (False, ())
    assert not run.output.exists(), "looking changes nothing"
    run.record(start)
    about = json.loads((run.output / "run.json").read_text())
    assert about["run_id"] == start.run_id
    assert about["recipe"]["model"]["hidden_size"] == 64
    assert about["deepspeed"] == MERGED
    assert set(about["versions"]) == {"python", "torch", "deepspeed", "megabatch"}
    assert len(about["starts"]) == 1
    assert (run.output / "tokenizer.model").read_bytes() == b"pieces"


def test_two_fresh_starts_are_two_runs(run):
    assert run.start().run_id != run.start().run_id


def test_a_second_start_goes_on_under_the_same_id_and_is_noted(saved):
    start = saved.start()
    assert start.goes_on and start.notes == ()
    assert saved.record(start) == json.loads((saved.output / "run.json").read_text())["run_id"]
    assert len(json.loads((saved.output / "run.json").read_text())["starts"]) == 2
    assert saved.start(resume=True).goes_on


def test_a_run_without_a_checkpoint_starts_again_and_says_so(run):
    run_id = run.record()
    start = run.start()
    assert (start.run_id, start.goes_on) == (run_id, False)
    assert start.notes == (f"{run.output} holds a run that never reached a checkpoint: it starts again from step 0.",)
    assert run.refusal(resume=True) == "--resume: RUN holds a run without a checkpoint. Without --resume it starts again from step 0."


def test_an_empty_folder_is_a_fresh_start_and_so_is_one_whose_start_died_at_once(run):
    run.output.mkdir()
    assert not run.start().goes_on
    (run.output / "run.json.tmp").write_text('{"run_')
    assert not run.start().goes_on


def test_resume_insists_on_a_run(run):
    assert run.refusal(resume=True) == "--resume: RUN holds no run to go on with."


def test_a_folder_with_other_things_is_refused(run):
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("years")
    assert run.refusal() == "output RUN holds files but no run.json: not a run of ours. Give another --output."


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_file_in_the_way_is_refused(run, below):
    run.output.write_text("a file")
    sentence = f"output RUN{below}: RUN is a file; it must be a folder or not be there yet."
    assert run.refusal(output=f"{run.output}{below}") == sentence


@pytest.mark.parametrize("text", ["", '{"run_id": ', "[]", "null", "{}", '{"run_id": "x", "recipe": {}, "starts": []}', "\ud800"])
def test_a_damaged_record_is_refused(saved, text):
    (saved.output / "run.json").write_bytes(text.encode(errors="surrogatepass"))
    assert saved.refusal().startswith("RUN/run.json is damaged (")


def test_another_run_is_refused_with_every_difference(saved):
    changes = {"seed": 2, "train_steps": 200, "optimizer": OptimizerSettings(learning_rate=1e-3)}
    assert saved.refusal(**changes) == (
        "RUN holds another run:\n"
        "  optimizer.learning_rate: 0.0003 -> 0.001\n"
        "  train_steps: 100 -> 200\n"
        "  seed: 1 -> 2\n"
        "Give another --output, or --allow_changes to go on with the new settings."
    )
    start = saved.start(**changes, allow_changes=True)
    assert start.goes_on
    assert start.notes == (
        "Going on with a change: optimizer.learning_rate: 0.0003 -> 0.001",
        "Going on with a change: train_steps: 100 -> 200",
        "Going on with a change: seed: 1 -> 2",
    )


def test_all_changes_of_a_run_that_went_on_are_kept_with_their_times(saved):
    def changes() -> list[dict]:
        return json.loads((saved.output / "run.json").read_text())["changes"]

    assert changes() == []
    for change in ({"seed": 2}, {}, {"train_steps": 200}):
        start = saved.start(**change, allow_changes=True)
        saved.settings = dataclasses.replace(saved.settings, **change)
        saved.record(start)
    starts = json.loads((saved.output / "run.json").read_text())["starts"]
    assert changes() == [{"time": starts[1], "lines": ["seed: 1 -> 2"]}, {"time": starts[3], "lines": ["train_steps: 100 -> 200"]}]
    shutil.rmtree(saved.root)
    saved.record()
    assert changes() == [], "a run that starts again from step 0 has read nothing otherwise"


def test_what_changes_no_number_may_change(saved):
    harmless = {"recompute": True, "compile": True, "log": LogSettings(interval=1), "peak_tflops": 5.0, "deepspeed": "other.json"}
    assert saved.start(**harmless, data=DataSettings(("moved",)), dry_run=True).notes == ()


def test_other_data_is_refused(saved):
    sentence = saved.refusal(fingerprint="e" * 64, data=DataSettings(("new",)))
    assert f"  the data: old {'f' * 12} -> new {'e' * 12}\n" in sentence


def test_other_data_of_a_blend_is_refused_by_its_folders(saved):
    sentence = saved.refusal(fingerprint="e" * 64, data=DataSettings(("old", "new")))
    assert f"  the data: old {'f' * 12} -> old, new {'e' * 12}\n" in sentence


def test_a_run_of_a_version_before_packing_is_told_from_this_one(saved):
    """Its run.json has one folder, as text, and its samples began one token later."""
    record = json.loads((saved.output / "run.json").read_text())
    record["recipe"]["data"] = {"path": "old", "vocab_size": 4096}
    (saved.output / "run.json").write_text(json.dumps(record))
    lines = saved.refusal(fingerprint="e" * 64, data=DataSettings(("old",), packing="best_fit")).splitlines()
    assert lines[1:-1] == [
        "  the samples: they began one token later, and the first token of the data was never predicted",
        "  data.packing: packed -> best_fit",
        f"  the data: old {'f' * 12} -> old {'e' * 12}",
    ]
    assert saved.start(allow_changes=True).notes == (
        "Going on with a change: the samples: they began one token later, and the first token of the data was never predicted",
    )


def test_another_model_is_refused_even_where_changes_are_allowed(saved):
    sentence = saved.refusal(model=ModelConfig(hidden_size=128), allow_changes=True)
    assert sentence.startswith("RUN/checkpoints/step_00000010 is a checkpoint of another model:\n  hidden_size: 64 there, 128 now\n")
    assert "  intermediate_size: 256 there, 512 now" in sentence


@pytest.mark.parametrize(
    "sizes", [{"pipeline_stages": 2}, {"tensor_parallel_size": 2}, {"sequence_parallel_size": 2}, {"pipeline_stages": 2, "recompute": True}]
)
def test_another_layout_or_zero_stage_goes_on_without_a_question(saved, sizes):
    other_json = MERGED | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert saved.start(**sizes, merged=other_json, deepspeed="other.json").notes == ()
    assert saved.start(**sizes).goes_on


def test_another_precision_is_another_run(saved):
    sentence = saved.refusal(precision="float32")
    assert sentence.startswith("RUN holds another run:\n  precision: bf16 -> float32\n")
    assert saved.start(precision="float32", allow_changes=True).notes == ("Going on with a change: precision: bf16 -> float32",)


def test_a_layout_is_described_for_a_person():
    assert describe(LAYOUT) == "2 rank(s) under ZeRO-1 in bf16"
    many = LAYOUT | {"world_size": 8, "pipeline_stages": 2, "tensor_parallel_size": 2}
    assert describe(many) == "8 rank(s): 2 pipeline stages x tensor parallel 2 x data parallel 2 under ZeRO-1 in bf16"


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(run):
    run.record()
    run.save(10, by_this_version=False)
    assert run.refusal(allow_changes=True) == (
        "RUN/checkpoints/step_00000010 was written by Megabatch before 0.2, in DeepSpeed's own files; "
        "go on with that version, or train anew."
    )


def test_a_damaged_newest_checkpoint_does_not_hide_the_one_before(saved):
    (saved.save(20) / "manifest.json").write_text('{"step": 2')
    assert saved.start().goes_on
    assert "another model" in saved.refusal(model=ModelConfig(hidden_size=128), allow_changes=True)


def test_a_run_whose_checkpoints_are_all_damaged_is_no_fresh_start(saved):
    newest = saved.root / "step_00000010"
    (newest / "manifest.json").unlink()
    assert saved.start().goes_on, "what is there is judged when it is loaded"
    newest.rename(newest.with_name("step_00000010.corrupt"))
    assert saved.start().goes_on


def test_the_tokenizer_beside_the_run_is_the_one_of_its_data(run):
    run.record()
    run.tokenizer.write_bytes(b"other pieces")
    run.record()
    assert (run.output / "tokenizer.model").read_bytes() == b"other pieces"
    run.tokenizer = run.tokenizer.rename(run.tokenizer.with_name("tokenizer.json"))
    run.record()
    assert {path.name for path in run.output.glob("tokenizer*")} == {"tokenizer.json"}
    run.tokenizer = run.tokenizer.rename(run.tokenizer.with_name("cl100k_base.tiktoken"))
    run.tokenizer.with_name("tokenizer_config.json").write_text("{}")
    run.record()
    assert [path.name for path in run_record.tokenizer_files(run.output)] == ["cl100k_base.tiktoken", "tokenizer_config.json"]
    assert run_record.tokenizer_in(run.output) == run.output / "cl100k_base.tiktoken"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"communication_data_type": "bf16"}, 'communication_data_type "fp32" -> "bf16"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype false -> "bf16"'),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights false -> true",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": False, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients false -> true",
        ),
    ],
)
def test_an_engine_choice_that_changes_numbers_is_another_run(saved, change, words):
    sentence = saved.refusal(merged=MERGED | change, deepspeed="other.json")
    assert sentence.splitlines()[1:-1] == [f"  other.json: {words}"]
    assert saved.start(merged=MERGED | change, deepspeed="other.json", allow_changes=True).goes_on


def test_switching_quantization_off_again_is_a_change_too(run):
    quantized = MERGED | {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    run_folder.record(run.settings, quantized, run.start(), "f" * 64, run.tokenizer)
    run.save(10)
    assert run.start(merged=quantized).notes == ()
    assert "zero_optimization.zero_quantized_weights true -> false" in run.refusal(merged=MERGED)


def test_a_run_that_is_already_longer_is_not_shortened(saved):
    with pytest.raises(UserError, match="already beyond the 1 steps"):
        saved.start(train_steps=1, allow_changes=True, schedule=dataclasses.replace(saved.settings.schedule, warmup_steps=0))


def test_a_folder_is_held_by_one_process_at_a_time(saved):
    with run_folder.lock(saved.settings), pytest.raises(UserError, match="Another process is training"):
        run_folder.lock(saved.settings)
    run_folder.lock(saved.settings).close()
