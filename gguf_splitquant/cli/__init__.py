"""The command line: a thin skin over the library's verbs.

Each verb is a module with ``add_arguments`` and ``run``, imported only when it is called, so that ``--help``
and a typing error answer at once. Exit codes: 0 done, 1 a limit was passed (``compare``) or something
differs (``verify``), 2 the input, disk or environment is at fault (one line says what and what to do), 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import SplitQuantError
from .interruption import Terminated, termination_raises

_VERBS = {
    "convert": "turn a Hugging Face checkpoint or a float GGUF into a quantized GGUF file",
    "build-runtime": "build the patched llama.cpp library that runs split files",
    "compare": "compare a quantized GGUF with its float baseline",
    "eval": "evaluate GGUF files: ARC, KLD, perplexity, speed",
    "chat": "talk with a GGUF file, in the model's own template",
    "inspect": "show what is in a GGUF file",
    "verify": "make tensors of a GGUF file again from their source, and compare",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with termination_raises():
            return _run(arguments)
    except SplitQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # the reader (head, less) has gone: silence the interpreter's own flush at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # whatever looks at it first; the path can be that of any option
        known = SplitQuantError(str(error.filename)[:200], str(error.strerror), "give a shorter path")
        print(f"error: {known}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gguf-splitquant",
        description="Hugging Face checkpoint to split-quantized GGUF for llama.cpp, on a CPU.",
    )
    parser.add_argument("--version", action="version", version=f"gguf-splitquant {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    for verb, summary in _VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if verb == chosen:
            module = import_module(f".{verb.replace('-', '_')}", __name__)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments, argparse.Namespace(arguments=arguments))
    code: int = parsed.run(parsed)
    return code
