"""``gguf-splitquant chat FILE.gguf``."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.chat import Conversation, Sampling
    from ..runtime.chat_template import ChatTemplate

_MOST_CONTEXT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("path", type=Path, metavar="FILE.gguf", help="of several shards the first")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument(
        "--temp",
        type=float,
        metavar="T",
        help="0: always the most likely token (default: the model's, or 0.8)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same answers every time")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=1024, help="of one answer (default: 1024)"
    )
    parser.add_argument(
        "--ctx", type=int, metavar="N", help=f"tokens of the conversation (default: up to {_MOST_CONTEXT})"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per performance core")


def run(args: argparse.Namespace) -> int:
    """Talk: with a person at a terminal, or answer what is piped in."""
    from ..runtime.chat import Conversation
    from ..runtime.engine import Engine, EngineOptions
    from .compare import check_positive

    check_positive(args, "max_tokens", "ctx", "threads")
    template, sampling = _of_model(args)
    if template is None:
        print("note: the file has no chat template: texts are continued, not answered", file=sys.stderr)
    options = EngineOptions(n_ctx=args.ctx or _context(args.path), n_threads=args.threads)
    with Engine(args.path, options) as engine:
        conversation = Conversation(engine, template, sampling, args.system, args.max_tokens)
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            _print_answer(conversation, sys.stdin.read().strip())
    return 0


def _of_model(args: argparse.Namespace) -> tuple[ChatTemplate | None, Sampling]:
    """The template and the sampling parameters in the file, where the options do not say otherwise."""
    from gguf import Keys

    from ..gguf_io.pairs import read_pairs
    from ..runtime.chat import Sampling
    from ..runtime.chat_template import chat_template

    metadata = read_pairs(args.path)

    def number(key: str, default: float) -> float:
        value = metadata[key].value if key in metadata else default
        return value if isinstance(value, (int, float)) else default

    usual = Sampling()
    sampling = Sampling(
        temperature=number(Keys.General.SAMPLING_TEMP, usual.temperature) if args.temp is None else args.temp,
        top_k=int(number(Keys.General.SAMPLING_TOP_K, usual.top_k)),
        top_p=number(Keys.General.SAMPLING_TOP_P, usual.top_p),
        min_p=number(Keys.General.SAMPLING_MIN_P, usual.min_p),
        seed=args.seed,
    )
    return chat_template(metadata), sampling


def _context(path: Path) -> int:
    from ..evaluation.contents import read_contents

    return min(read_contents(path).context_length or _MOST_CONTEXT, _MOST_CONTEXT)


def _talk(conversation: Conversation) -> None:
    """Ask and answer until the end of input."""
    # arrow keys and history, where Python has them
    with suppress(ImportError):
        import_module("readline")
    print("(end with Ctrl-D; Ctrl-C stops an answer)", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            try:
                _print_answer(conversation, text)
            except KeyboardInterrupt:
                print()


def _print_answer(conversation: Conversation, text: str) -> None:
    for piece in conversation.answer(text):
        print(piece, end="", flush=True)
    print()
