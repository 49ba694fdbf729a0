"""Tests of launch/export.py: every family gives a folder that transformers' own classes, tokenizers and pipelines read."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from data.command_line import UserError
from data.tokenization.huggingface_folder import write_tokenizer
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import copy_tokenizer, load_tokenizer
from launch import export
from launch.checkpoints import checkpoint, state
from launch.checkpoints.model_card import model_card
from launch.checkpoints.opening import load_model, open_model
from launch.training.optimizers import OPTIMIZERS
from launch.training.settings import OptimizerSettings
from model.config import ModelConfig
from model.transformer import Transformer
from tests.data.tokenization.vocabularies import begin_of_text_file, rank_file
from tests.model.both_sides import BERT, MARIAN, T5

transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]
SPECIAL = ("[CLS]", "[MASK]", "<extra_id_0>", "<extra_id_1>")
SMALL = {"vocab_size": 600, "sequence_length": 48, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
PROMPT = "the parser adds an argument"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([TEXT], path, vocab_size=600, special_tokens=SPECIAL)
    return path


@pytest.fixture
def run(tmp_path, tokenizer_file):
    """Return a function that writes a run folder with a checkpoint of new weights at each of the given steps."""

    def build(*steps: int, data: dict | None = None, record: dict | None = None, **options) -> Path:
        folder = tmp_path / "run"
        config = ModelConfig(**SMALL | options)
        recipe = {
            "model": dataclasses.asdict(config),
            "data": {"path": ["/somewhere/prepared"], "objective": None, "mask_rate": 0.15} | (data or {}),
            "batch": {"global_batch_size": 8},
        }
        for step in steps:
            unfinished = checkpoint.begin(folder / "checkpoints", step, "id")
            file = checkpoint.HashingFile(unfinished / "rank_00000.safetensors")
            weights = dict(Transformer(config, seed=step).named_parameters())
            slices = [state.ShardSlice.of_whole(name, w.shape) for name, w in weights.items()]
            values = ((one, dict.fromkeys(state.kinds_in({}), weights[one.name].detach().flatten())) for one in slices)
            state.write(file, slices, state.kinds_in({}), values)
            checkpoint.write_part(unfinished, 0, {file.path.name: file.finish()})
            manifest = {"layout": {"world_size": 1}, "model": recipe["model"], "recipe": recipe, "checksums": {}}
            manifest |= {"data": {"fingerprint": "f" * 64}, "versions": {"megabatch": "0.0"}} | (record or {})
            checkpoint.publish(unfinished, step, manifest)
        (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        (folder / "run.json").write_text(json.dumps({"recipe": recipe, "commit": "abc123"}))
        metrics = [{"step": 5, "loss/validation": 2.5}, {"step": 10, "loss/validation": 2.25}, {"step": 99, "loss/validation": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        return folder

    return build


def export_run(folder: Path, *arguments: str) -> Path:
    output = folder.parent / f"hf{len(arguments)}"
    assert export.main([str(folder), "--output", str(output), *arguments]) == 0
    return output


def test_decoder_generates_the_same_text_in_the_pipeline(run):
    folder = run(10)
    pipeline = transformers.pipeline("text-generation", model=str(export_run(folder)))
    (written,) = pipeline(PROMPT, max_new_tokens=5, do_sample=False)
    trained = load_model(str(folder))
    ids = load_tokenizer(trained.tokenizer).encode(PROMPT)
    for _ in range(5):
        logits = trained.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        ids.append(int(logits[0, -1].argmax()))
    assert written["generated_text"] == load_tokenizer(trained.tokenizer).decode(ids)


def test_encoder_fills_masks_the_same_way_in_the_pipeline(run):
    folder = run(10, **BERT)
    output = export_run(folder)
    predictions = transformers.pipeline("fill-mask", model=str(output), top_k=3)("the parser [MASK] an argument")
    trained = load_model(str(folder))
    ours = load_tokenizer(trained.tokenizer)
    ids = [ours.special_tokens["[CLS]"], *ours.encode("the parser"), ours.special_tokens["[MASK]"], *ours.encode(" an argument")]
    tokens = torch.tensor([[*ids, ours.end_of_text]])
    logits = trained.model(tokens, torch.ones_like(tokens), torch.zeros_like(tokens))[0, ids.index(ours.special_tokens["[MASK]"])]
    likeliest = logits.softmax(-1).topk(3)
    assert [one["token"] for one in predictions] == likeliest.indices.tolist()
    assert [one["score"] for one in predictions] == pytest.approx(likeliest.values.tolist(), rel=1e-4)
    pair = transformers.AutoTokenizer.from_pretrained(output)("parser", " argument")
    first, second = ours.encode("parser"), ours.encode(" argument")
    assert pair["input_ids"] == [ours.special_tokens["[CLS]"], *first, ours.end_of_text, *second, ours.end_of_text]
    assert pair["token_type_ids"] == [0] * (2 + len(first)) + [1] * (1 + len(second))


def test_classifier_gives_labels_in_the_pipeline(run):
    folder = run(10, **BERT, num_classes=2, token_head=False, data={"labels": ["bad", "good"], "objective": "classification"})
    (prediction,) = transformers.pipeline("text-classification", model=str(export_run(folder)))(PROMPT)
    assert prediction["label"] in ("bad", "good")


@pytest.mark.parametrize(("options", "start"), [(MARIAN, None), (T5, "[CLS]")], ids=["marian", "t5"])
def test_encoder_decoder_generates_a_batch_as_it_does_single_texts(run, options, start):
    """Transformers 5 has no pipeline for encoder-decoders; the test does what that of transformers 4 did."""
    folder = run(10, **options, data={"start_token": start})
    output = export_run(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(output)
    texts = [PROMPT, "def parser"]
    together = theirs.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=8, num_beams=2)
    trained = load_model(str(folder))
    ours = load_tokenizer(trained.tokenizer)
    for text, written in zip(texts, together, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert ids == [*ours.encode(text), ours.end_of_text]
        alone = theirs.generate(torch.tensor([ids]), max_new_tokens=8, num_beams=2)[0]
        assert written[: len(alone)].tolist() == alone.tolist() and written[0] == ours.start_token_id(start)
    assert [open_model(str(path)).start_token(ours) for path in (folder, output)] == [ours.start_token_id(start)] * 2
    if options is T5:
        assert tokenizer("the <extra_id_0> argument", add_special_tokens=False)["input_ids"] == [
            *ours.encode("the"),
            ours.special_tokens["<extra_id_0>"],
            *ours.encode(" argument"),
        ]


def test_model_card_lists_what_is_known_of_the_run(run, capsys):
    output = export_run(run(10, **BERT))
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    for row in (
        "| step | 10 |",
        "| tokens | 3,840 |",
        "| data | prepared, fingerprint ffffffffffff |",
        "| objective | masked, 0.15 of the tokens |",
        "| validation loss | 2.2500 nats a target token |",
        "| commit | abc123 |",
        "| written by | megabatch 0.0 |",
    ):
        assert row in card
    assert "logits differ from ours by at most" in card and "AutoModelForMaskedLM" in card
    again = export_run(output, "--precision", "bf16")  # a folder without its run has fewer rows
    assert "| tokens |" not in (again / "README.md").read_text()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_model_card_lists_the_settings_that_the_optimizer_reads(run, name):
    optimizer = OPTIMIZERS[name](OptimizerSettings(name=name, weight_decay=0.2, decay="independent", cautious_decay=True))
    card = model_card(open_model(str(run(10, record=optimizer.record()))), "mine", 1, torch.float32, 0.0, "text-generation")
    (row,) = [line for line in card.splitlines() if line.startswith("| optimizer |")]
    assert row.startswith(f"| optimizer | {name}, ") and "cautious weight_decay independent 0.2" in row
    read = {field for fields in optimizer.json_parameters.values() for field in fields}
    assert {field for field in ("beta1", "beta2", "epsilon", "momentum") if field in card} == read - {"learning_rate", "weight_decay"}
    assert ("muon_precision auto" in row) == (name == "muon")


def test_average_of_checkpoints_is_export_run(run):
    folder = run(1, 2, 3)
    mean = load_model(str(export_run(folder, "--average", "2"))).model.state_dict()
    two = [Transformer(ModelConfig(**SMALL), seed=step).state_dict() for step in (2, 3)]
    assert all(torch.allclose(tensor, (two[0][name] + two[1][name]) / 2, atol=1e-7) for name, tensor in mean.items())
    newest = open_model(str(folder))
    assert newest.step == 3 and all(torch.equal(newest.state[name], tensor) for name, tensor in two[1].items())
    with pytest.raises(UserError, match=r"--average 4: .* has 3 undamaged checkpoints"):
        open_model(str(folder), average=4)
    with pytest.raises(UserError, match="--average 2 needs a run folder"):
        open_model(str(folder / "checkpoints" / checkpoint.folder_name(3)), average=2)


def test_damaged_checkpoint_is_named_on_standard_error(run, capsys):
    folder = run(5, 10)
    next((folder / "checkpoints" / checkpoint.folder_name(10)).glob("*.safetensors")).write_bytes(b"")
    assert open_model(str(folder)).step == 5
    output = capsys.readouterr()
    assert output.out == "" and "Damaged checkpoint: " in output.err


@pytest.mark.parametrize("add_bos", [True, False])
def test_exported_tokenizer_begins_a_text_as_the_data_did(run, tmp_path, add_bos):
    folder = run(10, vocab_size=608)
    (folder / "tokenizer.model").unlink()
    given = begin_of_text_file(tmp_path / "given", [TEXT])
    copy_tokenizer(load_tokenizer(given, add_bos=add_bos), folder)
    ours = load_tokenizer(folder)
    output = export_run(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    begin = [theirs.convert_tokens_to_ids("<|begin_of_text|>")] if add_bos else []
    for text in ("", PROMPT, "two\n\nlines é"):
        assert theirs(text)["input_ids"] == ours.encode_beginning(text) == [*begin, *ours.encode(text)]
    assert theirs(PROMPT, " again")["input_ids"] == [*begin, *ours.encode(PROMPT), *begin, *ours.encode(" again")]
    assert (output / "tokenizer.json").read_bytes() == given.read_bytes() or not add_bos
    assert load_tokenizer(output).adds_bos is add_bos
    assert json.loads((output / "config.json").read_text())["bos_token_id"] == ours.begin_of_text


@pytest.mark.parametrize("kind", ["tokenizer.model", "own.tiktoken"])
def test_converted_tokenizer_gets_the_token_before_a_text(tmp_path, kind):
    path = tmp_path / "given" / kind
    path.parent.mkdir()
    if kind == "tokenizer.model":
        train_sentencepiece([TEXT], path, vocab_size=600, special_tokens=("<s>",))
    else:
        rank_file(path, [TEXT])
    configuration = path.with_name("tokenizer_config.json")
    known = json.loads(configuration.read_text()) if configuration.is_file() else {}
    configuration.write_text(json.dumps(known | {"bos_token": "<s>", "add_bos": True}))
    (tmp_path / "to").mkdir()
    write_tokenizer(path, tmp_path / "to", 48)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "to"), load_tokenizer(path)
    assert theirs(PROMPT)["input_ids"] == [ours.special_token_id("<s>"), *ours.encode(PROMPT)] and theirs.bos_token == "<s>"
    assert load_tokenizer(tmp_path / "to").adds_bos


def test_shard_size_zero_is_refused(run):
    with pytest.raises(UserError, match="max_shard_gib is 0; it must be above 0"):
        export_run(run(10), "--max_shard_gib", "0")


def test_tokenizer_of_another_model_is_refused(run):
    folder = run(10, vocab_size=599)
    with pytest.raises(UserError, match=r"has 600 ids, but the model in .* has a vocabulary of 599"):
        export.main([str(folder), "--output", str(folder.parent / "hf")])


def test_encoder_without_a_class_token_is_refused(run):
    folder = run(10, **BERT, data={"class_token": "<class>"})
    with pytest.raises(UserError, match='has no special token "<class>"'):
        export.main([str(folder), "--output", str(folder.parent / "hf")])
    assert not (folder.parent / "hf").exists()
