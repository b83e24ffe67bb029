"""Regenerates the table of known pre-tokenizers from a llama.cpp checkout.

llama.cpp's converter tells pre-tokenizers apart by the hash of the tokens of one text
(``TextModel.get_vocab_base_pre`` in ``conversion/base.py``, itself generated); which names the engine knows,
and the patterns behind them, stand in ``src/llama-vocab.cpp``.

    python scripts/update_pre_tokenizers.py LLAMA_CPP_CHECKOUT --version "llama.cpp commit 0c1e57098"
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "gguf_splitquant/sources/tokenizers/pre_tokenizers.json"


def read_hashes(converter: Path) -> tuple[str, dict[str, str]]:
    """The check text, and name by hash, from the source of ``get_vocab_base_pre``."""
    module = ast.parse(converter.read_text(encoding="utf-8"))
    function = next(
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef) and node.name == "get_vocab_base_pre"
    )
    check_text = ""
    hashes: dict[str, str] = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name("chktxt")], value=ast.Constant(str(text))):
                check_text = text
            case ast.If(
                test=ast.Compare(left=ast.Name("chkhsh"), comparators=[ast.Constant(str(digest))]),
                body=[ast.Assign(value=ast.Constant(str(name))), *_],
            ):
                # a hash listed twice: the later assignment wins there
                hashes[digest] = name
    if not check_text or not hashes:
        raise SystemExit(f"{converter}: get_vocab_base_pre no longer looks as expected")
    return check_text, hashes


def read_engine(vocabulary: Path) -> list[dict[str, Any]]:
    """Groups of names that the engine treats alike, each with its patterns (none for the default)."""
    source = vocabulary.read_text(encoding="utf-8")
    code = re.sub(r"^\s*//.*$", "", source, flags=re.MULTILINE)
    patterns: dict[str, list[str]] = {}
    for cases, body in re.findall(
        r"((?:case LLAMA_VOCAB_PRE_TYPE_\w+:\s*)+)regex_exprs = \{(.*?)\n\s*\};", code, flags=re.DOTALL
    ):
        literals = re.findall(r'"(?:[^"\\]|\\.)*"', body)
        for kind in re.findall(r"LLAMA_VOCAB_PRE_TYPE_(\w+)", cases):
            patterns[kind] = [ast.literal_eval(literal.replace("\n", "")) for literal in literals]
    groups: dict[str, list[str]] = {}
    for condition, kind in re.findall(
        r'((?:tokenizer_pre == "[^"]+"\s*(?:\|\|\s*)?)+)\)\s*\{\s*pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+);',
        code,
    ):
        groups.setdefault(kind, []).extend(re.findall(r'"([^"]+)"', condition))
    if len(groups) < 20 or len(patterns) < 20:
        raise SystemExit(f"{vocabulary}: the pre-tokenizers no longer look as expected")
    return [{"names": names, "patterns": patterns.get(kind, [])} for kind, names in groups.items()]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a llama.cpp checkout, or the one vendored in an sdist")
    parser.add_argument("--version", required=True, help="what to note as the source")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    check_text, hashes = read_hashes(options.checkout / "conversion/base.py")
    table = {
        "source": f"{options.version}: conversion/base.py (hashes), src/llama-vocab.cpp (engine)",
        "regenerate": "scripts/update_pre_tokenizers.py",
        "check_text": check_text,
        "engine": read_engine(options.checkout / "src/llama-vocab.cpp"),
        "hashes": hashes,
    }
    options.out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    names = {name for group in table["engine"] for name in group["names"]}
    print(f"{options.out}: {len(hashes)} hashes, {len(names)} names")
    for name in sorted(set(hashes.values()) - names):
        print(f"  the converter writes {name!r}, which the engine does not know")


if __name__ == "__main__":
    main()
