"""Finds the patched llama.cpp library and binds llama-cpp-python to it.

llama-cpp-python loads its library on import, from ``LLAMA_CPP_LIB_PATH`` where that is set. A path that the
user set is respected; otherwise the build in the user cache is used, and only for the time of the import
does the variable exist.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType

from ..errors import EngineError
from .builds import builds, cpu_features, library_file
from .sdist import VERSION

BUILD_COMMAND = "gguf-splitquant build-runtime"

_VARIABLE = "LLAMA_CPP_LIB_PATH"
_MARKER = "llama_supports_sub_weights"


def load_llama_cpp() -> ModuleType:
    """The module ``llama_cpp``, bound to the patched library.

    Where the user set ``LLAMA_CPP_LIB_PATH``, or imported llama_cpp before, it is bound to that library,
    which need not be patched: :func:`is_patched` tells. Without a build of our own, a library that came with
    llama-cpp-python is used: it runs every file that is not split.

    Raises:
        EngineError: there is no library, no llama-cpp-python, or one of another version; the message names
            the command that builds them.
    """
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None:
        return loaded
    override = os.environ.get(_VARIABLE)
    if override:
        return _import(Path(override))
    folder = find_library()
    if folder is None:
        bundled = _bundled_library()
        if bundled is None:
            raise EngineError("llama.cpp", _why_none(), f"run `{BUILD_COMMAND}`")
        return _import(bundled)
    _check_binding()
    os.environ[_VARIABLE] = str(folder)
    try:
        return _import(folder)
    finally:
        del os.environ[_VARIABLE]


def is_patched(llama_cpp: ModuleType) -> bool:
    """Whether the library behind ``llama_cpp`` runs split files: it exports the function that says so."""
    return hasattr(llama_cpp.llama_cpp._lib, _MARKER)


def find_library(*, patched: bool = True) -> Path | None:
    """The folder of the newest library in the user cache that this version built and that runs on this
    processor; None where there is none. ``patched=False`` asks for the stock one (``--stock``)."""
    usable = (
        build
        for build in builds()
        if build.spec.patched == patched
        and not build.spec.sanitized
        and build.is_current()
        and build.runs_here()
    )
    newest = next(usable, None)
    return newest.lib_dir if newest else None


def _why_none() -> str:
    patched = [build for build in builds() if build.spec.patched and not build.spec.sanitized]
    current = [build for build in patched if build.is_current()]
    if current:
        lacking = ", ".join(sorted(current[0].cpu - cpu_features()))
        return f"the patched library was built on another processor (this one lacks {lacking})"
    if patched:
        return "the patched library was built by another version of gguf-splitquant"
    return "the patched library has not been built"


def _check_binding() -> None:
    try:
        installed = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise EngineError(
            "llama-cpp-python", f"not installed for {sys.executable}", f"run `{BUILD_COMMAND}`"
        ) from None
    if installed != VERSION:
        raise EngineError(
            "llama-cpp-python",
            f"version {installed} is installed, the patched library is for {VERSION}",
            f"run `{BUILD_COMMAND}`",
        )


def _bundled_library() -> Path | None:
    spec = util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    return folder if library_file(folder).is_file() else None


def _import(folder: Path) -> ModuleType:
    try:
        return import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise EngineError(
            error.name or "llama_cpp", f"not installed for {sys.executable}", f"run `{BUILD_COMMAND}`"
        ) from error
    except (FileNotFoundError, RuntimeError, AttributeError, OSError) as error:
        raise EngineError(
            folder, f"llama-cpp-python cannot use this library: {error}", f"run `{BUILD_COMMAND} --force`"
        ) from error
