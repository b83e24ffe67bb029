"""Tokenizers that are damaged, contradict the model, or are not known."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from gguf_splitquant.errors import TokenizerError
from gguf_splitquant.sources.tokenizers import (
    add_gemma_tokenizer,
    add_llama_tokenizer,
    add_phi3_tokenizer,
    add_qwen2_tokenizer,
)
from gguf_splitquant.sources.tokenizers.bpe import detect_pre_tokenizer
from gguf_splitquant.sources.tokenizers.loading import load_tokenizer, load_with_transformers
from gguf_splitquant.sources.tokenizers.pre_tokenizer import PreTokenizers
from scripts.update_pre_tokenizers import TABLE, read_engine, read_hashes

from .handmade import write_tokenizer

CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = CASELESS + r"\p{N}{1,3}" + REST
QWEN2_PATTERN = CASELESS + r"\p{N}" + REST


def write_bpe(folder: Path, pre_tokenizer: Any = None) -> Path:
    """A byte-level BPE tokenizer of 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def refused(
    folder: Path, message: str, fix: str, n_vocab: int = 256, pre: str | None = None
) -> TokenizerError:
    with pytest.raises(TokenizerError, match=message) as caught:
        add_llama_tokenizer(gguf.GGUFWriter(None, "llama"), folder, n_vocab, pre)
    assert fix in caught.value.fix
    return caught.value


# --- pre-tokenizers


@pytest.mark.oracle
def test_table_is_what_the_script_makes_of_the_pinned_sources(official_converter: Path) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert (table["check_text"], table["hashes"]) == read_hashes(
        official_converter.parent / "conversion/base.py"
    )
    assert table["engine"] == read_engine(official_converter.parent / "src/llama-vocab.cpp")


def test_table_knows_the_common_ones() -> None:
    known = PreTokenizers.load()
    assert {"llama-bpe", "qwen2", "smollm", "gpt-2", "default"} <= set(known.names)
    # published: LLaMA 3 8B's tokens of the check text
    assert known.hashes["0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5"] == "llama-bpe"


@pytest.mark.parametrize(
    ("pre_tokenizer", "nearest"),
    [
        (split(LLAMA3_PATTERN), "llama-bpe"),
        (split(QWEN2_PATTERN), "qwen2"),
        (split(QWEN2_PATTERN.replace("'d", "'d|'q")), "qwen2"),
        (pre_tokenizers.ByteLevel(), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            "smollm",
        ),
    ],
)
def test_unknown_hash_names_the_nearest(tmp_path: Path, pre_tokenizer: Any, nearest: str) -> None:
    write_bpe(tmp_path, pre_tokenizer)
    error = refused(tmp_path, r"tokenizer\.json: pre-tokenizer not recognized", "--pre")
    assert nearest in error.cause


def hash_of(tokens: list[int]) -> str:
    return hashlib.sha256(str(tokens).encode()).hexdigest()


@pytest.mark.parametrize("bos", ["!", {"content": "!", "special": True}])
def test_hash_with_and_without_bos(tmp_path: Path, bos: Any) -> None:
    """DeepSeek's distilled Qwen2 is listed with BOS first, which only some versions of transformers add."""
    tokenizer = load_tokenizer(write_bpe(tmp_path))
    plain = list(tokenizer.encode("text", True))
    config = {"add_bos_token": True, "bos_token": bos}
    for tokens, found in ((plain, True), ([0, *plain], True), ([1, *plain], False)):
        known = PreTokenizers("text", {hash_of(tokens): "name"}, ())
        assert detect_pre_tokenizer(known, tokenizer, config) == ("name" if found else None)
    known = PreTokenizers("text", {hash_of([0, *plain]): "name"}, ())
    for other in ({"bos_token": bos}, {"add_bos_token": True, "bos_token": "none of these"}):
        assert detect_pre_tokenizer(known, tokenizer, other) is None


def test_added_tokens_that_change_the_hash(smollm2: Path, tmp_path: Path) -> None:
    """A fine-tune of a real model: the error leads to the option with which it converts."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    tokenizer.add_tokens(["3333"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    error = refused(tmp_path, "pre-tokenizer not recognized", "convert with --pre smollm", n_vocab=50000)
    assert "added tokens hide it, without them it is smollm" in error.cause
    writer = gguf.GGUFWriter(None, "llama")
    add_llama_tokenizer(writer, tmp_path, 50000, "smollm")
    assert writer.kv_data[0]["tokenizer.ggml.pre"].value == "smollm"
    assert "3333" in writer.kv_data[0]["tokenizer.ggml.tokens"].value


@pytest.mark.parametrize("add", [add_gemma_tokenizer, add_phi3_tokenizer])
def test_scores_are_not_invented(tmp_path: Path, add: Any) -> None:
    """Gemma's and Phi-3's tokens merge by the scores of tokenizer.model: without them, no file."""
    write_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model") as caught:
        add(gguf.GGUFWriter(None, "gemma2"), tmp_path, 300)
    assert "add that of the" in caught.value.fix


def test_override(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    writer = gguf.GGUFWriter(None, "qwen2")
    add_qwen2_tokenizer(writer, tmp_path, 260, "qwen2")
    pairs = writer.kv_data[0]
    assert pairs["tokenizer.ggml.pre"].value == "qwen2"
    assert pairs["tokenizer.ggml.tokens"].value[255:] == ["\u0143", *(f"[PAD{i}]" for i in range(256, 260))]


@pytest.mark.parametrize(
    ("name", "suggested"), [("qwen", "qwen2"), ("llama-bep", "llama-bpe"), ("#", "known:")]
)
def test_override_that_the_engine_does_not_know(tmp_path: Path, name: str, suggested: str) -> None:
    write_bpe(tmp_path)
    refused(tmp_path, f"--pre {name}: not a pre-tokenizer", suggested, pre=name)


def test_override_for_sentencepiece(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    refused(tmp_path, r"tokenizer\.json: SentencePiece, which has no pre-tokenizer", "--pre", 300, "qwen2")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    refused(tmp_path, r"tokenizer\.model: SentencePiece, which has no", "--pre", 300, "qwen2")


# --- files


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "a WordPiece tokenizer"),
        ({"model": {"type": "Unigram"}}, "a Unigram tokenizer"),
        ({"model": {"type": ["BPE"]}}, "tokenizer"),
        ({"model": None}, r"tokenizer\.json: not a tokenizer"),
        ({"added_tokens": 3}, r"tokenizer\.json: not a tokenizer"),
    ],
)
def test_damaged_tokenizer_json(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    path = write_bpe(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    refused(tmp_path, message, "", pre="gpt-2")


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    write_bpe(tmp_path)
    refused(tmp_path, "has a token id 255, the embedding 200 rows", "download", 200, "gpt-2")
    write_tokenizer(tmp_path)
    refused(tmp_path, "300 tokens, ids up to 299, for an embedding of 200 rows", "download", 200)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x05\x0a\x03abc"])
def test_damaged_sentencepiece(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    refused(tmp_path, r"tokenizer\.model: not a SentencePiece model", "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<x>": -1}, "-1 is not a token id"),
        ("added_tokens.json", {"<x>": "1"}, "1 is not a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}}, "an entry '-1'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "x"}}, "an entry '1'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "token 1 has no content"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "not an object"),
    ],
)
def test_damaged_added_tokens(
    stories15m: Path, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    (tmp_path / "tokenizer.model").symlink_to(stories15m / "tokenizer.model")
    (tmp_path / name).write_text(json.dumps(content))
    refused(tmp_path, f"{name}: .*{message}", "download", 32000)


# --- which library


def test_tokenizers_and_transformers_agree(smollm2: Path) -> None:
    """The fast way gives what transformers gives, on a real vocabulary."""
    fast, slow = load_tokenizer(smollm2), load_with_transformers(smollm2)
    text = PreTokenizers.load().check_text
    assert fast.ids == slow.ids
    assert {i: (t.content, t.special, t.normalized) for i, t in fast.added.items()} == {
        i: (t.content, t.special, t.normalized) for i, t in slow.added.items()
    }
    assert list(fast.encode(text, True)) == list(slow.encode(text, True))
    assert fast.decode(fast.encode(text, False)) == slow.decode(slow.encode(text, False))


@pytest.mark.parametrize(
    "settings",
    [{"pad_token": "<new>"}, {"added_tokens_decoder": {"256": {"content": "<new>", "special": True}}}],
)
def test_tokens_that_only_the_config_lists(tmp_path: Path, settings: dict[str, Any]) -> None:
    """tokenizer.json lacks them; transformers appends them, and so they have to be in the file."""
    write_bpe(tmp_path)
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    writer = gguf.GGUFWriter(None, "llama")
    add_llama_tokenizer(writer, tmp_path, 257, "gpt-2")
    assert writer.kv_data[0]["tokenizer.ggml.tokens"].value[256] == "<new>"
    assert writer.kv_data[0]["tokenizer.ggml.token_type"].value[256] == gguf.TokenType.CONTROL


def test_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    """Code that a checkpoint brings is never run, nor is the user asked whether it may."""
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(tmp_path, "transformers cannot load the tokenizer", "download", pre="gpt-2")
