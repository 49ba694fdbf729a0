"""Branches: runs that begin with a checkpoint of another run."""

import json
import os
import shutil
from pathlib import Path

from data.command_line import UserError
from data.files import new_folder
from launch.checkpoints import checkpoint


def parent_recipe(parent: Path) -> dict:
    """Return the recipe of a run, as its run.json has it. Raises UserError if the folder has no run."""
    record = parent / "run.json"
    try:
        return json.loads(record.read_text(encoding="utf-8"))["recipe"]
    except FileNotFoundError:
        raise UserError(f"parent {parent} is not the folder of a run: run.json is missing.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"parent {parent}: run.json is damaged ({error}).") from error


def checkpoint_at(parent: Path, step: int | None) -> Path:
    """Return the checkpoint of a run at a step, or its newest one. Raises UserError with the steps that there are."""
    found = {checkpoint.step_of(path): path for path in checkpoint.published(parent / "checkpoints")}
    if not found:
        raise UserError(f"parent {parent} has no checkpoint.")
    if step is not None and step not in found:
        raise UserError(f"parent {parent} has no checkpoint of step {step}. It has {', '.join(map(str, sorted(found)))}.")
    return found[max(found) if step is None else step]


def create_branch(parent: Path, origin: Path, folder: Path) -> None:
    """Create the folder of a run that resumes from `origin`, a checkpoint of the run in `parent`.

    The files of the checkpoint are hard links, so they need no space, or copies if the disk has no links. Neither run changes the other:
    a checkpoint is never written to again.
    """
    with new_folder(folder) as temporary:
        shutil.copytree(origin, temporary / "checkpoints" / origin.name, copy_function=_link)
        shutil.copy(parent / "run.json", temporary / "run.json")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
