"""Checkpoints: configs, indexes, model cards and tokenizers that lie, explode, or lead elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks.attack import Attack
from tests.sources.handmade import (
    CONFIG,
    header_of,
    llama_shapes,
    write_checkpoint,
    write_index,
    write_safetensors,
    write_shards,
)

Make = Callable[[Path], Path]


def _with(name: str, data: bytes | str, base: Callable[[Path], Any] = write_checkpoint) -> Make:
    """A sound checkpoint with one file replaced or added."""

    def make(folder: Path) -> Path:
        base(folder)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return folder

    return make


def _config(**fields: Any) -> Make:
    return _with("config.json", json.dumps({**CONFIG, **fields}))


def _special(name: str, kind: Callable[[Path], None]) -> Make:
    def make(folder: Path) -> Path:
        write_checkpoint(folder)
        (folder / name).unlink(missing_ok=True)
        kind(folder / name)
        return folder

    return make


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


def _experts(folder: Path) -> Path:
    """A header of 30,000 empty tensors, for 500 layers of 30,000 experts."""
    shapes = {f"x{i}": [0] for i in range(30_000)}
    write_checkpoint(folder)
    write_safetensors(folder / "model.safetensors", header_of(shapes))
    fields = {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 500,
        "num_local_experts": 30_000,
        "num_experts_per_tok": 1,
    }
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return folder


def _long_rope(folder: Path) -> Path:
    write_checkpoint(folder)
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields = {"head_dim": 2**31 - 2, "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return folder


def _shard(name: Any) -> Make:
    def make(folder: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        weight_map = write_shards(inside)
        write_safetensors(folder / "outside.safetensors", header_of(llama_shapes()))
        write_index(inside, {**weight_map, "lm_head.weight": name})
        return inside

    return make


def _hub_links(folder: Path) -> Path:
    """As the hub's cache has it: every file a link to a blob beside the snapshots."""
    snapshot, blobs = folder / "snapshots" / "0123", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_shards(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    return snapshot


def _with_all(files: dict[str, bytes | str], missing: tuple[str, ...] = ()) -> Make:
    """A sound checkpoint with several files replaced or added, and others removed."""

    def make(folder: Path) -> Path:
        write_checkpoint(folder)
        for name in missing:
            (folder / name).unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return folder

    return make


def _old(name: str, content: bytes | str | None = None) -> Make:
    """A byte-level tokenizer without tokenizer.json, and one file of it: without content, four terabytes."""
    sound = {"vocab.json": '{"a":0,"b":1,"ab":2}', "merges.txt": "#version: 0.2\na b\n"}

    def make(folder: Path) -> Path:
        _with_all(sound, ("tokenizer.json",))(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            _sparse(folder / name)
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return make


def _sentence_pieces(*texts: bytes) -> bytes:
    """A ``tokenizer.model`` of these pieces behind the unknown one, as protobuf has it."""
    entries = [b"\x0a\x05<unk>\x18\x02"] + [b"\x0a" + bytes([len(text)]) + text for text in texts]
    return b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in entries)


def _pieces(name: str, content: str) -> Make:
    """A checkpoint with a sound ``tokenizer.model``, and one file beside it."""
    return _with_all({"tokenizer.model": _sentence_pieces(b"a", b"b"), name: content})


def _decoder(key: str, content: str = "z") -> Make:
    return _pieces("tokenizer_config.json", json.dumps({"added_tokens_decoder": {key: {"content": content}}}))


def _folder(name: bytes) -> Make:
    """A sound checkpoint whose folder, which stands in for the model's name, has this one."""

    def make(folder: Path) -> Path:
        return _with_all({"tokenizer.model": _sentence_pieces(b"a")})(folder / os.fsdecode(name))

    return make


_LAUGHS = "a0: &a0 [lol, lol]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]" for i in range(30))
_HEADS = {
    "aliases of aliases as a tag": (f"{_LAUGHS}\ntags: [*a30]", "more than 200,000 values"),
    "aliases of aliases as the base model": (f"{_LAUGHS}\nbase_model: *a30", "more than 200,000 values"),
    "a long tag over and over": (
        f"a: &a {'x' * 100_000}\ntags: [{', '.join(['*a'] * 60_000)}]",
        "more than 200,000 values",
    ),
    "an alias of itself": ("a: &a [*a]", "nested deeper than 100 levels"),
    "ten thousand brackets": ("a: " + "[" * 10_000, "README.md: the model card cannot be read"),
    "a megabyte": ("a: [" + "1," * 500_000 + "]", "its head has 1,000,0.. characters"),
    "a day that is none": ("date: 2026-13-45", "README.md"),
    "an integer without digits": ('name: !!int ""', "README.md"),
    "a number that is none": ("name: !!float x", "README.md"),
    "a Python object": ("name: !!python/object/apply:os.system [id]", "determine a constructor"),
    "a list as a key": ("? [1]\n: 2", "README.md"),
    "a number as the name": ("model_name: 5", "general.name would be '5', not a string"),
    "a list as the name": ("model_name: [a, b]", "general.name would be .*, not a string"),
    "tags of two types": ("tags: [a, 1]", "general.tags would be .*, not a list of one type"),
    "tags in a list": ("tags: [[a]]", "general.tags would be .*, not a list of one type"),
    "a tag of twenty digits": (f"tags: [{'9' * 20}]", "general.tags would be .*, not a int32"),
    "a name of half a character": (r'model_name: "a\ud800"', r"'a\\ud800' is not valid Unicode"),
    "a tag of half a character": (r'tags: [a, "\udfff"]', "is not valid Unicode"),
}

_BPE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


def _tokenizer(**fields: Any) -> Make:
    return _with("tokenizer.json", json.dumps({**_BPE, **fields}))


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(wanted: str, instead: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": wanted}, "content": instead}


_TOKENIZERS = {
    "sixty doublings": (
        {"normalizer": {"type": "Sequence", "normalizers": [_replace("a", "aa")] * 60}},
        "its normalizer can make a text more than 10,000 times as long",
    ),
    "doublings in nested sequences": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Sequence", "normalizers": [_replace("a", "aa")] * 9}] * 9,
            }
        },
        "its normalizer can make a text",
    ),
    "one replacement by a megabyte": ({"normalizer": _replace("a", "a" * 1_000_000)}, "its normalizer"),
    "doublings of bytes": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60}},
        "its normalizer",
    ),
    "a decoder that doubles": (
        {"decoder": {"type": "Sequence", "decoders": [_replace("a", "aa")] * 60}},
        "its decoder",
    ),
    "a million tokens around a text": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 1000,
                "pair": [],
                "special_tokens": {"a": {"id": "a", "ids": [0] * 1000, "tokens": ["a"] * 1000}},
            }
        },
        "its post_processor",
    ),
    "a pattern that takes for ever": ({"pre_tokenizer": _split(r"(?:\s|\S|\S\S)+\Z\A")}, "not a tokenizer"),
    "a step without length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "not a tokenizer"),
    "a prefix longer than its token": (
        {"model": {**_BPE["model"], "continuing_subword_prefix": "#" * 20}},
        "not a tokenizer",
    ),
    "padding to a terabyte": (
        {
            "padding": {
                "strategy": {"Fixed": 2**40},
                "direction": "Right",
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            },
            "added_tokens": [
                {
                    "id": 3,
                    "content": "x",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ],
        },
        "pre-tokenizer",
    ),
    "a pattern of a megabyte": (
        {"pre_tokenizer": _split(r"(?:\s|\w)?" * 100_000)},
        "pre-tokenizer|not a tok",
    ),
    "a token id beyond the vocabulary": (
        {"model": {**_BPE["model"], "vocab": {"a": 0, "b": 1, "ab": 2**32 - 1}}},
        "has a token id 4294967295, the embedding 300 rows",
    ),
    "a merge of tokens that are not there": (
        {"model": {**_BPE["model"], "merges": [["a", "c"]]}},
        "not a tokenizer",
    ),
    "a negative id": ({"model": {**_BPE["model"], "vocab": {"a": -1}}}, "not a tokenizer"),
    "an unknown model": ({"model": {"type": "Oracle"}}, "a Oracle tokenizer"),
}

ATTACKS = [
    # config.json
    Attack("config nested deep", _with("config.json", '{"a":' * 5000), "nested deeper than 100 levels"),
    Attack("config of lists", _with("config.json", "[" + "[]," * 2_500_000 + "0]"), "2,000,000 parts"),
    Attack("config that is a pipe", _special("config.json", _pipe), "not an ordinary file"),
    Attack("config without end", _special("config.json", _endless), "not an ordinary file"),
    Attack("config of four terabytes", _special("config.json", _sparse), "longer than 67,108,864 bytes"),
    Attack("a number of 5000 digits", _with("config.json", '{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    Attack(
        "two billion layers", _config(num_hidden_layers=2**31 - 1), "num_hidden_layers is 2147483647, not"
    ),
    Attack("two billion tokens", _config(vocab_size=2**31 - 1), "vocab_size is 2147483647, not"),
    Attack("two billion heads", _config(num_attention_heads=2**31 - 1), "config.json|tensor"),
    Attack("half a billion frequencies", _long_rope, "shape .* by config.json it has to be"),
    Attack("fifteen million experts", _experts, "30000 experts in 500 layers"),
    Attack(
        "not a number",
        _with(
            "config.json",
            json.dumps({**CONFIG, "rope_theta": 0}).replace('"rope_theta": 0', '"rope_theta": NaN'),
        ),
        "rope_theta is NaN",
    ),
    Attack(
        "terminal codes", _config(architectures=["\x1b]0;owned\x07"]), r"architecture \?\]0;owned\? is not"
    ),
    Attack(
        "a name of half a character",
        _config(_name_or_path="org/a\ud800"),
        r"config.json: .*ud800 is half a character, not valid Unicode",
    ),
    Attack("a folder that is not UTF-8", _folder(b"m\xff\xfe"), "general.name would be .*the folder's name"),
    # the index
    *(
        Attack(f"index names {name!r}", _shard(name), "not a .*safetensors file of this folder")
        for name in ("../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "", 7)
    ),
    Attack(
        "index names a file of 5000 letters",
        _shard("a" * 5000 + ".safetensors"),
        "not a .*safetensors file of this folder",
    ),
    Attack("index without end", _special("model.safetensors.index.json", _endless), ""),
    Attack("every file a link, as in the hub's cache", _hub_links, ""),
    # the model card
    *(
        Attack(f"card: {name}", _with("README.md", f"---\n{head}\n---\n"), error)
        for name, (head, error) in _HEADS.items()
    ),
    Attack("card of four terabytes", _special("README.md", _sparse), "README.md: .*longer than"),
    # what generates
    Attack("generation config nested deep", _with("generation_config.json", '{"a":' * 5000), "nested deeper"),
    Attack("generation config without end", _special("generation_config.json", _endless), ""),
    # tokenizers
    *(
        Attack(f"tokenizer: {name}", _tokenizer(**fields), error)
        for name, (fields, error) in _TOKENIZERS.items()
    ),
    Attack("tokenizer.json of lists", _with("tokenizer.json", '{"a":[' + "[]," * 9_000_000 + "0]}"), "parts"),
    Attack("tokenizer.json of four terabytes", _special("tokenizer.json", _sparse), "longer than"),
    Attack("normalizers nested deep", _with("tokenizer.json", '{"normalizer":' * 5000), "nested deeper"),
    Attack("chat template of four terabytes", _special("chat_template.jinja", _sparse), "longer than"),
    Attack("tokenizer.model that is noise", _with("tokenizer.model", bytes(range(256)) * 9), "SentencePiece"),
    Attack("tokenizer.model that is empty", _with("tokenizer.model", b""), "SentencePiece"),
    Attack(
        "tokenizer.model of a length without end",
        _with("tokenizer.model", b"\x0a\xff\xff\xff\xff\x07" + b"a" * 99),
        "SentencePiece",
    ),
    Attack(
        "tokenizer.model of four terabytes", _special("tokenizer.model", _sparse), "longer than 16,777,216"
    ),
    Attack(
        "tokenizer.model of eight million pieces",
        _with("tokenizer.model", b"\x0a\x00" * (8 << 20)),
        "SentencePiece",
    ),
    Attack(
        "tokenizer.model with a piece that is not UTF-8",
        _with("tokenizer.model", _sentence_pieces(b"a", b"\xff\xfe")),
        "tokenizer.model: token 2 is not UTF-8",
    ),
    Attack("tokenizer.model that is sound", _with("tokenizer.model", _sentence_pieces(b"a", b"b")), ""),
    # added tokens
    Attack(
        "added token of half a character", _pieces("added_tokens.json", r'{"\ud800x": 5}'), "added_tokens"
    ),
    Attack(
        "listed token of half a character", _decoder("5", "\ud800"), "tokenizer_config.json: .*half a char"
    ),
    Attack("listed token of 28 digits", _decoder("0" * 20 + "99999999"), "has an entry '00000"),
    Attack("listed token of 5001 digits", _decoder("0" * 5000 + "5"), "has an entry '00000"),
    # chat templates
    *(
        Attack(f"half a character in {where}", _pieces(name, json.dumps({"chat_template": template})), name)
        for where, name, template in (
            ("a chat template", "tokenizer_config.json", "a\ud800"),
            ("a template's name", "tokenizer_config.json", [{"name": "\ud800", "template": "a"}]),
            ("the template's file", "chat_template.json", "a\udfff"),
        )
    ),
    # what transformers reads
    *(
        Attack(
            f"{name} of four terabytes", _old(name), f"{name}: (has 4,398,046,511,104 bytes|.*longer than)"
        )
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "vocab.txt",
            "chat_template.jinja",
            "additional_chat_templates/tool.jinja",
        )
    ),
    Attack(
        "vocab.json of lists", _old("vocab.json", '{"a":[' + "[]," * 2_500_000 + "0]}"), "2,000,000 parts"
    ),
    Attack("vocab.json nested deep", _old("vocab.json", '{"a":' * 5000), "nested deeper than 100 levels"),
    Attack(
        "half a character in special_tokens_map.json",
        _old("special_tokens_map.json", r'{"bos_token": "\ud800"}'),
        "special_tokens_map.json: .*half a character",
    ),
]
