"""Scripts to run, and the rooms that they are built from; README.md names them in reading order."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
"""Root of the source tree, which a run need not be started from."""
