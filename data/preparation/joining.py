"""The last step of a preparation: finished work units become shards, manifest, report and the output folder."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.command_line import UserError
from data.files import lock_file, publish_folder, sha256_of
from data.preparation import merging
from data.preparation.corpus import Corpus, FileCorpus, Unit
from data.preparation.node import Node, describe_changed_files, write_json
from data.preparation.settings import STANDARD_INPUT
from data.preparation.work_units import EXAMPLES, UnitWorker, read_entry
from data.preparation.workers import Workers, show_progress
from data.shards import MANIFEST, describe_place, token_dtype


def join(node: Node, workers: Workers, record: dict, output: Path) -> bool:
    """Make the output folder from the units of all nodes, if none is missing. Return True if this node made it."""
    if (totals := _read_units(node)) is None:
        node.log(
            f"Rank {node.rank} has finished its part, but not all of the {node.world_size} ranks have. "
            "The rank that finishes last writes the shards."
        )
        return False
    if (lock := lock_file(node.partial / "join.lock")) is None:
        node.log(f"Rank {node.rank} has finished its part; another rank is writing the shards.")
        return False
    with lock:
        _refuse_changed_input(node)
        manifest = _write_shards(node, workers, totals, record)
        _write_quarantine(node, totals.unit_names)
        write_json(manifest, node.result_folder / MANIFEST, indent=2)
        for unfinished in node.result_folder.rglob("*.partial"):
            unfinished.unlink()
        publish_folder(node.result_folder, output)
        node.log(_summary(manifest, output))
    return True


def _refuse_changed_input(node: Node) -> None:
    if isinstance(node.corpus, FileCorpus) and node.corpus.files[0].input_name != STANDARD_INPUT:
        changes = describe_changed_files(node.corpus.identity(), node.corpus.with_current_stamps().identity())
        if changes:
            raise UserError(f"The input changed while it was read: {changes[0]}. Delete {node.partial} and start again.")


@dataclass
class _UnitTotals:
    """The entries of all units, added up."""

    unit_names: list[str] = field(default_factory=list)
    documents: int = 0
    errors: Counter = field(default_factory=Counter)
    """Number of invalid records by reason; `dropped` includes them."""
    dropped: Counter = field(default_factory=Counter)
    """Number of dropped documents by reason."""
    dropped_by_source: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, name: str, entry: dict) -> None:
        """Add the entry of a unit."""
        self.unit_names.append(name)
        self.documents += entry["documents"]
        self.errors.update(entry["errors"])
        self.dropped.update(entry["dropped"])
        self.dropped_by_source.update({int(source): number for source, number in entry["dropped_of_source"].items()})
        for reason, some in entry["examples"].items():
            kept = self.examples.setdefault(reason, [])
            kept += some[: EXAMPLES - len(kept)]


def _read_units(node: Node) -> _UnitTotals | None:
    """Add up the entries of all units. Return None if a unit is not finished."""
    totals = _UnitTotals()
    if isinstance(node.corpus, FileCorpus):
        units = node.all_units
    else:
        num_blocks = json.loads((node.units_folder / "stream.json").read_bytes())["blocks"]
        units = [Unit(index, 0, (), 0) for index in range(num_blocks)]
    for unit in units:
        while True:
            entry = read_entry(node.units_folder, unit.name)
            if entry is None:
                return None
            totals.add(unit.name, entry)
            if entry["last"]:
                break
            unit = unit.next_part()
    return totals


def _write_shards(node: Node, workers: Workers, totals: _UnitTotals, record: dict) -> dict:
    """Write the shards and the report, and return the manifest."""
    from data.preparation.report import write_report  # matplotlib takes half a second to import, and only this step needs it

    settings, tokenizer = node.settings, node.tokenizer
    node.refuse_too_many(totals.errors)
    rules = merging.SelectionRules(
        settings.held_out, settings.exact_duplicates == "drop", settings.near_duplicates, settings.near_duplicate_similarity
    )
    merger = merging.UnitMerger(
        node.units_folder,
        node.join_folder,
        node.result_folder,
        token_dtype(tokenizer.vocab_size),
        node.texts_per_document,
        tokenizer.vocab_size,
    )
    duplicates = merger.select(totals.unit_names, rules, lambda: node.log("Looking for near-duplicates ..."))
    plans = merger.plan(totals.unit_names, settings.shard_tokens)
    dropped = totals.dropped + duplicates.counts
    if not any(plan.split == 0 for plan in plans):
        raise UserError(_describe_empty_training_split(node, totals, dropped, bool(plans)))
    unwritten = [(merger, plan) for plan in plans if not (node.join_folder / f"{plan.name}.json").exists()]
    show_progress(workers.call(_write_shard, unwritten, lambda: None), len(unwritten), "shards", node.log)
    splits, counts_by_source = _read_shard_entries(node, plans)
    manifest = record | {
        "tokenizer": {
            "file": tokenizer.path.name,
            "sha256": sha256_of(tokenizer.path),
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            **({"begin_of_text": tokenizer.begin_of_text} if tokenizer.adds_bos else {}),
            "settings": tokenizer.settings,
            "configuration_sha256": sha256_of(node.result_folder / "tokenizer_config.json"),
            "engine": node.fast_tokenizer.engine,
        },
        "splits": splits,
        "documents_read": totals.documents,
        "dropped": dict(sorted(dropped.items())),
        "inputs": _inputs(node.corpus, counts_by_source, totals.dropped_by_source + duplicates.counts_by_source),
        "sources": node.corpus.names,
        "position_unit": node.corpus.position_units,
    }
    examples = _examples(node, totals, duplicates)
    write_json(examples, node.result_folder / "dropped.json", indent=2)
    write_report(node.result_folder, manifest, *merger.counts(plans), examples, tokenizer.decode)
    return manifest


def _write_shard(worker: UnitWorker, merger: merging.UnitMerger, plan: merging.ShardPlan) -> None:
    """Write a shard, then its entry. Runs in a worker process."""
    write_json(merger.write_shard(plan), merger.join_folder / f"{plan.name}.json")


def _describe_empty_training_split(node: Node, totals: _UnitTotals, dropped: Counter, has_held_out: bool) -> str:
    counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items()))
    reason = f"--held_out {node.settings.held_out} holds out all of them" if has_held_out else f"all {totals.documents:,} were dropped"
    if not totals.documents:
        reason = "the input contains no record"
    return (
        f"There is no document to train on: {reason}{f' ({counts})' if counts else ''}. "
        f"Delete {node.partial} to start again with other settings."
    )


def _read_shard_entries(node: Node, plans: list[merging.ShardPlan]) -> tuple[dict[str, dict], dict[int, np.ndarray]]:
    """Return the manifest's entry of each split, and [documents, tokens, bytes] by source."""
    describe = _place_describer(node.corpus)
    counts_by_source: dict[int, np.ndarray] = {}
    splits: dict[str, dict] = {}
    for split, split_name in enumerate(merging.SPLITS):
        shards = [json.loads((node.join_folder / f"{plan.name}.json").read_bytes()) for plan in plans if plan.split == split]
        for shard in shards:
            shard["sources"] = [describe(source, position) for source, position in shard["sources"]]
            for source, numbers in shard.pop("of_sources").items():
                counts_by_source[int(source)] = counts_by_source.get(int(source), 0) + np.array(numbers)
        splits[split_name] = {kind: sum(shard[kind] for shard in shards) for kind in ("documents", "tokens", "bytes")}
        splits[split_name]["shards"] = shards
    return splits, counts_by_source


def _inputs(corpus: Corpus, counts_by_source: dict[int, np.ndarray], dropped: Counter) -> list[dict]:
    """Return the manifest's entry of each input: its files, documents, tokens, bytes and dropped documents."""
    rows: dict[str, Counter] = {}
    for source, name in enumerate(corpus.input_names):
        documents, tokens, num_bytes = counts_by_source.get(source, (0, 0, 0))
        counts = {"files": 1, "documents": int(documents), "tokens": int(tokens), "bytes": int(num_bytes), "dropped": dropped[source]}
        rows.setdefault(name, Counter()).update(counts)
    return [{"given": name, **counts} for name, counts in rows.items()]


def _examples(node: Node, totals: _UnitTotals, duplicates: merging.DroppedDocuments) -> dict[str, list[dict]]:
    """Return a few dropped documents of each reason, with place and text."""
    describe, examples = _place_describer(node.corpus), {}
    for reason, some in totals.examples.items():
        examples[reason] = [{"place": describe(one["source"], one["position"]), "text": one["text"]} for one in some]
    for reason, documents in duplicates.examples.items():
        examples[reason] = [
            {"place": describe(source, position), "text": node.tokenizer.decode(tokens[:300].tolist())}
            for source, position, tokens in documents
        ]
    return dict(sorted(examples.items()))


def _write_quarantine(node: Node, unit_names: list[str]) -> None:
    """Write quarantine.jsonl, if any unit has invalid records."""
    paths = [path for name in unit_names if (path := node.units_folder / f"{name}.quarantine").exists()]
    if not paths:
        return
    describe = _place_describer(node.corpus)
    with open(node.result_folder / "quarantine.jsonl", "w", encoding="utf-8") as file:
        for path in paths:
            with open(path, encoding="utf-8") as lines:
                for line in map(json.loads, lines):
                    place = describe(line.pop("source"), line.pop("position"))
                    file.write(json.dumps({"place": place} | line, ensure_ascii=False) + "\n")


def _place_describer(corpus: Corpus) -> Callable[[int, int], str]:
    """Return a function that describes (source, position) for a person, such as "a.jsonl, byte 17"."""
    names, units = corpus.names, corpus.position_units
    return lambda source, position: describe_place(names[source], units[source], position)


def _summary(manifest: dict, output: Path) -> str:
    settings = manifest["settings"]
    lines = [
        f"{name:<10} {split['documents']:>11,} documents {split['tokens']:>15,} tokens {split['bytes']:>16,} bytes"
        + (f"   {split['bytes'] / split['tokens']:.2f} bytes per token" if split["tokens"] else "")
        for name, split in manifest["splits"].items()
    ]
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in manifest["dropped"].items()) or "nothing"
    if settings["held_out"] and not manifest["splits"]["validation"]["documents"]:
        lines.append("           no document is held out (too few documents for this --held_out): training will have no validation loss")
    if settings["separator"] and manifest["documents_read"] <= len(manifest["sources"]):
        lines.append(f"           --separator {settings['separator']} does not occur in the input: each file is one document")
    begin = f"; each document begins with token {manifest['tokenizer']['begin_of_text']}" if settings["add_bos"] else ""
    tokenizer = f"tokenizer  {manifest['tokenizer']['vocab_size']:,} ids{begin}"
    return "\n".join([*lines, f"dropped    {dropped}", tokenizer, f"written to {output}"])
