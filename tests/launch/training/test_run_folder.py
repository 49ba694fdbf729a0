"""A folder belongs to one run: a second start resumes it, or is refused and changes nothing in it."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from data.command_line import UserError
from data.sampling.batch_plan import BatchPlan, BatchSettings, Segment
from launch.checkpoints import checkpoint, run_record
from launch.ranks.layout import Layout, describe_layout
from launch.training import run_folder
from launch.training.settings import (
    DataSettings,
    DistillationSettings,
    LogSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    share_the_batch,
)
from model.config import ModelConfig

MERGED = {"zero_optimization": {"stage": 1}, "communication_data_type": "fp32"}
LAYOUT = {"world_size": 2, "pipeline_stages": 1, "tensor_parallel_size": 1, "sequence_parallel_size": 1}
LAYOUT |= {"zero_stage": 1, "precision": "bf16"}


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


class Run:
    """A run as its first start leaves it, and the methods of a second start."""

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

    def save(self, step: int, by_this_version: bool = True, batch_plan: BatchPlan | None = None, **facts) -> Path:
        about = {"model": dataclasses.asdict(self.settings.model), "layout": LAYOUT}
        about |= {"checksums": {}} if by_this_version else {"versions": {"megabatch": "0.0.9"}}
        about |= facts | ({"batch_plan": batch_plan.record()} if batch_plan else {})
        folder = checkpoint.begin(self.root, step, "run")
        for rank in range(LAYOUT["world_size"]):
            checkpoint.write_part(folder, rank, {})
        return checkpoint.publish(folder, step, about)

    def refusal(self, **changes) -> str:
        """Return the message of a start that is refused, after checking that nothing in the folder has changed."""
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


def test_fresh_start_is_recorded_before_the_first_step(run):
    start = run.start()
    assert (start.resumes, start.notes) == (False, ())
    assert not run.output.exists(), "inspect changes nothing"
    run.record(start)
    about = json.loads((run.output / "run.json").read_text())
    assert about["run_id"] == start.run_id
    assert about["recipe"]["model"]["hidden_size"] == 64
    assert about["deepspeed"] == MERGED
    assert set(about["versions"]) == {"python", "torch", "deepspeed", "megabatch"}
    assert len(about["starts"]) == 1
    assert (run.output / "tokenizer.model").read_bytes() == b"pieces"


def test_two_fresh_starts_have_different_run_ids(run):
    assert run.start().run_id != run.start().run_id


def test_second_start_resumes_with_the_same_run_id_and_is_recorded(saved):
    start = saved.start()
    assert start.resumes and start.notes == ()
    assert saved.record(start) == json.loads((saved.output / "run.json").read_text())["run_id"]
    assert len(json.loads((saved.output / "run.json").read_text())["starts"]) == 2
    assert saved.start(resume=True).resumes


def test_resume_keeps_the_stamps_of_the_data_until_it_has_loaded(saved):
    stamps = [{"train/00000.bin": [64, 1]}]
    run_folder.record_data(saved.settings, saved.settings.batch_plan, stamps)
    saved.record(saved.start())  # as a start that ends before the checkpoint is loaded
    assert json.loads((saved.output / "run.json").read_text())["data_stamps"] == stamps


def test_run_without_a_checkpoint_starts_again_with_a_message(run):
    run_id = run.record()
    start = run.start()
    assert (start.run_id, start.resumes) == (run_id, False)
    assert start.notes == (f"{run.output} has a run without a checkpoint: it starts again from step 0.",)
    assert run.refusal(resume=True) == "--resume: RUN has a run without a checkpoint. Without --resume it starts again from step 0."


def test_empty_folder_and_folder_of_an_aborted_start_are_fresh_starts(run):
    run.output.mkdir()
    assert not run.start().resumes
    (run.output / "run.json.tmp").write_text('{"run_')
    assert not run.start().resumes


def test_resume_option_needs_an_existing_run(run):
    assert run.refusal(resume=True) == "--resume: RUN has no run to resume. Give the --output of a run, or leave --resume out."


def test_folder_with_other_files_is_refused(run):
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("years")
    assert run.refusal() == "output RUN is not a run folder: it has files but no run.json. Give another --output."


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_output_path_through_a_file_is_refused(run, below):
    run.output.write_text("a file")
    message = f"output RUN{below}: RUN is a file; it must be a folder, or not exist yet."
    assert run.refusal(output=f"{run.output}{below}") == message


@pytest.mark.parametrize("text", ["", '{"run_id": ', "[]", "null", "{}", '{"run_id": "x", "recipe": {}, "starts": []}', "\ud800"])
def test_damaged_run_json_is_refused(saved, text):
    (saved.output / "run.json").write_bytes(text.encode(errors="surrogatepass"))
    assert saved.refusal().startswith("RUN/run.json is damaged (")


def test_changed_settings_are_refused_with_every_difference(saved):
    changes = {"seed": 2, "train_steps": 200, "optimizer": OptimizerSettings(learning_rate=1e-3)}
    assert saved.refusal(**changes) == (
        "RUN has another run:\n"
        "  optimizer.learning_rate: 0.0003 -> 0.001\n"
        "  train_steps: 100 -> 200\n"
        "  seed: 1 -> 2\n"
        "Give another --output, or --allow_changes to resume with the new settings."
    )
    start = saved.start(**changes, allow_changes=True)
    assert start.resumes
    assert start.notes == (
        "Resuming with a change: optimizer.learning_rate: 0.0003 -> 0.001",
        "Resuming with a change: train_steps: 100 -> 200",
        "Resuming with a change: seed: 1 -> 2",
        "The order of samples changes with seed: samples that the run has read may be read again, and others that it has not read come "
        "later than without the change.",
    )


@pytest.mark.parametrize(("name", "resumes"), [("lamb", True), ("muon", False)])
def test_another_optimizer_is_refused_with_what_a_resume_would_need(saved, name, resumes):
    settings = OptimizerSettings(name=name)
    advice = "Give another --output, or --allow_changes to resume with the new settings."
    refused = (
        f"RUN/checkpoints/{checkpoint.folder_name(10)} holds the state of the optimizer adamw, which {name} cannot use. Resume with "
        "optimizer.name adamw, or start another run from its weights with --init and another --output."
    )
    message = f"RUN has another run:\n  optimizer.name: adamw -> {name}\n"
    assert saved.refusal(optimizer=settings) == message + (advice if resumes else refused)
    if resumes:
        assert saved.start(optimizer=settings, allow_changes=True).resumes
    else:
        assert saved.refusal(optimizer=settings, allow_changes=True) == refused


ORDER_CHANGES = [
    {"seed": 2},
    {"data": DataSettings(("old",), weights=(2.0,))},
    {"data": DataSettings(("old",), packing="best_fit")},
    {"data": DataSettings(("old",), objective="prefix")},
    {"fingerprint": "e" * 64},
]
SAME_ORDER = [
    {"train_steps": 200},
    {"batch": BatchSettings(16)},
    {"optimizer": OptimizerSettings(learning_rate=1e-3)},
    {"data": DataSettings(("old",), fim_rate=0.5)},
]


@pytest.mark.parametrize(("change", "is_noted"), [(change, change in ORDER_CHANGES) for change in ORDER_CHANGES + SAME_ORDER])
def test_changes_of_the_sample_order_are_noted(saved, change, is_noted):
    notes = saved.start(**change, allow_changes=True).notes
    assert [note.startswith("The order of samples changes with ") for note in notes] == [False] * (len(notes) - is_noted) + [
        True
    ] * is_noted


def test_run_with_another_batch_size_goes_on_at_its_position(run):
    """Steps 1 to 10 read 8 samples, 11 to 20 read 16, then 4; a checkpoint before a change forgets the change."""
    run.settings = dataclasses.replace(run.settings, batch=BatchSettings(8))
    run.record()
    run.save(10, batch_plan=run.settings.batch_plan)
    wider = run.start(batch=BatchSettings(16), allow_changes=True).plan
    assert wider.segments == (Segment(0, 0, 8), Segment(10, 80, 16))
    assert [wider.positions(step) for step in (9, 10)] == [range(72, 80), range(80, 96)]
    run.settings = dataclasses.replace(run.settings, batch=BatchSettings(16))
    run.record(run.start(allow_changes=True))
    assert run.start().plan == wider, "the process died before it saved again"
    run.save(20, batch_plan=wider)
    assert run.start().plan == wider, "a second resume"
    smaller = run.start(batch=BatchSettings(4), allow_changes=True).plan
    assert smaller.segments == (*wider.segments, Segment(20, 240, 4))
    shutil.rmtree(run.root / "step_00000020")
    assert run.start(batch=BatchSettings(4), allow_changes=True).plan.segments == (Segment(0, 0, 8), Segment(10, 80, 4))


def test_warm_up_of_a_resumed_run_is_compared_with_all_its_steps(run):
    """90 steps of 8 samples, then one of 64: a run that always had read 64 would have 12 steps."""
    tokens = 100.0 * 8 * run.settings.model.sequence_length
    run.settings = dataclasses.replace(run.settings, batch=BatchSettings(8), train_tokens=tokens, train_steps=None)
    run.record()
    run.save(90, batch_plan=run.settings.batch_plan)

    def shared(size: int, warmup_steps: int) -> RunSettings:
        changed = dataclasses.replace(run.settings, batch=BatchSettings(size), schedule=ScheduleSettings(warmup_steps=warmup_steps))
        assert changed.complaints() == []
        return share_the_batch(changed, Layout(1), *run_folder.find_plan(changed))

    assert shared(64, 20).schedule.warmup_steps == shared(801, 20).schedule.warmup_steps == 20
    with pytest.raises(
        UserError, match=r"^schedule\.warmup_steps 95 must be below 91, the steps of train_tokens \S+\. Use .* 90 or less\.$"
    ):
        shared(64, 95)


def test_checkpoint_without_a_batch_plan_has_one_size(run):
    run.settings = dataclasses.replace(run.settings, batch=BatchSettings(8))
    run.record()
    run.save(10, data={"samples_per_step": 8})
    assert run.start().plan == run.settings.batch_plan
    assert run.start(batch=BatchSettings(16), allow_changes=True).plan.position(11) == 96


@pytest.mark.parametrize(
    ("length", "end"),
    [
        ({"train_steps": 100}, "train_steps 100 stays, so the run reads 1,520 samples in place of 800."),
        ({"train_tokens": 204_800.0, "train_steps": None}, "train_tokens 204,800 stays, so the run has 55 steps in place of 100."),
    ],
)
def test_another_batch_size_is_described_with_the_length_of_the_run(run, length, end):
    run.settings = dataclasses.replace(run.settings, batch=BatchSettings(8), **length)
    run.record()
    run.save(10, batch_plan=run.settings.batch_plan)
    settings = dataclasses.replace(run.settings, batch=BatchSettings(16))
    start = run.start(batch=BatchSettings(16), allow_changes=True)
    assert run_folder.describe_new_size(settings, start.plan, 10, start.former) == (
        f"From step 11 on a step reads 16 samples in place of 8, the first of them at position 80: none is read twice or left out. {end}"
    )
    assert run_folder.describe_new_size(settings, start.plan, 20, start.former) is None, "the change was at step 10"
    assert run_folder.describe_new_size(run.settings, run.settings.batch_plan, 0, start.former) is None


def test_a_run_without_its_former_ramp_is_compared_with_that_ramp(run):
    """A ramp of 8 and from sample 80 on of 16 samples, which ends after 15 steps."""
    length = run.settings.model.sequence_length
    ramp = BatchSettings(16, ramp=f"0:8 {80 * length}:16")
    run.settings = dataclasses.replace(run.settings, batch=ramp, train_tokens=160.0 * length, train_steps=None)
    run.record()

    def described(step: int, size: int) -> str | None:
        run.save(step, batch_plan=run.settings.batch_plan)
        start = run.start(batch=BatchSettings(size), allow_changes=True)
        return run_folder.describe_new_size(dataclasses.replace(run.settings, batch=BatchSettings(size)), start.plan, step, start.former)

    assert "so the run has 10 steps in place of 15." in described(5, 24)
    assert described(10, 16) is None, "the ramp would have had the same size"
    assert described(15, 8) is None, "no step is left"


@pytest.mark.parametrize(("step", "size"), [(9, 8), (10, 16), (11, 16)])
def test_a_rate_that_follows_a_longer_ramp_is_noted_at_the_boundary_too(run, step, size):
    """Before the boundary the rate of 8 samples is noted. A size that the former ramp did not have has no rate to keep."""
    length = run.settings.model.sequence_length
    run.settings = dataclasses.replace(run.settings, batch=BatchSettings(16, ramp=f"0:8 {80 * length}:16"))
    run.record()
    run.save(step, batch_plan=run.settings.batch_plan)
    notes = run.start(batch=BatchSettings(32, ramp=f"0:8 {80 * length}:16 {500 * length}:32"), allow_changes=True).notes
    assert (
        [note for note in notes if note.startswith("The peak")]
        == [note for note in notes if f"rate of a step of {size} samples" in note]
        != []
    )
    notes = run.start(batch=BatchSettings(24, ramp=f"0:8 {80 * length}:24"), allow_changes=True).notes if step == 10 else ()
    assert not any(note.startswith("The peak") for note in notes), "the former ramp had no step of 24 samples"


def test_refused_length_of_a_seesaw_gives_a_ramp_that_keeps_its_rates(run):
    length = run.settings.model.sequence_length
    run.settings = dataclasses.replace(
        run.settings,
        batch=BatchSettings(8, ramp="seesaw:16:4", beta2_rule="tokens"),
        schedule=ScheduleSettings(warmup_steps=2),
        train_tokens=800.0 * length,
        train_steps=None,
    )
    before = run.settings.batch_plan
    run.record()
    step = before.segments[-1].first_step + 1
    run.save(step, batch_plan=before)
    assert run.start().plan == before
    message = run.refusal(train_tokens=1600.0 * length, allow_changes=True)
    assert "The sizes of seesaw follow from the length of the run and from its schedule. To change these and keep sizes" in message
    ramp, size, rate, beta2 = re.search(
        r'--batch\.ramp "(.+)" --batch\.global_batch_size (\d+) --optimizer\.learning_rate (\S+) --optimizer\.beta2 (\S+) --allow_changes',
        message,
    ).groups()
    batch = BatchSettings(int(size), ramp=ramp, beta2_rule="tokens")
    optimizer = OptimizerSettings(learning_rate=float(rate), beta2=float(beta2))
    after = run.start(batch=batch, optimizer=optimizer, train_tokens=1600.0 * length, allow_changes=True).plan
    assert after.begins_with(step, before.segments) and 1600 - 16 < after.position(after.steps) <= 1600
    for one in (8, 12, 16):
        former = run.settings.batch.rate_factor(one) * run.settings.optimizer.learning_rate
        assert float(rate) * batch.rate_factor(one) == pytest.approx(former, rel=1e-5)
        assert batch.beta2(one, float(beta2)) == pytest.approx(run.settings.batch.beta2(one, run.settings.optimizer.beta2), rel=1e-5)


def test_run_json_keeps_all_allowed_changes_with_their_times(saved):
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
    assert changes() == [], "a run that starts again from step 0 has no changes"


def test_settings_without_effect_on_results_may_change(saved):
    harmless = {"recompute": True, "compile": True, "log": LogSettings(interval=1), "peak_tflops": 5.0, "deepspeed": "other.json"}
    assert saved.start(**harmless, data=DataSettings(("moved",)), dry_run=True).notes == ()


def test_another_spelling_of_a_recorded_path_is_no_change(run, tmp_path, monkeypatch):
    """The teacher and the initial weights, given by another spelling, from another working folder, or both moved with the run."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "base", "old"):
        (tmp_path / name).mkdir()
    run.settings = dataclasses.replace(run.settings, init="base", distillation=DistillationSettings(teacher="teacher"))
    run.record()
    run.save(10)
    given = {"init": str(tmp_path / "base"), "distillation": DistillationSettings(teacher="./teacher")}
    assert run.start(**given).notes == ()
    assert "  init: base -> other\n" in run.refusal(init="other")
    monkeypatch.chdir(tmp_path.parent)
    found = run_folder.find_paths(run.settings)
    assert (found.init, found.distillation.teacher, found.data.path) == (
        *(str(tmp_path / one) for one in ("base", "teacher")),
        (str(tmp_path / "old"),),
    )
    (tmp_path / "old").rename(tmp_path / "away")
    with pytest.raises(UserError) as refused:
        run_folder.refuse_missing_data(run.settings)
    places = f"{tmp_path}/old, old"
    assert str(refused.value) == (
        f"The data that {run.output} was trained on was not found at any recorded path: {places}. Give it with --data."
    )
    run.settings = found
    assert run.start().notes == ()


def test_changed_data_is_refused(saved):
    message = saved.refusal(fingerprint="e" * 64, data=DataSettings(("new",)))
    assert f"  the data: old {'f' * 12} -> new {'e' * 12}\n" in message


def test_changed_data_of_a_blend_is_refused_with_its_folders(saved):
    message = saved.refusal(fingerprint="e" * 64, data=DataSettings(("old", "new")))
    assert f"  the data: old {'f' * 12} -> old, new {'e' * 12}\n" in message


def test_run_of_a_version_before_packing_is_refused_with_its_differences(saved):
    """In that version run.json has one folder, as text, and samples began one token later."""
    record = json.loads((saved.output / "run.json").read_text())
    record["recipe"]["data"] = {"path": "old", "vocab_size": 4096}
    (saved.output / "run.json").write_text(json.dumps(record))
    lines = saved.refusal(fingerprint="e" * 64, data=DataSettings(("old",), packing="best_fit")).splitlines()
    assert lines[1:-1] == [
        "  the samples: they began one token later, and the first token of the data was never predicted",
        "  data.packing: packed -> best_fit",
        f"  the data: old {'f' * 12} -> old {'e' * 12}",
    ]
    assert saved.start(allow_changes=True).notes[0] == (
        "Resuming with a change: the samples: they began one token later, and the first token of the data was never predicted"
    )


def test_another_model_is_refused_even_with_allow_changes(saved):
    message = saved.refusal(model=ModelConfig(hidden_size=128), allow_changes=True)
    assert message.startswith(
        "RUN/checkpoints/step_00000010 is a checkpoint of another model:\n  hidden_size: 64 in the checkpoint, 128 in this command\n"
    )
    assert "  intermediate_size: 256 in the checkpoint, 512 in this command" in message


@pytest.mark.parametrize(
    "sizes", [{"pipeline_stages": 2}, {"tensor_parallel_size": 2}, {"sequence_parallel_size": 2}, {"pipeline_stages": 2, "recompute": True}]
)
def test_another_layout_or_zero_stage_resumes_without_a_message(saved, sizes):
    other_json = MERGED | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert saved.start(**sizes, merged=other_json, deepspeed="other.json").notes == ()
    assert saved.start(**sizes).resumes


def test_another_precision_needs_allow_changes(saved):
    message = saved.refusal(precision="float32")
    assert message.startswith("RUN has another run:\n  precision: bf16 -> float32\n")
    assert saved.start(precision="float32", allow_changes=True).notes == ("Resuming with a change: precision: bf16 -> float32",)


def test_layout_description_names_ranks_stage_and_precision():
    assert describe_layout(LAYOUT) == "2 rank(s) under ZeRO-1 in bf16"
    many = LAYOUT | {"world_size": 8, "pipeline_stages": 2, "tensor_parallel_size": 2}
    assert describe_layout(many) == "8 rank(s): 2 pipeline stages x tensor parallel 2 x data parallel 2 under ZeRO-1 in bf16"


def test_checkpoint_of_an_earlier_format_is_refused_by_name(run):
    run.record()
    run.save(10, by_this_version=False)
    assert run.refusal(allow_changes=True) == (
        "RUN/checkpoints/step_00000010 was written by Megabatch before 0.2, in DeepSpeed's own files. "
        "Resume with that version, or train again."
    )


def test_damaged_newest_checkpoint_does_not_hide_the_one_before(saved):
    (saved.save(20) / "manifest.json").write_text('{"step": 2')
    assert saved.start().resumes
    assert "another model" in saved.refusal(model=ModelConfig(hidden_size=128), allow_changes=True)


def test_run_whose_checkpoints_are_all_damaged_is_not_a_fresh_start(saved):
    newest = saved.root / "step_00000010"
    (newest / "manifest.json").unlink()
    assert saved.start().resumes, "checkpoints are verified when they are loaded"
    newest.rename(newest.with_name("step_00000010.corrupt"))
    assert saved.start().resumes


def test_tokenizer_in_the_run_folder_is_that_of_the_data(run):
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
    assert run_record.find_tokenizer(run.output) == run.output / "cl100k_base.tiktoken"


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
def test_engine_choices_that_change_results_need_allow_changes(saved, change, words):
    message = saved.refusal(merged=MERGED | change, deepspeed="other.json")
    assert message.splitlines()[1:-1] == [f"  other.json: {words}"]
    assert saved.start(merged=MERGED | change, deepspeed="other.json", allow_changes=True).resumes


def test_switching_quantization_off_is_a_change(run):
    quantized = MERGED | {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    run_folder.record(run.settings, quantized, run.start(), "f" * 64, run.tokenizer)
    run.save(10)
    assert run.start(merged=quantized).notes == ()
    assert "zero_optimization.zero_quantized_weights true -> false" in run.refusal(merged=MERGED)


def test_fewer_steps_than_the_newest_checkpoint_are_refused(saved):
    with pytest.raises(UserError, match="already beyond the 1 steps"):
        saved.start(train_steps=1, allow_changes=True, schedule=dataclasses.replace(saved.settings.schedule, warmup_steps=0))


def test_folder_is_locked_by_one_process_at_a_time(saved):
    with run_folder.lock(saved.settings), pytest.raises(UserError, match="Another process is training"):
        run_folder.lock(saved.settings)
    run_folder.lock(saved.settings).close()
