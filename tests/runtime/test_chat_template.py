"""Chat templates: rendered as transformers renders them, from whatever a file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFValue, GGUFValueType
from jinja2 import TemplateError

from gguf_splitquant.runtime.chat_template import ChatTemplate, chat_template

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <you> & \u00fc"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "  Bye\n"},
]


@pytest.mark.parametrize("talk", [TALK, TALK[1:2], TALK[:2]])
@pytest.mark.parametrize("generate", [True, False])
def test_a_real_template_is_what_transformers_makes_of_it(
    smollm2: Path, talk: list[dict[str, str]], generate: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate)
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    mine = ChatTemplate(settings["chat_template"], tokenizer.bos_token, tokenizer.eos_token)
    assert mine.render(talk, generate=generate) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[9].content }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(TALK)


def test_begin_of_text_is_left_to_the_tokenizer() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ bos_token }}"
    assert ChatTemplate(source, "<s>", adds_bos=True).render(TALK) == "Be brief.<s>"
    assert ChatTemplate(source, "<s>", adds_bos=False).render(TALK) == "<s>Be brief.<s>"


def pairs(**values: object) -> dict[str, GGUFValue]:
    """Values of ``tokenizer.*`` keys; types do not matter to a reader."""
    return {
        f"tokenizer.{key.replace('__', '.')}": GGUFValue(v, GGUFValueType.STRING) for key, v in values.items()
    }


def test_from_metadata() -> None:
    tokens = ["<unk>", "<s>", "</s>"]
    found = chat_template(
        pairs(chat_template="x", ggml__tokens=tokens, ggml__bos_token_id=1, ggml__eos_token_id=2)
    )
    assert found == ChatTemplate("x", "<s>", "</s>", adds_bos=False)
    assert chat_template(pairs(ggml__tokens=tokens)) is None
    assert chat_template(pairs(chat_template=7)) is None
    hostile = pairs(chat_template="x", ggml__tokens=[b"\xff"], ggml__bos_token_id=0, ggml__eos_token_id=-1)
    assert chat_template(hostile) == ChatTemplate("x")


@pytest.mark.parametrize(
    ("values", "adds"),
    [
        ({"ggml__model": "llama"}, True),
        ({"ggml__model": "llama", "ggml__add_bos_token": False}, False),
        ({"ggml__model": "gpt2", "ggml__pre": "llama-bpe"}, True),
        ({"ggml__model": "gpt2", "ggml__pre": "qwen2"}, False),
        ({"ggml__model": "gpt2", "ggml__pre": "qwen2", "ggml__add_bos_token": True}, True),
    ],
)
def test_who_adds_begin_of_text(values: dict[str, object], adds: bool) -> None:
    found = chat_template(pairs(chat_template="x", **values))
    assert found is not None and found.adds_bos is adds
