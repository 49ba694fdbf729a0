"""The settings of a run: who wins, what is refused, and the arithmetic of a batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.command_line import UserError
from data.sampling.batch_plan import BatchSettings
from launch.ranks.layout import Layout
from launch.training.recipe import read_run_settings
from launch.training.settings import share_the_batch
from model.config import SIZES, ModelConfig


def refusal(*words: str) -> list[str]:
    """The lines of what read_run_settings refuses these words with."""
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
def test_micro_batches_of_all_ranks_add_up_to_the_global_batch(micro, ranks, steps):
    assert BatchSettings(micro * ranks * steps, micro).accumulation_steps(ranks) == steps


@pytest.mark.parametrize("batch, ranks, nearest", [((500, 4), 8, "480 or 512"), ((3, 4), 1, "4"), ((33, 32), 1, "32 or 64")])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(batch, ranks, nearest):
    unit = batch[1] * ranks
    with pytest.raises(UserError) as refused:
        BatchSettings(*batch).accumulation_steps(ranks)
    assert str(refused.value) == (
        f"batch.global_batch_size {batch[0]} is not a multiple of batch.micro_batch_size {batch[1]} "
        f"x data_parallel_size {ranks} = {unit}.\nNearest: {nearest}."
    )


def test_without_a_recipe_it_is_the_demo():
    settings = read_run_settings([])
    assert settings.output == "runs/demo"


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (2, 4), (8, 1)])
def test_without_a_micro_batch_size_each_rank_takes_its_whole_share(ranks, micro_batch):
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
def test_in_a_pipeline_the_share_is_cut_into_four_micro_batches_a_stage(layout, micro_batch):
    settings = share_the_batch(read_run_settings(["--batch.global_batch_size", "48"]), layout)
    assert settings.batch.micro_batch_size == micro_batch
    assert settings.batch.accumulation_steps(layout.data_parallel_size) * micro_batch * layout.data_parallel_size == 48
    assert settings.pipeline_stages == layout.pipeline_stages


def test_a_micro_batch_size_that_was_given_stays():
    words = ["--batch.global_batch_size", "48", "--batch.micro_batch_size", "12"]
    assert share_the_batch(read_run_settings(words), Layout(4, 2)).batch.micro_batch_size == 12


@pytest.mark.parametrize(
    ("words", "ranks", "sentence"),
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
def test_a_batch_that_the_ranks_cannot_share_is_refused_by_what_was_given(words, ranks, sentence):
    with pytest.raises(UserError) as refused:
        share_the_batch(read_run_settings(["--batch.global_batch_size", "10", *words]), Layout(ranks))
    assert str(refused.value) == sentence


def test_tokens_become_whole_steps(recipe):
    tokens = recipe("train_tokens: 100000\nbatch: {global_batch_size: 10, micro_batch_size: 5}\nmodel: {sequence_length: 64}\n")
    assert read_run_settings(["--config", tokens, "--schedule.warmup_steps", "0"]).batch_plan.steps == 100000 // 640


def test_the_length_is_given_in_steps_or_in_tokens_and_once(recipe):
    both = recipe("train_steps: 800\ntrain_tokens: 1.0e+6\n")
    assert refusal("--config", both) == [
        f"train_steps 800 ({both}) and train_tokens 1e+06 ({both}) both set the length of training; keep one and set the other to null."
    ]
    assert refusal("--train_steps", "null") == ["Give train_steps or train_tokens, the length of training."]
    settings = read_run_settings(["--config", both, "--train_tokens", "1e6"])  # the command line's takes the place of the recipe's
    assert settings.batch_plan.steps == 1_000_000 // settings.batch_plan.tokens(0)
    assert read_run_settings(["--config", both, "--train_steps", "7", "--schedule.warmup_steps", "1"]).batch_plan.steps == 7
    assert "is less than one step" in refusal("--train_tokens=5")[0]


def test_all_complaints_come_at_once():
    lines = refusal(
        *("--batch.global_batch_size", "0", "--train_steps", "null", "--train_tokens", "-1", "--optimizer.beta2", "1"),
        *("--optimizer.weight_decay", "-0.1", "--schedule.decay_fraction", "0", "--checkpoint.keep", "1", "--peak_tflops", "0"),
        *("--schedule.min_learning_rate", "1", "--loss.label_smoothing", "1", "--loss.z_loss", "-1e-4"),
    )
    begun = {line.split()[0] for line in lines}
    named = {"batch.global_batch_size", "train_tokens", "optimizer.beta2", "optimizer.weight_decay", "schedule.decay_fraction"}
    assert begun == named | {"checkpoint.keep", "peak_tflops", "schedule.min_learning_rate", "loss.label_smoothing", "loss.z_loss"}
    assert len(lines) == len(begun)


def test_a_warm_up_that_leaves_nothing_is_refused_with_the_nearest():
    assert refusal("--train_steps", "20", "--schedule.warmup_steps", "20") == [
        "schedule.warmup_steps 20 (command line) must be below train_steps 20 (command line). Use --schedule.warmup_steps 19 or less."
    ]
    read_run_settings(["--train_steps", "20", "--schedule.warmup_steps", "19"])
    read_run_settings(["--train_steps", "20", "--schedule.warmup_steps", "20", "--schedule.kind", "constant"])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_number_that_is_not_finite_is_refused(recipe, value):
    path = recipe(f"train_steps: 200\noptimizer: {{learning_rate: {value}}}\n")
    number = float(value.replace(".", ""))
    assert refusal("--config", path) == [f"optimizer.learning_rate is {number}; it must be a finite number. Set in {path}."]


@pytest.mark.parametrize("size", SIZES)
def test_a_named_size_on_the_command_line_is_that_model_whatever_the_recipe_says(size, recipe):
    assert read_run_settings(["--size", size, "--train_steps", "200"]).model == ModelConfig(**SIZES[size])
    path = recipe(
        "train_steps: 200\nmodel: {hidden_size: 64, num_key_value_heads: 2, head_size: 8, vocab_size: 70, tie_embeddings: true}\n"
    )
    assert read_run_settings(["--config", path, f"--size={size}"]).model == ModelConfig(**SIZES[size])


def test_settings_beside_a_size_win(recipe):
    path = recipe("size: llama-160m\nmodel: {num_layers: 3}\ntrain_steps: 200\n")
    in_recipe = SIZES["llama-160m"] | {"num_layers": 3}
    assert read_run_settings(["--config", path]).model == ModelConfig(**in_recipe)
    assert read_run_settings(["--config", path, "--model.hidden_size", "96"]).model == ModelConfig(**in_recipe | {"hidden_size": 96})
    both = SIZES["gpt2-124m"] | {"num_layers": 2}
    for words in (["--size", "gpt2-124m", "--model.num_layers", "2"], ["--model.num_layers=2", "--size=gpt2-124m"]):
        assert read_run_settings(["--config", path, *words]).model == ModelConfig(**both)


def test_what_follows_from_a_width_follows_the_width_that_is_given(recipe):
    path = recipe("train_steps: 200\n")
    settings = read_run_settings(["--config", path, "--model.hidden_size", "96", "--model.num_attention_heads", "12"])
    assert settings.model == ModelConfig(hidden_size=96, num_attention_heads=12)
    assert (settings.model.num_key_value_heads, settings.model.head_size, settings.model.intermediate_size) == (12, 8, 384)


def test_an_unknown_size_is_refused_with_the_nearest(recipe):
    for words in (["--size", "gpt2-124"], ["--config", recipe("size: gpt2-124\ntrain_steps: 200\n")]):
        assert refusal(*words)[0].startswith('Unknown size "gpt2-124". Did you mean "gpt2-124m"? There are: gpt2-124m, ')


def test_the_models_own_complaints_come_as_sentences():
    lines = refusal("--model.hidden_size", "100", "--model.num_attention_heads", "3")
    assert lines[0].startswith(
        "model.hidden_size 100 (command line) is not a multiple of model.num_attention_heads 3 (command line). Nearest number of heads: "
    )


@pytest.mark.parametrize("words", [["--local_rank=0"], ["--local-rank=3"], ["--local_rank", "1"]])
def test_what_a_launcher_adds_is_taken_and_not_needed(words):
    plain = read_run_settings(["--train_steps", "200"])
    assert read_run_settings([*words, "--train_steps", "200"]) == read_run_settings(["--train_steps", "200", *words]) == plain


def test_the_names_of_the_ecosystem_are_taken():
    for words in (["--deepspeed", "ours.json"], ["--deepspeed_config", "ours.json"], ["--deepspeed_config=ours.json"]):
        assert read_run_settings(words).deepspeed == "ours.json"
    assert read_run_settings(["--data", "tokens"]).data.path == read_run_settings(["--data=tokens"]).data.path == ("tokens",)
    assert read_run_settings(["--data", "a", "b", "--data.weights", "2", "0.5"]).data.weights == (2.0, 0.5)
    assert read_run_settings(["--data", "a", "b", "--seed", "3"]).data.path == ("a", "b")
