"""Builds the patched llama.cpp once per machine and keeps it in the user's cache.

Only libllama and ggml are compiled: a quarter of what llama-cpp-python's own build takes, and with the
patch. The binding itself is then installed without compiling anything.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import BuildError
from ..progress import SILENT, Progress
from .builds import Build, BuildSpec, build_name, find_build, library_file, runtime_dir, write_manifest
from .compilation import TOOLS, check_library, compile_llama_cpp
from .patching import apply_patch, patch_text
from .sdist import VERSION, extract_llama_cpp, fetch_sdist, run_pip, verify_sdist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Runtime:
    """What :func:`build_runtime` leaves behind.

    Attributes:
        build: the build in the cache.
        fresh: it was compiled by this call.
        binding_installed: llama-cpp-python was installed by this call.
    """

    build: Build
    fresh: bool
    binding_installed: bool


def build_runtime(
    spec: BuildSpec | None = None,
    *,
    sdist: Path | None = None,
    force: bool = False,
    binding: bool = True,
    progress: Progress = SILENT,
) -> Runtime:
    """Build llama.cpp as ``spec`` says, unless that build is in the cache, and install llama-cpp-python.

    A second call does nothing: it uses no network and starts no process. Calls at the same time wait for
    each other.

    Args:
        spec: by default the patched library alone.
        sdist: the source archive, where it should not be downloaded; its hash is checked all the same.
        force: build again even where the build is there.
        binding: install llama-cpp-python, without its own copy of llama.cpp, into this environment where
            it is not installed in the pinned version.
        progress: receives the steps.

    Raises:
        BuildError: a tool is missing, the sources cannot be had or are not the pinned ones, or a step
            failed; the message has the reason and the log's path.
    """
    spec = spec or BuildSpec()
    build = None if force else find_build(spec)
    fresh = build is None
    try:
        if build is None:
            with _lock(runtime_dir(), progress):
                # another process may have built it while this one waited
                build = None if force else find_build(spec)
                fresh = build is None
                build = build or _build(spec, sdist, progress)
        installed = binding and _install_binding(sdist, progress)
    except OSError as error:
        raise BuildError(
            error.filename or runtime_dir(),
            error.strerror or str(error),
            "free some space, or set GGUF_SPLITQUANT_CACHE to a folder that can be written",
        ) from error
    return Runtime(build, fresh, installed)


def _build(spec: BuildSpec, sdist: Path | None, progress: Progress) -> Build:
    root = runtime_dir()
    name = build_name(spec)
    log_path = root / f"{name}.log"
    archive = _archive(sdist, progress)
    # always the same folder, so that ccache recognizes the files of an earlier build
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        extract_llama_cpp(archive, work / "llama.cpp")
        if spec.patched:
            apply_patch(patch_text(), work / "llama.cpp")
        made = compile_llama_cpp(spec, work / "llama.cpp", work / "build", log_path, progress)
        # what is renamed into place is complete
        new = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
        try:
            _collect(made, new / "lib", spec)
            check_library(library_file(new / "lib"), log_path, sanitized=spec.sanitized)
            write_manifest(new, spec)
            shutil.rmtree(root / name, ignore_errors=True)
            new.rename(root / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    build = find_build(spec)
    if build is None:
        raise BuildError(root / name, "the build is not complete", f"see {log_path}")
    return build


def _collect(made: Path, lib: Path, spec: BuildSpec) -> None:
    lib.mkdir()
    for path in sorted(made.iterdir()):
        if path.name.startswith("lib") or (spec.tools and path.name in TOOLS):
            shutil.copy2(path, lib / path.name, follow_symlinks=False)
    if not library_file(lib).is_file():
        raise BuildError(library_file(lib).name, "the build made no such library")


def _archive(sdist: Path | None, progress: Progress) -> Path:
    if sdist is not None:
        return verify_sdist(sdist)
    progress.start(f"fetching the sources of llama-cpp-python {VERSION}", 1, "file")
    archive = fetch_sdist(runtime_dir())
    progress.advance(1)
    progress.finish()
    return archive


def _install_binding(sdist: Path | None, progress: Progress) -> bool:
    try:
        if metadata.version("llama-cpp-python") == VERSION:
            return False
    except metadata.PackageNotFoundError:
        pass
    archive = _archive(sdist, progress)
    progress.start(f"installing llama-cpp-python {VERSION}", 1, "package")
    env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    run_pip(["install", "--no-cache-dir", str(archive)], f"llama-cpp-python {VERSION}", env)
    progress.advance(1)
    progress.finish()
    return True


@contextmanager
def _lock(folder: Path, progress: Progress) -> Iterator[None]:
    """One build at a time: they share the work folder."""
    if fcntl is None:
        raise BuildError("build-runtime", "Windows is not supported yet", "run it in WSL")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.start("waiting for another build", 1, "build")
            fcntl.flock(file, fcntl.LOCK_EX)
            progress.advance(1)
            progress.finish()
        yield
