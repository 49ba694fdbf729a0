"""Every way to run gives the numbers of plain PyTorch on one process, and goes on from what any other way saved."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from launch.checkpoints.checkpoint import name_of as folder_of
from launch.checkpoints.opening import Averaged, open_model
from model import huggingface
from model.transformer import Transformer
from tests.launch.training.layout_cases import (
    BERT,
    DECODERS,
    FAMILIES,
    FAMILY_LAYOUTS,
    GPT2,
    HEALED,
    LAYOUTS,
    LLAMA,
    SEQUENCE,
    STAGES,
    TENSOR,
    case_of,
    name_of,
)
from tests.launch.training.layouts_on_ranks import STEPS, is_of_a_linear, model_config, train_plain
from tests.ranks import answers_of_ranks

RANK_SCRIPT = Path(__file__).with_name("layouts_on_ranks.py")
FEWER_STEPS = 10
"""Of jobs that save nothing."""

# On 4 ranks, which share two cores here, every second layout has the other family.
TRAINED = {
    name_of(ranks, json_name, sizes, family): (ranks, case_of(json_name, sizes, family))
    for number, (ranks, json_name, sizes) in enumerate(LAYOUTS)
    for which, family in enumerate(DECODERS)
    if ranks == 2 or number % 2 == which
} | {
    name_of(ranks, json_name, sizes, family): (ranks, case_of(json_name, sizes, family, samples=True))
    for family, layouts in FAMILY_LAYOUTS.items()
    for ranks, json_name, sizes in layouts
}
OTHERS = {
    "clipping off": (2, {"json": "zero2", "model": GPT2, "clipping": 0.0}),
    "clipping off, pipeline": (2, {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "clipping": 0.0}),
    "sequence parallel, more ranks than keys": (2, {"json": "zero2", "layout": SEQUENCE, "model": LLAMA | {"num_key_value_heads": 1}}),
    "tensor parallel, uneven feed-forward": (2, {"json": "zero1", "layout": TENSOR, "model": LLAMA | {"intermediate_size": 33}}),
    "pipeline, overlapped communication": (
        2,
        {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "zero": {"overlap_comm": True}},
    ),
    "four stages in a row of five layers": (
        4,
        {"json": "pipeline_zero1", "layout": {"pipeline_stages": 4}, "model": LLAMA, "pipeline": {"partition": "uniform"}},
    ),
    "as many stages as blocks, by type": (
        2,
        {"json": "pipeline_zero1", "layout": STAGES, "model": GPT2, "pipeline": {"partition": "type:block"}},
    ),
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
# Between two steps these draw a text and validate; the first is what the others are held to.
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
# bf16 keeps 8 bits of a number: these losses of about 4.2 were seen to differ by 0.00025, the norms by 0.25 %.
IN_BF16 = {
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
} | {"bf16, not a number": (4, {"json": "pipeline_zero1", "layout": STAGES, "model": LLAMA, "precision": "bf16", "poison": 5})}
# Dropout's numbers are a function of seed, step, micro-batch and layer: data parallelism and stages do not matter to them.
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


HEALED_MODEL = LLAMA | {"intermediate_size": 48}


def healed(name: str, saved: Path) -> dict:
    """A case of training after compression, with the models that it begins from and learns from."""
    json_name, sizes, words, more = HEALED[name]
    return case_of(json_name, sizes, "llama", **more) | {"model": HEALED_MODEL, "words": [word.format(models=saved) for word in words]}


def make_models(folder: Path) -> None:
    """A model half of whose linear weights are 0, and one of other widths that teaches it."""
    dense = Transformer(model_config({"model": HEALED_MODEL | {"hidden_size": 64}}), seed=7)
    pruned = Transformer(model_config({"model": HEALED_MODEL}), seed=3)
    for name, weight in pruned.named_parameters():
        if is_of_a_linear(name):
            weight.data[:, ::2] = 0
    for name, model in (("dense", dense), ("pruned", pruned)):
        huggingface.export(model.config, model.state_dict(), folder / name)


class Ranks:
    """Starts ranks once for all jobs of a world size, and keeps what they answered, or how they failed."""

    def __init__(self, jobs: dict[str, tuple[int, dict]]):
        self._jobs = jobs
        self._answers: dict[int, dict[str, dict] | AssertionError] = {}

    def answer(self, name: str) -> dict:
        ranks = self._jobs[name][0]
        if ranks not in self._answers:
            mine = {other: job for other, (world_size, job) in self._jobs.items() if world_size == ranks}
            try:
                answers = answers_of_ranks(ranks, RANK_SCRIPT, json.dumps(list(mine.values())), timeout_seconds=500)
                assert all(str(answer) == str(answers[0]) for answer in answers), "the ranks report different numbers"
                self._answers[ranks] = dict(zip(mine, answers[0], strict=True))
            except AssertionError as failure:
                self._answers[ranks] = failure
        found = self._answers[ranks]
        if isinstance(found, AssertionError):
            raise found
        return found[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def first_half(saved) -> Ranks:
    jobs = {name: (ranks, job(case, save=str(saved / name))) for name, (ranks, case) in TRAINED.items()}
    more = {name: (ranks, job(case)) for some in (OTHERS, SAMPLED, WITH_DROPOUT) for name, (ranks, case) in some.items()}
    more |= {name: (ranks, job(case, steps=STEPS)) for name, (ranks, case) in IN_BF16.items()}
    make_models(saved)
    more |= {name: (2, job(healed(name, saved), init=str(saved / "pruned"), save=str(saved / name))) for name in HEALED}
    assert not jobs.keys() & more.keys()
    return Ranks(jobs | more)


def job(
    case: dict, first: int = 0, load: str | None = None, init: str | None = None, save: str | None = None, steps: int = FEWER_STEPS
) -> dict:
    return {"case": case, "first": first, "load": load, "init": init, "save": save, "steps": STEPS if save else steps}


@functools.cache
def _plain(case: str) -> tuple:
    return train_plain(json.loads(case))


def plain(case: dict) -> tuple:
    """Losses, gradient norms and weights of the reference, worked out once for all layouts."""
    return _plain(json.dumps({key: case[key] for key in ("model", "loss", "clipping", "poison", "words") if key in case} | {"json": ""}))


def assert_equal(measured: dict, expected: list, loss_bound: float, norm_bound: float) -> None:
    assert len(measured["history"]) == len(expected) >= FEWER_STEPS
    for (loss, norm), (plain_loss, plain_norm) in zip(measured["history"], expected, strict=True):
        if plain_loss != plain_loss:  # a poisoned step: the steps behind it show that it changed nothing
            continue
        assert loss == pytest.approx(plain_loss, abs=loss_bound)
        assert norm == pytest.approx(plain_norm, rel=norm_bound)


@pytest.mark.parametrize("name", TRAINED)
def test_a_layout_gives_the_losses_gradient_norms_and_weights_of_plain_pytorch(name, first_half, saved):
    history, weights = plain(TRAINED[name][1])
    assert_equal(first_half.answer(name), history[:STEPS], 1e-5, 1e-5)
    ours = Averaged([saved / name / folder_of(STEPS)])
    assert ours.keys() == weights.keys()
    for parameter, tensor in weights.items():  # 20 steps of AdamW may blow a rounding up to a part of its rate
        assert float((ours[parameter] - tensor).abs().max()) < 1e-5, parameter


@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_with(name, first_half):
    assert_equal(first_half.answer(name), plain(OTHERS[name][1])[0][:FEWER_STEPS], 1e-5, 1e-5)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_text_and_a_validation_between_steps_are_the_same_and_leave_nothing_behind(name, first_half):
    answer, reference = first_half.answer(name), first_half.answer(next(iter(SAMPLED)))
    assert_equal(answer, plain(SAMPLED[name][1])[0][:FEWER_STEPS], 1e-5, 1e-5)
    assert answer["drawn"] == reference["drawn"]
    assert answer["validated"] == pytest.approx(reference["validated"], abs=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, case) in TRAINED.items() if "samples" in case])
def test_so_they_are_in_every_family(name, first_half):
    family = name.rpartition("-")[2]
    answer, reference = (first_half.answer(one) for one in (name, next(one for one in TRAINED if one.endswith(f"-{family}"))))
    assert answer.get("drawn") == reference.get("drawn") and ("drawn" in answer) == (family in ("transformer", "t5"))
    assert answer["validated"] == pytest.approx(reference["validated"], abs=1e-5)
    assert (min(answer["validated"][2:]) > 0) == (family == "bert"), "classes are counted where there are some"


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_stays_near_float32(name, first_half):
    assert_equal(first_half.answer(name), plain(IN_BF16[name][1])[0][:STEPS], 1e-3, 1e-2)


@pytest.mark.parametrize("name", [name for name in WITH_DROPOUT if "1 zero1" not in name])
def test_dropout_is_the_same_under_data_parallelism_and_in_pipelines(name, first_half):
    family = name.rpartition(" ")[2]
    reference = first_half.answer(f"dropout 1 zero1 {family}")["history"]
    assert_equal(first_half.answer(name), reference, 1e-5, 1e-5)
    without = train_plain({"json": "", "model": FAMILIES[family]}, FEWER_STEPS)[0]
    assert max(abs(loss - other) for (loss, _), (other, _) in zip(reference, without, strict=True)) > 1e-3


# Who goes on from whom: within a family, from the checkpoint of the layout that stands some places further on.
GOES_ON_FROM = {
    name: others[(others.index(name) + 8) % len(others)]
    for family in FAMILIES
    for others in [[name for name in TRAINED if name.endswith(f"-{family}")]]
    for name in others
}


HEALS_ON_FROM = {
    "taught zero3": "taught pipeline_zero1",
    "taught pipeline_zero1": "taught zero1",
    "rounded zero2": "rounded zero3",
}


# Which start anew from whose weights: the same model, or one with other outputs, which has an embedding of its own name.
CLASSIFIER = {"model": BERT | {"num_classes": 3, "token_head": False}}
STARTED = {
    "zero3-llama": (case_of("zero3", {}, "llama"), "2-zero1-llama"),
    "tensor-llama": (case_of("zero1", TENSOR, "llama"), "2-zero3-llama"),
    "pipeline-transformer": (case_of("pipeline_zero1", STAGES, "transformer"), "2-zero2-transformer"),
    "zero2-classifier": (case_of("zero2", {}, "bert") | CLASSIFIER, "2-zero3-bert"),
    "dualpipev-classifier": (case_of("pipeline_dualpipev", STAGES, "bert") | CLASSIFIER, "2-zero1-bert"),
}


@pytest.fixture(scope="module")
def second_half(first_half, saved) -> Ranks:
    going_on = {
        name: (ranks, job(case, first=STEPS, load=str(saved / GOES_ON_FROM[name] / folder_of(STEPS))))
        for name, (ranks, case) in TRAINED.items()
    }
    starting = {name: (2, job(case, init=str(saved / origin / folder_of(STEPS)))) for name, (case, origin) in STARTED.items()}
    healing = {
        name: (2, job(healed(name, saved), first=STEPS, load=str(saved / origin / folder_of(STEPS))))
        for name, origin in HEALS_ON_FROM.items()
    }
    return Ranks(going_on | starting | healing)


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_of_any_layout_goes_on_in_any_other_with_the_numbers_of_a_run_that_never_stopped(name, first_half, second_half):
    for ranks in {TRAINED[other][0] for other in TRAINED}:  # all checkpoints are there
        first_half.answer(next(other for other in TRAINED if TRAINED[other][0] == ranks))
    assert_equal(second_half.answer(name), plain(TRAINED[name][1])[0][STEPS : STEPS + FEWER_STEPS], 1e-5, 1e-5)


@pytest.mark.parametrize("name", STARTED)
def test_a_run_starts_from_the_weights_of_another_layout_as_plain_pytorch_does(name, first_half, second_half):
    case, origin = STARTED[name]
    first_half.answer(origin)
    _, weights = plain(TRAINED[origin][1])
    if name.endswith("classifier"):
        weights = {name: weight for name, weight in weights.items() if name.startswith(("1.", "2.", "3.", "4.", "5.", "6.pooler."))} | {
            "0.weight": weights["tied_modules.embedding.weight"]
        }
    assert_equal(second_half.answer(name), train_plain(case, FEWER_STEPS, weights)[0], 1e-5, 1e-5)


@pytest.mark.parametrize("name", HEALED)
def test_training_after_compression_is_that_of_plain_pytorch_and_zeros_stay_zeros(name, first_half, saved):
    answer, case = first_half.answer(name), healed(name, saved)
    history, weights = plain(case)
    assert_equal(answer, history[:STEPS], *((1e-3, 1e-2) if "bf16" in name else (1e-5, 1e-5)))
    ours, pruned = Averaged([saved / name / folder_of(STEPS)]), open_model(str(saved / "pruned")).state
    for parameter in weights:
        zero = pruned[parameter] == 0
        assert (ours[parameter][zero] == 0).all() and zero.any() == is_of_a_linear(parameter)
        assert (ours[parameter][~zero] != pruned[parameter][~zero]).any()


@pytest.mark.parametrize("name", HEALS_ON_FROM)
def test_so_it_is_when_it_goes_on(name, first_half, second_half, saved):
    first_half.answer(name)
    assert_equal(second_half.answer(name), plain(healed(name, saved))[0][STEPS : STEPS + FEWER_STEPS], 1e-5, 1e-5)


def test_nobody_goes_on_from_its_own_layout():
    layout = lambda name: (TRAINED[name][0], TRAINED[name][1]["json"], TRAINED[name][1]["layout"])  # noqa: E731
    assert all(layout(name) != layout(other) for name, other in GOES_ON_FROM.items())


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
def test_compiled_blocks_give_the_same_numbers(ranks):
    answers = answers_of_ranks(ranks, RANK_SCRIPT, json.dumps([job(case) for case in COMPILED[ranks]]))
    for case, measured in zip(COMPILED[ranks], answers[0], strict=True):
        assert_equal(measured, plain(case)[0][:FEWER_STEPS], 1e-5, 1e-5)


WITHOUT_WEIGHTS = GPT2 | {"tie_embeddings": True, "positions": "sinusoidal", "norm_position": "post"}  # a stage of its five
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
def test_so_it_is_on_many_ranks_and_when_they_go_on(name, tmp_path):
    ranks, case = MANY_RANKS[name]
    jobs = [job(case, save=str(tmp_path)), job(case, first=STEPS, load=str(tmp_path / folder_of(STEPS)))]
    answers = answers_of_ranks(ranks, RANK_SCRIPT, json.dumps(jobs), timeout_seconds=500)
    for measured, expected in zip(answers[0], (plain(case)[0][:STEPS], plain(case)[0][STEPS : STEPS + FEWER_STEPS]), strict=True):
        assert_equal(measured, expected, 1e-5, 1e-5)
