"""Settings of a run: what overrides what, what is refused, and how ranks share a batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.command_line import UserError
from data.sampling.batch_plan import BatchSettings
from data.sampling.objectives.table import OBJECTIVES
from launch import REPOSITORY
from launch.ranks.layout import Layout
from launch.training.recipe import read_run_settings
from launch.training.schedule import learning_rate
from launch.training.settings import DataSettings, RunSettings, ScheduleSettings, share_the_batch
from model.config import SIZES, ModelConfig


def refusal(*words: str) -> list[str]:
    """Return the lines of the message that read_run_settings refuses these words with."""
    with pytest.raises(UserError) as refused:
        read_run_settings(words)
    return str(refused.value).splitlines()


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_micro_batches_of_all_ranks_make_up_the_global_batch(micro, ranks, steps):
    assert BatchSettings(micro * ranks * steps, micro).accumulation_steps(ranks) == steps


@pytest.mark.parametrize("batch, ranks, nearest", [((500, 4), 8, "480 or 512"), ((3, 4), 1, "4"), ((33, 32), 1, "32 or 64")])
def test_an_indivisible_batch_is_refused_with_the_nearest_divisible(batch, ranks, nearest):
    unit = batch[1] * ranks
    with pytest.raises(UserError) as refused:
        BatchSettings(*batch).accumulation_steps(ranks)
    assert str(refused.value) == (
        f"batch.global_batch_size {batch[0]} is not a multiple of batch.micro_batch_size {batch[1]} "
        f"x data_parallel_size {ranks} = {unit}.\nNearest: {nearest}."
    )


def test_the_demo_recipe_is_the_default():
    settings = read_run_settings([])
    assert settings.output == "runs/demo"


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 32), (2, 16), (8, 4)])
def test_the_default_micro_batch_is_the_whole_share_of_a_rank(ranks, micro_batch):
    batch = share_the_batch(read_run_settings([]), Layout(ranks)).batch
    assert (batch.micro_batch_size, batch.accumulation_steps(ranks)) == (micro_batch, 1)


@pytest.mark.parametrize(
    ("layout", "micro_batch"),
    [
        (Layout(2, 2), 6),
        (Layout(4, 2), 3),
        (Layout(4, 4), 3),
        (Layout(4, 1, 2), 24),
        (Layout(4, 1, 1, 2), 24),
        (Layout(16, 2, 2, 2), 3),
    ],
    ids=str,
)
def test_a_pipeline_gets_four_micro_batches_a_stage_by_default(layout, micro_batch):
    settings = share_the_batch(read_run_settings(["--batch.global_batch_size", "48"]), layout)
    assert settings.batch.micro_batch_size == micro_batch
    assert settings.batch.accumulation_steps(layout.data_parallel_size) * micro_batch * layout.data_parallel_size == 48
    assert settings.pipeline_stages == layout.pipeline_stages


def test_a_given_micro_batch_size_is_kept():
    words = ["--batch.global_batch_size", "48", "--batch.micro_batch_size", "12"]
    assert share_the_batch(read_run_settings(words), Layout(4, 2)).batch.micro_batch_size == 12


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        ([], 4, "batch.global_batch_size 10 (command line) is not a multiple of data_parallel_size 4.\nNearest: 8 or 12."),
        ([], 16, "batch.global_batch_size 10 (command line) is not a multiple of data_parallel_size 16.\nNearest: 16."),
        (
            ["--batch.micro_batch_size", "2"],
            4,
            "batch.global_batch_size 10 (command line) is not a multiple of batch.micro_batch_size 2 (command line) "
            "x data_parallel_size 4 = 8.\nNearest: 8 or 16.",
        ),
    ],
)
def test_a_batch_that_ranks_cannot_share_is_refused_with_its_origin(words, ranks, message):
    with pytest.raises(UserError) as refused:
        share_the_batch(read_run_settings(["--batch.global_batch_size", "10", *words]), Layout(ranks))
    assert str(refused.value) == message


def test_train_tokens_are_rounded_down_to_whole_steps(recipe):
    tokens = recipe("train_tokens: 100000\nbatch: {global_batch_size: 10, micro_batch_size: 5}\nmodel: {sequence_length: 64}\n")
    assert read_run_settings(["--config", tokens, "--schedule.warmup_steps", "0"]).batch_plan.steps == 100000 // 640


def test_the_length_is_given_once_in_steps_or_in_tokens(recipe):
    both = recipe("train_steps: 800\ntrain_tokens: 1.0e+6\n")
    assert refusal("--config", both) == [
        f"train_steps 800 ({both}) and train_tokens 1e+06 ({both}) both set the length of training; keep one and set the other to null."
    ]
    assert refusal("--train_steps", "null") == ["Give train_steps or train_tokens, the length of training."]
    settings = read_run_settings(["--config", both, "--train_tokens", "1e6"])  # the command line's takes the place of the recipe's
    assert settings.batch_plan.steps == 1_000_000 // settings.batch_plan.tokens(0)
    warm_up = recipe("train_steps: 800\nschedule: {warmup_steps: 15}\n")
    assert read_run_settings(["--config", warm_up, "--schedule.warmup_tokens=81920"]).schedule == ScheduleSettings(warmup_tokens=81920)
    assert read_run_settings(["--config", both, "--train_steps", "7", "--schedule.warmup_steps", "1"]).batch_plan.steps == 7
    assert "is less than one step" in refusal("--train_tokens=5")[0]


def test_all_complaints_are_raised_together():
    lines = refusal(
        *("--batch.global_batch_size", "0", "--train_steps", "null", "--train_tokens", "-1", "--optimizer.beta2", "1"),
        *("--optimizer.weight_decay", "-0.1", "--schedule.decay_fraction", "0", "--checkpoint.keep", "1", "--peak_tflops", "0"),
        *("--schedule.min_learning_rate", "1", "--loss.label_smoothing", "1", "--loss.z_loss", "-1e-4"),
    )
    begun = {line.split()[0] for line in lines}
    named = {"batch.global_batch_size", "train_tokens", "optimizer.beta2", "optimizer.weight_decay", "schedule.decay_fraction"}
    assert begun == named | {"checkpoint.keep", "peak_tflops", "schedule.min_learning_rate", "loss.label_smoothing", "loss.z_loss"}
    assert len(lines) == len(begun)


def test_a_warm_up_as_long_as_the_run_is_refused_with_the_longest():
    assert refusal("--train_steps", "20", "--schedule.warmup_steps", "20") == [
        "schedule.warmup_steps 20 (command line) must be below train_steps 20 (command line). Use --schedule.warmup_steps 19 or less."
    ]
    read_run_settings(["--train_steps", "20", "--schedule.warmup_steps", "19"])
    read_run_settings(["--train_steps", "20", "--schedule.warmup_steps", "20", "--schedule.kind", "constant"])


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0), (2, 0), (9, 0), (10, 1), (25, 2), (999, 99), (1000, 100), (5000, 100)])
def test_the_default_warm_up_follows_the_length(steps, warm_up):
    settings = RunSettings(train_steps=steps)
    assert settings.warmup_steps == share_the_batch(settings, Layout(1)).schedule.warmup_steps == warm_up


@pytest.mark.parametrize(
    ("words", "warm_up"), [("--train_steps=1", 0), ("--train_steps=15", 1), ("--train_tokens=81920", 1), ("--train_steps=16", 15)]
)
def test_a_length_below_the_demo_recipes_warm_up_needs_no_other_option(words, warm_up):
    """The demo recipe has 15 steps of warm-up."""
    assert read_run_settings([words]).warmup_steps == warm_up


def test_demo_recipe_that_is_given_keeps_its_warm_up_under_any_name():
    for path in ("launch/recipes/demo.yaml", str(REPOSITORY / "launch" / "recipes" / "demo.yaml")):
        message = f"schedule.warmup_steps 15 ({path}) must be below train_steps 10 (command line)."
        assert refusal("--config", path, "--train_steps", "10")[0].startswith(message)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_every_short_length_is_accepted_with_the_defaults(objective, kind):
    model, data = ModelConfig(architecture=objective.architecture), DataSettings(objective=objective.name)
    for steps in (1, 2, 5, 10):
        settings = RunSettings(model=model, data=data, schedule=ScheduleSettings(kind), train_steps=steps)
        assert settings.complaints() == []
        rates = [learning_rate(step, settings.batch_plan, 1.0, kind, settings.warmup_steps) for step in range(steps)]
        assert max(rates) == 1.0 and min(rates) > 0


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_number_that_is_not_finite_is_refused(recipe, value):
    path = recipe(f"train_steps: 200\noptimizer: {{learning_rate: {value}}}\n")
    number = float(value.replace(".", ""))
    assert refusal("--config", path) == [f"optimizer.learning_rate is {number}; it must be a finite number. Set in {path}."]


@pytest.mark.parametrize("size", SIZES)
def test_a_named_size_on_the_command_line_replaces_the_recipes_model(size, recipe):
    assert read_run_settings(["--size", size, "--train_steps", "200"]).model == ModelConfig(**SIZES[size])
    path = recipe(
        "train_steps: 200\nmodel: {hidden_size: 64, num_key_value_heads: 2, head_size: 8, vocab_size: 70, tie_embeddings: true}\n"
    )
    assert read_run_settings(["--config", path, f"--size={size}"]).model == ModelConfig(**SIZES[size])


def test_model_settings_next_to_a_size_override_it(recipe):
    path = recipe("size: llama-160m\nmodel: {num_layers: 3}\ntrain_steps: 200\n")
    in_recipe = SIZES["llama-160m"] | {"num_layers": 3}
    assert read_run_settings(["--config", path]).model == ModelConfig(**in_recipe)
    assert read_run_settings(["--config", path, "--model.hidden_size", "96"]).model == ModelConfig(**in_recipe | {"hidden_size": 96})
    both = SIZES["gpt2-124m"] | {"num_layers": 2}
    for words in (["--size", "gpt2-124m", "--model.num_layers", "2"], ["--model.num_layers=2", "--size=gpt2-124m"]):
        assert read_run_settings(["--config", path, *words]).model == ModelConfig(**both)


def test_derived_sizes_follow_a_given_width(recipe):
    path = recipe("train_steps: 200\n")
    settings = read_run_settings(["--config", path, "--model.hidden_size", "96", "--model.num_attention_heads", "12"])
    assert settings.model == ModelConfig(hidden_size=96, num_attention_heads=12)
    assert (settings.model.num_key_value_heads, settings.model.head_size, settings.model.intermediate_size) == (12, 8, 384)


def test_an_unknown_size_is_refused_with_the_nearest(recipe):
    for words in (["--size", "gpt2-124"], ["--config", recipe("size: gpt2-124\ntrain_steps: 200\n")]):
        assert refusal(*words)[0].startswith('Unknown size "gpt2-124". Did you mean "gpt2-124m"? There are: gpt2-124m, ')


def test_complaints_of_the_model_name_where_its_values_were_set():
    lines = refusal("--model.hidden_size", "100", "--model.num_attention_heads", "3")
    assert lines[0].startswith(
        "model.hidden_size 100 (command line) is not a multiple of model.num_attention_heads 3 (command line). Nearest number of heads: "
    )


@pytest.mark.parametrize("words", [["--local_rank=0"], ["--local-rank=3"], ["--local_rank", "1"]])
def test_local_rank_from_a_launcher_is_ignored(words):
    plain = read_run_settings(["--train_steps", "200"])
    assert read_run_settings([*words, "--train_steps", "200"]) == read_run_settings(["--train_steps", "200", *words]) == plain


def test_aliases_of_settings_are_accepted():
    for words in (["--deepspeed", "ours.json"], ["--deepspeed_config", "ours.json"], ["--deepspeed_config=ours.json"]):
        assert read_run_settings(words).deepspeed == "ours.json"
    assert read_run_settings(["--data", "tokens"]).data.path == read_run_settings(["--data=tokens"]).data.path == ("tokens",)
    assert read_run_settings(["--data", "a", "b", "--data.weights", "2", "0.5"]).data.weights == (2.0, 0.5)
    assert read_run_settings(["--data", "a", "b", "--seed", "3"]).data.path == ("a", "b")
    assert refusal("--preserve_sparsity") == refusal("--hold_zeros")


def test_complaints_of_ranges_model_length_and_objective_come_together(recipe):
    path = recipe("train_steps: 20\nschedule: {warmup_steps: 100}\ndata: {objective: prefix, fim_rate: 0.5}\noptimizer: {beta1: 2.0}\n")
    assert refusal("--config", path, "--model.hidden_size=100", "--model.num_attention_heads=3") == [
        f"optimizer.beta1 is 2; it must be at least 0 and below 1. Set in {path}.",
        "model.hidden_size 100 (command line) is not a multiple of model.num_attention_heads 3 (command line). "
        "Nearest number of heads: 2; or set model.head_size.",
        f"schedule.warmup_steps 100 ({path}) must be below train_steps 20 ({path}). Use --schedule.warmup_steps 19 or less.",
        f"data.fim_rate is 0.5 ({path}); it is for data.objective causal, and this is prefix.",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--optimizer.name=sgd", "--optimizer.beta2=0.9"],
            "optimizer.beta2 0.9 (command line) has no effect with optimizer.name sgd (command line). Remove it, or use optimizer.name "
            "adamw, muon, lamb or lion.",
        ),
        (
            ["--optimizer.name=adamw", "--optimizer.momentum=0.9"],
            "optimizer.momentum 0.9 (command line) has no effect with optimizer.name adamw (command line). Remove it, or use "
            "optimizer.name muon, lars or sgd.",
        ),
        (
            ["--optimizer.name=lion", "--optimizer.muon_precision=bf16"],
            "optimizer.muon_precision bf16 (command line) has no effect with optimizer.name lion (command line). Remove it, or use "
            "optimizer.name muon.",
        ),
        (
            ["--optimizer.name=sgd", "--batch.beta2_rule=tokens", "--batch.ramp=0:4 1K:8", "--batch.global_batch_size=8"],
            "batch.beta2_rule tokens (command line) has no effect with optimizer.name sgd (command line). Remove it, or use "
            "optimizer.name adamw, muon, lamb or lion.",
        ),
        (
            ["--optimizer.weight_decay=0", "--optimizer.cautious_decay=true"],
            "optimizer.cautious_decay true (command line) has no effect with optimizer.weight_decay 0 (command line). Remove one of them.",
        ),
        (
            ["--optimizer.weight_decay=0", "--optimizer.decay=independent"],
            "optimizer.decay independent (command line) has no effect with optimizer.weight_decay 0 (command line). Remove one of them.",
        ),
    ],
)
def test_a_setting_that_the_optimizer_does_not_read_is_refused(words, message):
    assert refusal("--train_steps=20", "--train_tokens=null", *words) == [message]
