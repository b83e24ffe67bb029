"""The build: when it happens, what it refuses, and what it leaves behind. The compiler is a stand-in."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import threading
from importlib import metadata
from pathlib import Path

import pytest

from gguf_splitquant.errors import BuildError, SplitQuantError
from gguf_splitquant.runtime import build, builds, compilation, patching, sdist
from gguf_splitquant.runtime.build import build_runtime
from gguf_splitquant.runtime.builds import BuildSpec, find_build, recipe_hash, runtime_dir, sources_hash

STOCK = BuildSpec(patched=False)
ROOT = f"llama_cpp_python-{sdist.VERSION}/vendor/llama.cpp"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archive(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source archive of one file, and its hash as the pinned one."""
    path = archive(tmp_path / "sdist.tar.gz", (f"{ROOT}/CMakeLists.txt", b"project(x)\n"), ("other", b"x"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(sdist, "SDIST_SHA256", digest)
    monkeypatch.setattr(builds, "SDIST_SHA256", digest)
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `cmake` that notes its calls and "compiles" a libllama of one function."""
    tools, notes = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    source = tools / "llama.c"
    source.write_text("void llama_backend_init(void) {}\n")
    library = builds.library_file(Path("bin")).name
    script = f"""#!/bin/sh
echo "$@" >> {notes}
if [ "$1" = --build ]; then
    sleep 0.2
    echo "[1/2] Building CXX object src/llama.cpp.o"
    mkdir -p "$2/bin" && cc -shared -fPIC -o "$2/bin/{library}" {source}
    echo "[2/2] Linking"
fi
"""
    cmake(tools, script)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return notes


def cmake(folder: Path, script: str) -> None:
    path = folder / "cmake"
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Steps:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def start(self, what: str, total: int, unit: str) -> None:
        self.seen.append((what, total))

    def advance(self, amount: int, note: str = "") -> None:
        self.seen.append((note, amount))

    def finish(self) -> None:
        self.seen.append(("finish", 0))


# -- when ----------------------------------------------------------------------------------------------


def test_builds_once(sources: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    first = build_runtime(STOCK, sdist=sources, binding=False, progress=steps)
    assert first.fresh
    assert builds.library_file(first.build.lib_dir).is_file()
    assert steps.seen == [
        ("compiling llama.cpp", 2),
        ("Building CXX object src/llama.cpp.o", 1),
        ("Linking", 1),
        ("finish", 0),
    ]
    configure, compile_ = calls.read_text().splitlines()
    assert "-DGGML_AMX_TILE=OFF" in configure
    assert "--target llama" in compile_
    log = runtime_dir() / f"{first.build.path.name}.log"
    assert "[2/2] Linking" in log.read_text()
    left = {path.name for path in runtime_dir().iterdir()}
    assert left == {first.build.path.name, log.name, "lock"}

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a second build starts no process")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr(metadata, "version", lambda _: sdist.VERSION)
    second = build_runtime(STOCK, progress=Steps())
    assert (second.fresh, second.binding_installed, second.build) == (False, False, first.build)


def test_force_builds_again(sources: Path, calls: Path) -> None:
    build_runtime(STOCK, sdist=sources, binding=False)
    assert build_runtime(STOCK, sdist=sources, binding=False, force=True).fresh
    assert len(calls.read_text().splitlines()) == 4


def test_two_at_once_build_once(sources: Path, calls: Path) -> None:
    results: list[build.Runtime] = []

    def one() -> None:
        results.append(build_runtime(STOCK, sdist=sources, binding=False))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.fresh for result in results) == [False, False, True]
    assert len(calls.read_text().splitlines()) == 2


def test_recipe_depends_on_patch_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [BuildSpec(), STOCK, BuildSpec(tools=True), BuildSpec(metal=True), BuildSpec(sanitized=True)]
    before = [recipe_hash(spec) for spec in specs]
    assert len(set(before)) == len(specs)
    assert [recipe_hash(spec) for spec in specs] == before
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert all(recipe_hash(spec) != old for spec, old in zip(specs, before, strict=True))
    monkeypatch.delenv("CXXFLAGS")
    # a library stays usable when the environment it was built in is gone
    sources_before = [sources_hash(spec) for spec in specs]
    monkeypatch.setattr(builds, "patch_text", lambda: "another patch")
    changed = [recipe_hash(spec) != old for spec, old in zip(specs, before, strict=True)]
    assert changed == [spec.patched for spec in specs]
    changed = [sources_hash(spec) != old for spec, old in zip(specs, sources_before, strict=True)]
    assert changed == [spec.patched for spec in specs]


def test_build_for_another_processor_is_not_used(sources: Path, calls: Path) -> None:
    made = build_runtime(STOCK, sdist=sources, binding=False).build
    manifest = made.path / builds.MANIFEST
    fields = json.loads(manifest.read_text())
    fields["cpu"].append("avx1024")
    manifest.write_text(json.dumps(fields))
    assert find_build(STOCK) is None
    assert len(builds.builds()) == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"spec": {"new": 1}}', "\x00"])
def test_damaged_manifest_is_no_build(content: str, sources: Path, calls: Path) -> None:
    made = build_runtime(STOCK, sdist=sources, binding=False).build
    (made.path / builds.MANIFEST).write_text(content)
    assert builds.builds() == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86's")
def test_amx_stays_off_where_the_processor_lists_it(tmp_path: Path) -> None:
    """As on a host whose -march=native stands for one with AMX."""
    flags = compilation._environment(tmp_path)["CXXFLAGS"].split()
    command = ["c++", "-march=sapphirerapids", "-dM", "-E", "-x", "c++", "/dev/null"]
    plain = subprocess.run(command, capture_output=True, text=True)
    if plain.returncode or "__AMX_INT8__" not in plain.stdout:
        pytest.skip("this compiler does not know AMX")
    # CMake puts CXXFLAGS before ggml's own -march
    ours = subprocess.run([command[0], *flags, *command[1:]], capture_output=True, text=True, check=True)
    assert "__AMX" not in ours.stdout
    assert "__AVX512VNNI__" in ours.stdout


# -- what fails ----------------------------------------------------------------------------------------


def assert_nothing_left() -> None:
    left = {path.name for path in runtime_dir().iterdir() if path.suffix != ".log"}
    assert left <= {"lock"}


def test_wrong_hash_is_refused(tmp_path: Path, calls: Path) -> None:
    path = archive(tmp_path / "sdist.tar.gz", (f"{ROOT}/CMakeLists.txt", b"project(x)\n"))
    with pytest.raises(SplitQuantError, match=sdist.SDIST_SHA256):
        build_runtime(STOCK, sdist=path, binding=False)
    assert not calls.exists()
    assert_nothing_left()


def test_missing_archive_is_named(tmp_path: Path, calls: Path) -> None:
    with pytest.raises(BuildError, match=r"nowhere\.tar\.gz: No such file"):
        build_runtime(STOCK, sdist=tmp_path / "nowhere.tar.gz", binding=False)


def test_compiler_error_is_the_message(sources: Path, calls: Path) -> None:
    script = """#!/bin/sh
[ "$1" = --build ] || exit 0
echo "[1/2] Building CXX object a.o"
echo "FAILED: a.o"
echo "a.cpp:3:5: error: 'x' was not declared in this scope"
echo "    3 |     x = 1;"
echo "ninja: build stopped: subcommand failed."
exit 1
"""
    cmake(calls.parent / "tools", script)
    with pytest.raises(BuildError, match=r"a\.cpp:3:5: error: 'x' was not declared") as caught:
        build_runtime(STOCK, sdist=sources, binding=False)
    log = Path(str(caught.value).rsplit("see ", 1)[1])
    assert "3 |     x = 1;" in log.read_text()
    assert_nothing_left()


def test_library_that_does_not_load_is_refused(sources: Path, calls: Path) -> None:
    source = calls.parent / "tools" / "llama.c"
    source.write_text("void llama_backend_init(void) { __builtin_trap(); }\n")
    with pytest.raises(BuildError, match="does not load: the process died with code -"):
        build_runtime(STOCK, sdist=sources, binding=False)
    assert_nothing_left()


def test_missing_cmake_is_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    with pytest.raises(BuildError, match=r"cmake: not in PATH; run `pip install cmake`"):
        build_runtime(STOCK, sdist=sources, binding=False)
    assert_nothing_left()


def test_cache_that_cannot_be_written(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="set GGUF_SPLITQUANT_CACHE"):
        build_runtime(STOCK, sdist=sources, binding=False)


def test_pip_failure_has_its_reason() -> None:
    with pytest.raises(BuildError, match=r"`pip download` failed: .*no such option"):
        sdist.run_pip(["download", "--no-such-option"], "x")


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "member",
    [(f"{ROOT}/../../../../escaped", b"x"), ("/escaped", b"x"), link(f"{ROOT}/link"), link("elsewhere")],
    ids=["parent", "absolute", "link", "link elsewhere"],
)
def test_archive_entries_outside_their_folder_are_refused(
    member: tuple[str, bytes] | tarfile.TarInfo, tmp_path: Path
) -> None:
    path = archive(tmp_path / "bad.tar.gz", member, (f"{ROOT}/CMakeLists.txt", b""))
    with pytest.raises(BuildError, match="outside its folder"):
        sdist.extract_llama_cpp(path, tmp_path / "deep" / "er" / "target")
    assert not any(p.name == "escaped" for p in tmp_path.rglob("*"))


# -- the patch -----------------------------------------------------------------------------------------

PATCH = """\
diff --git a/a.txt b/a.txt
--- a/a.txt
+++ b/a.txt
@@ -1,3 +1,4 @@
 one
-two
+TWO
+and
 three
@@ -5 +6,0 @@
-five
diff --git a/sub/b.txt b/sub/b.txt
--- a/sub/b.txt
+++ b/sub/b.txt
@@ -1 +1 @@
-x
+y
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    (root / "sub" / "b.txt").write_text("x\n")
    return root


def test_patch_changes_files(tree: Path) -> None:
    assert patching.apply_patch(PATCH, tree) == [tree / "a.txt", tree / "sub" / "b.txt"]
    assert (tree / "a.txt").read_text() == "one\nTWO\nand\nthree\nfour\n"
    assert (tree / "sub" / "b.txt").read_text() == "y\n"


def test_patch_is_all_or_nothing(tree: Path) -> None:
    (tree / "sub" / "b.txt").write_text("z\n")
    with pytest.raises(BuildError, match=r"sub/b\.txt: line 1 is not what the patch expects"):
        patching.apply_patch(PATCH, tree)
    assert "two" in (tree / "a.txt").read_text()


@pytest.mark.parametrize("name", ["../outside.txt", "missing.txt"])
def test_patch_stays_in_the_tree(name: str, tree: Path) -> None:
    (tree.parent / "outside.txt").write_text("x\n")
    with pytest.raises(BuildError, match=r"\.txt: the patch changes this file"):
        patching.apply_patch(f"--- a/{name}\n+++ b/{name}\n@@ -1 +1 @@\n-x\n+y\n", tree)
    assert (tree.parent / "outside.txt").read_text() == "x\n"


def test_truncated_patch_is_refused(tree: Path) -> None:
    with pytest.raises(BuildError, match="damaged hunk"):
        patching.apply_patch(PATCH[: PATCH.index(" three")], tree)


@pytest.mark.oracle
@pytest.mark.skipif(shutil.which("git") is None, reason="git is the oracle")
def test_patch_of_llama_cpp_is_what_git_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the archive in the user's cache, where a build has left it
    monkeypatch.undo()
    sources = sdist.fetch_sdist(runtime_dir())
    text = patching.patch_text()
    for side in ("ours", "theirs"):
        sdist.extract_llama_cpp(sources, tmp_path / side)
    changed = patching.apply_patch(text, tmp_path / "ours")
    git = ["git", "-C", str(tmp_path / "theirs"), "apply", "--whitespace=error-all"]
    subprocess.run(git, input=text, text=True, check=True)
    assert len(changed) == text.count("\n+++ ")
    for path in changed:
        assert path.read_bytes() == (tmp_path / "theirs" / path.relative_to(tmp_path / "ours")).read_bytes()
