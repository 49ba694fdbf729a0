"""A begin-of-text token before each document (--add_bos): from the tokenizer to the prepared folder and the samples."""

import argparse
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from data.command_line import UserError, read_settings
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.preparation.work_units import UnitWorker
from data.sampling.batches import evaluation_batches
from data.sampling.fill_in_the_middle import FillInTheMiddle
from data.sampling.packing import BestFitSamples, PackedSamples
from data.sampling.samples import IGNORED
from data.sampling.settings import SamplingSettings
from data.sampling.show_settings import ShowSettings
from data.sampling.showing import show
from data.sampling.sources import open_folders, open_held_out, open_sampling
from data.shards import PreparedData, Shard, TokenStream
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from tests.data.tokenization.vocabularies import begin_of_text_file, rank_file

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]
BEGIN, END = 50_000, 60_000


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tokenizer.json that puts a token before each text."""
    return begin_of_text_file(tmp_path_factory.mktemp("given"), [TEXT])


@pytest.fixture(scope="module")
def make(given, tmp_path_factory):
    """A function that prepares 40 short documents; keywords change the settings."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"document {number}: {TEXT[100 * number : 100 * number + 90]}" for number in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line, "label": "x"}) + "\n" for line in lines))

    def run(name, **changes):
        arguments = {
            "input": (str(folder / "a.jsonl"),),
            "output": str(folder / name),
            "tokenizer": str(given),
            "workers": 1,
            "gigatoken": False,
        }
        return prepare(PrepareSettings(**arguments | {"held_out": 0.2} | changes), log=lambda line: None)

    return run


@pytest.fixture(scope="module")
def both(make):
    """The same text prepared with and without the token: what the tokenizer states, and --add_bos false."""
    return make("with", gigatoken=True), make("without", add_bos=False)


def documents_of(prepared: PreparedData, split: str = "train") -> list[list[int]]:
    stream = prepared.splits[split]
    starts = [stream.document_start(number) for number in range(stream.num_documents + 1)]
    return [stream.read(start, end - start).tolist() for start, end in itertools.pairwise(starts)]


def test_documents_have_the_ids_of_transformers_and_an_end(both, given):
    transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(given.parent)
    for prepared, adds in zip(both, (True, False), strict=True):
        ours = load_tokenizer(prepared.tokenizer_path)
        assert ours.adds_bos is adds and prepared.manifest["settings"]["add_bos"] is adds
        assert prepared.begin_of_text == (theirs.bos_token_id if adds else None)
        for document in documents_of(prepared):
            text = ours.decode(document)
            assert document == [*theirs(text, add_special_tokens=adds)["input_ids"], theirs.eos_token_id]
        assert prepared.splits["train"].num_predicted == sum(map(len, documents_of(both[1])))


def test_setting_is_part_of_what_makes_a_folder_the_same(make, both):
    with_bos, without = both
    assert make("with", add_bos=True, gigatoken=True).fingerprint == with_bos.fingerprint
    with pytest.raises(UserError, match="--add_bos was False and is now True"):
        make("without")
    manifest = json.loads((without.folder / "manifest.json").read_text())
    del manifest["settings"]["add_bos"]  # as earlier versions wrote it
    (without.folder / "manifest.json").write_text(json.dumps(manifest))
    assert make("without", add_bos=False).begin_of_text is None
    with pytest.raises(UserError, match=r"with was prepared with --add_bos true and .*without with --add_bos false"):
        open_folders([str(without.folder), str(with_bos.folder)])


def test_prepared_tokenizer_is_given_on_with_its_choice(make, both):
    for name, prepared in zip(("with", "without"), both, strict=True):
        assert make(f"{name} again", tokenizer=str(prepared.folder)).fingerprint == prepared.fingerprint


def test_token_files_get_or_lose_the_token(make, both):
    for prepared, other in zip(both, both[::-1], strict=True):
        shards = tuple(str(prepared.folder / shard["prefix"]) + ".bin" for shard in prepared.manifest["splits"]["train"]["shards"])
        read = make(f"tokens {prepared.folder.name}", input=shards, add_bos=other.begin_of_text is not None, held_out=0)
        assert sorted(documents_of(read)) == sorted(documents_of(other))


def test_empty_token_document_gets_the_token_once():
    for beginning in ([BEGIN], []):
        tokenizer = SimpleNamespace(begin_of_text=BEGIN, beginning=beginning, end_of_text=END)
        worker = UnitWorker(SimpleNamespace(corpus=None, dtype="<u2"), tokenizer, print)
        for document in ([BEGIN], [BEGIN, END], [END]):
            assert worker._concatenate([np.array(document)])[0].tolist() == [*beginning, END]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer": None, "add_bos": True}, "add_bos true applies only to a given tokenizer"),
        ({"pair_field": "label", "add_bos": True}, "add_bos true and pair_field label are both given"),
    ],
)
def test_setting_without_a_meaning_is_refused(make, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        make("refused", **changes)


def test_tokenizer_without_the_token_is_refused(make, tmp_path):
    train_sentencepiece([TEXT], tmp_path / "tokenizer.model", vocab_size=600)
    with pytest.raises(UserError, match=r"--add_bos true needs a token that begins a text, and .*tokenizer\.model has none"):
        make("refused", tokenizer=str(tmp_path), add_bos=True)
    assert not make("learned", tokenizer=str(tmp_path)).manifest["settings"]["add_bos"]


def test_pairs_never_begin_with_the_token(make):
    assert make("pairs", pair_field="label").begin_of_text is None


def test_setting_is_read_as_a_flag_or_a_value(given):
    for words, value in ((["--add_bos"], True), (["--add_bos", "false"], False), (["--add_bos", "null"], None), ([], None)):
        assert read_settings(PrepareSettings, ["--tokenizer", str(given), *words, "--output", "x"], "").add_bos is value


def with_processor(given: Path, folder: Path, processor, **configuration) -> Path:
    model = tokenizers.Tokenizer.from_file(str(given))
    model.post_processor = processor
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end_of_text|>", "tokenizer_class": "TokenizersBackend"} | configuration)
    )
    return folder


def test_only_one_token_before_a_text_is_a_beginning(given, tmp_path):
    template = tokenizers.processors.TemplateProcessing
    ids = {name: load_tokenizer(given).special_token_id(name) for name in ("[CLS]", "<|end_of_text|>", "<|begin_of_text|>")}
    marks = list(ids.items())
    bert = with_processor(given, tmp_path / "bert", template("[CLS] $A <|end_of_text|>", None, marks))
    t5 = with_processor(given, tmp_path / "t5", template("$A <|end_of_text|>", None, marks))
    gemma = with_processor(given, tmp_path / "gemma", template("<|begin_of_text|> $A", None, marks), add_bos_token=False)
    # transformers 5 does not read add_bos_token where there is a tokenizer.json.
    qwen = with_processor(given, tmp_path / "qwen", tokenizers.processors.ByteLevel(), bos_token="[CLS]", add_bos_token=True)
    found = {folder.name: load_tokenizer(folder) for folder in (bert, t5, gemma, qwen)}
    assert {name: one.adds_bos for name, one in found.items()} == {"bert": False, "t5": False, "gemma": True, "qwen": False}
    assert found["gemma"].begin_of_text == ids["<|begin_of_text|>"] and found["qwen"].begin_of_text == ids["[CLS]"]
    assert load_tokenizer(qwen, add_bos=True).encode_beginning("a") == [ids["[CLS]"], *found["qwen"].encode("a")]
    assert found["bert"].begin_of_text is None
    (gemma / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')  # as earlier versions copied it into a folder
    assert not load_tokenizer(gemma).adds_bos


def test_other_files_follow_their_configuration(tmp_path):
    rank_file(tmp_path / "own.tiktoken", [TEXT])
    path = tmp_path / "tokenizer_config.json"
    configuration = json.loads(path.read_text()) | {"bos_token": {"content": "<s>"}}
    path.write_text(json.dumps(configuration))
    assert load_tokenizer(tmp_path).beginning == []
    path.write_text(json.dumps(configuration | {"add_bos_token": True}))
    ours = load_tokenizer(tmp_path)
    assert ours.beginning == [ours.special_token_id("<s>")] and ours.special_names[ours.beginning[0]] == "<s>"


def stream_of(write_shard, lengths) -> tuple[TokenStream, list[list[int]]]:
    """Documents of these lengths between BEGIN and END; the other tokens are counted."""
    texts = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    documents = [[BEGIN, *text.tolist(), END] for text in texts]
    return TokenStream([Shard(write_shard(documents))], 0, begin_of_text=BEGIN), documents


def test_packed_samples_begin_with_the_token_and_never_predict_it(write_shard):
    stream, _ = stream_of(write_shard, [3, 2, 1])
    rows = [PackedSamples(stream, 5, END, document_mask=True).sample(number, 0) for number in range(3)]
    assert [row.tokens.tolist() for row in rows] == [[BEGIN, 0, 1, 2, END], [BEGIN, 3, 4, END, BEGIN], [BEGIN, 0, 0, 0, 0]]
    assert [row.targets.tolist() for row in rows] == [[0, 1, 2, END, IGNORED], [3, 4, END, IGNORED, 5], [END] + [IGNORED] * 4]
    assert [row.segments.tolist() for row in rows] == [[1] * 5, [1, 1, 1, 1, 2], [1, 0, 0, 0, 0]]


def test_cut_before_a_document_separates_it_from_the_end_before(write_shard):
    stream, _ = stream_of(write_shard, [3, 3])
    row = PackedSamples(stream, 4, END, document_mask=True).sample(1, 0)
    assert [field.tolist() for field in row[:3]] == [[END, BEGIN, 3, 4], [1, 2, 2, 2], [IGNORED, 3, 4, 5]]


@hypothesis.given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    sequence_length=st.integers(12, 24),
    document_mask=st.booleans(),
    kind=st.sampled_from([PackedSamples, BestFitSamples]),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_every_piece_begins_with_the_token_and_has_each_target_once(write_shard, lengths, sequence_length, document_mask, kind, rate):
    stream, documents = stream_of(write_shard, lengths)
    fill = FillInTheMiddle(rate, 61_001, 61_002, 61_003) if rate else None
    samples = kind(stream, sequence_length, END, document_mask, fill)
    read = []
    for number in range(samples.num_samples):
        tokens, segments, targets, *_ = samples.sample(number, 0)
        kept = targets != IGNORED
        pieces = samples.documents(number)
        told = [documents[piece.document][piece.first : piece.first + piece.num_tokens] for piece in pieces]
        expected = [token for piece in told for token in piece if token != BEGIN]
        assert sorted(token for token in targets[kept] if token < 61_000) == sorted(expected), "documents() returns what sample() has"
        read += expected
        assert tokens[0] == BEGIN or tokens[:2].tolist() == [END, BEGIN]
        assert (targets != BEGIN).all()
        for position in np.flatnonzero(tokens == BEGIN):  # nothing of a document stands before its beginning
            assert position == 0 or targets[position - 1] in (IGNORED, END)
        if document_mask:
            firsts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
            assert all(tokens[first] == BEGIN or (first, targets[first]) == (0, IGNORED) for first in firsts)
    assert sorted(read) == sorted(token for document in documents for token in document[1:])


@hypothesis.given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), length=st.integers(2, 12), data=st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_evaluation_counts_each_token_of_the_text_once(write_shard, lengths, length, data):
    stream, documents = stream_of(write_shard, lengths)
    batches = list(evaluation_batches(stream, length, 1, END, stride=data.draw(st.integers(1, length))))
    kept = [target for batch in batches for target in batch.targets[batch.targets != IGNORED].tolist()]
    assert kept == [token for document in documents for token in document[1:]] and len(kept) == stream.num_predicted
    first = batches[0].tokens[0].tolist()
    whole = [token for document in documents for token in document]
    assert first[: len(whole) - 1] == whole[:-1][:length], "the first window is the text as a tokenizer gives it"


def test_objectives_with_frames_of_their_own_refuse_the_token(both):
    folders = {prepared.folder.name: prepared for prepared in both}
    settings = SamplingSettings(objective="masked", class_token="[CLS]")
    options = {"sequence_length": 16, "document_mask": False, "architecture": "encoder"}
    with pytest.raises(UserError, match=r"with was prepared with --add_bos true, so each document begins with <\|begin_of_text\|>; data"):
        open_held_out({"with": folders["with"]}, settings, **options)
    open_held_out({"without": folders["without"]}, settings, **options)


def test_bits_per_byte_count_the_text_alone(both):
    with_bos, without = (
        open_sampling({prepared.folder.name: prepared}, SamplingSettings(), 16, False, 0).bytes_per_token for prepared in both
    )
    assert with_bos == without


def test_shown_sample_begins_with_the_name_of_the_token(both):
    lines = list(show(ShowSettings(data=SamplingSettings(path=(str(both[0].folder),)))))
    shown = [line for line in lines if line.startswith("    ")]
    assert shown and all(line.startswith("    <|begin_of_text|> ") for line in shown)
