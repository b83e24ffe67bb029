"""The pinned llama-cpp-python source archive: fetched with pip, checked by its hash, unpacked with care.

It brings the Python binding and, vendored, the llama.cpp revision that the patch is for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import BuildError
from ..pypi import check_sha256

VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

_NAME = f"llama_cpp_python-{VERSION}.tar.gz"
_SOURCES = PurePosixPath(f"llama_cpp_python-{VERSION}") / "vendor" / "llama.cpp"


def fetch_sdist(folder: Path) -> Path:
    """The source archive in ``folder``, downloaded with pip where it is not there yet (73 MB).

    Raises:
        SplitQuantError: pip cannot get it, or what it got is not the pinned archive.
    """
    path = folder / _NAME
    if path.is_file():
        return verify_sdist(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        requirement = Path(work) / "requirements.txt"
        # pip checks the hash before it runs the archive's own metadata hooks
        requirement.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
        options = ["--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes", "--dest", work]
        run_pip(["download", *options, "-r", str(requirement)], f"llama-cpp-python {VERSION}")
        return verify_sdist(Path(work) / _NAME).replace(path)


def verify_sdist(path: Path) -> Path:
    """``path``, if it is the pinned archive.

    Raises:
        SplitQuantError: its SHA-256 is another.
        OSError: it cannot be read.
    """
    check_sha256(path, SDIST_SHA256)
    return path


def extract_llama_cpp(sdist: Path, target: Path) -> None:
    """Unpack the vendored llama.cpp into ``target``.

    Raises:
        BuildError: the archive holds a path outside its folder, a link or a device, or no llama.cpp.
    """
    with tarfile.open(sdist, "r:gz") as archive:
        for member in _members(archive):
            name = PurePosixPath(member.name)
            # the archive keeps the .git file of a submodule, which leads nowhere and confuses git
            if not name.is_relative_to(_SOURCES) or name.name == ".git":
                continue
            destination = target / name.relative_to(_SOURCES)
            if member.isdir():
                destination.mkdir(parents=True, exist_ok=True)
                continue
            destination.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            destination.write_bytes(content.read())
            destination.chmod(0o755 if member.mode & 0o100 else 0o644)
    if not (target / "CMakeLists.txt").is_file():
        raise BuildError(sdist, "holds no vendored llama.cpp")


def _members(archive: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    for member in archive:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
            raise BuildError(member.name, "the archive holds this link or path outside its folder")
        yield member


def run_pip(arguments: list[str], subject: str, env: dict[str, str] | None = None) -> None:
    """Run this interpreter's pip.

    Raises:
        BuildError: there is no pip, or it failed; with its last error line.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise BuildError("pip", f"not installed for {sys.executable}", "run `python -m ensurepip`")
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    raise BuildError(
        subject,
        f"`pip {arguments[0]}` failed: {(errors or lines or ['no output'])[-1]}",
        "check pip's package index and the network",
    )
