"""A model's own chat template, rendered as transformers renders it.

A template is a program from the internet: it runs in jinja's sandbox, in a process with little memory and
time, and whatever it raises is an error about the template.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValue, Keys

from ..errors import GGUFError
from ..gguf_io.pairs import read_pairs
from .template_process import TEMPLATES

Message = Mapping[str, str]
"""``{"role": "system", "user" or "assistant", "content": text}``"""

# llama_vocab::impl::load in llama.cpp's src/llama-vocab.cpp: pre-tokenizers that begin with BOS by default
_BOS_BY_DEFAULT = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "chameleon", "tekken"),
}


@dataclass(frozen=True)
class ChatTemplate:
    """The template of one model.

    Attributes:
        source: jinja, as in the file.
        bos, eos: the texts of these tokens; empty where the model has none.
        adds_bos: the tokenizer puts BOS before every text, so that a rendered one must not be doubled.
    """

    source: str
    bos: str = ""
    eos: str = ""
    adds_bos: bool = False

    def render(
        self,
        messages: Sequence[Message],
        *,
        generate: bool = True,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> str:
        """A conversation as the model wants to read it, without the BOS that the tokenizer adds.

        Args:
            messages: of the conversation.
            generate: end where the assistant's next message begins.
            now: the time that a template may ask for.

        Raises:
            TemplateError: the template is broken, refuses these messages, or takes too much time or memory.
        """

        request = {
            "source": self.source,
            "messages": [dict(message) for message in messages],
            "bos": self.bos,
            "eos": self.eos,
            "generate": generate,
            "now": now().isoformat(),
        }
        text = TEMPLATES.render(request)
        return text.removeprefix(self.bos) if self.adds_bos and self.bos else text


def chat_template(metadata: Mapping[str, GGUFValue]) -> ChatTemplate | None:
    """The chat template in a file's metadata; None where there is none."""
    value = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if value is None or not isinstance(value.value, str) or not value.value:
        return None
    return ChatTemplate(
        value.value,
        token_text(metadata, Keys.Tokenizer.BOS_ID),
        token_text(metadata, Keys.Tokenizer.EOS_ID),
        _adds_bos(metadata),
    )


def read_chat_template(path: Path) -> ChatTemplate:
    """The chat template of a GGUF file.

    Raises:
        GGUFError: it has none, or is damaged.
    """
    found = chat_template(read_pairs(path))
    if found is None:
        raise GGUFError(path, "has no chat template: it is not a chat model", "use another model")
    return found


def token_text(metadata: Mapping[str, GGUFValue], key: str) -> str:
    """The text of the token whose id is under ``key``; empty where there is none."""
    token, tokens = metadata.get(key), metadata.get(Keys.Tokenizer.LIST)
    if token is None or tokens is None or not isinstance(token.value, int):
        return ""
    texts = tokens.value
    text = texts[token.value] if isinstance(texts, list) and 0 <= token.value < len(texts) else ""
    return text if isinstance(text, str) else ""


def _adds_bos(metadata: Mapping[str, GGUFValue]) -> bool:
    said = metadata.get(Keys.Tokenizer.ADD_BOS)
    if said is not None:
        return bool(said.value)
    model, pre = metadata.get(Keys.Tokenizer.MODEL), metadata.get(Keys.Tokenizer.PRE)
    if model is not None and model.value == "llama":
        return True
    return pre is not None and pre.value in _BOS_BY_DEFAULT
