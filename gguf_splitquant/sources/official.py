"""llama.cpp's own converter, for checkpoints of families that are not read here.

It is the user's checkout, with the packages that it needs; it writes a float GGUF file, and that is read like
any other. Nothing of it is imported: it brings its own gguf-py.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SplitQuantError

SCRIPT = "convert_hf_to_gguf.py"


def official_command(folder: Path | str) -> str:
    """The command that converts ``folder`` through llama.cpp's converter, as a user types it."""
    command = ["python", "convert_splitquant.py", str(folder), "OUT.gguf"]
    return f"{shlex.join(command)} --official-converter LLAMA_CPP_FOLDER"


@contextmanager
def official_float_file(checkout: Path, model: Path, beside: Path) -> Iterator[Path]:
    """``model`` as a 16-bit float GGUF file, as long as the context lasts.

    Args:
        checkout: a folder with llama.cpp's sources, or its convert_hf_to_gguf.py.
        model: the checkpoint.
        beside: the folder that takes the file: it is as large as the checkpoint in 16 bit.

    Raises:
        SplitQuantError: there is no converter, or it failed; the cause is its last line.
    """
    script = checkout / SCRIPT if checkout.is_dir() else checkout
    if script.name != SCRIPT or not script.is_file():
        raise SplitQuantError(
            checkout, f"no {SCRIPT} there", "give the folder of a llama.cpp checkout (git clone)"
        )
    if not model.is_dir():
        raise SplitQuantError(model, "not a checkpoint folder", "leave --official-converter out")
    with tempfile.TemporaryDirectory(dir=beside, prefix=".official-") as work:
        # the converter takes a model's name from its folder, not from this file
        out = Path(work) / "float.gguf"
        command = [sys.executable, str(script.absolute()), str(model.absolute()), "--outfile", str(out)]
        done = subprocess.run(
            [*command, "--outtype", "auto"], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0 or not out.is_file():
            raise _failure(script, model, done)
        yield out


def _failure(script: Path, model: Path, done: subprocess.CompletedProcess[str]) -> SplitQuantError:
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    cause = said[-1][:300] if said else f"exit code {done.returncode}"
    fix = f"run it alone to see more: {shlex.join([sys.executable, str(script), str(model)])}"
    if "ModuleNotFoundError" in cause:
        requirements = str(script.parent / "requirements.txt")
        fix = f"run: {shlex.join([sys.executable, '-m', 'pip', 'install', '-r', requirements])}"
    return SplitQuantError(script, f"failed: {cause}", fix)
