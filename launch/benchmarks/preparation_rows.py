"""The rows of launch/benchmarks/preparation.py: each measures our side and a peer's in turn."""

import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.command_line import UserError
from data.sampling.order import Blend
from data.sampling.packing import PackedSamples
from data.shards import MAGIC, VERSION, Shard, ShardWriter, TokenStream
from data.tokenization.conversion import convert
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from launch import REPOSITORY
from launch.benchmarks.measurement import Timing, describe_machine, timed
from launch.benchmarks.settings import PreparationSettings

_PREPARE = REPOSITORY / "data" / "prepare.py"
_DOCUMENT_CHARACTERS = 3000  # about one web page
_TRAINING_DOCUMENTS = 3000
_VOCAB_SIZE = 16_384
_END_OF_TEXT = "<|endoftext|>"
_LONGEST_SECONDS = 1200
# A separate file, because datatrove's processes read it again.
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
class Row:
    """One line of the table. A larger value is better for a rate, a smaller one for everything else."""

    what: str
    unit: str
    ours: float
    peer: float | None
    """The peer's value; None if there is no peer."""
    peer_name: str
    """Name of the peer, or the reason why there is none."""
    aim: str = ""
    detail: str = ""
    """Spread of the rounds and CPU time of both, where rounds are timed."""

    @property
    def ratio(self) -> float | None:
        """How many times better our value is; None without a peer."""
        if not self.peer:
            return None
        return self.ours / self.peer if self.unit == "MB/s" else self.peer / self.ours


def measure(names: Sequence[str], settings: PreparationSettings) -> None:
    """Measure these rows and print the table."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, Path(folder))
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += TABLE[name](bench)
    print(f"\n{datetime.date.today()}, {describe_machine('1 library thread in each process')}, {_versions()}")
    print(f"\n{'':52}{'unit':>13}{'ours':>12}{'peer':>12}{'ratio':>10}  {'aim':12}peer")
    for row in rows:
        peer = f"{row.peer:12.3g}{row.ratio:10,.1f}" if row.peer else f"{'':22}"
        print(f"{row.what:52}{row.unit:>13}{row.ours:12.3g}{peer}  {row.aim:12}{row.peer_name}")
        if row.detail:
            print(f"    {row.detail}")


class Bench:
    """The settings with the text and tokenizers of a run; each is made in `folder` at its first use."""

    def __init__(self, settings: PreparationSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._numbers = itertools.count()

    def new_path(self, name: str) -> Path:
        """Return a path that has not been used yet."""
        return self.folder / f"{name}-{next(self._numbers)}"

    @functools.cached_property
    def documents(self) -> list[str]:
        """JSON lines of `megabytes` in total."""
        lines = list(_lines(self.settings.input))
        if not lines:
            raise UserError(f"--input {' '.join(self.settings.input)} contains no lines.")
        taken, left, repeated = [], self.settings.megabytes * 1e6, itertools.cycle(lines)
        while left > 0:
            taken.append(next(repeated))
            left -= len(taken[-1].encode())
        return taken

    @functools.cached_property
    def texts(self) -> list[str]:
        """Texts that the tokenizers are trained on."""
        return [json.loads(line)["text"] for line in self.documents[:_TRAINING_DOCUMENTS]]

    @functools.cached_property
    def sentencepiece(self) -> tuple[Path, Path]:
        """A SentencePiece BPE model, and the same tokenizer as a tokenizer.json."""
        model, converted = self.folder / "sentencepiece.model", self.folder / "sentencepiece.json"
        train_sentencepiece(self.texts, model, min(_VOCAB_SIZE, 512 + len(self.texts)))
        convert(load_tokenizer(model)).save(str(converted))
        return model, converted

    @functools.cached_property
    def byte_level(self) -> tuple[Path, Path]:
        """A byte-level BPE tokenizer.json, for both contenders."""
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
        """Return a folder with the documents in N files: datatrove gives each process its own files."""
        return self._write(f"corpus-{files}", self.documents, files)

    def one_document(self) -> Path:
        """Return a folder with one document."""
        return self._write("one", self.documents[:1], 1)

    def prepare(self, corpus: Path, tokenizer: Path, workers: int, *options: str) -> tuple[Timing, int]:
        """Return the time that data/prepare.py takes from start to end, and the number of tokens that it wrote."""
        output = self.new_path("ours")
        command = [sys.executable, str(_PREPARE), "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output)]
        timing = _run([*command, "--workers", str(workers), "--held_out", "0", "--exact_duplicates", "keep", *options])
        return timing, json.loads((output / "manifest.json").read_text())["splits"]["train"]["tokens"]

    def datatrove(self, corpus: Path, tokenizer: Path, workers: int) -> tuple[Timing, int]:
        """Return the time and tokens of datatrove."""
        output, program = self.new_path("datatrove"), self.folder / "datatrove_pipeline.py"
        program.write_text(_DATATROVE)
        timing = _run([self.settings.peer_python or "", str(program), str(corpus), str(tokenizer), _END_OF_TEXT, str(output), str(workers)])
        return timing, sum(path.stat().st_size for path in output.glob("*.ds")) // 2

    def _write(self, name: str, documents: list[str], files: int) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            for number in range(files):
                (folder / f"{number}.jsonl").write_text("".join(documents[number::files]), encoding="utf-8")
        return folder


def _lines(files: Sequence[str]) -> Iterator[str]:
    """Yield JSON lines, each with its line break."""
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


def _run(command: list[str]) -> Timing:
    """Return the time that a command takes, with one library thread in each of its processes."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1"}
    done: list[subprocess.CompletedProcess[str]] = []
    timing = timed(lambda: done.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LONGEST_SECONDS)))
    if done[0].returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done[0].stdout[-2000:]}{done[0].stderr[-2000:]}")
    return timing


def _compare_scripts(
    bench: Bench, what: str, tokenizer: tuple[Path, Path], workers: int, our_aim: str, engines: Sequence[bool]
) -> list[Row]:
    """Compare both scripts, JSON Lines to finished shards, with and without the time that each needs for a single document."""
    corpus, one = bench.corpus(workers), bench.one_document()
    contenders: dict[str, Callable[[Path], tuple[Timing, int]]] = {
        f"gigatoken {fast}": functools.partial(_prepare, bench, tokenizer[0], workers, fast) for fast in engines
    }
    if bench.settings.peer_python:
        contenders["datatrove"] = lambda corpus: bench.datatrove(corpus, tokenizer[1], workers)
    whole: dict[str, list[Timing]] = {name: [] for name in contenders}
    start: dict[str, list[Timing]] = {name: [] for name in contenders}
    tokens = set()
    for _ in range(bench.settings.rounds):
        for name, run in contenders.items():
            timing, written = run(corpus)
            whole[name].append(timing)
            start[name].append(run(one)[0])
            tokens.add(written)
    if len(tokens) != 1:
        raise RuntimeError(f"{what}: the contenders wrote different numbers of tokens: {sorted(tokens)}.")
    megabytes = sum(path.stat().st_size for path in corpus.iterdir()) / 1e6
    peer_name = "datatrove" if "datatrove" in contenders else "not measured: no datatrove"
    rate = {name: megabytes / _least(timings) for name, timings in whole.items()}
    without = {name: megabytes / max(_least(whole[name]) - _least(start[name]), 1e-3) for name in contenders}
    rows = []
    for fast in engines:
        ours = f"gigatoken {fast}"
        kind = f"{what}, {'gigatoken' if fast else 'its own library'}"
        rows.append(
            Row(kind, "MB/s", rate[ours], rate.get("datatrove"), peer_name, our_aim, _detail(whole[ours], whole.get("datatrove", [])))
        )
        rows.append(Row("    without start-up", "MB/s", without[ours], without.get("datatrove"), peer_name))
    return rows


def _least(timings: Sequence[Timing]) -> float:
    """Return the wall time of the fastest round."""
    return min(timing.wall for timing in timings)


def _detail(ours: Sequence[Timing], peer: Sequence[Timing]) -> str:
    """Return the least and greatest wall time of the rounds, and the least CPU time, of both sides."""
    sides = (("ours", ours), ("peer", peer))
    return "; ".join(
        f"{side} {_least(timings):.2f} to {max(timing.wall for timing in timings):.2f} s, CPU {min(timing.cpu for timing in timings):.2f} s"
        for side, timings in sides
        if timings
    )


def _prepare(bench: Bench, tokenizer: Path, workers: int, fast: bool, corpus: Path) -> tuple[Timing, int]:
    return bench.prepare(corpus, tokenizer, workers, "--gigatoken", str(fast).lower())


def _sentencepiece(bench: Bench) -> list[Row]:
    return _compare_scripts(bench, "SentencePiece BPE, 2 processes", bench.sentencepiece, 2, "1.2 times", (True, False))


def _huggingface(bench: Bench) -> list[Row]:
    return _compare_scripts(bench, "tokenizer.json, 2 processes", bench.byte_level, 2, "2 times", (True, False))


def _gigatoken(bench: Bench) -> list[Row]:
    return _compare_scripts(bench, "tokenizer.json, 1 process", bench.byte_level, 1, "15 MB/s", (True,))


def _start_up(bench: Bench) -> list[Row]:
    """Time from the start of the interpreter to the finished folder, with a corpus of one document."""
    ours, peer, one = [], [], bench.one_document()
    for _ in range(bench.settings.rounds):
        ours.append(bench.prepare(one, bench.byte_level[0], 1)[0])
        if bench.settings.peer_python:
            peer.append(bench.datatrove(one, bench.byte_level[1], 1)[0])
    peer_name = "datatrove" if peer else "not measured: no datatrove"
    return [Row("start-up", "seconds", _least(ours), _least(peer) if peer else None, peer_name, "below 2", _detail(ours, peer))]


def _index(bench: Bench) -> list[Row]:
    """Memory of a writer per document: just before it is closed, and at most until it is closed."""
    documents, tokens = bench.settings.index_documents, np.zeros(300, np.dtype("<u2"))

    def ours() -> Iterator[None]:
        """Write the documents; yield once before the shard is closed."""
        writer = ShardWriter(bench.new_path("ours") / "shard", tokens.dtype)
        for _ in range(documents):
            writer.add(tokens)
        yield
        writer.close()

    before_close, peak = _memory(ours())
    peer, peer_name = _megatron(lambda peer: _memory(peer.build_index(bench.new_path("megatron"), tokens, documents)))
    return [
        Row("index while writing", "B/document", before_close / documents, peer and peer[0] / documents, peer_name, "12 to 20"),
        Row("    and while closing, at most", "B/document", peak / documents, peer and peer[1] / documents, peer_name),
    ]


def _order(bench: Bench) -> list[Row]:
    """Set up a blend of two sources and draw 1,000 samples. Megatron orders a hundredth of the samples; its time is scaled."""
    samples = bench.settings.blend_samples
    part = max(samples // 100, 1)

    def ours() -> Iterator[None]:
        """Draw 1,000 samples, and yield while the order is in memory."""
        blend = Blend([samples // 2, samples // 4 or 1], [0.7, 0.3], seed=1)
        blend.draw(np.linspace(0, samples - 1, 1000).astype(np.int64))
        yield

    seconds, peer_seconds = [], []
    for _ in range(bench.settings.rounds):
        seconds.append(_seconds(lambda: list(ours())))
        peer, peer_name = _megatron(lambda peer: _seconds(lambda: list(peer.build_blend(part))))
        peer_seconds += [] if peer is None else [peer * 100]
    memory, (peer_memory, _) = _memory(ours())[1], _megatron(lambda peer: _memory(peer.build_blend(part))[1] * 100)
    what = f"order of {samples:.0e} samples"
    return [
        Row(what, "seconds", min(seconds), min(peer_seconds, default=None), f"{peer_name}, from 1/100 of them", "below 1"),
        Row("    memory", "MB", memory / 1e6, peer_memory and peer_memory / 1e6, f"{peer_name}, from 1/100 of them", "constant"),
    ]


def _random_access(bench: Bench) -> list[Row]:
    """Read samples of 2,048 tokens in random order; both join documents, ours also with document masks."""
    prefix = bench.new_path("set")
    _write_sparse_shard(prefix, bench.settings.set_tokens)
    opened = _seconds(lambda: PackedSamples(TokenStream([Shard(prefix)], 0), 2048, 1, False, None, 0).num_samples)
    stream = TokenStream([Shard(prefix)], 0)
    joined, masked = (PackedSamples(stream, 2048, 1, document_mask, None, 0) for document_mask in (False, True))
    start = time.perf_counter()
    theirs, peer_name = _megatron(lambda peer: peer.open_dataset(prefix, bench.new_path("cache")))
    peer_opened = time.perf_counter() - start if theirs else None
    draw = np.random.default_rng(0)
    microseconds: dict[str, list[float]] = {"joined": [], "masked": [], "theirs": []}
    for _ in range(bench.settings.rounds + 1):  # the first round loads the pages of every index
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


def _write_sparse_shard(prefix: Path, num_tokens: int) -> None:
    """Write a shard whose tokens are all 0 and use no disk."""
    lengths = np.random.default_rng(0).exponential(500, max(num_tokens // 500, 1)).astype("<i4") + 1
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", MAGIC, VERSION, 8, len(lengths), len(lengths) + 1))
        for part in (lengths, offsets, np.arange(len(lengths) + 1)):
            file.write(part.tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))


def _megatron(measure: Callable[[types.ModuleType], Any]) -> tuple[Any, str]:
    """Return what `measure` finds of megatron-core, and its name; None and the reason if it is not installed."""
    try:
        from launch.benchmarks import megatron_peer  # optional: megatron-core exists for Linux only
    except ImportError as error:
        return None, f"not measured: {error}"
    return measure(megatron_peer), "megatron-core"


def _memory(steps: Iterator[None]) -> tuple[int, int]:
    """Return the bytes that are in use when a measurement yields, and the peak until it ends."""
    gc.collect()
    tracemalloc.start()
    next(steps)
    in_use, _ = tracemalloc.get_traced_memory()
    for _ in steps:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return in_use, peak


def _seconds(measured: Callable[[], object]) -> float:
    start = time.perf_counter()
    measured()
    return time.perf_counter() - start


def _versions() -> str:
    names = ("numpy", "sentencepiece", "tokenizers", "gigatoken", "megatron-core")
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)


TABLE: dict[str, Callable[[Bench], list[Row]]] = {
    "sentencepiece": _sentencepiece,
    "huggingface": _huggingface,
    "gigatoken": _gigatoken,
    "start_up": _start_up,
    "index": _index,
    "order": _order,
    "random_access": _random_access,
}
"""The function of each row, by its name in `only`."""
