"""The files on which a running run relies: prepared data that must not change, and its own folder that must stay."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from data.files import write_file
from data.shards import PreparedData
from data.tokenization.companions import GENERATION, licence_files
from launch.checkpoints import checkpoint
from launch.checkpoints.run_record import tokenizer_files
from launch.ranks.processes import Process


class DiskWatch:
    """Checks of one rank before each checkpoint: the data on the first rank of each node, the run's folder on rank 0."""

    def __init__(self, folder: Path, sources: Iterable[PreparedData], process: Process):
        """Remember the small files of the run's folder, which has just been recorded."""
        self._folder, self._record = folder, folder / "run.json"
        self._sources = list(sources) if process.local_rank == 0 else []
        small = [self._record, folder / GENERATION, *tokenizer_files(folder), *licence_files(folder)] if process.is_first else []
        self._kept = {path.relative_to(folder): path.read_bytes() for path in small if path.is_file()}

    def find_change(self) -> str | None:
        """Return a message if the data has changed, or if the folder holds another run now; None if training can continue."""
        for source in self._sources:
            if change := source.find_change():
                return (
                    f"{change} The steps since the newest checkpoint may have read other text. Restore the file, then resume. "
                    + checkpoint.describe_newest(self._folder / "checkpoints")
                )
        if self._kept and (found := _run_id(self._record)) not in (None, json.loads(self._kept[Path("run.json")])["run_id"]):
            return f"output {self._folder} was replaced during the run: it holds the run {found} now. Nothing was written to it."
        return None

    def restore_folder(self) -> str | None:
        """Write the small files of the folder again if run.json was removed. Return a message about it, or None if run.json is there.

        Raises OSError if they cannot be written.
        """
        if not self._kept or self._record.exists():
            return None
        is_lost = not self._folder.exists()
        for name, contents in self._kept.items():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / name, contents)
        message = f"{self._record} was removed during the run. It and the tokenizer were written again"
        if is_lost:
            message = (
                f"output {self._folder} was removed or renamed during the run. run.json and the tokenizer were written again; the earlier "
                "log and curves are lost"
            )
        log = self._folder / "log.txt"
        if not log.exists():  # the log that the monitor writes was removed too
            write_file(log, time.strftime("%Y-%m-%d %H:%M:%S ") + message + ".\n")
        return message


def _run_id(record: Path) -> str | None:
    """Return the id of the run that a run.json describes; None if there is none."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
