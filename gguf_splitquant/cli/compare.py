"""``gguf-splitquant compare FLOAT.gguf QUANT.gguf``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation.behaviour import Behaviour, Place
    from ..evaluation.compare import Comparison, FileSize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("float_path", type=Path, metavar="FLOAT.gguf", help="the baseline")
    parser.add_argument("quant_path", type=Path, metavar="QUANT.gguf", help="the file to judge")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: a built-in one)"
    )
    parser.add_argument("--max-kld", type=float, metavar="X", help="exit with 1 if the mean KLD is above X")
    parser.add_argument(
        "--max-logit-diff",
        type=float,
        metavar="Y",
        help="exit with 1 if any two logits differ by more than Y",
    )
    parser.add_argument(
        "--max-flips",
        type=float,
        metavar="SHARE",
        help="exit with 1 if more of all tokens (0 to 1) have both models sure, and of different tokens",
    )
    parser.add_argument(
        "--max-token-kld", type=float, metavar="Z", help="exit with 1 if the KLD of any token is above Z"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--limit-tokens", type=int, metavar="N", help="read only N tokens of the text")
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options on how models are run, which evaluations share."""
    parser.add_argument(
        "--ctx", type=int, metavar="N", help="tokens per chunk (default: 512 or the model's own)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per performance core")
    parser.add_argument(
        "--kv", choices=("f16", "f32"), default="f16", help="type of the KV cache (default: f16)"
    )
    parser.add_argument("--flash-attn", choices=("on", "off"), help="default: as llama.cpp chooses")


def flash_attention(args: argparse.Namespace) -> bool | None:
    """What ``--flash-attn`` means to the engine."""
    return None if args.flash_attn is None else bool(args.flash_attn == "on")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise EvaluationError for an option below one."""
    from ..errors import EvaluationError

    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvaluationError(f"--{name.replace('_', '-')}", f"{value} is less than one", "use 1 or more")


_LIMITS = ("max_kld", "max_logit_diff", "max_flips", "max_token_kld")


def _check_limits(args: argparse.Namespace) -> None:
    from ..errors import EvaluationError

    for name in _LIMITS:
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise EvaluationError(f"--{name.replace('_', '-')}", f"{value} is not a limit", "use 0 or more")


def run(args: argparse.Namespace) -> int:
    """Compare; 1 if a limit is passed."""
    from ..evaluation.compare import compare, violations
    from ..evaluation.text import read_text
    from .progress_bar import ProgressBar

    check_positive(args, "ctx", "threads", "limit_tokens")
    _check_limits(args)
    comparison = compare(
        args.float_path,
        args.quant_path,
        read_text(args.text),
        context=args.ctx,
        limit_tokens=args.limit_tokens,
        threads=args.threads,
        kv=args.kv,
        flash_attention=flash_attention(args),
        progress=ProgressBar(),
    )
    passed = violations(comparison, **{name: getattr(args, name) for name in _LIMITS})
    if args.json:
        print(json.dumps({**comparison.to_json(), "violations": list(passed)}, indent=2))
    else:
        print(render(comparison))
    if comparison.behaviour.flips:
        print(f"warning: {changed_behaviour(comparison.behaviour)}", file=sys.stderr)
    for sentence in passed:
        print(f"limit passed: {sentence}", file=sys.stderr)
    return 1 if passed else 0


def render(comparison: Comparison) -> str:
    """The comparison as a table for people."""
    figures = comparison.divergence
    base, quant = comparison.base, comparison.quant
    lines = [
        f"text: {comparison.text}, {comparison.chunks} chunks of {comparison.context} tokens, "
        f"{figures.tokens} scored",
        "",
        _row("", "baseline", "quantized"),
        _row("file", Path(base.path).name, Path(quant.path).name),
        _row("bytes", f"{base.file_bytes:,}", f"{quant.file_bytes:,}"),
        _row("bpw, linear layers", _bpw(base), _bpw(quant)),
        _row("bpw, whole file", f"{base.file_bpw:.2f}", f"{quant.file_bpw:.2f}"),
        _row("perplexity", f"{figures.ppl_base:.4f}", f"{figures.ppl:.4f}"),
        "",
        _row("mean KLD", f"{figures.kld_mean:.6f}", f"± {figures.kld_error:.6f}"),
        _row("median / p90 KLD", f"{figures.kld_median:.6f}", f"{figures.kld_p90:.6f}"),
        _row("p99 / max KLD", f"{figures.kld_p99:.6f}", f"{figures.kld_max:.6f}"),
        _row("top-1 agreement", f"{100 * figures.top1:.2f} %", ""),
        _row("perplexity ratio", f"{figures.ppl_ratio:.5f}", f"± {figures.ppl_ratio_error:.5f}"),
        _row("logit difference, max / RMS", f"{figures.logit_max:.6f}", f"{figures.logit_rms:.6f}"),
        _row("sure of another token", f"{comparison.behaviour.flips:,}", f"of {comparison.behaviour.sure:,}"),
    ]
    if comparison.behaviour.worst:
        lines += ["", f"largest KLD, {_shown(comparison.behaviour.worst)}"]
    if figures.non_finite:
        lines.append(_row("positions with NaN or infinity", f"{figures.non_finite:,}", "left out above"))
    return "\n".join(line.rstrip() for line in lines)


def changed_behaviour(behaviour: Behaviour) -> str:
    """One sentence about choices that changed although both models are sure."""
    place = f"; {_shown(behaviour.worst_flip)}" if behaviour.worst_flip else ""
    many = "positions" if behaviour.flips > 1 else "position"
    return f"behaviour changed at {behaviour.flips:,} {many} where both models are sure{place}"


def _shown(place: Place) -> str:
    """A place of the text with both choices; no control character gets to the terminal."""
    base, quant = (f"{c.token!a} ({c.probability:.2f})" for c in (place.base, place.quant))
    where = f"chunk {place.chunk}, token {place.position}"
    return f"{place.kld:.3f} at {where}, after {place.context[-60:]!a}: baseline {base}, quantized {quant}"


def _bpw(size: FileSize) -> str:
    return "-" if size.linear_bpw is None else f"{size.linear_bpw:.2f}"


def _row(label: str, left: str, right: str) -> str:
    return f"{label:<31}{left:>18}  {right:>18}"
