"""Nothing is written but OUT, and nothing through a link: what the link leads to stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from gguf_splitquant.calibration.imatrix import write_imatrix
from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import OutputError
from gguf_splitquant.planning import plan_refined
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.replacing import replacing, write_text
from tests.sample_models import small_model
from tests.sources.handmade import write_checkpoint

SPLIT = Recipe(layout="split", target_bpw=5.0, calibration="none")


def _imatrix(path: Path) -> None:
    write_imatrix(path, {"a": np.ones(8)}, {"a": 5}, "text")


WRITERS: dict[str, Callable[[Path], object]] = {
    "a model": lambda path: convert(small_model(), path, Recipe(), force=True),
    "a plan": lambda path: plan_refined(small_model(), SPLIT, None).write(path, SPLIT),
    "an imatrix": _imatrix,
    "a text": lambda path: write_text(path, "text"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nowhere"])
def test_a_link_is_replaced_not_followed(writer: str, there: bool, tmp_path: Path) -> None:
    target, out = tmp_path / "elsewhere" / "precious", tmp_path / "out" / "out.gguf"
    for path in (target, out):
        path.parent.mkdir()
    if there:
        target.write_bytes(b"precious")
    out.symlink_to(target)
    WRITERS[writer](out)
    assert out.is_file() and not out.is_symlink() and out.stat().st_size > 0
    assert target.exists() == there
    assert not there or target.read_bytes() == b"precious"
    assert list(out.parent.iterdir()) == [out]


def test_a_link_as_out_needs_force(tmp_path: Path) -> None:
    target, out = tmp_path / "precious", tmp_path / "out.gguf"
    target.write_bytes(b"precious")
    out.symlink_to(target)
    with pytest.raises(OutputError, match=r"out\.gguf: exists; pass --force"):
        convert(small_model(), out, Recipe())
    assert out.is_symlink() and target.read_bytes() == b"precious"


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    """Whoever keeps models on another disk has such a link: files appear there, under their own names."""
    checkpoint = write_checkpoint(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    arguments = ["convert", str(checkpoint), str(tmp_path / "models"), "--layout", "float"]
    assert main(arguments) == 0
    (file,) = (tmp_path / "disk").iterdir()
    assert GGUFReader(file).tensors


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/escaped", "a/../../../escaped", "..", "-rf", "con\x00\n"]
)
def test_a_models_name_leads_nowhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    (checkpoint / "README.md").write_text(
        f"---\nname: {json.dumps(name)}\nmodel_name: {json.dumps(name)}\n---\n"
    )
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))
    out = tmp_path / "deep" / "er" / "out"
    out.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    assert main(["convert", str(checkpoint), str(out), "--layout", "float"]) == 0
    (new,) = set(tmp_path.rglob("*")) - before
    assert new.parent == out and not new.name.startswith(("-", "."))


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match=r"nowhere/out: cannot be written: No such file"):
        write_text(tmp_path / "nowhere" / "out", "x")
