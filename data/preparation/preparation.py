"""The work between a corpus and a prepared folder: agree with who worked on it before, tokenize unit by unit, join.

OUTPUT.partial holds plan.json (what the units are of), units/ (what is done), join/ (shards that are done), whole/ (what OUTPUT will be).
"""

import itertools
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.command_line import UserError
from data.files import lock_file, publish_folder, sha256_of, write_file
from data.preparation import merging
from data.preparation.duplicates import DIGEST, digest_of
from data.preparation.sources import STANDARD_INPUT, Corpus, FileCorpus, Row, Unit
from data.preparation.work_units import EXAMPLES, Task, UnitWorker, read_entry, remove_unfinished
from data.preparation.workers import Progress, Workers, count_off
from data.shards import MANIFEST, describe_place, token_dtype
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import copy_tokenizer, fastest, load_tokenizer
from data.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from data.prepare import PrepareSettings

PLAN = "plan.json"
_SAMPLE_CHARACTERS = 100_000  # of the corpus, on which a fast tokenizer is compared
_LEAST_UNIT, _LARGEST_UNIT = 4 << 20, 64 << 20
_UNITS_OF_A_CORPUS = 256  # where they come out between the two
_NAMED_CHANGES = 5


class Preparation:
    """What one node does of it."""

    def __init__(
        self,
        settings: "PrepareSettings",
        corpus: Corpus,
        given: Tokenizer | None,
        partial: Path,
        rank: int,
        world_size: int,
        say: Callable[[str], object],
    ) -> None:
        """`given` is the tokenizer that the settings name, where they name one."""
        self.settings, self.corpus, self.given = settings, corpus, given
        self.partial, self.rank, self.world_size, self.say = partial, rank, world_size, say
        self.units, self.joined, self.whole = partial / "units", partial / "join", partial / "whole"
        for folder in (self.units, self.joined, self.whole):
            folder.mkdir(exist_ok=True)
        remove_unfinished(self.units, rank)
        self.num_texts = 1 if settings.pair_field is None else 2

    def agree(self, recorded: dict) -> None:
        """Find the plan of an earlier start or of another node, or make it, and with it the tokenizer.

        Raises UserError, with what differs, where it was made for other text or other settings.
        """
        lock = lock_file(self.partial / "agree.lock", wait_seconds=math.inf)
        assert lock is not None
        with lock:
            path = self.partial / PLAN
            before = json.loads(path.read_bytes()) if path.exists() else None
            plan = recorded | {"files": self.corpus.identity()}
            if before is not None:
                if before["settings"]["on_error"] == "fail":  # then nothing was passed over so far
                    before["settings"]["on_error"] = self.settings.on_error
                if changed := changes(before, plan):
                    raise UserError(
                        f"{self.partial} was begun with other text or settings: {changed}. "
                        f"Give the same again, or another --output; or delete {self.partial}."
                    )
                self.tokenizer = load_tokenizer(self.whole)
            else:
                self.tokenizer = self._make_tokenizer()
            sample = list(self.corpus.beginning(_SAMPLE_CHARACTERS, lambda texts: True))
            fast, sentence = fastest(self.tokenizer, sample) if self.settings.gigatoken else (self.tokenizer, "")
            if sentence:
                self.say(sentence)
            self.fast = fast
            if before is not None and before["engine"] != fast.engine:
                raise UserError(
                    f"{self.partial} was begun with {before['engine']}, and here it is {fast.engine}. "
                    "Install the same, or give another --output."
                )
            self.unit_bytes = before["unit_bytes"] if before else self._unit_bytes()
            write_json(plan | {"engine": fast.engine, "unit_bytes": self.unit_bytes}, path)

    def _make_tokenizer(self) -> Tokenizer:
        if self.given is not None:
            copy_tokenizer(self.given, self.whole)
            return load_tokenizer(self.whole)
        settings = self.settings
        self.say(f"Learning a tokenizer of {settings.vocab_size} ids ...")

        def is_for_training(texts: tuple[str, ...]) -> bool:
            return not merging.is_held_out(np.frombuffer(digest_of("\0".join(texts)), DIGEST), settings.held_out)[0]

        texts = self.corpus.beginning(settings.tokenizer_characters, is_for_training)
        first = next(texts, None)
        if first is None and (problem := self.corpus.first_problem()):
            raise UserError(f"There is no text to learn a tokenizer from. {problem}.")
        texts = itertools.chain([] if first is None else [first], texts)
        path = self.whole / "tokenizer.model"
        train_sentencepiece(
            texts, path, settings.vocab_size, settings.tokenizer_kind, settings.special_tokens, settings.pieces_within_words
        )
        copy_tokenizer(load_tokenizer(path), self.whole)
        return load_tokenizer(self.whole)

    def _unit_bytes(self) -> int:
        if self.settings.unit_megabytes is not None:
            return max(1, round(self.settings.unit_megabytes * 2**20))
        if not isinstance(self.corpus, FileCorpus):
            return self.corpus.unit_bytes
        size = sum(file.size for file in self.corpus.files)
        return min(_LARGEST_UNIT, max(_LEAST_UNIT, size // _UNITS_OF_A_CORPUS))

    def workers(self) -> Workers:
        """As many as are asked for, and not more than there is work for."""
        asked = self.settings.workers or usable_cores()
        count = asked
        if isinstance(self.corpus, FileCorpus):
            few = self._own_units()[:asked]
            count = asked if any(unit.is_open_ended for unit in few) else max(1, len(few))
        task = Task(
            corpus=self.corpus if isinstance(self.corpus, FileCorpus) else None,
            given=self.corpus.givens[0],
            num_texts=self.num_texts,
            folder=self.units,
            rank=self.rank,
            tokenizer=self.tokenizer.path,
            fast=self.fast is not self.tokenizer,
            threads=max(1, asked // count),
            dtype=token_dtype(self.tokenizer.vocab_size).str,
            on_error=self.settings.on_error,
            filters=self.settings.filters,
            sign=self.settings.near_duplicates != "keep",
        )
        return Workers(task, count, self.fast)

    @cached_property
    def _all_units(self) -> list[Unit]:
        """Of files; of one that is cut where it is read, the first part."""
        return list(self.corpus.units(self.unit_bytes))

    def _own_units(self) -> list[Unit]:
        return self._all_units[self.rank :: self.world_size]

    def tokenize(self, workers: Workers) -> None:
        """Do this node's units that are not done yet."""
        errors: Counter = Counter()
        ended: set[int] = set()  # files that were read to their end
        is_of_files = isinstance(self.corpus, FileCorpus)
        progress = Progress(workers, sum(unit.size for unit in self._own_units()) if is_of_files else None, self.say)

        def count(unit: Unit, entry: dict, now: bool = True) -> None:
            errors.update(entry["errors"])
            self._refuse_too_many(errors)
            if entry["last"]:
                ended.add(unit.number)
            progress.add(unit.number if unit.is_open_ended else unit.name, entry["bytes_on_disk"], now)

        def is_done(unit: Unit) -> bool:
            if (entry := read_entry(self.units, unit.name)) is not None:
                count(unit, entry, now=False)
            return entry is not None

        def of_files() -> Iterator[tuple[Unit, None]]:
            for unit in self._own_units():
                while unit.number not in ended:
                    if not is_done(unit):
                        yield unit, None
                    if not unit.is_open_ended:
                        break
                    unit = unit.next_part()

        def of_stream() -> Iterator[tuple[Unit, list[Row]]]:
            blocks = 0
            for unit, rows in self.corpus.blocks(self.unit_bytes):
                blocks += 1
                if unit.number % self.world_size == self.rank and not is_done(unit):
                    yield unit, rows
            write_json({"blocks": blocks}, self.units / "stream.json")

        try:
            for (unit, _), entry in workers.call(UnitWorker.do, of_files() if is_of_files else of_stream(), progress.look):
                count(unit, entry)
        finally:
            progress.close()

    def join(self, workers: Workers, recorded: dict, output: Path) -> bool:
        """Make the output of the units, once those of all nodes are there, on the node that comes last; whether it was this one."""
        with ExitStack() as held:
            if (found := self._found()) is None:
                self.say(f"Rank {self.rank} is done; others of the {self.world_size} are not. The one that is done last joins all parts.")
                return False
            if (lock := lock_file(self.partial / "join.lock")) is None:
                self.say(f"Rank {self.rank} is done; another rank is joining all parts.")
                return False
            held.enter_context(lock)
            self._refuse_changed_input()
            manifest = self._write_shards(workers, found, recorded)
            self._write_quarantine(found.names)
            write_json(manifest, self.whole / MANIFEST, indent=2)
            for left in self.whole.rglob("*.partial"):
                left.unlink()
            publish_folder(self.whole, output)
            self.say(summary(manifest, output))
        return True

    def _refuse_changed_input(self) -> None:
        if isinstance(self.corpus, FileCorpus) and self.corpus.files[0].given != STANDARD_INPUT:
            changed = _changed_files(self.corpus.identity(), self.corpus.as_it_is_now().identity())
            if changed:
                raise UserError(f"The input changed while it was read: {changed[0]}. Delete {self.partial} and begin again.")

    def _found(self) -> "_Found | None":
        """What all units say together; None where one is missing."""
        found = _Found()
        if isinstance(self.corpus, FileCorpus):
            units = self._all_units
        else:
            blocks = json.loads((self.units / "stream.json").read_bytes())["blocks"]
            units = [Unit(number, 0, (), 0) for number in range(blocks)]
        for unit in units:
            while True:
                entry = read_entry(self.units, unit.name)
                if entry is None:
                    return None
                found.add(unit.name, entry)
                if entry["last"]:
                    break
                unit = unit.next_part()
        return found

    def _write_shards(self, workers: Workers, found: "_Found", recorded: dict) -> dict:
        """Shards and report; the manifest of them."""
        settings = self.settings
        self._refuse_too_many(found.errors)
        choice = merging.Choice(
            settings.held_out, settings.exact_duplicates == "drop", settings.near_duplicates, settings.near_duplicate_similarity
        )
        join = merging.Join(
            self.units, self.joined, self.whole, token_dtype(self.tokenizer.vocab_size), self.num_texts, self.tokenizer.vocab_size
        )
        went = join.decide(found.names, choice, lambda: self.say("Looking for near-duplicates ..."))
        plans = join.plan(found.names, settings.shard_tokens)
        dropped = found.dropped + went.counts
        if not any(plan.split == 0 for plan in plans):
            counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items()))
            why = f"--held_out {settings.held_out} takes every one" if plans else f"of {found.documents:,} read none is left"
            raise UserError(
                f"There is no document to train on: {why}{f' ({counts})' if counts else ''}. "
                f"Delete {self.partial} to begin with other settings."
            )
        waiting = [(join, plan) for plan in plans if not (self.joined / f"{plan.name}.json").exists()]
        count_off(workers.call(_write_shard, waiting, lambda: None), len(waiting), "shards", self.say)
        places = self._places()
        of_sources: dict[int, np.ndarray] = {}
        splits: dict[str, dict] = {}
        for split, split_name in enumerate(merging.SPLITS):
            written = [json.loads((self.joined / f"{plan.name}.json").read_bytes()) for plan in plans if plan.split == split]
            for shard in written:
                shard["sources"] = [places(source, position) for source, position in shard["sources"]]
                for source, numbers in shard.pop("of_sources").items():
                    of_sources[int(source)] = of_sources.get(int(source), 0) + np.array(numbers)
            splits[split_name] = {kind: sum(shard[kind] for shard in written) for kind in ("documents", "tokens", "bytes")}
            splits[split_name]["shards"] = written
        manifest = recorded | {
            "tokenizer": {
                "file": self.tokenizer.path.name,
                "sha256": sha256_of(self.tokenizer.path),
                "vocab_size": self.tokenizer.vocab_size,
                "end_of_text": self.tokenizer.end_of_text,
                "settings": self.tokenizer.settings,
                "configuration_sha256": sha256_of(self.whole / "tokenizer_config.json"),
                "engine": self.fast.engine,
            },
            "splits": splits,
            "documents_read": found.documents,
            "dropped": dict(sorted(dropped.items())),
            "inputs": self._inputs(of_sources, found.dropped_of_sources + went.of_sources),
            "sources": self.corpus.names,
            "position_unit": self.corpus.position_units,
        }
        self._report(manifest, join.counts(plans), self._examples(found, went))
        return manifest

    def _inputs(self, of_sources: dict[int, np.ndarray], dropped: Counter) -> list[dict]:
        """What each input gave."""
        rows: dict[str, Counter] = {}
        for source, given in enumerate(self.corpus.givens):
            documents, tokens, num_bytes = of_sources.get(source, (0, 0, 0))
            found = {"files": 1, "documents": int(documents), "tokens": int(tokens), "bytes": int(num_bytes), "dropped": dropped[source]}
            rows.setdefault(given, Counter()).update(found)
        return [{"given": given, **counts} for given, counts in rows.items()]

    def _examples(self, found: "_Found", went: merging.Gone) -> dict[str, list[dict]]:
        """A few of the documents that were dropped, by reason, to be read by a person."""
        places, examples = self._places(), {}
        for reason, some in found.examples.items():
            examples[reason] = [{"place": places(one["source"], one["position"]), "text": one["text"]} for one in some]
        for reason, documents in went.examples.items():
            examples[reason] = [
                {"place": places(source, position), "text": self.tokenizer.decode(tokens[:300])} for source, position, tokens in documents
            ]
        return dict(sorted(examples.items()))

    def _report(self, manifest: dict, counts: tuple[np.ndarray, np.ndarray], examples: dict[str, list[dict]]) -> None:
        from data.preparation.report import write_report

        write_json(examples, self.whole / "dropped.json", indent=2)
        write_report(self.whole, manifest, *counts, examples, self.tokenizer.decode)

    def _write_quarantine(self, names: list[str]) -> None:
        kept = [path for name in names if (path := self.units / f"{name}.quarantine").exists()]
        if not kept:
            return
        places = self._places()
        with open(self.whole / "quarantine.jsonl", "w", encoding="utf-8") as file:
            for path in kept:
                with open(path, encoding="utf-8") as lines:
                    for line in map(json.loads, lines):
                        place = places(line.pop("source"), line.pop("position"))
                        file.write(json.dumps({"place": place} | line, ensure_ascii=False) + "\n")

    def _places(self) -> Callable[[int, int], str]:
        names, units = self.corpus.names, self.corpus.position_units
        return lambda source, position: describe_place(names[source], units[source], position)

    def _refuse_too_many(self, errors: Counter) -> None:
        if errors.total() > self.settings.max_errors:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in errors.most_common())
            raise UserError(
                f"{errors.total():,} records are no text ({reasons}), more than --max_errors {self.settings.max_errors}. What is done is "
                f"kept in {self.partial}; the same command with a larger --max_errors goes on from there."
            )


@dataclass
class _Found:
    """What units say together."""

    names: list[str] = field(default_factory=list)
    documents: int = 0
    errors: Counter = field(default_factory=Counter)
    """Of the dropped, those that were no text."""
    dropped: Counter = field(default_factory=Counter)
    dropped_of_sources: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, name: str, entry: dict) -> None:
        self.names.append(name)
        self.documents += entry["documents"]
        self.errors.update(entry["errors"])
        self.dropped.update(entry["dropped"])
        self.dropped_of_sources.update({int(source): number for source, number in entry["dropped_of_source"].items()})
        for reason, some in entry["examples"].items():
            kept = self.examples.setdefault(reason, [])
            kept += some[: EXAMPLES - len(kept)]


def _write_shard(worker: UnitWorker, join: merging.Join, plan: merging.ShardPlan) -> None:
    """A shard, and behind it what is to be known of it."""
    write_json(join.write_shard(plan), join.joined / f"{plan.name}.json")


def changes(before: dict, now: dict) -> str:
    """What differs between two records of what was asked for, in words; nothing where they are the same."""
    if before.get("format") != now["format"]:
        return f"it was made by another version of this project (format {before.get('format')}, now {now['format']})"
    there, here = before.get("settings", {}), now["settings"]
    changed = [f"--{name} {there.get(name)} there, {value} now" for name, value in here.items() if there.get(name) != value]
    if before.get("given_tokenizer") != now["given_tokenizer"]:
        changed.append("--tokenizer or --end_of_text names another tokenizer, or another token to end a document with")
    if before.get("text") != now["text"]:
        lists = [record.get("files") for record in (before, now)]
        changed += _changed_files(*lists) if all(lists) else ["the input is not the same, by name, size or time"]
    more = f" and {len(changed) - _NAMED_CHANGES} more" if len(changed) > _NAMED_CHANGES else ""
    return "; ".join(changed[:_NAMED_CHANGES]) + more


def _changed_files(before: list[list], now: list[list]) -> list[str]:
    """What differs between two identities of a corpus, file by file."""
    there, here = ({name: stamp for name, *stamp in files} for files in (before, now))
    found = []
    for name in sorted(there.keys() | here.keys()):
        if name not in here or name not in there:
            found.append(f"{name} is {'gone' if name in there else 'new'}")
        elif there[name][:1] != here[name][:1]:
            found.append(f"{name} has another size")
        elif there[name] != here[name]:
            found.append(f"{name} was written since")
    return found or (["the order of the input files"] if before != now else [])


def write_json(value: dict, path: Path, indent: int | None = None) -> None:
    """Create or replace a JSON file; several nodes may write the same one."""
    write_file(path, json.dumps(value, indent=indent, ensure_ascii=False), Path(f"{path}.{secrets.token_hex(4)}.partial"))


def summary(manifest: dict, output: Path) -> str:
    lines = [
        f"{name:<10} {split['documents']:>11,} documents {split['tokens']:>15,} tokens {split['bytes']:>16,} bytes"
        + (f"   {split['bytes'] / split['tokens']:.2f} bytes a token" if split["tokens"] else "")
        for name, split in manifest["splits"].items()
    ]
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in manifest["dropped"].items()) or "nothing"
    if manifest["settings"]["held_out"] and not manifest["splits"]["validation"]["documents"]:
        lines.append("           no document is held out: there are too few for this --held_out, and training will have no validation")
    if manifest["settings"]["separator"] and manifest["documents_read"] <= len(manifest["sources"]):
        lines.append(f"           --separator {manifest['settings']['separator']} occurs nowhere: each file is one document")
    return "\n".join([*lines, f"dropped    {dropped}", f"tokenizer  {manifest['tokenizer']['vocab_size']:,} ids", f"written to {output}"])


def usable_cores() -> int:
    """The cores that a batch system left to this process, where the system can say, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
