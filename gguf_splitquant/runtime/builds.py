"""Which builds of llama.cpp there are in the user's cache, and which of them this machine can run.

Building and loading meet here: a build is a folder with a manifest. Finding one takes no compiler and no
subprocess, so that opening a model stays instant, and a library that was built for another processor (a
cache on a network drive, a container image) is refused by name instead of dying with an illegal instruction.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..cache import cache_dir
from .patching import patch_text
from .sdist import SDIST_SHA256, VERSION

MANIFEST = "build.json"

_ISA = re.compile(r"^(sse|ssse|avx|fma|f16c|bmi|abm|popcnt|movbe|aes|vaes|v?pclmul|gfni|sha|adx|xop|tbm)")
_SANITIZERS = ("ADDRESS", "UNDEFINED")
_CHECKED = "-O1 -g1 -D_GLIBCXX_ASSERTIONS"
_COMPILER_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")


@dataclass(frozen=True)
class BuildSpec:
    """What is built.

    Attributes:
        patched: with the split-weight patch; False gives the stock library, the oracle of the tests.
        tools: also llama-quantize, llama-perplexity, llama-imatrix and llama-export-lora.
        metal: with the Metal backend (macOS).
        sanitized: with AddressSanitizer, UndefinedBehaviorSanitizer and assertions, for hostile files in
            tests: several times as slow, and it loads only where :mod:`.sanitizers` says how.
    """

    patched: bool = True
    tools: bool = False
    metal: bool = False
    sanitized: bool = False


@dataclass(frozen=True)
class Build:
    """A finished build.

    Attributes:
        path: its folder.
        spec: what was built.
        sources: :func:`sources_hash` at the time.
        recipe: :func:`recipe_hash` at the time.
        cpu: the instruction sets that the compiler could use.
    """

    path: Path
    spec: BuildSpec
    sources: str
    recipe: str
    cpu: frozenset[str]

    @property
    def lib_dir(self) -> Path:
        """The folder that ``LLAMA_CPP_LIB_PATH`` takes: libraries, and tools where they were built."""
        return self.path / "lib"

    def runs_here(self) -> bool:
        """Whether this machine has every instruction set that the compiler could use."""
        return self.cpu <= cpu_features()

    def is_current(self) -> bool:
        """Whether it was made from this version's sources and patch."""
        return self.sources == sources_hash(self.spec)


def runtime_dir() -> Path:
    """The folder of all builds; it need not exist yet."""
    return cache_dir() / "runtime"


def library_file(folder: Path) -> Path:
    """libllama in ``folder``, under this platform's name; it need not exist."""
    return folder / ("libllama.dylib" if sys.platform == "darwin" else "libllama.so")


def sources_hash(spec: BuildSpec) -> str:
    """The pinned archive and, in a patched build, the patches."""
    patch = hashlib.sha256(patch_text().encode()).hexdigest() if spec.patched else None
    return _hash([SDIST_SHA256, patch])


def recipe_hash(spec: BuildSpec) -> str:
    """What a build depends on apart from the processor: sources, flags, the user's compiler variables.

    Two builds with the same hash and processor are interchangeable.
    """
    environment = [os.environ.get(name) for name in _COMPILER_VARIABLES]
    return _hash([sources_hash(spec), cmake_flags(spec), environment, sys.platform, platform.machine()])


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_name(spec: BuildSpec) -> str:
    """The folder name of a build of ``spec`` for this processor."""
    cpu = hashlib.sha256(" ".join(sorted(cpu_features())).encode()).hexdigest()[:8]
    what = ("split" if spec.patched else "stock") + ("-sanitized" if spec.sanitized else "")
    return f"{VERSION}-{what}-{recipe_hash(spec)}-{cpu}"


def cmake_flags(spec: BuildSpec) -> list[str]:
    """The options of llama.cpp's CMake build: shared, tuned for this processor, without network or BLAS."""
    on_off = {
        "BUILD_SHARED_LIBS": True,
        "GGML_NATIVE": True,
        "GGML_AMX_TILE": False,
        "GGML_AMX_INT8": False,
        "GGML_AMX_BF16": False,
        "GGML_BLAS": False,
        "GGML_METAL": spec.metal,
        "GGML_METAL_EMBED_LIBRARY": spec.metal,
        "LLAMA_BUILD_COMMON": spec.tools,
        "LLAMA_BUILD_TOOLS": spec.tools,
        "LLAMA_BUILD_TESTS": False,
        "LLAMA_BUILD_EXAMPLES": False,
        "LLAMA_BUILD_SERVER": False,
        "LLAMA_BUILD_APP": False,
        "LLAMA_OPENSSL": False,
        "CMAKE_BUILD_WITH_INSTALL_RPATH": True,
    }
    flags = [f"-D{name}={'ON' if value else 'OFF'}" for name, value in on_off.items()]
    # libllama finds libggml beside it wherever the folder is moved
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    return [*flags, *_build_type(spec), f"-DCMAKE_INSTALL_RPATH={origin}"]


def _build_type(spec: BuildSpec) -> list[str]:
    if not spec.sanitized:
        return ["-DCMAKE_BUILD_TYPE=Release"]
    sanitizers = [f"-D{project}_SANITIZE_{what}=ON" for project in ("GGML", "LLAMA") for what in _SANITIZERS]
    # line numbers and assertions, which a release has not
    languages = [f"-DCMAKE_{language}_FLAGS_RELWITHDEBINFO={_CHECKED}" for language in ("C", "CXX")]
    return ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", *languages, *sanitizers]


def cpu_features() -> frozenset[str]:
    """The instruction sets of this processor that a compiler's ``-march=native`` may use.

    From /proc/cpuinfo (x86 ``flags``, Arm ``Features``); elsewhere the machine's name stands for them.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset({platform.machine(), platform.processor()})
    flags = re.search(r"^(flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    if flags is None:
        return frozenset({platform.machine()})
    names = flags[2].split()
    # x86 kernels also list errata and virtualization here, which come and go with the kernel
    return frozenset(names if flags[1] == "Features" else filter(_ISA.match, names)) | {platform.machine()}


def write_manifest(folder: Path, spec: BuildSpec) -> None:
    """Record in ``folder`` what it was built from, on this machine, just now."""
    manifest = {
        "llama_cpp_python": VERSION,
        "spec": dataclasses.asdict(spec),
        "sources": sources_hash(spec),
        "recipe": recipe_hash(spec),
        "cpu": sorted(cpu_features()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def builds() -> list[Build]:
    """All complete builds in the cache, newest first. A folder with a damaged manifest is not one."""
    found: list[tuple[float, Build]] = []
    for manifest in runtime_dir().glob(f"[!.]*/{MANIFEST}"):
        try:
            fields = json.loads(manifest.read_text())
            spec = BuildSpec(**fields["spec"])
            sources, recipe = str(fields["sources"]), str(fields["recipe"])
            build = Build(manifest.parent, spec, sources, recipe, frozenset(fields["cpu"]))
            modified = manifest.stat().st_mtime
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if library_file(build.lib_dir).is_file():
            found.append((modified, build))
    return [build for _, build in sorted(found, key=lambda item: item[0], reverse=True)]


def find_build(spec: BuildSpec) -> Build | None:
    """The newest build of exactly ``spec`` from the present sources and flags that runs here, if any."""
    recipe = recipe_hash(spec)
    return next((b for b in builds() if b.spec == spec and b.recipe == recipe and b.runs_here()), None)
