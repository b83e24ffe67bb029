"""A Modelfile for Ollama: the chat template in Ollama's language, stop tokens, sampling parameters.

Facts from github.com/ollama/ollama: the tensor types from ``fs/ggml/type.go`` (``ParseTensorType``, and the
types marked "not supported by Ollama"), the syntax from ``parser/parser.go``, what a template is given from
``template/template.go``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGUFValue, Keys, TokenType

from ..errors import RecipeError
from ..planning.plan import Plan
from ..recipe import STOCK_TYPES
from ..runtime.chat_template import chat_template, token_text
from .chat_form import ChatForm, NoFormError, Turn, find_form

LOADS = frozenset(
    ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)
"""ggml types of ours that Ollama loads."""

REFUSED = tuple(name for name in STOCK_TYPES if name not in LOADS)
"""Types of the stock layout that it does not: the I-quants."""

# [host/][namespace/]model[:tag] (types/model/name.go)
_NAME = re.compile(r"(\w[\w.-]*(:\d+)?/)?(\w[\w.-]*/)?\w[\w.-]*(:\w[\w.-]*)?", re.ASCII)

# metadata key -> Ollama's parameter
_PARAMETERS = {
    Keys.General.SAMPLING_TEMP: "temperature",
    Keys.General.SAMPLING_TOP_K: "top_k",
    Keys.General.SAMPLING_TOP_P: "top_p",
    Keys.General.SAMPLING_MIN_P: "min_p",
    Keys.General.SAMPLING_PENALTY_REPEAT: "repeat_penalty",
}
_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)


@dataclass(frozen=True)
class Modelfile:
    """What ``ollama create`` reads.

    Attributes:
        text: the file.
        notes: what it lacks, as sentences.
    """

    text: str
    notes: tuple[str, ...]


def check_name(name: str) -> None:
    """Raise RecipeError for a name that Ollama refuses."""
    if not _NAME.fullmatch(name):
        raise RecipeError(
            "--ollama", f"{name!r} is not a model name", "write such as mymodel or mymodel:4bit"
        )


def check_plan(plan: Plan) -> None:
    """Raise RecipeError unless Ollama loads a file of this plan."""
    if any(len(t.outputs) > 1 for t in plan.tensors):
        raise RecipeError("--ollama", "Ollama does not run files with sub-layers", "use --recipe stock")
    for output in plan.outputs:
        if output.qtype.name not in LOADS:
            raise RecipeError(
                "--ollama", f"Ollama does not load {output.qtype.name} ({output.name})", "choose another type"
            )


def make_modelfile(file_name: str, metadata: Mapping[str, GGUFValue]) -> Modelfile:
    """The Modelfile for a GGUF file beside it.

    Args:
        file_name: of the GGUF file, without a folder.
        metadata: of the model.
    """
    form, notes = _form(metadata)
    lines = [f"FROM ./{file_name}"]
    if form is not None:
        lines.append(f"TEMPLATE {_quoted(go_template(form))}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in _stops(metadata, form)]
    for key, parameter in _PARAMETERS.items():
        if key in metadata:
            lines.append(f"PARAMETER {parameter} {metadata[key].value:.6g}")
    return Modelfile("\n".join(lines) + "\n", notes)


def _form(metadata: Mapping[str, GGUFValue]) -> tuple[ChatForm | None, tuple[str, ...]]:
    template = chat_template(metadata)
    if template is None:
        return None, ("the model has no chat template: Ollama will hand it prompts as they are",)
    try:
        form = find_form(template)
        written = go_template(form)
    except NoFormError as error:
        reason = str(error)
    else:
        # parser.go drops what is not printable, and has no escapes
        lost = {c for c in written if not c.isprintable()} - set("\n\t")
        if not lost and '"""' not in written:
            alone = form.system is None
            note = "the model's template has no system message: Ollama's SYSTEM has no effect"
            return form, (note,) if alone else ()
        reason = "its texts cannot be written in a Modelfile"
    return None, (
        f"no TEMPLATE: the chat template has no faithful equivalent ({reason}); Ollama uses its own guess",
    )


def go_template(form: ChatForm) -> str:
    """The form as a template of Go's text/template, for the values that Ollama gives it."""
    start, loop, in_user, turns = _literal(form.start_alone), "{{ range .Messages }}", "", ""
    if form.system:
        if form.start != form.start_alone:
            start = "{{ if .System }}" + _literal(form.start) + "{{ else }}" + start + "{{ end }}"
        if form.system_in_user:
            loop = "{{ range $i, $_ := .Messages }}"
            around = _turn(form.system, "{{ $.System }}")
            # the system message is number 0, and the first of the user's number 1
            in_user = "{{ if and (eq $i 1) $.System }}" + around + "{{ end }}"
        else:
            turns += _branch("system", _turn(form.system, "{{ .Content }}"))
    turns += _branch("user", _turn(form.user, in_user + "{{ .Content }}"))
    turns += _branch("assistant", _turn(form.assistant, "{{ .Content }}"))
    return start + loop + turns + "{{ end }}" + _literal(form.generation)


def _turn(turn: Turn, content: str) -> str:
    return _literal(turn.before) + content + _literal(turn.after)


def _branch(role: str, text: str) -> str:
    return f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}'


def _literal(text: str) -> str:
    """Text that Go's template copies: what would open an action is written by one."""
    return text.replace("{{", '{{ "{{" }}')


def _stops(metadata: Mapping[str, GGUFValue], form: ChatForm | None) -> list[str]:
    """What ends an answer: the end tokens, and a special token that closes the assistant's turn."""
    keys = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    stops = [token_text(metadata, key) for key in keys]
    if form is not None:
        closing = form.assistant.after.lstrip()
        special = [text for text in _special_tokens(metadata) if text and closing.startswith(text)]
        stops.append(max(special, key=len, default=""))
    return list(dict.fromkeys(stop for stop in stops if stop and '"' not in stop))


def _special_tokens(metadata: Mapping[str, GGUFValue]) -> list[str]:
    tokens, types = metadata.get(Keys.Tokenizer.LIST), metadata.get(Keys.Tokenizer.TOKEN_TYPE)
    if tokens is None or types is None:
        return []
    pairs = zip(tokens.value, types.value, strict=False)
    return [text for text, kind in pairs if kind in _SPECIAL and isinstance(text, str)]


def _quoted(text: str) -> str:
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
