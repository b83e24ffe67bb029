"""Renders chat templates in a process of its own, with little memory: what :mod:`.template_process` starts.

jinja's sandbox keeps a template away from Python; that it counts to 10^10 in nested loops, or writes a text
of many gigabytes, only the operating system can stop.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

MEMORY = 1 << 30
"""Bytes that the process may have in all."""
_CPU_SECONDS = 600
MOST_TEXT = 8 << 20
"""Characters of a rendered conversation."""


def main() -> None:
    """Answer each line of standard input, a request in JSON, with ``{"text": ...}`` or ``{"error": ...}``."""
    _limit_memory()
    for line in sys.stdin:
        try:
            answer = {"text": _render(json.loads(line))}
        # from a program that nobody here wrote: RecursionError, MemoryError, TypeError and so on
        except Exception as error:
            name = type(error).__name__
            answer = {"error": str(error) if name == "TemplateError" else f"{name}: {str(error)[:1000]}"}
        print(json.dumps(answer), flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    # should the process that asks be gone
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))


def _render(request: dict[str, Any]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    now = datetime.datetime.fromisoformat(request["now"])

    def refuse(reason: object) -> None:
        raise TemplateError(str(reason))

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    length, pieces = 0, []
    for piece in environment.from_string(request["source"]).generate(
        messages=request["messages"],
        bos_token=request["bos"],
        eos_token=request["eos"],
        add_generation_prompt=request["generate"],
        raise_exception=refuse,
        strftime_now=now.strftime,
    ):
        length += len(piece)
        if length > MOST_TEXT:
            raise TemplateError(f"it writes more than {MOST_TEXT:,} characters")
        pieces.append(piece)
    return "".join(pieces)
