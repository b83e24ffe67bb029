"""Error messages: one line that is safe to print and to paste into an issue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.errors import SplitQuantError

TOKEN = "hf_" + "AbCdEfGhIj" * 3


@given(st.text(max_size=80), st.text(max_size=80))
def test_whatever_a_file_holds_prints_as_one_line(name: str, cause: str) -> None:
    message = str(SplitQuantError(name, cause, "do this"))
    assert message.isprintable()
    assert message.endswith("; do this")


def test_a_million_numbers_are_cut() -> None:
    assert len(str(SplitQuantError("x", str(list(range(10**5)))))) <= 4000


@pytest.mark.parametrize(
    ("said", "hidden", "kept"),
    [
        (f"401 for Authorization: Bearer {TOKEN}", TOKEN, "401 for Authorization"),
        (f"cannot use {TOKEN}!", TOKEN, "cannot use"),
        (
            "HTTPSConnectionPool(host='cdn.example', port=443): Max retries exceeded with url: "
            "/repos/a/b?X-Amz-Signature=0123456789abcdef&X-Amz-Date=1 (Caused by x)",
            "0123456789abcdef",
            "url: /repos/a/b?*** (Caused by x)",
        ),
        (
            "GET https://cdn.example/a/b?sig=0123456789abcdef failed",
            "0123456789abcdef",
            "https://cdn.example/a/b?***",
        ),
        (
            "proxy http://user:pa55word@proxy.example:8080/ refused",
            "pa55word",
            "@proxy.example:8080/ refused",
        ),
    ],
)
def test_secrets_are_hidden(said: str, hidden: str, kept: str) -> None:
    for error in (
        SplitQuantError("a/b", said),
        SplitQuantError("a/b", "x", said),
        SplitQuantError(said, "x"),
    ):
        assert hidden not in str(error)
        assert kept in str(error)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_token_of_the_environment_is_hidden_whatever_its_form(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "0rganisation-own-f0rm")
    assert "0rganisation" not in str(SplitQuantError("x", "bad header 0rganisation-own-f0rm."))


def test_ordinary_messages_stay_as_they_are() -> None:
    message = (
        "/tmp/a b/model.safetensors: tensor blk.0.attn_q.weight: is gated; accept its licence at "
        "https://huggingface.co/org/name and set HF_TOKEN to a token of that account"
    )
    subject, _, rest = message.partition(": ")
    cause, _, fix = rest.partition("; ")
    assert str(SplitQuantError(subject, cause, fix)) == message
