"""Paths that a run records, so that every script finds them from any working folder, also after they were moved with the run's folder.

Here and not in launch/, because data/show.py reads a run's paths too.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError


def record_path(path: str, run: Path) -> dict[str, str]:
    """Return what a run in the folder `run` records of a path: as it was given, relative to that folder, and absolute."""
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(run))
    return {"given": path, "relative": relative, "absolute": os.path.abspath(path)}


def places_of(recorded: dict[str, str], run: Path) -> list[str]:
    """Return where a recorded path may be, the most likely place first.

    A path that runs of earlier versions recorded has only the entry "given", relative to the working folder of its start.
    """
    places = [os.path.normpath(run.resolve() / recorded["relative"])] if "relative" in recorded else []
    places += [recorded[name] for name in ("absolute", "given") if name in recorded]
    return list({os.path.realpath(place): place for place in places}.values())


def find_path(recorded: dict[str, str], run: Path) -> str | None:
    """Return the first place at which something is, as it was given if that is the same place; None if nothing is at any place."""
    found = next((place for place in places_of(recorded, run) if os.path.exists(place)), None)
    is_given = found is not None and os.path.realpath(found) == os.path.realpath(recorded["given"])
    return recorded["given"] if is_given else found


def require_path(recorded: dict[str, str], run: Path, option: str) -> str:
    """Return the place that find_path finds. Raises UserError, with `option` as the way to give the path, if nothing is at any place."""
    if (found := find_path(recorded, run)) is None:
        places = ", ".join(places_of(recorded, run))
        raise UserError(f"The data that {run} was trained on was not found at any recorded path: {places}. Give it with {option}.")
    return found


def other_data(run: Path, paths: Sequence[str], recorded: str, found: str) -> str:
    """Return the message that the recorded paths of a run lead to data with another fingerprint."""
    return (
        f"{', '.join(paths)}: these are not the data that {run} was trained on, although a recorded path leads to them (fingerprint "
        f"{found[:12]}, recorded {recorded[:12]}). Give the data to read with --data."
    )
