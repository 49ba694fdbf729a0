"""Folders that the Hugging Face library `datasets` or the hub wrote, and the options that read them.

`Dataset.save_to_disk` writes data-*.arrow, dataset_info.json and state.json. `DatasetDict.save_to_disk` writes one such folder for each
split, and dataset_dict.json. A dataset that was downloaded from the hub has a dataset card: README.md, which begins with metadata.
"""

import glob
import json
import shlex
from collections.abc import Collection
from pathlib import Path

from data.command_line import UserError

_STATE, _SPLITS, _CARD = "state.json", "dataset_dict.json", "README.md"
_CARD_KEYS = ("dataset_info:", "configs:", "task_categories:", "size_categories:")
"""Keys in the metadata of a dataset card. Other READMEs, such as model cards, do not have them."""
_SHARED_CARD_KEYS = ("language:", "license:")
"""Keys that model cards have too. With them alone, a folder is a dataset if it has data files that no model has."""
_DATA_SUFFIXES = {".parquet", ".arrow", ".jsonl", ".csv", ".tsv"}
_CARD_BYTES = 1 << 14
_TABLES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", ".txt")


def refuse_dataset_folder(name: str, files: Collection[Path]) -> None:
    """Raise UserError, with the options to use, if the files of input `name` contain a folder that a dataset library wrote."""
    for folder in sorted({file.parent for file in files if file.name in (_STATE, _SPLITS, _CARD)}):
        if advice := how_to_read(folder):
            raise UserError(f"--input {name}: {folder} {advice}")


def how_to_read(folder: Path) -> str | None:
    """Return what a folder is and the option that reads it, or None if no dataset library wrote it."""
    return how_to_read_saved(folder) or _how_to_read_dataset(folder)


def how_to_read_saved(folder: Path) -> str | None:
    """Return the same for a folder that save_to_disk wrote, which load_dataset cannot read; None for any other folder."""
    if (folder / _SPLITS).is_file():
        options = " or ".join(f"--input {_pattern(folder, f'{split}/data-*.arrow')}" for split in _splits(folder))
        return f"was written by DatasetDict.save_to_disk and has several splits. Use {options}."
    if (folder / _STATE).is_file() and (folder / "dataset_info.json").is_file():
        return f"was written by Dataset.save_to_disk. Use --input {_pattern(folder, 'data-*.arrow')}."  # cache-*.arrow repeat the data
    return None


def _how_to_read_dataset(folder: Path) -> str | None:
    keys = _card_keys(folder / _CARD)
    suffixes = {suffix for path in folder.rglob("*") for suffix in path.suffixes} if keys else set()
    if keys & set(_CARD_KEYS) or (keys and suffixes & _DATA_SUFFIXES):
        patterns = [f" or --input {_pattern(folder, f'**/*{suffix}*')} for all splits" for suffix in _TABLES if suffix in suffixes]
        dataset = f"--dataset {shlex.quote(str(folder))} --dataset_split train"
        return f"is a dataset of the Hugging Face Hub; its README.md is not text to train on. Use {dataset}{''.join(patterns[:1])}."
    return None


def _splits(folder: Path) -> list[str]:
    try:
        return [str(split) for split in json.loads((folder / _SPLITS).read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError):
        return sorted(path.parent.name for path in folder.glob(f"*/{_STATE}"))


def _pattern(folder: Path, names: str) -> str:
    return shlex.quote(f"{glob.escape(str(folder))}/{names}")


def _card_keys(path: Path) -> set[str]:
    """Return the keys of _CARD_KEYS and _SHARED_CARD_KEYS that are in the metadata of a README."""
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read(_CARD_BYTES).splitlines()
    if lines[:1] != ["---"]:
        return set()
    metadata = lines[1 : lines.index("---", 1)] if "---" in lines[1:] else lines
    return {key for key in _CARD_KEYS + _SHARED_CARD_KEYS if any(line.startswith(key) for line in metadata)}
