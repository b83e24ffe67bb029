"""What a chat template writes around each message: found by rendering it, not by reading it.

Templates are programs, and two that look different may write the same. So the template is rendered with marks
for messages, what stands between the marks is taken for what it writes around every message of that role,
and conversations of all shapes are then rendered both ways. Only a template that is reproduced to the
character has a form; of any other (it writes the date, trims or rearranges messages) the reason is told.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from ..runtime.chat_template import ChatTemplate, Message

_SYSTEM, _USER, _ANSWER, _USER2 = "Mark-System", "Mark-User", "Mark-Answer", "Mark-Next"
_DATES = (datetime.datetime(2001, 2, 3), datetime.datetime(2014, 5, 6))


class NoFormError(ValueError):
    """The template does more than writing fixed texts around messages; the message says what."""


@dataclass(frozen=True)
class Turn:
    """The texts around a message."""

    before: str
    after: str


@dataclass(frozen=True)
class ChatForm:
    """A template as fixed texts.

    Attributes:
        start: before everything, where there is a system message.
        start_alone: before everything, where there is none: a default system message stands here.
        system: around the system message; None where the model knows none.
        system_in_user: ``system`` stands inside the first user message's turn, before its text.
        user, assistant: around their messages.
        generation: after the last message: what begins the assistant's next one.
    """

    start: str
    start_alone: str
    system: Turn | None
    system_in_user: bool
    user: Turn
    assistant: Turn
    generation: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a user's message."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        text = self.start_alone if system is None else self.start
        first = True
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                if self.system and not self.system_in_user:
                    text += self.system.before + content + self.system.after
                continue
            turn = self.user if message["role"] == "user" else self.assistant
            text += turn.before
            if first and system is not None and self.system and self.system_in_user:
                text += self.system.before + system + self.system.after
            text += content + turn.after
            first = False
        return text + self.generation


def find_form(template: ChatTemplate) -> ChatForm:
    """The form of a template.

    Raises:
        NoFormError: it has none.
    """
    user, answer, user2 = _said("user", _USER), _said("assistant", _ANSWER), _said("user", _USER2)
    head, tail = _cut(_rendered(template, [user]), _USER)
    _, after_user = _cut(_rendered(template, [user], generate=False), _USER)
    head_again, to_answer, to_next, _ = _cut(
        _rendered(template, [user, answer, user2]), _USER, _ANSWER, _USER2
    )
    if not (tail.startswith(after_user) and to_answer.startswith(after_user)):
        after_user = ""
    _, _, after_answer = _cut(_rendered(template, [user, answer], generate=False), _USER, _ANSWER)
    before_user = to_next.removeprefix(after_answer)
    if not (to_next.startswith(after_answer) and head.endswith(before_user)):
        after_answer, before_user = to_next, ""
    start = head.removesuffix(before_user)
    form = ChatForm(
        start=start,
        start_alone=start,
        system=None,
        system_in_user=False,
        user=Turn(before_user, after_user),
        assistant=Turn(to_answer.removeprefix(after_user), after_answer),
        generation=tail.removeprefix(after_user),
    )
    if head_again != head:
        raise NoFormError("it writes the first message differently when others follow")
    form = _with_system(template, form)
    _compare(template, form)
    return form


def _with_system(template: ChatTemplate, form: ChatForm) -> ChatForm:
    try:
        text = _rendered(template, [_said("system", _SYSTEM), _said("user", _USER)])
    except NoFormError:
        return form
    if _SYSTEM not in text:
        return form
    head, to_user, _ = _cut(text, _SYSTEM, _USER)
    opened = form.start + form.user.before
    in_user = bool(form.user.before) and head.startswith(opened)
    if in_user:
        start, system = form.start, Turn(head.removeprefix(opened), to_user)
    elif to_user.endswith(form.user.before):
        shared = form.start if head.startswith(form.start) else ""
        start = shared
        system = Turn(head.removeprefix(shared), to_user.removesuffix(form.user.before))
    else:
        raise NoFormError("it writes the first message differently after a system message")
    return ChatForm(start, form.start_alone, system, in_user, form.user, form.assistant, form.generation)


def _compare(template: ChatTemplate, form: ChatForm) -> None:
    """Raise NoFormError unless both write the same for conversations of all shapes."""
    texts = ["Hello, world!", "One line\n\n  and {{ another }}", "3 < 4 & \u00fc\u4f60", "x"]
    for rounds in range(4):
        for with_system in (False, True) if form.system else (False,):
            roles = ["system"] * with_system + ["user", "assistant"] * rounds + ["user"]
            messages = [_said(role, texts[(i + rounds) % 4] + str(i)) for i, role in enumerate(roles)]
            if _rendered(template, messages) != form.render(messages):
                raise NoFormError(f"it does more than fixed texts around messages ({', '.join(roles)})")


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _rendered(template: ChatTemplate, messages: Sequence[Message], *, generate: bool = True) -> str:
    def at(date: datetime.datetime) -> str:
        return template.render(messages, generate=generate, now=lambda: date)

    try:
        text, later = (at(date) for date in _DATES)
    except TemplateError as error:
        raise NoFormError(f"it refuses an ordinary conversation: {str(error)[:200]}") from error
    if text != later:
        raise NoFormError("it writes the date")
    return text


def _cut(text: str, *marks: str) -> list[str]:
    """What stands before, between and behind the marks. Raises NoFormError if not each is there once."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            raise NoFormError("it leaves out, repeats or moves messages")
        pieces.append(piece)
    return [*pieces, text]
