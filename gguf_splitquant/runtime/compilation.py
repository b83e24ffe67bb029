"""Runs CMake over llama.cpp: configure, compile, keep every word in a log, report the steps.

The first error line of a C++ build is rarely its last; on failure the line that says why is looked up in the
log, so that the user reads one sentence instead of a screen.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from ..errors import BuildError
from ..progress import Progress
from .builds import BuildSpec, cmake_flags
from .sanitizers import sanitizer_environment

TOOLS = ("llama-quantize", "llama-perplexity", "llama-imatrix", "llama-export-lora")

_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")
_REASON = re.compile(r"(\berror\b|\bfatal\b|undefined reference|No space left|Killed)", re.IGNORECASE)
_NOT_A_REASON = re.compile(r"(Configuring incomplete|build stopped|^FAILED:|^make)")

_NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")


def compile_llama_cpp(spec: BuildSpec, source: Path, build: Path, log_path: Path, progress: Progress) -> Path:
    """Configure and compile ``source`` in ``build``; ninja and ccache are used where they are in PATH.

    Returns:
        The folder of libraries and tools.

    Raises:
        BuildError: a tool is missing, or a step failed; with the reason and the log's path.
    """
    cmake = _tool("cmake", "run `pip install cmake`, or install your system's cmake package")
    cxx_compiler()
    env = _environment(source.parent)
    configure = [cmake, "-S", str(source), "-B", str(build), *cmake_flags(spec)]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    targets = ["llama", *(TOOLS if spec.tools else ())]
    compile_ = [cmake, "--build", str(build), "--parallel", str(_cores()), "--target", *targets]
    with log_path.open("w", encoding="utf-8", buffering=1) as log:
        _run(configure, env, log, None)
        _run(compile_, env, log, progress)
    return build / "bin"


def check_library(library: Path, log_path: Path, *, sanitized: bool = False) -> None:
    """Load ``library`` in a process of its own: a wrong instruction set or a missing dependency shows here.

    Raises:
        BuildError: it cannot be loaded.
    """
    script = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).llama_backend_init()"
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)],
        env=sanitizer_environment(cxx_compiler()) if sanitized else None,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        cause = lines[-1] if lines else f"the process died with code {done.returncode}"
        raise BuildError(library.name, f"was built but does not load: {cause}", f"see {log_path}")


def _run(command: list[str], env: dict[str, str], log: TextIO, progress: Progress | None) -> None:
    log.write(f"$ {' '.join(command)}\n")
    done, total = 0, 0
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            step = _STEP.match(line)
            if progress is None or step is None:
                continue
            if not total:
                total = int(step[2] or 100)
                progress.start("compiling llama.cpp", total, "step" if step[2] else "%")
            now = min(int(step[1]), total)
            progress.advance(now - done, line[step.end() :].strip())
            done = now
    if progress is not None and total:
        progress.finish()
    if process.returncode:
        raise BuildError("llama.cpp", _reason(Path(log.name)), f"see {log.name}")


def _reason(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    reasons = [line for line in lines if _REASON.search(line) and not _NOT_A_REASON.search(line)]
    return f"the build failed: {(reasons or lines)[-1]}"


def _environment(root: Path) -> dict[str, str]:
    env = dict(os.environ)
    # ccache finds a file again in another cache folder
    env |= {"CCACHE_BASEDIR": str(root), "CCACHE_NOHASHDIR": "1"}
    if platform.machine() in ("x86_64", "AMD64"):
        # -march=native turns AMX on wherever the processor lists it; virtual machines list it and then
        # kill the process that uses it (SIGILL)
        for variable, compiler in (("CFLAGS", _c_compiler()), ("CXXFLAGS", cxx_compiler())):
            flags = [flag for flag in _NO_AMX if _accepts(compiler, flag)]
            env[variable] = " ".join([env.get(variable, ""), *flags]).strip()
    return env


def _accepts(compiler: str, flag: str) -> bool:
    command = [*compiler.split(), "-Werror", flag, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


def cxx_compiler() -> str:
    """The C++ compiler: ``CXX``, or the first that is found. Raises BuildError where there is none."""
    return _first("CXX", ("c++", "g++", "clang++"))


def _c_compiler() -> str:
    return _first("CC", ("cc", "gcc", "clang"))


def _first(variable: str, names: tuple[str, ...]) -> str:
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise BuildError(
            names[0], "no C++ compiler in PATH", "install g++ or clang (macOS: `xcode-select --install`)"
        )
    return found


def _tool(name: str, fix: str) -> str:
    path = shutil.which(name) or _beside_python(name)
    if path is None:
        raise BuildError(name, "not in PATH", fix)
    return path


def _beside_python(name: str) -> str | None:
    """`pip install cmake` puts it here, which an environment that is not activated does not have in PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
