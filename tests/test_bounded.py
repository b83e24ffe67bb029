"""Limits on small files: what they count is what a parser would make of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant import bounded
from gguf_splitquant.bounded import MAX_DEPTH, parse_json, read_bytes, read_text

VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a"\\[]{},:', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\,[', max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


def parts(value: Any) -> int:
    """Containers, and commas between what they hold."""
    if not isinstance(value, (list, dict)):
        return 0
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(0, len(inner) - 1) + sum(map(parts, inner))


@given(VALUES, st.sampled_from([None, 1]))
def test_parts_are_those_of_the_value(value: Any, indent: int | None) -> None:
    raw = json.dumps(value, indent=indent).encode()
    assert parse_json(raw, parts(value)) == value
    if parts(value):
        with pytest.raises(ValueError, match="parts"):
            parse_json(raw, parts(value) - 1)


@pytest.mark.parametrize("size", [2, 3, 5, 7])
@given(value=VALUES)
def test_pieces_of_any_size_count_the_same(size: int, value: Any) -> None:
    raw = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded, "MiB", size)
        assert parse_json(raw, parts(value)) == value


@pytest.mark.parametrize("sign", [("[", "]"), ('{"a":', "}"), ('["]", ', "]")])
def test_depth(sign: tuple[str, str]) -> None:
    def nested(depth: int) -> bytes:
        return (sign[0] * depth + "0" + sign[1] * depth).encode()

    parse_json(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        parse_json(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize("where", ['"{}"', '["{}"]', '{{"{}": 1}}', r'"\\{}\""'])
def test_half_a_character_is_refused(where: str) -> None:
    """Each of these is JSON for Python, and no text that a file can hold."""
    for half in (r"\ud800", r"\uDFff", r"\ud800\ud800\udc00", r"\udc00\ud800", r"\ud800 \udc00", r"\uD83Dx"):
        raw = where.format(half).encode()
        json.loads(raw)
        with pytest.raises(ValueError, match=r"\\u.... is half a character"):
            parse_json(raw)
    for whole in (
        r"\ud83d\ude00",
        r"\uD83D\uDE00x\ud83d\ude00",
        r"\\ud800",
        r"\ud7ff",
        r"\uE000",
        r"\\\\uD83D",
    ):
        raw = where.format(whole).encode()
        assert parse_json(raw) == json.loads(raw)


@given(st.binary(max_size=60))
def test_noise_is_a_value_error(raw: bytes) -> None:
    try:
        expected = json.loads(raw.decode("utf-8"))
    except ValueError:
        with pytest.raises(ValueError):
            parse_json(raw)
    else:
        assert parse_json(raw) == expected or expected != expected


def test_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("12345")
    assert read_text(path, 5) == "12345"
    with pytest.raises(ValueError, match="longer than 4 bytes"):
        read_bytes(path, 4)


def test_only_ordinary_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"x")
    before = set(Path("/proc/self/fd").iterdir())
    for name in ("pipe", "device", "."):
        with pytest.raises(OSError, match="not an ordinary file"):
            read_bytes(tmp_path / name)
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert read_bytes(tmp_path / "link") == b"x"
