"""What users install: the wheel has the patch, the types and nothing else; the sdist builds the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_package import ROOT, build, contents


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    sdist, wheel = build(tmp_path_factory.mktemp("dist"), isolated=False)
    return contents(sdist), contents(wheel)


def test_the_wheel_has_the_patch_the_types_and_every_module(archives: tuple[set[str], set[str]]) -> None:
    _, wheel = archives
    assert "gguf_splitquant/py.typed" in wheel
    patches = {p.relative_to(ROOT / "patches") for p in (ROOT / "patches").rglob("*") if p.is_file()}
    assert patches and {f"gguf_splitquant/_patches/{p.as_posix()}" for p in patches} <= wheel
    listed = subprocess.run(["git", "ls-files", "gguf_splitquant"], cwd=ROOT, capture_output=True, text=True)
    tracked = set(listed.stdout.split())
    assert tracked <= wheel
    others = {name.split("/")[0] for name in wheel} - {"gguf_splitquant"}
    assert [name for name in others if not name.endswith(".dist-info")] == []


def test_the_sdist_has_what_the_tests_need(archives: tuple[set[str], set[str]]) -> None:
    sdist, _ = archives
    assert {"tests/conftest.py", "patches/README.md", "Makefile", "LICENSE", "CHANGELOG.md"} <= sdist
    assert not [name for name in sdist if name.startswith(("shared/", "eval/", ".venv/"))]


INSTALLED_AS = {
    "google": "protobuf",
    "huggingface_hub": "huggingface-hub",
    "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
}
"""Modules whose packages have other names."""
BESIDE = {"llama_cpp"}
"""What build-runtime installs."""


def test_every_import_is_a_declared_dependency() -> None:
    """What an import needs but only the tests' own packages bring along is missing at users'."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = project[project.index("dependencies = [") : project.index("test = [")]
    needed += project[project.index("\nhub = [") : project.index("\neval-oracle = [")]
    needed += project[project.index("\nparquet = [") : project.index("\ndev = [")]
    declared = set(re.findall(r'"([A-Za-z0-9_-]+)', needed))
    imported: dict[str, Path] = {}
    for path in (ROOT / "gguf_splitquant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            else:
                continue
            imported |= {name.split(".")[0]: path for name in names}
    others = imported.keys() - set(sys.stdlib_module_names) - BESIDE - {"gguf_splitquant"}
    assert "numpy" in others
    assert {n: imported[n] for n in others if INSTALLED_AS.get(n, n) not in declared} == {}


HEAVY = {
    "numpy",
    "gguf",
    "transformers",
    "torch",
    "llama_cpp",
    "numba",
    "scipy",
    "tqdm",
    "jinja2",
    "argparse",
}


@pytest.mark.parametrize(
    ("program", "allowed"),
    [
        ("import gguf_splitquant", set()),
        ("from gguf_splitquant.cli import main; main(['--help'])", {"argparse"}),
        ("from gguf_splitquant.cli import main; main(['verify', '--help'])", {"argparse"}),
        ("from gguf_splitquant.cli import main; main(['compare', '--help'])", {"argparse"}),
    ],
)
def test_start_imports_nothing_heavy(program: str, allowed: set[str]) -> None:
    watched = HEAVY - allowed
    whole = (
        f"import sys\ntry:\n    {program}\nexcept SystemExit: pass\n"
        f"sys.exit(repr({watched!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stderr.strip() == "set()"
