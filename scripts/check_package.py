"""Build the wheel and the sdist, install the wheel alone, and convert with it.

What is looked at: both archives build, the wheel from the sdist, and a fresh environment with nothing but the
wheel and its dependencies converts a model and verifies the result. The files inside are looked at by
tests/test_packaging.py.

    python scripts/check_package.py FOLDER
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from tests.sample_models import small_model

ROOT = Path(__file__).parent.parent


def build(folder: Path, *, isolated: bool = True) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    options = [] if isolated else ["--no-isolation"]
    command = [sys.executable, "-m", "build", *options, "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return sdist, wheel


def contents(archive: Path) -> set[str]:
    """The files in a wheel, or in an sdist without its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return {name for name in file.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as file:
        return {m.name.partition("/")[2] for m in file.getmembers() if m.isfile()}


def use(wheel: Path, folder: Path) -> None:
    """Install into an environment of its own, and convert there."""
    venv.create(folder / "venv", with_pip=True, clear=True)
    tools = folder / "venv" / "bin"

    def run(*command: object) -> None:
        print("$", *command, flush=True)
        # in a folder without sources, so that only the installed package is found
        subprocess.run([str(c) for c in command], check=True, cwd=folder)

    source = folder / "model.gguf"
    convert(small_model(), source, Recipe(layout="float", outtype="bf16"), force=True)
    run(tools / "pip", "install", "--quiet", wheel)
    run(tools / "gguf-splitquant", "--help")
    for name, options in (
        ("paper", ["--recipe", "paper"]),
        ("stock", ["--type", "Q4_0", "--no-calibration"]),
    ):
        recipe = options if name == "paper" else ["--recipe", "stock", *options]
        out = folder / f"{name}.gguf"
        run(tools / "gguf-splitquant", "convert", source, out, *recipe, "--force")
        run(tools / "gguf-splitquant", "verify", out, "--source", source, "--all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for archives and the environment")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sdist, wheel = build(folder / "dist")
    print(sdist.name, len(contents(sdist)), "files;", wheel.name, len(contents(wheel)), "files")
    use(wheel, folder)


if __name__ == "__main__":
    main()
