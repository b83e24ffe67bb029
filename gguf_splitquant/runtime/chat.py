"""A conversation with a model: its own template, its own sampling parameters, the answer as it comes.

What was read stays in the KV cache: a turn computes only what is new.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from ..errors import EngineError
from .chat_template import ChatTemplate, Message
from .engine import Engine

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely one.
        top_k: of the most likely tokens only; 0: of all.
        top_p: of the most likely ones that together have this probability.
        min_p: of those with at least this fraction of the most likely one's probability.
        seed: None draws differently every time.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None


@dataclass
class Conversation:
    """A model, and what was said so far.

    Attributes:
        engine: with a context for the whole conversation.
        template: the model's; None continues each message as a text of its own.
        sampling: how tokens are drawn.
        system: what the model is told beforehand.
        max_tokens: of one answer; 0: as many as the context holds, where any answer ends.
    """

    engine: Engine
    template: ChatTemplate | None
    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""
    max_tokens: int = 0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.sampling.seed)
        self._messages: list[Message] = []
        if self.system:
            self._messages.append({"role": "system", "content": self.system})
        self._read: list[int] = []

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer, piece by piece; it belongs to the conversation as far as it was taken.

        Raises:
            EngineError: the context is full, or the template refuses the conversation.
        """
        said = {"role": "user", "content": text}
        prompt = self._prompt([*self._messages, said], text)
        pieces: list[str] = []
        try:
            for piece in self.engine.stream_text(self._generate(prompt)):
                pieces.append(piece)
                yield piece
        finally:
            if self.template is not None:
                self._messages += [said, {"role": "assistant", "content": "".join(pieces)}]

    def _prompt(self, messages: list[Message], text: str) -> list[int]:
        if self.template is None:
            return [int(token) for token in self.engine.tokenize(text)]
        try:
            rendered = self.template.render(messages)
        except TemplateError as error:
            raise EngineError(
                self.engine.path, f"its chat template refuses the conversation: {error}", "leave --system out"
            ) from error
        return [int(token) for token in self.engine.tokenize(rendered, parse_special=True)]

    def _generate(self, prompt: list[int]) -> Iterator[int]:
        if not prompt:
            raise EngineError(self.engine.path, "nothing to answer: the message is empty", "write a message")
        logits = self._feed(prompt)
        most = self.engine.n_ctx - len(prompt)
        for _ in range(min(self.max_tokens or most, most)):
            token = draw(logits, self.sampling, self._random)
            if self.engine.ends_text(token):
                return
            yield token
            logits = self._feed([*self._read, token])

    def _feed(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits after ``tokens``; those that were read already are not computed again."""
        engine = self.engine
        shared = 0
        for mine, new in zip(self._read, tokens[:-1], strict=False):
            if mine != new:
                break
            shared += 1
        if shared == 0 or (shared < len(self._read) and not engine.truncate_sequence(0, shared)):
            engine.clear()
            shared = 0
        # until all is read: after an error in between nothing is known
        self._read = []
        logits = np.empty((0, 0), np.float32)
        for start in range(shared, len(tokens), engine.n_batch):
            part = tokens[start : start + engine.n_batch]
            last = start + len(part) == len(tokens)
            wanted = [False] * (len(part) - 1) + [last]
            logits = engine.decode(part, np.arange(start, start + len(part)), 0, wanted)
        self._read = list(tokens)
        return np.asarray(logits[-1])


def draw(logits: NDArray[np.float32], how: Sampling, random: np.random.Generator) -> int:
    """One token from ``logits``, float32 (vocabulary,)."""
    if how.temperature <= 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    if how.top_k > 0:
        order = order[: how.top_k]
    plain = _softmax(logits[order].astype(np.float64))
    # the smallest set whose probability reaches top_p, and of that what is not far less likely than the first
    kept = (np.cumsum(plain) - plain < how.top_p) & (plain >= how.min_p * plain[0])
    kept[0] = True
    order = order[kept]
    weights = _softmax(logits[order].astype(np.float64) / how.temperature)
    return int(order[min(np.searchsorted(np.cumsum(weights), random.random()), len(order) - 1)])


def _softmax(values: F64) -> F64:
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum())
