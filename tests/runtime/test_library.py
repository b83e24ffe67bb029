"""Which library is used, and what a user reads where there is none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gguf_splitquant.errors import EngineError
from gguf_splitquant.runtime import builds, library
from gguf_splitquant.runtime.builds import Build, BuildSpec, build_name, library_file, runtime_dir
from gguf_splitquant.runtime.library import find_library, is_patched, load_llama_cpp
from gguf_splitquant.runtime.sdist import VERSION
from tests.runtime.logits_process import LogitsProcess


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No build, no library of llama-cpp-python's own, nothing imported yet."""
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(library, "_bundled_library", lambda: None)


def add_build(spec: BuildSpec | None = None) -> Path:
    spec = spec or BuildSpec()
    folder = runtime_dir() / build_name(spec)
    (folder / "lib").mkdir(parents=True)
    library_file(folder / "lib").touch()
    builds.write_manifest(folder, spec)
    return folder / "lib"


@pytest.mark.usefixtures("empty_cache")
def test_without_a_build_the_command_is_named() -> None:
    with pytest.raises(EngineError, match=r"has not been built; run `gguf-splitquant build-runtime`"):
        load_llama_cpp()


@pytest.mark.usefixtures("empty_cache")
def test_finds_the_kind_that_is_asked_for() -> None:
    assert find_library() is None
    stock = add_build(BuildSpec(patched=False, tools=True))
    assert find_library() is None
    assert find_library(patched=False) == stock
    # for tests alone, and loads only in an environment of its own
    add_build(BuildSpec(sanitized=True))
    assert find_library() is None
    patched = add_build()
    assert find_library() == patched


@pytest.mark.usefixtures("empty_cache")
def test_build_of_another_processor_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    here = builds.cpu_features()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(builds, "cpu_features", lambda: here | {"avx1024"})
        add_build()
    with pytest.raises(EngineError, match=r"another processor \(this one lacks avx1024\); run"):
        load_llama_cpp()


@pytest.mark.usefixtures("empty_cache")
def test_build_of_another_version_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    add_build()
    monkeypatch.setattr(builds, "patch_text", lambda: "a newer patch")
    with pytest.raises(EngineError, match="another version of gguf-splitquant; run"):
        load_llama_cpp()


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("installed", "cause"), [("0.2.90", "version 0.2.90 is installed"), (None, "not installed")]
)
def test_binding_of_another_version_is_explained(
    installed: str | None, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError
        return installed

    add_build()
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(
        EngineError, match=f"llama-cpp-python: {cause}.*; run `gguf-splitquant build-runtime`"
    ):
        load_llama_cpp()


@pytest.mark.usefixtures("empty_cache")
def test_library_that_is_not_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = add_build()
    monkeypatch.setattr(metadata, "version", lambda _: VERSION)
    pytest.importorskip("diskcache")
    with pytest.raises(EngineError, match=f"{folder}: llama-cpp-python cannot use this library"):
        load_llama_cpp()


def test_older_instruction_sets_suffice() -> None:
    here = builds.cpu_features()
    assert here
    build = Build(Path(), BuildSpec(), "", "", frozenset(list(here)[:1]))
    assert build.runs_here()
    assert not dataclasses.replace(build, cpu=here | {"avx1024"}).runs_here()


@pytest.mark.engine
@pytest.mark.oracle
def test_tells_patched_from_stock(patched: LogitsProcess, stock: LogitsProcess) -> None:
    script = (
        "from gguf_splitquant.runtime.library import is_patched, load_llama_cpp;"
        "import os; before = dict(os.environ); print(is_patched(load_llama_cpp()));"
        "assert dict(os.environ) == before"
    )
    said = {}
    for process in (patched, stock):
        env = {"LLAMA_CPP_LIB_PATH": str(process.library), "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        )
        said[process] = done.stdout.strip()
    assert said == {patched: "True", stock: "False"}


@pytest.mark.engine
def test_finds_the_build_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    assert is_patched(load_llama_cpp())
