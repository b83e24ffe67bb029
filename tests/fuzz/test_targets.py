"""The fuzz targets for a moment each: seeds, and seeds that are damaged in up to four places."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, opened, seeds

BINARY = ["safetensors", "gguf-header", "gguf-source", "imatrix", "verify"]
NUMBERS = [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, b"\0\0\0\x80", b"\0\0\0\0\0\0\0\x80", b"\x7f", b"\1"]


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_sound(name: str) -> None:
    """Otherwise a fuzzer would never come behind the first check."""
    with opened(TARGETS[name]) as feed:
        accepted = [feed(seed) for seed in seeds(name)]
    assert accepted[0]


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds(name))))
    # headers are in front
    limit = min(len(data), 2048)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, limit))
        piece = draw(st.sampled_from(NUMBERS) | st.binary(max_size=9))
        match draw(st.sampled_from(["over", "in", "out", "cut", "copy"])):
            case "over":
                data[at : at + len(piece)] = piece
            case "in":
                data[at:at] = piece
            case "out":
                del data[at : at + draw(st.integers(1, 9))]
            case "cut":
                del data[at + draw(st.integers(0, 200)) :]
            case "copy":
                start = draw(st.integers(0, limit))
                data[at:at] = data[start : start + draw(st.integers(1, 64))]
    return bytes(data)


@pytest.mark.parametrize("name", BINARY)
def test_damaged_bytes(name: str) -> None:
    with opened(TARGETS[name]) as feed:

        @settings(max_examples=250)
        @given(damaged(name))
        def run(data: bytes) -> None:
            event("read" if feed(data) else "refused")

        run()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", "\ud800"]
    )
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as container and key; of long containers the first."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in list(keys)[:20]:
        found += [(value, key), *places(value[key])]
    return found


@pytest.mark.parametrize("name", ["config", "tokenizer", "plan", "recipe"])
def test_other_values(name: str) -> None:
    """JSON that is sound as JSON, with up to three values of other types or sizes."""
    with opened(TARGETS[name]) as feed:

        @settings(max_examples=120)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            document = json.loads(data.draw(st.sampled_from(seeds(name))))
            for _ in range(data.draw(st.integers(1, 3))):
                container, key = data.draw(st.sampled_from(places(document)))
                container[key] = data.draw(VALUES)
            event("read" if feed(json.dumps(document).encode()) else "refused")

        run()


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["name", "tags", "license", "base_model", "datasets", "language", "version", "x"]
            ),
            st.sampled_from(
                [
                    "a",
                    "[a, b]",
                    "{a: b}",
                    "2026-13-45",
                    '!!int ""',
                    ".nan",
                    "~",
                    "&a [*a]",
                    "? b",
                    "a/b",
                    "[[1]]",
                ]
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_model_cards(fields: list[tuple[str, str]]) -> None:
    head = "\n".join(f"{key}: {value}" for key, value in fields)
    with opened(TARGETS["model-card"]) as feed:
        event("read" if feed(f"---\n{head}\n---\n".encode()) else "refused")
