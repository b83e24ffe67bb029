"""``gguf-splitquant build-runtime``: the patched llama.cpp, once per machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.build import build_runtime
from ..runtime.builds import BuildSpec
from .progress_bar import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--force", action="store_true", help="build again even if it is in the cache")
    parser.add_argument("--metal", action="store_true", help="with the Metal backend (macOS)")
    parser.add_argument(
        "--stock",
        action="store_true",
        help="without the patches: the reference of the tests",
    )
    parser.add_argument(
        "--with-tools",
        action="store_true",
        help="also llama-quantize, -perplexity, -imatrix and -export-lora (takes four times as long)",
    )
    parser.add_argument(
        "--sanitized",
        action="store_true",
        help="with AddressSanitizer and UndefinedBehaviorSanitizer: for `make test-asan`",
    )
    parser.add_argument(
        "--sdist",
        type=Path,
        metavar="FILE",
        help="the source archive, instead of downloading it",
    )
    parser.add_argument(
        "--library-only", action="store_true", help="leave llama-cpp-python in this environment as it is"
    )


def run(args: argparse.Namespace) -> int:
    """Build, or find the build, and say where it is."""
    spec = BuildSpec(
        patched=not args.stock, tools=args.with_tools, metal=args.metal, sanitized=args.sanitized
    )
    done = build_runtime(
        spec, sdist=args.sdist, force=args.force, binding=not args.library_only, progress=ProgressBar()
    )
    what = "patched llama.cpp" if spec.patched else "stock llama.cpp"
    print(f"{what}: {done.build.lib_dir} ({'built' if done.fresh else 'in the cache'})")
    if done.binding_installed:
        print("llama-cpp-python: installed")
    return 0
