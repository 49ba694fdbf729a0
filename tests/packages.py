"""Environments of their own for packages that only a slow test needs, as an independent witness or for a file that they carry."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def environment_with(folder: Path, *packages: str, without: tuple[str, ...] = ()) -> Path:
    """Create an environment in `folder` that has our packages and these (without those); return its Python. Skips if pip cannot."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and transformers are not installed twice
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, "install", "--no-compile", *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    if without:
        subprocess.run([*pip, "uninstall", "--yes", *without], check=True, capture_output=True)
    return python
