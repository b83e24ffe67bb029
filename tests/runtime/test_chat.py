"""Conversations with a real model: its template, reproducible sampling, nothing computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.errors import EngineError
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.runtime.chat import Conversation, Sampling, draw
from gguf_splitquant.runtime.chat_template import ChatTemplate, read_chat_template
from gguf_splitquant.runtime.engine import Engine, EngineOptions
from tests.gguf_files import FLOAT, convert_once

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def chat_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_once(smollm2, tmp_path_factory.mktemp("chat"), Recipe(layout="float"), "float")


@pytest.fixture(scope="module")
def engine(chat_file: Path) -> Iterator[Engine]:
    with Engine(chat_file, EngineOptions(n_ctx=512)) as engine:
        yield engine


@pytest.mark.engine
def test_the_model_answers(chat_file: Path, engine: Engine) -> None:
    talk = Conversation(engine, read_chat_template(chat_file), GREEDY)
    pieces = list(talk.answer("What is the capital of France?"))
    assert len(pieces) > 3 and "Paris" in "".join(pieces)
    assert "<|im_" not in "".join(pieces)


@pytest.mark.engine
def test_a_second_turn_reads_only_what_is_new(
    chat_file: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    decode = Engine.decode
    monkeypatch.setattr(
        Engine,
        "decode",
        lambda self, tokens, *rest: (counts.append(len(tokens)), decode(self, tokens, *rest))[1],
    )
    template = read_chat_template(chat_file)
    talk = Conversation(engine, template, GREEDY, system="You are a pirate. " * 10, max_tokens=8)
    first = "".join(talk.answer("Hello!"))
    read, before = counts[0], len(counts)
    second = "".join(talk.answer("And now?"))
    assert counts[before] < read / 2
    engine.clear()
    whole = template.render(
        [
            {"role": "system", "content": "You are a pirate. " * 10},
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And now?"},
        ]
    )
    assert second == "".join(engine.generate_text(whole, 8))


@pytest.mark.engine
def test_the_same_seed_gives_the_same_answer(chat_file: Path, engine: Engine) -> None:
    answers = []
    for seed in (1, 1, 2):
        how = Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed)
        talk = Conversation(engine, read_chat_template(chat_file), how, max_tokens=12)
        answers.append("".join(talk.answer("Tell me a story.")))
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.engine
def test_errors_and_interruptions(chat_file: Path, engine: Engine) -> None:
    refusing = Conversation(engine, ChatTemplate("{{ raise_exception('no system') }}"), GREEDY, "x")
    with pytest.raises(EngineError, match="refuses the conversation: no system"):
        list(refusing.answer("Hi"))
    talk = Conversation(engine, read_chat_template(chat_file), GREEDY)
    with pytest.raises(EngineError, match="the context of 512 tokens is full"):
        list(talk.answer("word " * 600))
    with Engine(chat_file, EngineOptions(n_ctx=256)) as small:
        talk = Conversation(small, ChatTemplate("{{ messages[-1].content }}"), GREEDY)
        long = list(talk.answer("one two three four " * 60))  # ends where the context does
        assert 0 < len(long) < 256
    talk = Conversation(engine, read_chat_template(chat_file), GREEDY)
    answer = talk.answer("What is the capital of France?")
    taken = next(answer)
    answer.close()  # as Ctrl-C does
    assert [m["content"] for m in talk._messages] == ["What is the capital of France?", taken]
    assert "".join(talk.answer("Go on."))


@pytest.mark.engine
def test_without_a_template_texts_are_continued(
    stories15m: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = convert_once(stories15m, tmp_path_factory.mktemp("stories"), FLOAT, "float")
    with Engine(path, EngineOptions(n_ctx=256)) as engine:
        talk = Conversation(engine, None, GREEDY, max_tokens=12)
        once = "".join(talk.answer("Once upon a time"))
        assert once == "".join(engine.generate_text("Once upon a time", 12)) != ""
        with pytest.raises(EngineError, match="the message is empty"):
            empty = Conversation(engine, ChatTemplate("x"), GREEDY)
            empty._prompt = lambda messages, text: []  # type: ignore[method-assign]
            list(empty.answer(""))


def test_sampling() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def seen(**how: float) -> dict[int, float]:
        random = np.random.default_rng(0)
        sampling = Sampling(**{"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, **how})
        tokens = [draw(logits, sampling, random) for _ in range(4000)]
        return {int(t): tokens.count(t) / len(tokens) for t in sorted(set(tokens))}

    assert seen(temperature=0) == {0: 1.0}
    assert seen() == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.03)
    assert seen(top_k=2) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)
    assert seen(top_p=0.79) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)
    assert seen(min_p=0.2) == pytest.approx({0: 0.526, 1: 0.316, 2: 0.158}, abs=0.03)
    assert seen(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.03)
    assert seen(top_p=0.0) == {0: 1.0}
