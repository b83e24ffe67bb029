"""Split files that lie are refused twice: by our reader, and by llama.cpp without reading out of bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_splitquant.errors import GGUFError
from gguf_splitquant.evaluation.contents import read_contents
from gguf_splitquant.runtime.engine import Engine
from gguf_splitquant.runtime.library import find_library
from tests.attacks.split_files import ATTACKS, DENSE, GOOD, IDS, ORDER, SplitAttack
from tests.runtime.logits_process import LogitsProcess
from tests.runtime.tiny_models import split, write


@pytest.fixture(scope="module")
def patched() -> Iterator[LogitsProcess]:
    folder = find_library()
    if folder is None:
        pytest.fail("the library is not built: run `gguf-splitquant build-runtime`")
    process = LogitsProcess(folder)
    yield process
    process.close()


def by_name(attack: SplitAttack) -> str:
    return attack.name


@pytest.mark.parametrize("attack", ATTACKS, ids=by_name)
def test_our_reader(attack: SplitAttack, tmp_path: Path) -> None:
    path = attack.write(tmp_path / "bad.gguf")
    if not attack.ours:
        read_contents(path)
        return
    with pytest.raises(GGUFError, match=attack.ours) as caught:
        read_contents(path)
    assert caught.value.subject == str(path)
    # whatever opens a model
    with pytest.raises(GGUFError, match=attack.ours):
        Engine(path)


@pytest.mark.engine
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("attack", ATTACKS, ids=by_name)
def test_llama_cpp(attack: SplitAttack, mmap: bool, patched: LogitsProcess, tmp_path: Path) -> None:
    answer = patched.run(attack.write(tmp_path / "bad.gguf"), mmap=mmap)
    assert answer.refused == ("model" if attack.theirs else "")
    assert attack.theirs in answer.log


@pytest.mark.engine
def test_sound_files_are_read(patched: LogitsProcess, tmp_path: Path) -> None:
    """Each attack changes one thing in one of these."""
    by_channel = GOOD.write(tmp_path / "channels.gguf")
    by_value = write(split(DENSE, ["blk.0.attn_v.weight"], 3), tmp_path / "values.gguf")
    for path in (by_channel, by_value):
        assert patched.run(path).refused == ""
    assert len(read_contents(by_channel).layers["blk.0.attn_q.weight"]) == 3


@pytest.mark.engine
def test_without_memory_the_values_of_an_order_are_not_there(patched: LogitsProcess, tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[-1] = -1
    path = GOOD.changed(**{ORDER: ids}).write(tmp_path / "bad.gguf")
    assert patched.run(path, allocate=False).refused == ""


def test_a_later_version_is_not_guessed_at(tmp_path: Path) -> None:
    path = GOOD.write(tmp_path / "new.gguf")
    data = path.read_bytes()
    key = b"splitquant.version" + (4).to_bytes(4, "little")
    assert data.count(key + b"\1") == 1
    path.write_bytes(data.replace(key + b"\1", key + b"\3"))
    with pytest.raises(GGUFError, match=r"has version 3 of the format, and 1 to 2 are known; update"):
        read_contents(path)


def test_names_are_unique() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    for attack in ATTACKS:
        re.compile(attack.ours)
