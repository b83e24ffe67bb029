"""GGUF files whose header lies: counts, lengths, types, places."""

from __future__ import annotations

import os
from pathlib import Path

from tests.attacks.attack import Attack, content, one_file_each
from tests.attacks.raw_gguf import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    TYPE_F32,
    TYPE_Q4_0,
    U8,
    U32,
    U64,
    Raw,
    array,
    pair,
    string,
    tensor,
    u32,
    u64,
)

ONE = tensor("a.weight", (32, 2))


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.gguf")
    return folder / "a.gguf"


def _tensors(*entries: bytes) -> bytes:
    return Raw(tensors=entries).bytes()


def _pairs(*pairs: bytes) -> bytes:
    return Raw(pairs=(ARCHITECTURE, *pairs)).bytes()


_FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cannot be read"),
    "another file": (b"%PDF-1.7 and so on", "is not GGUF: it begins with b'%PDF'"),
    "four bytes": (b"GGUF", "ends inside its header"),
    "version 1": (Raw(version=1).bytes(), "has version 1"),
    "big-endian": (Raw(version=3 << 24).bytes(), "has version 50331648"),
    "2^63 tensors": (Raw(n_tensors=2**63).bytes(), "announces 9223372036854775808 tensors"),
    "2^64 - 1 keys": (Raw(n_pairs=2**64 - 1).bytes(), "announces 18446744073709551615 keys"),
    "one tensor too few": (
        Raw(n_tensors=100).bytes(),
        "ends inside its header|has 0 dimensions|unknown type",
    ),
    "a string of 2^63 bytes": (_pairs(pair("a", STRING, u64(2**63) + b"x")), "ends inside its header"),
    "a string of 2^64 - 1 bytes": (_pairs(pair("a", STRING, u64(2**64 - 1))), "ends inside its header"),
    "a key of a gigabyte": (_pairs(string("", 2**30)), "has a name of 1073741824 bytes"),
    "an array of 2^63 bytes": (_pairs(pair("a", ARRAY, array(U8, b"", 2**63))), "a has 922337203685"),
    "an array of 2^61 strings": (_pairs(pair("a", ARRAY, array(STRING, b"", 2**61))), "a has 23058430092"),
    "a vocabulary of 2^61": (
        _pairs(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, b"", 2**61))),
        "tokenizer.ggml.tokens has 2305843009213693952 items",
    ),
    "a token of 2^64 - 1 bytes": (
        _pairs(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, u64(2**64 - 1) + bytes(16), 2))),
        "ends inside its header",
    ),
    "fewer tokens than announced": (
        _pairs(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, string("a"), 10**6))),
        "ends inside its header",
    ),
    "an array longer than the file": (
        _pairs(pair("a", ARRAY, array(U64, b"", 10**6))),
        "ends inside its head",
    ),
    "arrays of arrays of arrays": (
        _pairs(pair("a", ARRAY, array(ARRAY, array(ARRAY, array(U8, b"x", 1), 1), 1))),
        "a is an array of arrays",
    ),
    "a value of type 13": (_pairs(pair("a", 13, b"")), "a value of the unknown type 13"),
    "an array of type 99": (_pairs(pair("a", ARRAY, array(99, b"", 1))), "a value of the unknown type 99"),
    "a key twice": (_pairs(pair("a", U8, b"x"), pair("a", U8, b"y")), "has (the key )?a twice"),
    "alignment 0": (_pairs(pair("general.alignment", U32, u32(0))), "an alignment of 0"),
    "alignment 33": (
        _pairs(pair("general.alignment", U32, u32(33))),
        "an alignment of 33, which is no power",
    ),
    "alignment true": (_pairs(pair("general.alignment", BOOL, b"\1")), "an alignment of True"),
    "alignment as text": (_pairs(pair("general.alignment", STRING, string("32"))), "an alignment of 32"),
    "alignment 2^31": (_pairs(pair("general.alignment", U32, u32(2**31))), "is truncated"),
    "a tensor behind the end": (_tensors(tensor("a", (32, 2), offset=1 << 40)), "tensor a ends at byte"),
    "a tensor at 2^64 - 32": (
        _tensors(tensor("a", (32, 2), offset=2**64 - 32)),
        "tensor a ends at byte 1844",
    ),
    "a tensor larger than the file": (_tensors(tensor("a", (2**20, 2**20))), "tensor a ends at byte 4398046"),
    "dimensions whose product overflows": (
        _tensors(tensor("a", (2**32, 2**32, 2**32))),
        "tensor a has the impossible shape",
    ),
    "2^63 times nothing": (_tensors(tensor("a", (2**63, 0))), "tensor a has the impossible shape"),
    "a product of 2^64, which is 0": (_tensors(tensor("a", (2**32, 2**32))), "impossible shape"),
    "no dimension": (_tensors(tensor("a", ())), "tensor a has 0 dimensions"),
    "five dimensions": (_tensors(tensor("a", (1, 1, 1, 1, 1))), "tensor a has 5 dimensions"),
    "2^32 - 1 dimensions": (_tensors(string("a") + u32(2**32 - 1)), "tensor a has 4294967295 dimensions"),
    "an unknown type": (_tensors(tensor("a", (32,), kind=999)), "tensor a has the unknown type 999"),
    "a removed type": (_tensors(tensor("a", (32,), kind=4)), "tensor a has the unknown type 4"),
    "rows of half a block": (
        _tensors(tensor("a", (33, 2), TYPE_Q4_0)),
        "rows of 33 are not whole Q4_0 blocks",
    ),
    "a name twice": (_tensors(ONE, tensor("a.weight", (8,), offset=256)), "two tensors of the same name"),
    "a name of two kilobytes": (_tensors(tensor("a" * 2000, (8,))), "has a name of 2000 bytes"),
    "the same bytes twice": (_tensors(ONE, tensor("b.weight", (32,))), "tensor .*weight overlaps tensor"),
    "an overlap by a value": (
        _tensors(tensor("a", (33,)), tensor("b", (8,), offset=128)),
        "tensor b overlaps tensor a",
    ),
    "a place that is not aligned": (
        _tensors(tensor("a", (8,), offset=4)),
        "tensor a begins at 4, no multiple",
    ),
    "not UTF-8": (_tensors(tensor(b"\xff\xfe", (8,))), ""),
    "terminal codes in a name": (_tensors(tensor("\x1b[2Ja", (8,), 999)), r"tensor \?\[2Ja has the unknown"),
    "a million shards": (_pairs(pair("split.count", U32, u32(10**6))), "split.count is 1000000"),
    "shards that are not there": (_pairs(pair("split.count", U32, u32(65535))), "shard|is one of 65535"),
    "a count of shards in words": (_pairs(pair("split.count", STRING, string("two"))), "split.count is two"),
    "a million empty strings": (_pairs(pair("a", ARRAY, array(STRING, bytes(8 * 10**6), 10**6))), ""),
    "more strings than any vocabulary has": (
        _pairs(pair("a", ARRAY, array(STRING, bytes(160_000_000), 20_000_000))),
        "a has 20000000 items",
    ),
    "more items in all arrays than any vocabulary has": (
        _pairs(*(pair(key, ARRAY, array(U8, bytes(4_000_000), 4_000_000)) for key in ("a", "b"))),
        "b has 4000000 items, 8000000 with those of the arrays before, and 6000000 is the most",
    ),
    "a hundred megabytes of tensors": (
        Raw(
            tensors=(),
            n_tensors=3_000_000,
            more=b"".join(tensor(f"{i:06x}", (1,)) for i in range(20_000)) * 150,
        ).bytes(),
        "announces 3000000 tensors",
    ),
    # keys of ours and llama.cpp's with values of other types
    "a layout of numbers": (_pairs(pair("splitquant.layout", ARRAY, array(U8, b"xy", 2))), ""),
    "a recipe of numbers": (_pairs(pair("splitquant.recipe", ARRAY, array(U8, b"xy", 2))), ""),
    "a recipe nested deep": (_pairs(pair("splitquant.recipe", STRING, string("[" * 100_000))), ""),
    "a recipe of two gigabytes of digits": (
        _pairs(pair("splitquant.recipe", STRING, string("9" * 5000))),
        "",
    ),
    "a name of numbers": (_pairs(pair("general.name", ARRAY, array(I32, bytes(8), 2))), ""),
    "a licence of numbers": (_pairs(pair("general.license", ARRAY, array(F32, bytes(8), 2))), ""),
    "made by nobody": (_pairs(pair("general.quantized_by", STRING, string(" "))), ""),
    "errors in words": (
        _pairs(
            pair("splitquant.quantized_tensors", STRING, string("ab")),
            pair("splitquant.relative_error", STRING, string("cd")),
        ),
        "",
    ),
    "an architecture of numbers": (Raw(pairs=(pair("general.architecture", U32, u32(7)),)).bytes(), ""),
    "a negative number of parameters": (
        _pairs(pair("splitquant.parameter_count", U64, u64(2**64 - 1))),
        "",
    ),
}

ATTACKS = [
    *one_file_each("a.gguf", _FILES),
    Attack("a pipe that nobody writes to", _pipe, "not an ordinary file"),
]
"""For header, pairs and ``inspect``."""

SOURCES = [
    Attack(
        "integers instead of weights", content(_tensors(tensor("a", (8,), 26)), "a.gguf"), "only floats and"
    ),
    Attack("no value", content(_tensors(tensor("a", (0, 8))), "a.gguf"), "has no values"),
    Attack("no tensor", content(_tensors(), "a.gguf"), "holds no weights"),
    Attack("no architecture", content(Raw(pairs=()).bytes(), "a.gguf"), "has no general.architecture"),
    Attack(
        "an architecture of numbers",
        content(Raw(pairs=(pair("general.architecture", U32, u32(7)),)).bytes(), "a.gguf"),
        "has no general.architecture",
    ),
    Attack(
        "a quantized vector",
        content(_tensors(tensor("a.weight", (32,), TYPE_Q4_0)), "a.gguf"),
        "quantized vec",
    ),
    Attack(
        "a scalar type of four dimensions",
        content(_tensors(tensor("blk.0.a.weight", (2, 2, 2, 2), TYPE_F32)), "a.gguf"),
        "",
    ),
]
"""For GGUF files as models to convert."""
