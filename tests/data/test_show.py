"""data/show.py: it shows the rows that training reads, with the text that was prepared."""

import ast
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data import show
from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.sampling.batch_plan import BatchPlan, BatchSettings
from data.sampling.batches import TrainingBatches
from data.sampling.order import Blend
from data.sampling.samples import IGNORED
from data.sampling.settings import SamplingSettings
from data.sampling.sources import names_of, open_folders, open_sampling
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
WORDS = ["--model.sequence_length", "24", "--batch.global_batch_size", "8", "--seed", "5", "--characters", "0"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Two prepared folders with one tokenizer, which has the special tokens of fill-in-the-middle."""
    root = tmp_path_factory.mktemp("show")
    dice = random.Random(3)
    texts = {"verse": [], "prose": []}
    for name, number in (("verse", 12), ("prose", 30)):
        (root / name).mkdir()
        for document in range(number):
            text = f"{name} {document}: " + " ".join(dice.choices(["sun", "moon", "earth", "water\n", "fire"], k=dice.randint(3, 40)))
            (root / name / f"{document:02d}.txt").write_text(text)
            texts[name].append(text)
    train_sentencepiece(texts["verse"] + texts["prose"], root / "tokenizer.model", 380, special_tokens=MARKS)
    for name in texts:
        prepare(
            PrepareSettings(
                input=(str(root / name),),
                tokenizer=str(root / "tokenizer.model"),
                output=str(root / f"{name}-prepared"),
                held_out=0.0,
                workers=1,
            )
        )
    return str(root / "verse-prepared"), str(root / "prose-prepared")


def shown(capsys, *words: str) -> list[str]:
    show.main([*words, *WORDS])
    return capsys.readouterr().out.splitlines()


def rows_of(lines: list[str]) -> list[tuple[str, int, int]]:
    """Return (source, epoch, sample) of every row that was shown."""
    found = [re.fullmatch(r"micro-batch \d+, row \d+: (\S+), epoch (\d+), sample (\d+)", line) for line in lines]
    return [(row[1], int(row[2]), int(row[3])) for row in found if row]


def texts_of(lines: list[str]) -> list[str]:
    """Return the text of each row, joined from its documents, without special tokens."""
    rows: list[str] = []
    for line in lines:
        if line.startswith("micro-batch"):
            rows.append("")
        elif line.startswith("    "):
            literals = re.findall(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", line)
            rows[-1] += "".join(ast.literal_eval(literal) for literal in literals)
    return rows


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("packing", ["packed", "best_fit"])
def test_shown_samples_are_those_that_training_reads(folders, capsys, world_size, micro_batch_size, packing):
    settings = SamplingSettings(folders, weights=(1, 3), packing=packing)
    sampling = open_sampling(open_folders(folders), settings, 24, True, seed=5)
    tokenizer = load_tokenizer(Path(folders[0]) / "tokenizer.model")
    words = ["--data.weights", "1", "3", "--data.packing", packing, "--model.document_mask", "--world_size", str(world_size)]
    words += ["--batch.micro_batch_size", str(micro_batch_size)]
    for step in (1, 8):
        read = []
        for rank in range(world_size):
            lines = shown(capsys, *folders, *words, "--step", str(step), "--rank", str(rank))
            batches = TrainingBatches(sampling.samples, sampling.blend, BatchPlan(BatchSettings(8, micro_batch_size), 24), rank, world_size)
            targets = np.concatenate([batch.targets.numpy() for batch in batches.step(step - 1)])
            segments = np.concatenate([batch.segments.numpy() for batch in batches.step(step - 1)])
            assert texts_of(lines) == [tokenizer.decode(row[row != IGNORED].tolist()) for row in targets]
            padding = [int(line.split()[0]) for line in lines if line.endswith("positions of padding")]
            assert padding == [count for count in (segments == 0).sum(axis=1).tolist() if count]
            places = sum(line.startswith("  ") and not line.startswith("    ") for line in lines) - len(padding)
            assert places == segments.max(axis=1).sum(), "one line a document"
            read += rows_of(lines)
        source, epoch, sample = Blend([one.num_samples for one in sampling.samples], (1, 3), 5).draw(np.arange(8 * step - 8, 8 * step))
        names = ["verse-prepared", "prose-prepared"]
        expected = [(names[s], e, i) for s, e, i in zip(source.tolist(), epoch.tolist(), sample.tolist(), strict=True)]
        assert sorted(read) == sorted(expected)


def test_documents_are_shown_with_their_place_and_tokens(folders, capsys):
    """The test reads all samples of an epoch of one source."""
    prepared = open_folders(folders[:1])["verse-prepared"]
    stream = prepared.splits["train"]
    lengths = stream.shards[0].document_lengths().tolist()
    steps = -(-len(stream) // 24 // 8) + 1
    lines = [line for step in range(1, steps + 1) for line in shown(capsys, folders[0], "--step", str(step))]
    first_epoch = sum(epoch == 0 for _, epoch, _ in rows_of(lines))
    assert first_epoch == -(-len(stream) // 24)
    found = [re.fullmatch(r"  (.*): (?:all (\d+) tokens|tokens (\d+) to (\d+) of (\d+))", line) for line in lines]
    whole = [int(row[2] or row[5]) for row in found if row]
    assert set(whole) == set(lengths)
    assert {row[1] for row in found if row} == {f"{number:02d}.txt" for number in range(12)}
    for line, text in itertools.pairwise(lines):
        if whole := re.fullmatch(r"  (\d\d)\.txt: all \d+ tokens", line):
            assert f"'verse {int(whole[1])}: " in text, "the text is that of the file"


def test_fill_in_the_middle_is_shown(folders, capsys):
    words = ["--data.fim_rate", "1", "--model.sequence_length", "64", "--model.document_mask"]
    show.main([folders[1], *WORDS, *words])
    lines = capsys.readouterr().out.splitlines()
    documents = [(place, text) for place, text in itertools.pairwise(lines) if text.startswith("    ")]
    transformed = [text for place, text in documents if place.endswith(", transformed by fill-in-the-middle")]
    assert transformed
    for text in transformed:
        assert all(text.count(mark) == 1 for mark in MARKS)
        assert text.startswith("    <|fim_prefix|>") and text.index("<|fim_suffix|>") < text.index("<|fim_middle|>")
    assert not any("<|fim" in text for place, text in documents if not place.endswith("middle"))


def test_long_texts_are_shortened_in_the_middle(folders, capsys):
    show.main([folders[1], *WORDS, "--characters", "10"])
    texts = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert any(len(text) == 15 and text[5:10] == " ... " for text in texts) and max(map(len, texts)) == 15


@pytest.fixture
def run(folders, tmp_path) -> Path:
    """A run folder of two data-parallel ranks, with the part of run.json that decides which samples are read."""
    recipe = {
        "model": {"sequence_length": 32, "document_mask": True, "hidden_size": 64},
        "data": {"path": list(folders), "weights": [2, 1], "max_epochs": None, "packing": "best_fit", "fim_rate": 0.5, "vocab_size": 9},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "seed": 9,
    }
    recipe["data"]["fim_tokens"] = list(MARKS)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "deepspeed": {"gradient_accumulation_steps": 2}}))
    return tmp_path


def test_run_folder_gives_the_settings_that_decide_the_samples(run, folders, capsys):
    show.main(["--run", str(run), "--step", "3", "--rank", "1"])
    of_run = capsys.readouterr().out
    words = ["--data.weights", "2", "1", "--data.packing", "best_fit", "--data.fim_rate", "0.5", "--model.sequence_length", "32"]
    words += ["--model.document_mask", "--batch.global_batch_size", "8", "--batch.micro_batch_size", "2", "--seed", "9"]
    show.main([*folders, *words, "--step", "3", "--rank", "1", "--world_size", "2"])
    assert capsys.readouterr().out == of_run
    assert of_run.startswith("step 3, rank 1 of 2: samples of 32 tokens, best_fit, documents separated by mask, seed 9\n")
    show.main(["--run", str(run), "--step", "3", "--seed", "1", "--world_size", "4", "--rank", "1"])
    assert capsys.readouterr().out.startswith("step 3, rank 1 of 4: samples of 32 tokens, best_fit, documents separated by mask, seed 1\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "1"], "rank 1 (command line) must be below world_size 1 (default)."),
        (
            ["--step", "0", "--characters", "-1"],
            "step is 0; it must be above 0 and below 2147483648. Set on the command line.\n"
            "characters is -1; it must be at least 0. Set on the command line.",
        ),
        (
            ["--world_size", "3", "--batch.micro_batch_size", "2"],
            "batch.global_batch_size 8 is not a multiple of batch.micro_batch_size 2 x world_size 3 = 6.\nNearest: 6 or 12.",
        ),
        (["--world_size", "3"], "batch.global_batch_size 8 is not a multiple of world_size 3.\nNearest: 6 or 9."),
        (["--world_size", "9"], "batch.global_batch_size 8 is not a multiple of world_size 9.\nNearest: 9."),
        (["--data.weights", "1", "2"], "data.weights has 2 weights for 1 sources; give one for each folder of data.path."),
        (
            ["--data.packing", "best"],
            'data.packing is best; it must be packed or best_fit. Did you mean "best_fit"? Set on the command line.',
        ),
        (
            ["--data.fim_rate", "1", "--data.fim_tokens", "a"],
            "data.fim_tokens has 1 tokens; it must have three: before prefix, suffix and middle.",
        ),
        (["--run", "nowhere"], "--run nowhere: nowhere/run.json cannot be read: No such file or directory."),
        (["--data.path"], "data.path names no folder; give at least one folder."),
    ],
)
def test_invalid_show_settings_are_refused(folders, words, message):
    with pytest.raises(UserError) as refused:
        show.main([*([] if "--data.path" in words else [folders[0]]), *WORDS, *words])
    assert str(refused.value) == message


def test_unknown_fim_token_is_refused_with_the_nearest_one(folders):
    with pytest.raises(UserError, match=r'no special token "<\|fim_pre\|>"\. Did you mean "<\|fim_prefix\|>"'):
        show.main([folders[0], *WORDS, "--data.fim_rate", "0.1", "--data.fim_tokens", "<|fim_pre|>", *MARKS[1:]])


def test_run_of_an_unsupported_older_version_is_refused(run):
    about = json.loads((run / "run.json").read_text())
    del about["recipe"]["data"]["packing"]
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError) as refused:
        show.main(["--run", str(run)])
    assert str(refused.value) == (
        f"--run {run} was written by a version whose samples began one token later; this version cannot show them."
    )


@pytest.mark.parametrize(("about", "kind"), [("[]", "TypeError"), ('{"recipe": {}}', "KeyError"), ("{", "JSONDecodeError")])
def test_damaged_run_json_is_refused(run, about, kind):
    (run / "run.json").write_text(about)
    with pytest.raises(UserError, match=rf"run\.json does not have the content that this version writes \({kind}"):
        show.main(["--run", str(run)])


def test_changes_that_decide_the_samples_are_shown_first(run, capsys):
    about = json.loads((run / "run.json").read_text())
    changes = [{"time": "Monday", "lines": ["optimizer.learning_rate: 0.0003 -> 0.001"]}]
    (run / "run.json").write_text(json.dumps(about | {"changes": changes}))
    show.main(["--run", str(run)])
    assert capsys.readouterr().out.startswith("step 1, rank 0 of 2: "), "the learning rate does not decide which samples are read"
    changes += [{"time": "Tuesday", "lines": ["seed: 1 -> 9", "train_steps: 4 -> 8"]}]
    changes += [{"time": "Wednesday", "lines": ["the data: a 12 -> b 34"]}]
    (run / "run.json").write_text(json.dumps(about | {"changes": changes}))
    show.main(["--run", str(run)])
    assert capsys.readouterr().out.splitlines()[0] == (
        "The run was resumed with changes: seed: 1 -> 9 (Tuesday); the data: a 12 -> b 34 (Wednesday). "
        "Earlier steps read other samples than those shown here."
    )


CHANGED = {"recipe": {"global_batch_size": 16}, "deepspeed": {"gradient_accumulation_steps": 4}}
RAMPED = {"recipe": {"global_batch_size": 16, "ramp": "0:8 512:16"}, "deepspeed": {"gradient_accumulation_steps": 2, "train_batch_size": 8}}
SEESAW = {"recipe": {"global_batch_size": 8, "ramp": "seesaw"}, "deepspeed": {"gradient_accumulation_steps": 4, "train_batch_size": 16}}


@pytest.mark.parametrize("written", [CHANGED, RAMPED, SEESAW], ids=["changed", "ramp", "seesaw, resumed after its first size"])
def test_steps_before_and_after_a_change_of_the_batch_are_shown(written, run, capsys):
    """Steps 1 and 2 of the run read 8 samples, the steps after them 16."""
    about = json.loads((run / "run.json").read_text())
    about["recipe"]["batch"] |= written["recipe"]
    about["recipe"]["sequence_parallel_size"] = 1
    about |= {"deepspeed": written["deepspeed"], "changes": [{"time": "-", "lines": ["batch.global_batch_size: 8 -> 16"]}]}
    about["batch_plan"] = [{"first_step": 0, "first_position": 0, "size": 8}, {"first_step": 2, "first_position": 16, "size": 16}]
    (run / "run.json").write_text(json.dumps(about))
    rows = []
    for step in (1, 2, 3):
        for rank in (0, 1):
            show.main(["--run", str(run), "--step", str(step), "--rank", str(rank)])
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].startswith(f"step {step}, rank {rank} of 2: "), "nothing to warn of"
            rows += rows_of(lines)
    other = ["--run", str(run), "--batch.ramp", "null", "--batch.global_batch_size", "32", "--world_size", "1", "--step", "1"]
    show.main(other)
    assert sorted(rows) == sorted(rows_of(capsys.readouterr().out.splitlines()))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"sha256": "0" * 64, "vocab_size": 2000}, r"000000000000 \(2,000 ids\) is not [0-9a-f]{12} \(380 ids\)\."),
        ({"settings": {"pat_str": "x"}}, r"the files are equal, but the settings next to them differ \(pat_str\)\."),
        ({"end_of_text": 7}, r"documents end with token 7, not \d+\."),
    ],
)
def test_folders_with_different_tokenizers_are_refused_by_name(folders, tmp_path, change, difference):
    shutil.copytree(folders[1], tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["tokenizer"] |= change
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"other and .*verse-prepared have different tokenizers: {difference}"):
        open_folders([folders[0], str(tmp_path / "other")])


def test_bytes_per_token_follow_the_weights_of_the_blend(folders, tmp_path):
    """Characters that the tokenizer was not trained on become one token a byte."""
    (tmp_path / "kanji.txt").write_text("".join(chr(0x4E00 + number) for number in range(2000)))
    tokenizer = f"{folders[0]}/tokenizer.model"
    prepare(PrepareSettings(input=(str(tmp_path / "kanji.txt"),), tokenizer=tokenizer, output=str(tmp_path / "kanji"), held_out=0.0))
    paths = (folders[0], str(tmp_path / "kanji"))
    opened = open_folders(paths)
    verse, kanji = (folder.splits["train"].num_bytes / len(folder.splits["train"]) for folder in opened.values())
    assert verse > 2 * kanji
    for weights, expected in {(3, 1): (3 * verse + kanji) / 4, (1, 3): (verse + 3 * kanji) / 4}.items():
        sampling = open_sampling(opened, SamplingSettings(paths, weights), 24, False, 1)
        assert sampling.bytes_per_token == pytest.approx(expected)


def test_folder_without_training_tokens_is_refused_by_name(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "empty")
    manifest = json.loads((tmp_path / "empty" / "manifest.json").read_text())
    manifest["splits"]["train"] |= {"shards": []}
    (tmp_path / "empty" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"empty has no tokens to train on\."):
        open_sampling(open_folders([folders[1], str(tmp_path / "empty")]), SamplingSettings(), 24, False, 1)


def test_source_names_are_the_shortest_distinct_path_endings():
    assert names_of(["prepared"]) == ["prepared"]
    assert names_of(["a/web", "b/code/"]) == ["web", "code"]
    assert names_of(["a/x/prepared", "b/x/prepared"]) == ["a/x/prepared", "b/x/prepared"]
    with pytest.raises(UserError, match=r"/a twice; name a folder once and give it a larger share in data\.weights"):
        names_of(["a", "b", "./a"])


OBJECTIVES = {
    "prefix": ["--data.objective", "prefix"],
    "masked": ["--model.architecture", "encoder", "--data.mask_rate", "0.5"],
    "next_sentence": ["--model.architecture", "encoder", "--data.next_sentence", "--model.token_types", "2"],
    "span_corruption": ["--model.architecture", "encoder_decoder", "--data.span_length", "6"],
    "pairs": ["--data.objective", "pairs", "--model.architecture", "encoder_decoder"],
    "classification": ["--data.objective", "classification", "--model.architecture", "encoder", "--data.labels", "odd", "even"],
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[str, str]:
    """Texts with labels, and the same texts alone, in folders whose tokenizer has the special tokens of all objectives."""
    root = tmp_path_factory.mktemp("labelled")
    records = [{"text": f"fish number {number} swims", "label": ("even", "odd")[number % 2]} for number in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [record["text"] for record in records] + ["even", "odd"]
    train_sentencepiece(texts, root / "tokenizer.model", 370, special_tokens=("[CLS]", "[MASK]", "<extra_id_0>"))
    tokenizer, pairs, alone = (str(root / name) for name in ("tokenizer.model", "pairs", "alone"))
    for output, pair_field in ((pairs, "label"), (alone, None)):
        prepare(PrepareSettings((str(root / "text.jsonl"),), pair_field=pair_field, output=output, tokenizer=tokenizer, workers=1))
    return pairs, alone


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_shows_its_inputs_and_targets(labelled, capsys, objective):
    lines = shown(capsys, labelled[objective not in ("pairs", "classification")], *OBJECTIVES[objective])
    assert len(rows_of(lines)) == 8
    names = [line.split(":")[0].strip() for line in lines if line.startswith("    ")]
    assert {
        "prefix": {"prefix", "predicted"},
        "masked": {"read", "predicted"},
        "next_sentence": {"read", "predicted", "class"},
        "span_corruption": {"source", "read", "predicted"},
        "pairs": {"source", "read", "predicted"},
        "classification": {"read", "class"},
    }[objective] <= set(names)
    text = "\n".join(lines)
    marks = {"masked": "[MASK]", "next_sentence": "[CLS]", "span_corruption": "<extra_id_0>", "classification": "[CLS]"}
    assert marks.get(objective, "") in text and all(
        "text.jsonl, byte" in line for line in lines if line.startswith("  ") and "tokens" in line
    )
    if objective == "pairs":
        source = next(place for place, line in enumerate(lines) if line.startswith("    source"))
        number = int(re.search(r"number (\d+) swims", lines[source])[1])
        assert f"'{('even', 'odd')[number % 2]}' <|endoftext|>" in lines[source + 2]
