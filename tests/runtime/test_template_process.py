"""The process that renders templates: it starts once, is ended when it hangs, and starts again."""

from __future__ import annotations

import subprocess
import threading

import pytest
from jinja2 import TemplateError

from gguf_splitquant.runtime.template_process import TemplateProcess

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def request(source: str, text: str = "Hello") -> dict[str, object]:
    return {
        "source": source,
        "messages": [{"role": "user", "content": text}],
        "bos": "<s>",
        "eos": "</s>",
        "generate": True,
        "now": "2026-02-03T04:05:06",
    }


def test_one_process_renders_all(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    original = subprocess.Popen

    def counted(*args: object, **options: object) -> object:
        started.append(args)
        return original(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", counted)
    process = TemplateProcess()
    try:
        results: list[str] = []
        source = "{{ bos_token }}{{ messages[0].content }}{{ strftime_now('%d.%m.%Y') }}"

        def one(number: int) -> None:
            results.append(process.render(request(source, f"\u00fc\n{number}")))

        threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [f"<s>\u00fc\n{i}03.02.2026" for i in range(8)]
        assert len(started) == 1
    finally:
        process.close()


def test_what_hangs_is_ended_and_the_next_one_is_rendered() -> None:
    process = TemplateProcess(seconds=1.0)
    try:
        with pytest.raises(TemplateError, match="it takes longer than 1 seconds"):
            process.render(request(ENDLESS))
        process.seconds = 60.0
        assert process.render(request("{{ messages[0].content }}")) == "Hello"
        # half a megabyte there, half a megabyte back
        assert process.render(request("{{ messages[0].content }}", "x" * 500_000)) == "x" * 500_000
    finally:
        process.close()


def test_a_process_that_was_ended_is_replaced() -> None:
    process = TemplateProcess()
    try:
        process.render(request("x"))
        assert process._process is not None
        process._process.kill()
        process._process.wait()
        assert process.render(request("y")) == "y"
    finally:
        process.close()
