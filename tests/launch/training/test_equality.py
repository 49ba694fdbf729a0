"""Every layout gives the numbers of plain PyTorch on one process, and resumes from what any other layout saved."""

import functools
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from torch import Tensor

from launch.checkpoints.checkpoint import folder_name, read_manifest
from launch.checkpoints.opening import AveragedState, open_model
from model import huggingface
from model.transformer import Transformer
from tests.launch.training.layout_cases import (
    AFTER_COMPRESSION,
    BERT,
    DECODERS,
    FAMILIES,
    FAMILY_LAYOUTS,
    GPT2,
    LAYOUTS,
    LLAMA,
    OTHER_OPTIMIZERS,
    SEQUENCE,
    STAGES,
    TENSOR,
    case_of,
    name_of,
)
from tests.launch.training.layouts_on_ranks import STEPS, is_of_a_linear, model_config, results_of_ranks, train_plain
from tests.launch.training.noise_by_brute_force import MEASURED_OR_NOT, WITH_NOISE_SCALE, assert_equals_brute_force
from tests.launch.training.noise_by_brute_force import STEPS as NOISE_STEPS
from tests.ranks import REPOSITORY

FEWER_STEPS = 10
"""Number of steps of jobs that save nothing."""


def optimizer_of_slow_tests() -> str:
    """Return the one of OTHER_OPTIMIZERS that the hash of the commit chooses: within a few commits each has its turn."""
    git = shutil.which("git")
    commit = subprocess.run([git, "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout if git else ""
    return OTHER_OPTIMIZERS[int(commit or "0", 16) % len(OTHER_OPTIMIZERS)]


# Layouts alternate between the two families for AdamW; the other family has another optimizer.
WITH_ADAMW = {
    name_of(ranks, json_name, sizes, DECODERS[number % 2]): (ranks, case_of(json_name, sizes, DECODERS[number % 2]))
    for number, (ranks, json_name, sizes) in enumerate(LAYOUTS)
}
WITH_OTHERS = {
    name_of(ranks, json_name, sizes, optimizer, family): (ranks, case_of(json_name, sizes, family, optimizer=optimizer))
    for number, (ranks, json_name, sizes) in enumerate(LAYOUTS)
    for optimizer in [OTHER_OPTIMIZERS[number // 2 % len(OTHER_OPTIMIZERS)]]
    for family in [DECODERS[(number + 1) % 2]]
}
# The slow tests train every layout with the other optimizers too. Each commit has one of these optimizers in its slow tests.
WITH_THE_REMAINING = {
    name: (ranks, case_of(json_name, sizes, DECODERS[number % 2], optimizer=optimizer))
    for number, (ranks, json_name, sizes) in enumerate(LAYOUTS)
    for optimizer in OTHER_OPTIMIZERS
    for name in [name_of(ranks, json_name, sizes, optimizer, DECODERS[number % 2])]
    if name_of(ranks, json_name, sizes, optimizer, DECODERS[(number + 1) % 2]) not in WITH_OTHERS
}
# Four ranks share two cores in these tests: there every third layout has another optimizer than AdamW, and the slow tests have the rest.
ON_FOUR_RANKS = [[name for name, (ranks, _) in some.items() if ranks == 4] for some in (WITH_ADAMW, WITH_OTHERS)]
ONLY_SLOW = {*WITH_THE_REMAINING, *ON_FOUR_RANKS[0][2::3], *ON_FOUR_RANKS[1][0::3], *ON_FOUR_RANKS[1][1::3]}
IN_OTHER_FAMILIES = {
    name_of(ranks, json_name, sizes, family): (ranks, case_of(json_name, sizes, family, samples=True))
    for family, layouts in FAMILY_LAYOUTS.items()
    for ranks, json_name, sizes in layouts
}
CHOSEN = optimizer_of_slow_tests()
TRAINED = {
    name: (ranks, case)
    for name, (ranks, case) in (WITH_ADAMW | WITH_OTHERS | WITH_THE_REMAINING | IN_OTHER_FAMILIES).items()
    if name not in ONLY_SLOW or case.get("optimizer") in (None, CHOSEN)
}
WITH_CAUTION = ["--optimizer.cautious_decay=true", "--optimizer.weight_decay=1"]
OTHERS = {
    "clipping off": (2, {"json": "zero2", "model": GPT2, "clipping": 0.0}),
    "clipping off, pipeline": (2, {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "clipping": 0.0}),
    "sequence parallel, more ranks than keys": (2, {"json": "zero2", "layout": SEQUENCE, "model": LLAMA | {"num_key_value_heads": 1}}),
    "tensor parallel, uneven feed-forward": (2, {"json": "zero1", "layout": TENSOR, "model": LLAMA | {"intermediate_size": 33}}),
    "pipeline, overlapped communication": (
        2,
        {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "zero": {"overlap_comm": True}},
    ),
    "lamb, sub-groups": (2, {"json": "zero3", "model": LLAMA, "zero": {"sub_group_size": 6000}, "optimizer": "lamb"}),
    "lamb, not a number": (2, {"json": "zero2", "model": LLAMA, "poison": 5, "optimizer": "lamb"}),
    "lamb, tensor parallel, uneven feed-forward": (
        2,
        {"json": "zero1", "layout": TENSOR, "model": LLAMA | {"intermediate_size": 33}, "optimizer": "lamb"},
    ),
    "muon, sub-groups": (2, {"json": "zero3", "model": LLAMA, "zero": {"sub_group_size": 6000}, "optimizer": "muon"}),
    "muon, not a number": (2, {"json": "zero2", "model": LLAMA, "poison": 5, "optimizer": "muon"}),
    "muon, uneven feed-forward": (
        2,
        {"json": "zero1", "layout": TENSOR, "model": LLAMA | {"intermediate_size": 33}, "optimizer": "muon"},
    ),
    "muon, cross-attention": (2, case_of("pipeline_zero1", STAGES, "t5", optimizer="muon")),
    **{
        f"{'cautious ' if cautious else ''}{name}": (2, case_of("zero1", {}, "llama", optimizer=name, words=WITH_CAUTION * cautious))
        for name, cautious in (("sgd", False), ("lion", False), ("lion", True), ("adamw", True), ("muon", True))
    },
    "lars": (2, {"json": "zero1", "layout": TENSOR, "model": LLAMA, "optimizer": "lars"}),
    "lars, pipeline": (2, {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "optimizer": "lars"}),
    "four stages in a row of five layers": (
        4,
        {"json": "pipeline_zero1", "layout": {"pipeline_stages": 4}, "model": LLAMA, "pipeline": {"partition": "uniform"}},
    ),
    "as many stages as blocks, by type": (
        2,
        {"json": "pipeline_zero1", "layout": STAGES, "model": GPT2, "pipeline": {"partition": "type:block"}},
    ),
    **{
        f"batch ramp, {ranks} {json_name} {sizes}": (ranks, case_of(json_name, sizes, "llama", ramp=3))
        for ranks, json_name, sizes in (
            *((2, f"zero{stage}", {}) for stage in range(4)),
            *((2, json_name, {}) for json_name in ("zero2_offload", "zero3_offload")),
            *((2, json_name, STAGES) for json_name in ("pipeline_zero1", "pipeline_dualpipev")),
            *((2, json_name, SEQUENCE) for json_name in ("zero1", "zero3")),
            (2, "zero1", TENSOR),
            (4, "pipeline_zero1", STAGES | SEQUENCE),
            (4, "zero0", TENSOR | SEQUENCE),
        )
    },
    **{
        f"not a number, {json_name} {sizes}": (2, {"json": json_name, "layout": sizes, "model": LLAMA, "poison": 5})
        for json_name, sizes in (
            *((f"zero{stage}", {}) for stage in range(4)),
            *((f"zero{stage}", TENSOR) for stage in range(4)),
            ("zero1", SEQUENCE),
            ("pipeline_zero1", STAGES),
            ("pipeline_dualpipev", STAGES),
        )
    },
}
# The batch in 1, 2, 4 and 8 micro-batches, whose shares of ignored targets differ between 0 and 70 %.
ACCUMULATED = {
    f"{8 // size} micro-batches": (1, {"json": "zero1", "model": LLAMA, "micro_batch": size, "clipping": 0.0}) for size in (8, 4, 2, 1)
}
# These jobs generate a text and validate between two steps. The others are compared with the first.
SAMPLED = {
    f"{ranks} {json_name} {sizes}": (ranks, case_of(json_name, sizes, "llama", samples=True, recompute=True, **more))
    for ranks, json_name, sizes, more in (
        (1, "zero1", {}, {}),
        (1, "zero3", {}, {"zero": {"stage3_param_persistence_threshold": 0}}),
        (2, "zero1", TENSOR, {}),
        (2, "zero3", SEQUENCE, {"zero": {"stage3_param_persistence_threshold": 0}}),
        (2, "pipeline_zero1", STAGES, {}),
        (2, "pipeline_dualpipev", STAGES, {}),
        (4, "pipeline_zero1", STAGES | TENSOR, {}),
        (4, "pipeline_dualpipev", STAGES | SEQUENCE, {}),
    )
}
# bf16 has 8 significant bits: measured differences were 0.00025 for these losses of about 4.2, and 0.25 % for the norms.
IN_BF16 = (
    {
        f"bf16 {ranks} {json_name} {sizes}": (ranks, {"json": json_name, "layout": sizes, "model": GPT2, "precision": "bf16"})
        for ranks, json_name, sizes in (
            *((ranks, f"zero{stage}", {}) for stage in (1, 2, 3) for ranks in (1, 2)),
            *((2, f"zero{stage}", TENSOR) for stage in (1, 2)),
            *((2, f"zero{stage}", SEQUENCE) for stage in (1, 3)),
            (2, "pipeline_zero1", STAGES),
            (2, "pipeline_dualpipev", STAGES),
            (4, "pipeline_zero1", {"pipeline_stages": 4}),
            (4, "pipeline_zero1", STAGES | TENSOR),
        )
    }
    | {
        f"bf16 {optimizer} 2 {json_name} {sizes}": (
            2,
            {"json": json_name, "layout": sizes, "model": GPT2, "precision": "bf16", "optimizer": optimizer},
        )
        for optimizer, json_name, sizes in (
            *(("lamb", f"zero{stage}", {}) for stage in (1, 2, 3)),
            *(("muon", f"zero{stage}", {}) for stage in (1, 3)),
            *((optimizer, "pipeline_zero1", STAGES) for optimizer in ("lamb", "muon")),
            *((optimizer, "zero1", {}) for optimizer in ("lars", "lion", "sgd")),
        )
    }
    | {"bf16, not a number": (4, {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "precision": "bf16", "poison": 5})}
)
# Dropout is a function of seed, step, micro-batch and layer: it is the same under data parallelism and in pipelines.
WITH_DROPOUT = {
    f"dropout {ranks} {json_name} {family}": (
        ranks,
        {"json": json_name, "layout": sizes, "model": FAMILIES[family] | {"dropout": 0.1}, "recompute": recompute, "micro_batch": 2},
    )
    for ranks, json_name, sizes, recompute, family in (
        (1, "zero1", {}, False, "llama"),
        (1, "zero3", {}, True, "llama"),
        (2, "zero2", {}, False, "llama"),
        (2, "pipeline_zero1", STAGES, True, "llama"),
        (2, "pipeline_dualpipev", STAGES, False, "llama"),
        (4, "pipeline_zero1", STAGES, False, "llama"),
        (1, "zero1", {}, False, "transformer"),
        (2, "pipeline_zero1", STAGES, True, "transformer"),
    )
}


COMPRESSED_MODEL = LLAMA | {"intermediate_size": 48}


def compressed_case(name: str, saved: Path) -> dict:
    """Return a case of training after compression, with the models that it starts from and learns from."""
    json_name, sizes, words, more = AFTER_COMPRESSION[name]
    return case_of(json_name, sizes, "llama", **more) | {"model": COMPRESSED_MODEL, "words": [word.format(models=saved) for word in words]}


def make_models(folder: Path) -> None:
    """Export a model with half of its linear weights 0, and a teacher for it with other widths."""
    dense = Transformer(model_config({"model": COMPRESSED_MODEL | {"hidden_size": 64}}), seed=7)
    pruned = Transformer(model_config({"model": COMPRESSED_MODEL}), seed=3)
    for name, weight in pruned.named_parameters():
        if is_of_a_linear(name):
            weight.data[:, ::2] = 0
    for name, model in (("dense", dense), ("pruned", pruned)):
        huggingface.export(model.config, model.state_dict(), folder / name)


def with_marks(names: Iterable[str]) -> list:
    """Return the names as values of pytest.mark.parametrize, of which those in ONLY_SLOW are slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ONLY_SLOW else name for name in names]


class JobsOnRanks:
    """Starts ranks once for all jobs of a world size, once more for those of slow tests, and keeps their results or their failure."""

    def __init__(self, jobs: dict[str, tuple[int, dict]], folder: Path):
        self._jobs, self._folder = jobs, folder
        self._answers: dict[tuple[int, bool], dict[str, dict] | AssertionError] = {}

    def answer(self, name: str) -> dict:
        """Return the result of a job. All jobs that share its ranks are run together, at the first call."""
        key = ranks, _ = self._jobs[name][0], name in ONLY_SLOW
        if key not in self._answers:
            jobs = {other: job for other, (world_size, job) in self._jobs.items() if (world_size, other in ONLY_SLOW) == key}
            try:
                answers = results_of_ranks(ranks, list(jobs.values()), self._folder, timeout_seconds=900)
                assert all(str(answer) == str(answers[0]) for answer in answers), "the ranks report different numbers"
                self._answers[key] = dict(zip(jobs, answers[0], strict=True))
            except AssertionError as failure:
                self._answers[key] = failure
        results = self._answers[key]
        if isinstance(results, AssertionError):
            raise results
        return results[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def first_half(saved) -> JobsOnRanks:
    jobs = {name: (ranks, job(case, save=str(saved / name))) for name, (ranks, case) in TRAINED.items()}
    more = {
        name: (ranks, job(case)) for some in (OTHERS, ACCUMULATED, SAMPLED, IN_BF16, WITH_DROPOUT) for name, (ranks, case) in some.items()
    }
    more |= {name: (ranks, job(case, steps=NOISE_STEPS)) for name, (ranks, case) in WITH_NOISE_SCALE.items()}
    more |= {name: (2, job(case, save=str(saved / name))) for name, case in MEASURED_OR_NOT.items()}
    make_models(saved)
    more |= {name: (2, job(compressed_case(name, saved), init=str(saved / "pruned"), save=str(saved / name))) for name in AFTER_COMPRESSION}
    assert not jobs.keys() & more.keys()
    return JobsOnRanks(jobs | more, saved)


WEIGHT_BOUNDS = {"adamw": 1e-5, "lamb": 1e-6, "muon": 5e-6}
"""Largest difference of a weight after 20 steps. AdamW can enlarge a rounding error to a fraction of its rate."""


def job(
    case: dict, first: int = 0, load: str | None = None, init: str | None = None, save: str | None = None, steps: int = FEWER_STEPS
) -> dict:
    return {"case": case, "first": first, "load": load, "init": init, "save": save, "steps": STEPS if save else steps}


@functools.cache
def _plain(case: str) -> tuple:
    return train_plain(json.loads(case))


def plain(case: dict) -> tuple:
    """Return losses, gradient norms and weights of the reference, which is computed once for all layouts."""
    return _plain(
        json.dumps(
            {key: case[key] for key in ("model", "loss", "clipping", "poison", "words", "optimizer", "ramp") if key in case} | {"json": ""}
        )
    )


def differences(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference in each parameter."""
    assert ours.keys() == expected.keys()
    return {name: float((ours[name] - tensor).abs().max()) for name, tensor in expected.items()}


def assert_equal(measured: dict, expected: list, loss_bound: float, norm_bound: float) -> None:
    assert len(measured["history"]) == len(expected) >= FEWER_STEPS
    for (loss, norm), (plain_loss, plain_norm) in zip(measured["history"], expected, strict=True):
        if plain_loss != plain_loss:  # the step with a NaN: the steps after it show that it changed nothing
            continue
        assert loss == pytest.approx(plain_loss, abs=loss_bound)
        assert norm == pytest.approx(plain_norm, rel=norm_bound)


@pytest.mark.parametrize("name", with_marks(TRAINED))
def test_a_layout_gives_the_numbers_of_plain_pytorch(name, first_half, saved):
    history, weights = plain(TRAINED[name][1])
    assert_equal(first_half.answer(name), history[:STEPS], 1e-5, 1e-5)
    apart = differences(AveragedState([saved / name / folder_name(STEPS)]), weights)
    assert max(apart.values()) < WEIGHT_BOUNDS[TRAINED[name][1].get("optimizer", "adamw")], apart


def like(name: str) -> list[str]:
    """Return the names in TRAINED that are slow tests if `name` is one, and no slow tests if it is none."""
    return [other for other in TRAINED if (other in ONLY_SLOW) == (name in ONLY_SLOW)]


SCALARS = {
    "lamb": {f"optimizer/{scalar}" for scalar in ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max", "relative_update")},
    "muon": {"optimizer/relative_update"},
}


@pytest.mark.parametrize("name", with_marks(name for name, (_, case) in TRAINED.items() if case.get("optimizer") in SCALARS))
def test_all_layouts_report_the_same_scalars_of_an_optimizer(name, first_half):
    optimizer, family = name.split("-")[-2:]
    reference = first_half.answer(next(other for other in like(name) if other.endswith(f"-{optimizer}-{family}")))["scalars"]
    assert set(reference) == SCALARS[optimizer] and min(reference.values()) > 0
    assert first_half.answer(name)["scalars"] == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", with_marks(name for name in TRAINED if "-lamb-" in name))
def test_lamb_exchanges_16_bytes_a_matrix(name, first_half):
    ranks, case = TRAINED[name]
    for exchanged, matrices in first_half.answer(name)["bytes"]:
        ranks_of_stage = ranks // case["layout"].get("pipeline_stages", 1)
        assert exchanged == (16 * matrices * STEPS if ranks_of_stage > 1 else 0)


@pytest.mark.parametrize("name", with_marks(name for name in TRAINED if "-muon-" in name))
def test_muon_exchanges_no_more_than_the_bound_of_the_layout(name, first_half):
    """The bounds of launch/training/optimizers/matrix_exchange.py, in float32, plus the report of one step."""
    ranks, case = TRAINED[name]
    sizes, exchanged = case["layout"], first_half.answer(name)["bytes"]
    ranks_of_stage = ranks // sizes.get("pipeline_stages", 1)
    values = sum(weight.numel() for parameter, weight in plain(case)[1].items() if is_of_a_linear(parameter))
    tensor_ranks = sizes.get("tensor_parallel_size", 1)
    each = 4 * (ranks_of_stage + tensor_ranks - 2) / tensor_ranks if case["json"] == "zero0" else 8
    report = sum(16 * matrices for _, matrices in exchanged)
    total = sum(sent for sent, _ in exchanged)
    assert report < total <= each * values * STEPS + report if ranks_of_stage > 1 else total == 0


@pytest.mark.parametrize("name", with_marks([*TRAINED, *IN_BF16]))
def test_plan_counts_the_memory_of_the_optimizer(name, first_half):
    measured, planned = first_half.answer(name)["optimizer_bytes"]
    assert measured == pytest.approx(planned, rel=0.03)  # vectors are whole on tensor-parallel ranks, and DeepSpeed pads


@pytest.mark.parametrize("name", OTHERS)
def test_special_cases_match_plain_pytorch(name, first_half):
    assert_equal(first_half.answer(name), plain(OTHERS[name][1])[0][:FEWER_STEPS], 1e-5, 1e-5)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulation_changes_neither_loss_nor_gradient_norm(name, first_half):
    assert_equal(first_half.answer(name), plain(ACCUMULATED[name][1])[0][:FEWER_STEPS], 4e-6, 1e-6)  # 1e-6 of losses of about 4.2


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_and_validation_do_not_change_training(name, first_half):
    answer, reference = first_half.answer(name), first_half.answer(next(iter(SAMPLED)))
    assert_equal(answer, plain(SAMPLED[name][1])[0][:FEWER_STEPS], 1e-5, 1e-5)
    assert answer["drawn"] == reference["drawn"]
    assert answer["validated"] == pytest.approx(reference["validated"], abs=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, case) in TRAINED.items() if "samples" in case])
def test_samples_and_validation_are_equal_in_all_layouts_of_a_family(name, first_half):
    family = name.rpartition("-")[2]
    answer, reference = (first_half.answer(one) for one in (name, next(one for one in TRAINED if one.endswith(f"-{family}"))))
    assert answer.get("drawn") == reference.get("drawn") and ("drawn" in answer) == (family in ("transformer", "t5"))
    assert answer["validated"] == pytest.approx(reference["validated"], abs=1e-5)
    assert (min(answer["validated"][2:]) > 0) == (family == "bert"), "classes are counted if there are any"


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_is_close_to_float32(name, first_half):
    assert_equal(first_half.answer(name), plain(IN_BF16[name][1])[0][:FEWER_STEPS], 1e-3, 1e-2)


@pytest.mark.parametrize("name", [name for name in WITH_DROPOUT if "1 zero1" not in name])
def test_dropout_is_the_same_under_data_parallelism_and_in_pipelines(name, first_half):
    family = name.rpartition(" ")[2]
    reference = first_half.answer(f"dropout 1 zero1 {family}")["history"]
    assert_equal(first_half.answer(name), reference, 1e-5, 1e-5)
    without = train_plain({"json": "", "model": FAMILIES[family]}, FEWER_STEPS)[0]
    assert max(abs(loss - other) for (loss, _), (other, _) in zip(reference, without, strict=True)) > 1e-3


@pytest.mark.parametrize("name", WITH_NOISE_SCALE)
def test_squared_gradient_norms_equal_brute_force(name, first_half):
    assert_equals_brute_force(first_half.answer(name)["squares"], WITH_NOISE_SCALE[name][1])


def test_noise_scale_changes_no_bit_and_off_it_registers_nothing(first_half, saved):
    on, off = (first_half.answer(name) for name in MEASURED_OR_NOT)
    sums = [read_manifest(saved / name / folder_name(STEPS))["checksums"] for name in MEASURED_OR_NOT]
    assert on["history"] == off["history"] and sums[0] == sums[1]
    assert on["hooks"] > 0 and off["hooks"] == 0


def alike(case: dict) -> tuple:
    return case["model"], case.get("optimizer")


# Which checkpoint each layout resumes from: that of the layout half of the list later, of the same family and optimizer.
RESUMES_FROM = {
    name: others[(others.index(name) + len(others) // 2) % len(others)]
    for name, (_, case) in TRAINED.items()
    for others in [[other for other in like(name) if alike(TRAINED[other][1]) == alike(case)]]
}


COMPRESSED_RESUMES_FROM = {
    "taught zero3": "taught pipeline_zero1",
    "taught pipeline_zero1": "taught zero1",
    "rounded zero2": "rounded zero3",
}


# Runs that start from the weights of another: the same model, or one with other outputs, whose embedding has another name.
CLASSIFIER = {"model": BERT | {"num_classes": 3, "token_head": False}}
STARTS_FROM = {
    "zero3-llama": (case_of("zero3", {}, "llama"), "2-zero2-llama"),
    "tensor-llama": (case_of("zero1", TENSOR, "llama"), "2-zero3-lamb-llama"),
    "pipeline-transformer": (case_of("pipeline_zero1", STAGES, "transformer"), "2-zero2-transformer"),
    "zero2-classifier": (case_of("zero2", {}, "bert") | CLASSIFIER, "2-zero3-bert"),
    "dualpipev-classifier": (case_of("pipeline_dualpipev", STAGES, "bert") | CLASSIFIER, "2-zero1-bert"),
}


@pytest.fixture(scope="module")
def second_half(first_half, saved) -> JobsOnRanks:
    resumed = {
        name: (ranks, job(case, first=STEPS, load=str(saved / RESUMES_FROM[name] / folder_name(STEPS))))
        for name, (ranks, case) in TRAINED.items()
    }
    started = {name: (2, job(case, init=str(saved / origin / folder_name(STEPS)))) for name, (case, origin) in STARTS_FROM.items()}
    compressed = {
        name: (2, job(compressed_case(name, saved), first=STEPS, load=str(saved / origin / folder_name(STEPS))))
        for name, origin in COMPRESSED_RESUMES_FROM.items()
    }
    return JobsOnRanks(resumed | started | compressed, saved)


@pytest.mark.parametrize("name", with_marks(TRAINED))
def test_resume_in_another_layout_matches_a_run_that_never_stopped(name, first_half, second_half):
    for ranks in {ranks for ranks, _ in TRAINED.values()}:  # every job that saves a checkpoint has run
        first_half.answer(next(other for other in like(name) if TRAINED[other][0] == ranks))
    assert_equal(second_half.answer(name), plain(TRAINED[name][1])[0][STEPS : STEPS + FEWER_STEPS], 1e-5, 1e-5)


@pytest.mark.parametrize("name", STARTS_FROM)
def test_init_from_another_layouts_weights_matches_plain_pytorch(name, first_half, second_half):
    case, origin = STARTS_FROM[name]
    first_half.answer(origin)
    _, weights = plain(TRAINED[origin][1])
    if name.endswith("classifier"):
        weights = {name: weight for name, weight in weights.items() if name.startswith(("1.", "2.", "3.", "4.", "5.", "6.pooler."))} | {
            "0.weight": weights["tied_modules.embedding.weight"]
        }
    assert_equal(second_half.answer(name), train_plain(case, FEWER_STEPS, weights)[0], 1e-5, 1e-5)


@pytest.mark.parametrize("name", AFTER_COMPRESSION)
def test_training_after_compression_matches_plain_pytorch_and_keeps_zeros(name, first_half, saved):
    answer, case = first_half.answer(name), compressed_case(name, saved)
    history, weights = plain(case)
    assert_equal(answer, history[:STEPS], *((1e-3, 1e-2) if "bf16" in name else (1e-5, 1e-5)))
    ours, pruned = AveragedState([saved / name / folder_name(STEPS)]), open_model(str(saved / "pruned")).state
    for parameter in weights:
        zero = pruned[parameter] == 0
        assert (ours[parameter][zero] == 0).all() and zero.any() == is_of_a_linear(parameter)
        assert (ours[parameter][~zero] != pruned[parameter][~zero]).any()


@pytest.mark.parametrize("name", COMPRESSED_RESUMES_FROM)
def test_training_after_compression_resumes_in_another_layout(name, first_half, second_half, saved):
    first_half.answer(name)
    assert_equal(second_half.answer(name), plain(compressed_case(name, saved))[0][STEPS : STEPS + FEWER_STEPS], 1e-5, 1e-5)


def test_no_case_resumes_from_its_own_layout():
    layout = lambda name: (TRAINED[name][0], TRAINED[name][1]["json"], TRAINED[name][1]["layout"])  # noqa: E731
    assert all(layout(name) != layout(other) for name, other in RESUMES_FROM.items())


COMPILED = {
    ranks: [case_of(json_name, sizes, "llama", compile=True, **more) for json_name, sizes, more in some]
    for ranks, some in {
        1: [
            ("zero1", {}, {}),
            ("zero1", {}, {"words": ["--quantization.bits=4", "--quantization.group_size=8", "--quantization.symmetric=false"]}),
        ],
        2: [
            (json_name, sizes, {})
            for json_name, sizes in (("zero3", {}), ("pipeline_zero1", STAGES), ("zero1", TENSOR), ("zero1", SEQUENCE))
        ],
    }.items()
}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU, and there is none")
@pytest.mark.parametrize("ranks", COMPILED)
def test_compiled_blocks_give_the_same_numbers(ranks, tmp_path):
    answers = results_of_ranks(ranks, [job(case) for case in COMPILED[ranks]], tmp_path, timeout_seconds=600)
    for case, measured in zip(COMPILED[ranks], answers[0], strict=True):
        assert_equal(measured, plain(case)[0][:FEWER_STEPS], 1e-5, 1e-5)


WITHOUT_WEIGHTS = GPT2 | {
    "tie_embeddings": True,
    "positions": "sinusoidal",
    "norm_position": "post",
}  # one of its five stages has no weights
MANY_RANKS = {
    "stages, tensors and sequences shared at once": (8, case_of("pipeline_zero1", STAGES | TENSOR | SEQUENCE, "llama")),
    "an encoder-decoder in stages that receive and send": (4, case_of("pipeline_zero1", {"pipeline_stages": 4}, "t5")),
    "an encoder-decoder in eight parts": (4, case_of("pipeline_dualpipev", {"pipeline_stages": 4}, "t5")),
    "an encoder-decoder in four stages with one embedding": (4, case_of("pipeline_zero1", {"pipeline_stages": 4}, "transformer")),
    "as many stages as layers": (5, case_of("pipeline_zero1", {"pipeline_stages": 5}, "llama", pipeline={"partition": "uniform"})),
    "a stage without weights": (
        5,
        case_of("pipeline_zero1", {"pipeline_stages": 5}, "llama", pipeline={"partition": "uniform"}) | {"model": WITHOUT_WEIGHTS},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY_RANKS)
def test_many_ranks_match_plain_pytorch_and_resume(name, tmp_path):
    ranks, case = MANY_RANKS[name]
    jobs = [job(case, save=str(tmp_path)), job(case, first=STEPS, load=str(tmp_path / folder_name(STEPS)))]
    answers = results_of_ranks(ranks, jobs, tmp_path, timeout_seconds=500)
    for measured, expected in zip(answers[0], (plain(case)[0][:STEPS], plain(case)[0][STEPS : STEPS + FEWER_STEPS]), strict=True):
        assert_equal(measured, expected, 1e-5, 1e-5)
