"""Importance matrices, plans, results of evaluations, and chat templates."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.attacks.attack import Attack, content, one_file_each
from tests.attacks.raw_gguf import TYPE_I32, Raw, tensor


def _imatrix(*entries: bytes, data: bytes = b"\0\0\x80\x3f" * 64) -> bytes:
    return Raw(tensors=entries, data=data).bytes()


def _legacy(*values: int, more: bytes = b"") -> bytes:
    return b"".join(struct.pack("<i", value) for value in values) + more


_SUMS, _COUNTS = "a.weight.in_sum2", "a.weight.counts"
_NAN = struct.pack("<f", float("nan")) * 64

IMATRICES = one_file_each(
    "imatrix",
    {
        "2^31 entries": (_legacy(2**31 - 1), "the number of entries is 2147483647"),
        "minus one entry": (_legacy(-1), "the number of entries is -1"),
        "a name of a gigabyte": (_legacy(1, 2**30, more=bytes(99)), "the length of a name is 1073741824"),
        "a billion values": (_legacy(1, 1, more=b"a" + _legacy(1, 2**29) + bytes(9)), "a number of values"),
        "no call": (_legacy(1, 1, more=b"a" + _legacy(0, 1) + bytes(9)), "a number of calls is 0"),
        "sums without counts": (_imatrix(tensor(_SUMS, (8,))), "has sums but no counts for a.weight"),
        "sums of no channel": (
            _imatrix(tensor(_SUMS, (0, 2)), tensor(_COUNTS, (1, 2))),
            "a.weight.in_sum2 has no values",
        ),
        "no count": (
            _imatrix(tensor(_SUMS, (8,)), tensor(_COUNTS, (1, 0), offset=32)),
            "counts has no values",
        ),
        "integers": (
            _imatrix(tensor(_SUMS, (8,), TYPE_I32), tensor(_COUNTS, (1,), offset=32)),
            "is I32, not F",
        ),
        "three counts for two experts": (
            _imatrix(tensor(_SUMS, (8, 2)), tensor(_COUNTS, (1, 3), offset=64)),
            "has 3 counts for 2 experts",
        ),
        "not a number": (
            _imatrix(tensor(_SUMS, (8,)), tensor(_COUNTS, (1,), offset=32), data=_NAN),
            "has NaN, infinite or negative values",
        ),
        "a vocabulary": (_imatrix(), "is a GGUF file, but not an imatrix"),
        "noise": (bytes(range(256)), "is not an imatrix, or is damaged"),
    },
)

_WEIGHTS = {name: [["Q4_0", 256]] for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output.weight")}


def _plan(**weights: Any) -> bytes:
    return json.dumps({"format": 1, "weights": {**_WEIGHTS, **weights}}).encode()


def _q(*pieces: Any) -> bytes:
    return _plan(**{"blk.0.attn_q.weight": list(pieces)})


PLANS = one_file_each(
    "plan.json",
    {
        "nothing": (b"", "not a plan"),
        "nested deep": (b'{"format":' * 5000, "nested deeper than 100 levels"),
        "ten million lists": (b"[" + b"[]," * 10_000_000 + b"0]", "more than 2,000,000 parts"),
        "infinite channels": (_q(["Q4_0", float("inf")]), "the width inf is no integer"),
        "no number of channels": (_q(["Q4_0", float("nan")]), "the width nan is no integer"),
        "half a channel": (_q(["Q4_0", 256.5]), "the width 256.5 is no integer"),
        "true": (_q(["Q4_0", True]), "the width True is no integer"),
        "channels in words": (_q(["Q4_0", "256"]), "the width '256' is no integer"),
        "a width of 4000 digits": (_q(["Q4_0", 10**4000]), "are not 256 channels"),
        "a negative width": (_q(["Q4_0", 288], ["Q4_0", -32]), "are not 256 channels"),
        "no channel": (_q(["Q4_0", 256], ["Q4_0", 0]), "are not 256 channels"),
        "half a block": (_q(["Q4_0", 240], ["F16", 16]), "F16 is not one of|not whole blocks"),
        "a type that is none": (_q(["Q4_99", 256]), "not a plan"),
        "a type that cannot be written": (_q(["I32", 256]), "I32 is not one of"),
        "three parts of a piece": (_q(["Q4_0", 256, 1]), "not a plan"),
        "a prediction of 400 digits": (
            json.dumps({"format": 1, "weights": _WEIGHTS, "predicted_kld": 10**400}).encode(),
            "not a plan: OverflowError",
        ),
        "another format": (json.dumps({"format": [1], "weights": {}}).encode(), "not a plan: ValueError"),
        "weights in a list": (json.dumps({"format": 1, "weights": [1]}).encode(), "not a plan: AttributeErr"),
        "a weight that is not there": (
            _plan(**{"../../x": [["Q4_0", 1]]}),
            "../../x is missing in the model",
        ),
    },
)

_NO_TARGET = {"layout": "stock", "qtype": "Q4_0"}


def _recipe(**fields: Any) -> bytes:
    return json.dumps({**_NO_TARGET, **fields}).encode()


def _pattern(pattern: str) -> bytes:
    return _recipe(tensor_types=[[pattern, "Q8_0"]])


RECIPES = one_file_each(
    "recipe.json",
    {
        "nothing": (b"", "recipe: not JSON"),
        "nested deep": (b"[" * 100_000, "nested deeper than 100 levels"),
        "ten million lists": (b"[" + b"[]," * 10_000_000 + b"0]", "longer than 1,048,576 bytes"),
        "a target of 400 digits": (_recipe(qtype="", target_bpw=10**400), "bits per weight"),
        "a target of 300 digits": (_recipe(qtype="", target_bpw=1e300), "1e[+]300 bits per weight"),
        "a size of 400 digits": (_recipe(qtype="", target_size=10**400), "0 bytes; choose a size"),
        "true clusters": (_recipe(k=True), "damaged: k is 'True'"),
        "a type in a list": (_recipe(embedding=["Q8_0"]), "damaged: embedding is"),
        "half a surrogate": (_recipe(embedding="\ud800"), "half a character"),
        "a pattern that backtracks": (_pattern("(.|.|.|.)+[!?]"), "takes longer than 10 seconds for"),
        "a pattern of nested repeats": (_pattern("((a|b){65000}){65000}"), "repeats more than 1,000 times"),
        "empty groups": (_pattern("(){9999}"), "repeats more than 1,000 times"),
        "a pattern without end": (_pattern("a{99999999999999}"), "repeats more than 1,000 times"),
        "a pattern in a pattern": (_pattern("(?R)*"), "unknown extension"),
        "a long pattern": (_pattern("a" * 100_000), "has 100,000 characters"),
        "nested groups": (_pattern("(" * 5000 + ")" * 5000), "has 10,000 characters"),
        "250 nested groups": (_pattern("(" * 250 + ")" * 250), ""),
    },
)

RESULTS = one_file_each(
    "results.json",
    {
        "nested deep": (b"[" * 100_000, "nested deeper than 100 levels"),
        "another format": (b'{"format": "x"}', "its format is 'x'"),
        "a list": (b"[]", "not results of an evaluation"),
    },
)


TEMPLATES = [
    Attack(name, content(source.encode(), "template.jinja"), error)
    for name, (source, error) in {
        "loops in loops": (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes longer than",
        ),
        "a power of powers": ("{{ 9 ** (9 ** 9) }}", "takes longer than|MemoryError"),
        "ten gigabytes": ("{{ 'a' * 10 ** 10 }}", "MemoryError|OverflowError"),
        "doublings": (
            "{% set n = namespace(t='aa') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
            "MemoryError",
        ),
        "a gigabyte of blanks": ("{{ '%1000000000d' % 1 }}", "MemoryError|it writes more than"),
        "a text of many pieces": (
            "{% for a in range(9999) %}{% for b in range(9999) %}0123456789{% endfor %}{% endfor %}",
            "it writes more than",
        ),
        "the way to Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|SecurityError"),
        "the way through a format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe|SecurityError"),
        "the way through a function": (
            "{{ raise_exception.__globals__['sys'] }}",
            "unsafe|SecurityError",
        ),
        "the way through a loop": (
            "{{ cycler.__init__.__globals__.os.system('id') }}",
            "unsafe|SecurityError",
        ),
        "a file": ("{% include '/etc/passwd' %}", "no loader|TypeError"),
        "an import": ("{% import 'os' as os %}", "no loader|TypeError"),
        "a change of the messages": ("{{ messages.append(1) }}", "unsafe|SecurityError"),
        "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        "a thousand brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "Error"),
        "half a statement": ("{% if %}", "TemplateSyntaxError"),
    }.items()
]
