"""Measure what data/ must reach, beside its peers, in one run: python launch/benchmarks/preparation.py --peer_python PEERS/bin/python

The peer of data/prepare.py is datatrove's DocumentTokenizer, in an environment of its own (pip install datatrove orjson tokenizers);
that of the index and of random access is megatron-core, in ours. Every contender runs in several rounds, in turns; the best of each
counts, and only the ratios of one run mean anything.
"""

import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.command_line import UserError, nearest, read_settings, run_door
from launch import REPOSITORY

_PREPARE = REPOSITORY / "data" / "prepare.py"
_DOCUMENT_CHARACTERS = 3000  # about what a web page has
_LEARNT_FROM = 3000  # documents
_VOCAB_SIZE = 16_384
_END_OF_TEXT = "<|endoftext|>"
_LONGEST_SECONDS = 1200
# A file of its own, because datatrove's processes read it again.
_DATATROVE = """
import sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    folder, tokenizer, end_of_text, output, workers = sys.argv[1:]
    tokens = DocumentTokenizer(output, tokenizer, eos_token=end_of_text, shuffle_documents=False)
    LocalPipelineExecutor([JsonlReader(folder), tokens], tasks=int(workers), workers=int(workers), logging_dir=output + "/logs").run()
"""


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    input: tuple[str, ...] = ()
    """JSON Lines files, the text in the field "text" (default: the source of Python's standard library, by the 3,000 characters)."""
    megabytes: float = 40.0
    """JSON Lines to tokenize; a shorter input is repeated."""
    peer_python: str | None = None
    """Python of an environment that has datatrove. Without it there is no peer of data/prepare.py."""
    rounds: int = 2
    """How often each contender runs."""
    index_documents: int = 1_000_000
    """Documents of 300 tokens, written as one shard."""
    blend_samples: int = 1_000_000_000
    """Samples of the blend of two sources."""
    set_tokens: int = 2_000_000_000
    """Tokens of the set that samples are read from, 500 a document on average, in a file with nothing but holes."""
    only: tuple[str, ...] = ()
    """Rows to measure (default: all)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; better is more of a rate, and less of anything else."""

    what: str
    unit: str
    ours: float
    peer: float | None
    """None where there is none."""
    peer_name: str
    """Or why there is none."""
    aim: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better ours is."""
        if not self.peer:
            return None
        return self.ours / self.peer if self.unit == "MB/s" else self.peer / self.ours


def main(arguments: Sequence[str]) -> None:
    settings = read_settings(BenchmarkSettings, arguments, "Measure preparation and reading of data beside others.")
    for name in settings.only:
        if name not in ROWS:
            raise UserError(f'Unknown row "{name}".{nearest(name, list(ROWS))} There are: {", ".join(ROWS)}.')
    for name in ("megabytes", "rounds", "index_documents", "blend_samples", "set_tokens"):
        if getattr(settings, name) <= 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be above 0.")
    if settings.peer_python is not None and not shutil.which(settings.peer_python):
        raise UserError(f"--peer_python {settings.peer_python} is no program.")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, Path(folder))
        for name, measure in ROWS.items():
            if not settings.only or name in settings.only:
                print(f"{name} ...", file=sys.stderr, flush=True)
                rows += measure(bench)
    print(f"\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores, {_versions()}")
    print(f"\n{'':52}{'unit':>13}{'ours':>12}{'peer':>12}{'ratio':>10}  {'aim':12}peer")
    for row in rows:
        peer = f"{row.peer:12.3g}{row.ratio:10,.1f}" if row.peer else f"{'':22}"
        print(f"{row.what:52}{row.unit:>13}{row.ours:12.3g}{peer}  {row.aim:12}{row.peer_name}")


class Bench:
    """The settings, and text and tokenizers, each made in `folder` when it is first asked for."""

    def __init__(self, settings: BenchmarkSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._numbers = itertools.count()

    def new_path(self, name: str) -> Path:
        return self.folder / f"{name}-{next(self._numbers)}"

    @functools.cached_property
    def documents(self) -> list[str]:
        """JSON lines of so many megabytes in all."""
        lines = list(_lines(self.settings.input))
        if not lines:
            raise UserError(f"--input {' '.join(self.settings.input)} holds no line.")
        taken, left, repeated = [], self.settings.megabytes * 1e6, itertools.cycle(lines)
        while left > 0:
            taken.append(next(repeated))
            left -= len(taken[-1].encode())
        return taken

    @functools.cached_property
    def texts(self) -> list[str]:
        return [json.loads(line)["text"] for line in self.documents[:_LEARNT_FROM]]

    @functools.cached_property
    def sentencepiece(self) -> tuple[Path, Path]:
        """A SentencePiece BPE model, and the same as a tokenizer.json."""
        from data.tokenization.huggingface import convert
        from data.tokenization.tokenizer import load_tokenizer, train_sentencepiece

        model, converted = self.folder / "sentencepiece.model", self.folder / "sentencepiece.json"
        train_sentencepiece(self.texts, model, min(_VOCAB_SIZE, 512 + len(self.texts)))
        convert(load_tokenizer(model)).save(str(converted))
        return model, converted

    @functools.cached_property
    def byte_level(self) -> tuple[Path, Path]:
        """A byte-level BPE tokenizer.json, for both contenders."""
        import tokenizers

        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=_VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=[_END_OF_TEXT], show_progress=False
        )
        model.train_from_iterator(self.texts, trainer)
        path = self.folder / "byte_level.json"
        model.save(str(path))
        return path, path

    def corpus(self, files: int) -> Path:
        """A folder with the documents dealt out to so many files: datatrove gives each process files of its own."""
        return self._write(f"corpus-{files}", self.documents, files)

    def one_document(self) -> Path:
        return self._write("one", self.documents[:1], 1)

    def prepare(self, corpus: Path, tokenizer: Path, workers: int, *options: str) -> tuple[float, int]:
        """Seconds of our door, from its start to its end, and the tokens that it wrote."""
        output = self.new_path("ours")
        command = [sys.executable, str(_PREPARE), "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output)]
        seconds = _run([*command, "--workers", str(workers), "--held_out", "0", "--exact_duplicates", "keep", *options])
        return seconds, json.loads((output / "manifest.json").read_text())["splits"]["train"]["tokens"]

    def datatrove(self, corpus: Path, tokenizer: Path, workers: int) -> tuple[float, int]:
        """The same of datatrove."""
        output, program = self.new_path("datatrove"), self.folder / "datatrove_pipeline.py"
        program.write_text(_DATATROVE)
        seconds = _run(
            [self.settings.peer_python or "", str(program), str(corpus), str(tokenizer), _END_OF_TEXT, str(output), str(workers)]
        )
        return seconds, sum(path.stat().st_size for path in output.glob("*.ds")) // 2

    def _write(self, name: str, documents: list[str], files: int) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            for number in range(files):
                (folder / f"{number}.jsonl").write_text("".join(documents[number::files]), encoding="utf-8")
        return folder


def _lines(files: Sequence[str]) -> Iterator[str]:
    """JSON lines, each with its line's end."""
    for file in files:
        try:
            with open(file, encoding="utf-8") as opened:
                yield from (line.rstrip("\n") + "\n" for line in opened if line.strip())
        except OSError as error:
            raise UserError(f"--input {file}: {error.strerror}.") from error
    for path in [] if files else sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            starts = range(0, len(text), _DOCUMENT_CHARACTERS)
            yield from (json.dumps({"text": text[start : start + _DOCUMENT_CHARACTERS]}) + "\n" for start in starts)


def _run(command: list[str]) -> float:
    """Seconds that a process takes, its libraries on one thread in each of its own processes."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds


def _doors(bench: Bench, what: str, tokenizer: tuple[Path, Path], workers: int, ours_aim: str, engines: Sequence[bool]) -> list[Row]:
    """JSON Lines to finished shards by both doors, and by both without the time that each needs for a single document."""
    corpus, one = bench.corpus(workers), bench.one_document()
    contenders: dict[str, Callable[[Path], tuple[float, int]]] = {
        f"gigatoken {fast}": functools.partial(_prepare, bench, tokenizer[0], workers, fast) for fast in engines
    }
    if bench.settings.peer_python:
        contenders["datatrove"] = lambda corpus: bench.datatrove(corpus, tokenizer[1], workers)
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    start: dict[str, list[float]] = {name: [] for name in contenders}
    tokens = set()
    for _ in range(bench.settings.rounds):
        for name, run in contenders.items():
            seconds, written = run(corpus)
            whole[name].append(seconds)
            start[name].append(run(one)[0])
            tokens.add(written)
    if len(tokens) != 1:
        raise RuntimeError(f"{what}: the contenders wrote different numbers of tokens: {sorted(tokens)}.")
    megabytes = sum(path.stat().st_size for path in corpus.iterdir()) / 1e6
    peer_name = "datatrove" if "datatrove" in contenders else "not measured: no datatrove"
    rate = {name: megabytes / min(seconds) for name, seconds in whole.items()}
    without = {name: megabytes / max(min(whole[name]) - min(start[name]), 1e-3) for name in contenders}
    rows = []
    for fast in engines:
        kind = f"{what}, {'gigatoken' if fast else 'its own library'}"
        for label, values, aim in ((kind, rate, ours_aim), ("    without start-up", without, "")):
            rows.append(Row(label, "MB/s", values[f"gigatoken {fast}"], values.get("datatrove"), peer_name, aim))
    return rows


def _prepare(bench: Bench, tokenizer: Path, workers: int, fast: bool, corpus: Path) -> tuple[float, int]:
    return bench.prepare(corpus, tokenizer, workers, "--gigatoken", str(fast).lower())


def sentencepiece(bench: Bench) -> list[Row]:
    return _doors(bench, "SentencePiece BPE, 2 processes", bench.sentencepiece, 2, "1.2 times", (True, False))


def huggingface(bench: Bench) -> list[Row]:
    return _doors(bench, "tokenizer.json, 2 processes", bench.byte_level, 2, "2 times", (True, False))


def gigatoken(bench: Bench) -> list[Row]:
    return _doors(bench, "tokenizer.json, 1 process", bench.byte_level, 1, "15 MB/s", (True,))


def start_up(bench: Bench) -> list[Row]:
    """A corpus of one document, from the start of the interpreter to the finished folder."""
    ours, peer, one = [], [], bench.one_document()
    for _ in range(bench.settings.rounds):
        ours.append(bench.prepare(one, bench.byte_level[0], 1)[0])
        if bench.settings.peer_python:
            peer.append(bench.datatrove(one, bench.byte_level[1], 1)[0])
    return [
        Row("start-up", "seconds", min(ours), min(peer, default=None), "datatrove" if peer else "not measured: no datatrove", "below 2")
    ]


def index(bench: Bench) -> list[Row]:
    """What a writer holds of each document, just before it is closed and at most until it has been."""
    import numpy as np

    from data.shards import ShardWriter

    documents, tokens = bench.settings.index_documents, np.zeros(300, np.dtype("<u2"))

    def ours() -> Iterator[None]:
        writer = ShardWriter(bench.new_path("ours") / "shard", tokens.dtype)
        for _ in range(documents):
            writer.add(tokens)
        yield
        writer.close()

    def megatron() -> Iterator[None]:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = bench.new_path("megatron")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
        for _ in range(documents):
            builder.add_document(tokens, [len(tokens)])
        yield
        builder.finalize(f"{prefix}.idx")

    held, most = _memory(ours())
    peer, peer_name = _megatron(lambda: _memory(megatron()))
    return [
        Row("index while writing", "B/document", held / documents, peer and peer[0] / documents, peer_name, "12 to 20"),
        Row("    and while closing, at most", "B/document", most / documents, peer and peer[1] / documents, peer_name),
    ]


def order(bench: Bench) -> list[Row]:
    """A blend of two sources, set up and asked for a thousand samples; Megatron's, of a hundredth of the samples, times a hundred."""
    import numpy as np

    from data.sampling.order import Blend

    samples = bench.settings.blend_samples

    def ours() -> Iterator[None]:
        blend = Blend([samples // 2, samples // 4 or 1], [0.7, 0.3], seed=1)
        blend.draw(np.linspace(0, samples - 1, 1000).astype(np.int64))
        yield

    def megatron() -> Iterator[None]:
        from megatron.core.datasets import helpers

        part = max(samples // 100, 1)
        sources, places = np.zeros(part, np.int16), np.zeros(part, np.int64)
        helpers.build_blending_indices(sources, places, np.array([0.7, 0.3]), 2, part, False)
        np.random.RandomState(1).shuffle(np.arange(part, dtype=np.uint32))
        yield

    seconds, peer_seconds = [], []
    for _ in range(bench.settings.rounds):
        seconds.append(_seconds(lambda: list(ours())))
        peer, peer_name = _megatron(lambda: _seconds(lambda: list(megatron())))
        peer_seconds += [] if peer is None else [peer * 100]
    memory, (peer_memory, _) = _memory(ours())[1], _megatron(lambda: _memory(megatron())[1] * 100)
    what = f"order of {samples:.0e} samples"
    return [
        Row(what, "seconds", min(seconds), min(peer_seconds, default=None), f"{peer_name}, from 1/100 of them", "below 1"),
        Row("    memory", "MB", memory / 1e6, peer_memory and peer_memory / 1e6, f"{peer_name}, from 1/100 of them", "constant"),
    ]


def random_access(bench: Bench) -> list[Row]:
    """Samples of 2,048 tokens in random order; documents joined by both, and by ours also told apart."""
    import numpy as np

    from data.sampling.packing import PackedSamples
    from data.shards import Shard, TokenStream

    prefix = bench.new_path("set")
    _write_holes(prefix, bench.settings.set_tokens)
    opened = _seconds(lambda: PackedSamples(TokenStream([Shard(prefix)], 0), 2048, 1, False, None, 0).num_samples)
    stream = TokenStream([Shard(prefix)], 0)
    joined, masked = (PackedSamples(stream, 2048, 1, document_mask, None, 0) for document_mask in (False, True))
    start = time.perf_counter()
    theirs, peer_name = _megatron(lambda: _gpt_dataset(prefix, bench.new_path("cache")))
    peer_opened = time.perf_counter() - start if theirs else None
    draw = np.random.default_rng(0)
    microseconds: dict[str, list[float]] = {"joined": [], "masked": [], "theirs": []}
    for _ in range(bench.settings.rounds + 1):  # the first touches the pages of every index
        numbers = draw.integers(0, joined.num_samples - 1, (3, 1000)).tolist()
        readers: list[Callable[[int], object]] = [lambda number: joined.sample(number, 0), lambda number: masked.sample(number, 0)]
        if theirs:
            readers.append(lambda number: theirs[number % len(theirs)])
        for name, read, some in zip(microseconds, readers, numbers, strict=False):
            microseconds[name].append(_seconds(lambda read=read, some=some: [read(number) for number in some]) * 1e3)  # type: ignore[misc]
    best = {name: min(values[1:], default=None) for name, values in microseconds.items()}
    what = f"sample of {bench.settings.set_tokens:.0e} tokens"
    assert best["joined"] is not None and best["masked"] is not None
    return [
        Row(what, "microseconds", best["joined"], best["theirs"], peer_name, "1 times"),
        Row("    with document masks", "microseconds", best["masked"], best["theirs"], f"{peer_name}, without", "1 times"),
        Row("    to open the set", "seconds", opened, peer_opened, peer_name),
    ]


def _write_holes(prefix: Path, num_tokens: int) -> None:
    """A shard whose tokens are all 0 and take no room on the disk."""
    import numpy as np

    from data.shards import MAGIC, VERSION

    lengths = np.random.default_rng(0).exponential(500, max(num_tokens // 500, 1)).astype("<i4") + 1
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", MAGIC, VERSION, 8, len(lengths), len(lengths) + 1))
        for part in (lengths, offsets, np.arange(len(lengths) + 1)):
            file.write(part.tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))


def _gpt_dataset(prefix: Path, cache: Path):
    """megatron-core's samples of one epoch, without the attention masks that it could make."""
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=2048,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=types.SimpleNamespace(eod=1, pad=2, vocab_size=50_000, unique_identifiers={}),
    )
    stored = IndexedDataset(str(prefix), mmap=True)
    documents = np.arange(len(stored.sequence_lengths), dtype=np.int32)
    return GPTDataset(stored, str(prefix), documents, None, Split.train, config)


def _megatron(measure: Callable):
    """What is measured of megatron-core, and its name; None and why where it cannot be."""
    try:
        import megatron.core.datasets.helpers  # noqa: F401  the import is not what is measured

        return measure(), "megatron-core"
    except ImportError as error:
        return None, f"not measured: {error}"


def _memory(steps: Iterator[None]) -> tuple[int, int]:
    """Bytes that are held when a measurement yields, and at most until it ends."""
    gc.collect()
    tracemalloc.start()
    next(steps)
    held, _ = tracemalloc.get_traced_memory()
    for _ in steps:
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held, most


def _seconds(measured: Callable[[], object]) -> float:
    start = time.perf_counter()
    measured()
    return time.perf_counter() - start


def _versions() -> str:
    names = ("numpy", "sentencepiece", "tokenizers", "gigatoken", "megatron-core")
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "sentencepiece": sentencepiece,
    "huggingface": huggingface,
    "gigatoken": gigatoken,
    "start_up": start_up,
    "index": index,
    "order": order,
    "random_access": random_access,
}


if __name__ == "__main__":
    run_door(main)
