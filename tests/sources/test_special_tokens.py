"""Special tokens: llama.cpp's own gguf-py is the oracle, on many more tokenizers than there are fixtures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_splitquant.errors import TokenizerError
from gguf_splitquant.sources.tokenizers.special import read_special_tokens

TOKENS = ("<s>", "</s>", "[CLS]", "[SEP]", "<eot>", "<pad>")
special_pieces = st.sampled_from(TOKENS).map(lambda t: {"SpecialToken": {"id": t, "type_id": 0}})
text_pieces = st.sampled_from("AB").map(lambda name: {"Sequence": {"id": name, "type_id": 0}})
pieces = st.lists(st.one_of(special_pieces, text_pieces), max_size=6)
processors = st.one_of(
    st.just({"type": "ByteLevel"}),
    st.builds(lambda s, p: {"type": "TemplateProcessing", "single": s, "pair": p}, pieces, pieces),
    st.builds(
        lambda c, s: {"type": "RobertaProcessing", "cls": [c, 1], "sep": [s, 2]},
        st.sampled_from(TOKENS),
        st.sampled_from(TOKENS),
    ),
)
post_processors = st.one_of(
    st.none(),
    processors,
    st.lists(processors, min_size=1, max_size=3).map(lambda p: {"type": "Sequence", "processors": p}),
)
normalizers = st.recursive(
    st.sampled_from(
        [
            {"type": "Lowercase"},
            {"type": "StripAccents"},
            {"type": "NFC"},
            {"type": "BertNormalizer", "lowercase": False, "strip_accents": True},
        ]
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda n: {"type": "Sequence", "normalizers": n}),
    max_leaves=3,
)
named_tokens = st.one_of(
    st.none(), st.sampled_from(TOKENS), st.sampled_from(TOKENS).map(lambda t: {"content": t})
)
tokenizer_configs = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"model_max_length": st.just(8)},
        optional={
            **{f"{kind}_token": named_tokens for kind in ("bos", "eos", "cls", "sep", "pad")},
            **{f"add_{kind}_token": st.booleans() for kind in ("bos", "eos", "sep")},
            "chat_template": st.one_of(st.none(), st.just("t"), st.just([{"name": "n", "template": "t"}])),
        },
    ),
)
configs = st.fixed_dictionaries(
    {},
    optional={
        f"{kind}_token_id": st.one_of(st.none(), st.integers(0, 20), st.just([1, 2]))
        for kind in ("bos", "eos", "pad", "unk")
    },
)


@pytest.fixture(scope="module")
def official_gguf(official_converter: Path) -> ModuleType:
    """The gguf-py that llama.cpp brings along, under another name beside PyPI's."""
    package = ModuleType("official_gguf")
    package.__path__ = [str(official_converter.parent / "gguf-py/gguf")]
    sys.modules["official_gguf"] = package
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    package.SpecialVocab = importlib.import_module("official_gguf.vocab").SpecialVocab
    package.GGUFWriter = importlib.import_module("official_gguf.gguf_writer").GGUFWriter
    sys.dont_write_bytecode = before
    return package


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(json.dumps(content))


def pairs(writer: Any) -> dict[str, tuple[Any, str]]:
    return {key: (pair.value, pair.type.name) for key, pair in writer.kv_data[0].items()}


@pytest.mark.oracle
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(post_processors, normalizers | st.none(), tokenizer_configs, configs, st.none() | st.integers(3, 12))
def test_equals_official(
    official_gguf: ModuleType,
    tmp_path: Path,
    post_processor: Any,
    normalizer: Any,
    tokenizer_config: Any,
    config: Any,
    n_vocab: int | None,
) -> None:
    tokenizer = {
        "model": {"merges": [["a", "b"], [" ", "c"]]},
        "added_tokens": [{"id": i, "content": token} for i, token in enumerate(TOKENS)],
        "post_processor": post_processor,
        "normalizer": normalizer,
    }
    write(tmp_path, "tokenizer.json", tokenizer)
    write(tmp_path, "tokenizer_config.json", tokenizer_config)
    write(tmp_path, "config.json", config)

    mine, theirs = gguf.GGUFWriter(None, "llama"), official_gguf.GGUFWriter(None, "llama")
    read_special_tokens(tmp_path, n_vocab=n_vocab, merges=True).add_to(mine)
    official_gguf.SpecialVocab(tmp_path, load_merges=True, n_vocab=n_vocab).add_to_gguf(theirs, quiet=True)
    assert pairs(mine) == pairs(theirs)
    assert list(mine.kv_data[0]) == list(theirs.kv_data[0])


@pytest.mark.oracle
def test_merges_file_equals_official(official_gguf: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\na b\n\nmal formed line\nc  d\n# e\n", encoding="utf-8"
    )
    official = official_gguf.SpecialVocab(tmp_path, load_merges=True)
    assert official.merges == ["a b", "c d", "# e"]
    assert read_special_tokens(tmp_path, merges=True).merges == official.merges


def test_named_templates_in_a_fixed_order(tmp_path: Path) -> None:
    """gguf-py writes the names in an order that changes from run to run; the file must not."""
    names = [f"template{i}" for i in range(20)]
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": n, "template": "x"} for n in names]})
    writer = gguf.GGUFWriter(None, "llama")
    read_special_tokens(tmp_path).add_to(writer)
    assert writer.kv_data[0]["tokenizer.chat_templates"].value == sorted(names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"bos_token_id": -1}', "bos token has the id -1"),
        ("tokenizer.json", '{"model": {"merges": [["a"]]}}', "tokenizer.json: model.merges"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}', "tokenizer_config.json: chat_template"),
    ],
)
def test_damaged(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        read_special_tokens(tmp_path, merges=True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["model", "added_tokens", "post_processor", "normalizer", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["type", "Sequence", "id"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["type", "single", "pair", "processors", "merges"]), inner)
            ),
            max_leaves=12,
        ),
    )
)
def test_any_tokenizer_json_is_read_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, "tokenizer.json", tokenizer)
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": True})
    try:
        read_special_tokens(tmp_path, merges=True)
    except TokenizerError as error:
        assert error.fix
