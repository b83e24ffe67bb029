"""The header is what gguf-py writes, byte for byte."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from gguf import GGUFValue, GGUFValueType, GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.gguf_io.layout import build_layout

_I32 = st.integers(-(2**31), 2**31 - 1)
_U8 = st.integers(0, 255)
_F32 = st.floats(width=32)
_LISTS = [
    (st.text(), None),
    (st.text(), GGUFValueType.STRING),
    (st.binary(), GGUFValueType.STRING),
    (st.binary() | st.text(), None),
    (st.sampled_from(TokenType), None),
    (st.sampled_from(TokenType), GGUFValueType.INT32),
    (_I32, None),
    (_I32, GGUFValueType.INT32),
    (_U8, GGUFValueType.UINT8),
    (_F32, None),
    (_F32, GGUFValueType.FLOAT32),
    (_F32, GGUFValueType.FLOAT64),
    (st.booleans(), None),
    (st.booleans(), GGUFValueType.BOOL),
    (st.lists(_I32, min_size=1), None),
]
_VALUES = st.one_of(
    *(
        st.lists(items, min_size=1).map(
            lambda values, kind=kind: GGUFValue(values, GGUFValueType.ARRAY, kind)
        )
        for items, kind in _LISTS
    ),
    st.text().map(lambda text: GGUFValue(text, GGUFValueType.STRING)),
    _I32.map(lambda number: GGUFValue(number, GGUFValueType.INT32)),
    st.binary(min_size=1).map(lambda data: GGUFValue(data, GGUFValueType.ARRAY)),
)


@settings(max_examples=60, deadline=None)
@given(pairs=st.dictionaries(st.text(min_size=1), _VALUES, max_size=4))
def test_is_what_gguf_py_writes(pairs: dict[str, GGUFValue]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(None, "llama")
        writer.kv_data[0] = dict(pairs)
        writer.write_header_to_file(Path(folder) / "header")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        expected = (Path(folder) / "header").read_bytes()
    header = build_layout("llama", pairs, ()).header
    assert header[: len(expected)] == expected
    assert not any(header[len(expected) :])


@pytest.mark.parametrize("values", [[], [1, "a"]])
def test_arrays_that_gguf_has_not_are_refused(values: list[object]) -> None:
    with pytest.raises(ValueError, match="GGUF"):
        build_layout("llama", {"key": GGUFValue(values, GGUFValueType.ARRAY)}, ())
