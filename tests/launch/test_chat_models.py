"""The files next to the weights of a chat model are copied through prepared data and runs, export, quantization and pruning."""

import dataclasses
import json
import shutil

import gguf
import pytest
import transformers

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.tokenization import published_check
from data.tokenization.companions import licence_files
from launch import export, pretrain, prune, quantize
from launch.checkpoints import checkpoint, state
from launch.checkpoints.conversion import convert
from launch.checkpoints.opening import open_model
from launch.checkpoints.run_record import find_tokenizer
from launch.training import run_folder
from launch.training.settings import DataSettings, RunSettings
from tests.launch.chat_model import SHORT, TEMPLATE, TEXTS, facts, write_chat_model

LAYOUT = {
    "world_size": 1,
    "pipeline_stages": 1,
    "tensor_parallel_size": 1,
    "sequence_parallel_size": 1,
    "zero_stage": 0,
    "precision": "bf16",
}
QUICK = ("--calibration_samples", "8", "--test_samples", "8", "--sensitivity_samples", "0")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def text(chat, tmp_path_factory):
    """Text that is tokenized with the chat model's tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(TEXTS * 5)))
    output = folder / "prepared"
    prepare(PrepareSettings(input=(str(folder / "texts.jsonl"),), output=str(output), tokenizer=str(chat), held_out=0.2, workers=1))
    return output


def run_from(initial, tokenizer, folder):
    """Write the folder of a run that started from a model, with a checkpoint of its weights."""
    opened = open_model(str(initial))
    settings = RunSettings(output=str(folder), model=opened.config, data=DataSettings(("prepared",)), train_steps=10)
    start = run_folder.Start("id", False, settings.batch_plan)
    run_folder.record(settings, {}, start, "f" * 64, tokenizer, opened)
    unfinished = checkpoint.begin(folder / "checkpoints", 1, "id")
    file = checkpoint.HashingFile(unfinished / "rank_00000.safetensors")
    slices = [state.ShardSlice.of_whole(name, opened.state[name].shape) for name in opened.state]
    kinds = state.kinds_in({})
    sums = {one.name: [state.checksum(opened.state[one.name].flatten(), one)] * len(kinds) for one in slices}
    state.write(file, slices, kinds, ((one, dict.fromkeys(kinds, opened.state[one.name].flatten())) for one in slices))
    checkpoint.write_part(unfinished, 0, {file.path.name: file.finish()})
    recipe = dataclasses.asdict(settings)
    about = {
        "run_id": "id",
        "layout": LAYOUT,
        "model": recipe["model"],
        "recipe": recipe,
        "checksums": sums,
        "data": {"fingerprint": "f" * 64},
    }
    checkpoint.publish(unfinished, 1, about)
    run_folder.record(settings, {}, dataclasses.replace(start, resumes=True), "f" * 64, tokenizer)  # the second start has no initial model
    return folder


def test_files_next_to_the_weights_of_a_chat_model_are_copied(chat, text, tmp_path):
    """The chain is: the published folder, a run from it, its converted checkpoint, the export, a quantized model, and a pruned one."""
    chat = shutil.copytree(chat, tmp_path / "chat")
    for name in ("LICENSE.txt", "USE_POLICY.md", "Notice"):
        (chat / name).write_text(f"{name} of the makers")
    expected = facts(chat)
    convert(run_from(chat, text / "tokenizer.json", tmp_path / "run"), tmp_path / "converted", 1e9, print)
    chain = [tmp_path / name for name in ("exported", "quantized", "pruned")]
    assert export.main([str(tmp_path / "converted"), "--output", str(chain[0])]) == 0
    options = ["--data", str(text), *QUICK]
    assert quantize.main([str(chain[0]), *options, "--output", str(chain[1]), "--group_size", "32"]) == 0
    assert prune.main([str(chain[0]), *options, "--output", str(chain[2]), "--sparsity", "2:4"]) == 0
    for folder in chain:
        assert facts(folder) == expected, folder
        assert (folder / "tokenizer.json").read_bytes() == (chat / "tokenizer.json").read_bytes()
        assert [path.read_text() for path in licence_files(folder)] == [
            f"{name} of the makers" for name in ("LICENSE.txt", "Notice", "USE_POLICY.md")
        ]
        assert not list(folder.rglob("*.py")) and "auto_map" not in (folder / "tokenizer_config.json").read_text()


def test_templates_in_the_configuration_are_copied_too(tmp_path):
    chat = write_chat_model(tmp_path / "chat", as_files=False)
    (chat / "generation_config.json").unlink()  # transformers then reads config.json
    assert export.main([str(chat), "--output", str(tmp_path / "exported")]) == 0
    before, after = facts(chat, transformers.PreTrainedTokenizerFast), facts(tmp_path / "exported")
    assert after == before and after["ids"][1] == [308, 310]


def test_a_run_with_the_bare_tokenizer_takes_the_rest_from_its_init(chat, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(chat / "tokenizer.json", bare)
    (bare / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))  # as data/prepare.py --end_of_text writes it
    run = run_from(chat, bare / "tokenizer.json", tmp_path / "run")
    assert export.main([str(run), "--output", str(tmp_path / "exported")]) == 0
    before, after = facts(chat), facts(tmp_path / "exported")
    assert after["roles"].pop("eos_token") == ("<|end|>", 308) and before["roles"].pop("eos_token")[0] == "<|im_end|>"
    assert after["chat"] == before["chat"] and after["ids"] == before["ids"] and after["roles"] == before["roles"]


def test_gguf_file_has_the_chat_templates_and_ids_of_special_tokens(chat, tmp_path):
    file = tmp_path / "chat.gguf"
    assert export.main([str(chat), "--output", str(file), "--format", "gguf", "--type", "f32"]) == 0
    fields = {key.removeprefix("tokenizer."): field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    assert (fields["chat_template"], fields["chat_template.short"], fields["chat_templates"]) == (TEMPLATE, SHORT, ["short"])
    ids = {name: fields["ggml.tokens"][fields[f"ggml.{name}_token_id"]] for name in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": "<|begin|>", "eos": "<|im_end|>", "eot": "<|im_end|>", "padding": "<|pad|>"}
    engine = pytest.importorskip("llama_cpp", reason="the independent reader is llama.cpp").Llama(str(file), vocab_only=True, verbose=False)
    assert engine.metadata["tokenizer.chat_template"] == TEMPLATE
    assert fields["ggml.tokens"][engine.token_bos()] == "<|begin|>" and fields["ggml.tokens"][engine.token_eos()] == "<|im_end|>"


def test_tokenizer_json_is_preferred_to_an_older_model_next_to_it(chat, tmp_path):
    """Fine-tuned models have added tokens that only the tokenizer.json holds."""
    folder = shutil.copytree(chat, tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    assert find_tokenizer(folder) == folder / "tokenizer.json"


def test_contradiction_of_init_and_recipe_names_both(chat, tmp_path):
    with pytest.raises(UserError) as refusal:
        pretrain.main(["--config", "launch/recipes/sst2.yaml", "--init", str(chat), "--output", str(tmp_path / "run"), "--dry_run"])
    values = f"model.num_key_value_heads 2 (init {chat}) does not divide model.num_attention_heads 3 (launch/recipes/sst2.yaml)."
    assert str(refusal.value).startswith(f"{values}\nRemove the settings that contradict those of init, which its weights fix")


def test_export_is_refused_if_a_chat_would_get_other_ids(chat, tmp_path, monkeypatch):
    def forgetful(folder, *details):
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        published_check.check_published_tokenizer(folder, *details)

    def written_too_early(*details):
        raise AssertionError("weights were written before the tokenizer was checked")

    monkeypatch.setattr("data.tokenization.huggingface_folder.check_published_tokenizer", forgetful)
    monkeypatch.setattr("model.huggingface.export", written_too_early)
    with pytest.raises(UserError, match="differs from it in chat templates"):
        export.main([str(chat), "--output", str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()
