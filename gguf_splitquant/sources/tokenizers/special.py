"""Special tokens, merges and chat templates, as llama.cpp's converter reads them from the tokenizer's files.

gguf-py's ``SpecialVocab`` does this, but the release on PyPI reads post-processors and normalizers otherwise
than the gguf-py that llama.cpp's converter brings along, and this has to give the latter's values: which of
BOS and EOS the engine adds depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from ...bounded import read_text
from ...errors import TokenizerError
from ..config import read_json_if_there

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass
class SpecialTokens:
    """What the GGUF says about special tokens.

    Attributes:
        ids: token id by kind (``bos``, ``eos``, ...).
        add: whether the engine adds the token of that kind to a text by itself.
        merges: BPE merges, ``left right`` each.
        chat_template: one template, or the named ones as ``{"name": ..., "template": ...}``.
        lowercase: the tokenizer lowercases its input.
        strip_accents: it strips accents.
    """

    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    chat_template: str | Sequence[Mapping[str, str]] | None = None
    lowercase: bool | None = None
    strip_accents: bool | None = None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys; kinds that GGUF has no key for are left out."""
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, token in self.ids.items():
            if add_id := getattr(writer, f"add_{kind}_token_id", None):
                add_id(token)
        for kind, value in self.add.items():
            if add_flag := getattr(writer, f"add_add_{kind}_token", None):
                add_flag(value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
            names = writer.kv_data[0].get(gguf.Keys.Tokenizer.CHAT_TEMPLATES)
            if names is not None:
                # gguf-py lists a set, in an order that changes from run to run
                names.value = sorted(names.value)
        if self.lowercase is not None:
            writer.add_bool("tokenizer.ggml.normalizer.lowercase", self.lowercase)
        if self.strip_accents is not None:
            writer.add_bool("tokenizer.ggml.normalizer.strip_accents", self.strip_accents)


def read_special_tokens(
    folder: Path, *, n_vocab: int | None = None, merges: bool = False, kinds: Sequence[str] = KINDS
) -> SpecialTokens:
    """Read tokenizer.json, tokenizer_config.json, chat_template.* and config.json in ``folder``.

    Args:
        folder: the checkpoint.
        n_vocab: ids from here up are ignored; None takes all.
        merges: read the BPE merges too.
        kinds: of special tokens to look for.

    Raises:
        TokenizerError: a file is damaged, or gives a negative id.
    """
    return _Reader(folder, n_vocab, kinds).read(merges)


class _Reader:
    def __init__(self, folder: Path, n_vocab: int | None, kinds: Sequence[str]) -> None:
        self.folder = folder
        self.n_vocab = n_vocab
        self.kinds = list(kinds)
        self.found = SpecialTokens()
        self.tokenizer = read_json_if_there(folder / "tokenizer.json")
        # changed below: a post-processor can name tokens that the config does not
        self.config = read_json_if_there(folder / "tokenizer_config.json")

    def read(self, merges: bool) -> SpecialTokens:
        if self.tokenizer:
            if merges:
                self.found.merges = self._merges_in(_object(_object(self.tokenizer).get("model")))
            self._normalizer(_object(self.tokenizer.get("normalizer")))
            self._post_processor()
        if self.config:
            self.found.chat_template = self._chat_template(self.config)
            self._ids_by_content(self.config)
        self._ids_in_config()
        if merges and not self.found.merges:
            self.found.merges = self._merges_file()
        return self.found

    # --- merges

    def _merges_in(self, model: Mapping[str, Any]) -> list[str]:
        merges = model.get("merges")
        if not isinstance(merges, list) or not merges:
            return []
        if all(isinstance(merge, str) for merge in merges):
            return merges
        if all(
            isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)
            for merge in merges
        ):
            # the byte-level alphabet writes a space as U+0120, so that one space can part the two
            return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge) for merge in merges]
        raise TokenizerError(
            self.folder / "tokenizer.json",
            "model.merges is neither a list of strings nor of pairs",
            "download it again",
        )

    def _merges_file(self) -> list[str]:
        path = self.folder / "merges.txt"
        if not path.is_file():
            return []
        try:
            lines = read_text(path).split("\n")
        except (OSError, ValueError) as error:
            raise TokenizerError(path, f"cannot be read ({error})", "download it again") from error
        if lines and lines[0].strip().startswith("#"):
            del lines[0]
        return [" ".join(line.split()) for line in lines if len(line.split()) == 2]

    # --- tokenizer.json

    def _normalizer(self, normalizer: Mapping[str, Any]) -> None:
        match normalizer.get("type"):
            case "Lowercase":
                self.found.lowercase = True
            case "StripAccents":
                self.found.strip_accents = True
            case "BertNormalizer":
                if isinstance(normalizer.get("lowercase"), bool):
                    self.found.lowercase = normalizer["lowercase"]
                if isinstance(normalizer.get("strip_accents"), bool):
                    self.found.strip_accents = normalizer["strip_accents"]
            case "Sequence":
                for part in _list(normalizer.get("normalizers")):
                    self._normalizer(_object(part))

    def _token(self, kind: str) -> Any:
        return (self.config or {}).get(f"{kind}_token")

    def _name_token(self, kind: str, token: Any) -> None:
        if self.config:
            self.config[f"{kind}_token"] = token

    def _post_processor(self) -> None:
        for kind, stand_in in (("bos", "cls"), ("eos", "sep")):
            if not self._token(kind) and self._token(stand_in):
                self._name_token(kind, self._token(stand_in))
        processor = _object(_object(self.tokenizer).get("post_processor"))
        for part in map(_object, _list(processor.get("processors")) or [processor]):
            match part.get("type"):
                case "ByteLevel":
                    self.found.add.setdefault("bos", False)
                    self.found.add.setdefault("eos", False)
                case "RobertaProcessing":
                    self._roberta(part)
                case "TemplateProcessing":
                    self._template(part)

    def _roberta(self, processor: Mapping[str, Any]) -> None:
        for kind in ("bos", "eos", "sep"):
            self.found.add[kind] = True
        for kind, stand_in in (("cls", "bos"), ("sep", "eos")):
            if not self._token(kind):
                self._name_token(kind, (_list(processor.get(kind)) or [self._token(stand_in)])[0])

    def _template(self, processor: Mapping[str, Any]) -> None:
        """What the template puts around one text, and between two."""
        single = [_object(piece) for piece in _list(processor.get("single"))]
        first = last = None
        if len(single) > 1:
            first, last = _special(single[0]), _special(single[-1])
            if first:
                self._leading(first)
            if last:
                self._trailing(last)
        pair = [_object(piece) for piece in _list(processor.get("pair"))]
        if first and pair and _special(pair[0]) == first:
            pair = pair[1:]
        if last and pair and _special(pair[-1]) == last:
            pair = pair[:-1]
        between = pair[1:-1]
        if between and _sequence(pair[0]) == "A" and _sequence(pair[-1]) == "B":
            # without a tokenizer_config the tokens around a single text have to do
            sep = self._token("sep")
            eos = self._token("eos") if self.config else last
            separators = [token for token in (sep, eos) if token]
            add = _special(between[0]) in separators and not last
            if len(between) == 2:
                add = add or _special(between[1]) in separators
            self.found.add["sep"] = add
            if add and not sep:
                self._name_token("sep", eos)

    def _leading(self, token: str) -> None:
        if not self.config:
            self.found.add["bos"] = True
            return
        if token not in (self._token("bos"), self._token("cls")):
            for kind in ("bos", "cls"):
                if not self._token(kind):
                    self._name_token(kind, token)
        self.found.add["bos"] = token in (self._token("bos"), self._token("cls"))

    def _trailing(self, token: str) -> None:
        if self.config and token != self._token("eos"):
            # the tokenizer ends texts otherwise than its config says: the config's token ends turns
            for kind in ("eot", "eom"):
                if kind not in self.kinds:
                    self.kinds.append(kind)
                    self._name_token(kind, self._token("eos"))
                    break
            self._name_token("eos", token)
        self.found.add["eos"] = True

    # --- tokenizer_config.json and config.json

    def _chat_template(self, config: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
        template = config.get("chat_template", self._template_file())
        if template is None or isinstance(template, str):
            return template
        if isinstance(template, list):
            for entry in map(_object, template):
                if not isinstance(entry.get("name", ""), str) or not isinstance(entry.get("template"), str):
                    raise TokenizerError(
                        self.folder / "tokenizer_config.json",
                        "chat_template has an entry without name and template",
                        "download it again",
                    )
            return template
        return None

    def _template_file(self) -> Any:
        jinja = self.folder / "chat_template.jinja"
        if not jinja.is_file():
            return (read_json_if_there(self.folder / "chat_template.json") or {}).get("chat_template")
        others = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
        if not others:
            return self._text(jinja)
        return [
            {"name": "default", "template": self._text(jinja)},
            *({"name": path.stem, "template": self._text(path)} for path in others),
        ]

    def _text(self, path: Path) -> str:
        try:
            return read_text(path)
        except (OSError, ValueError) as error:
            raise TokenizerError(path, f"cannot be read ({error})", "download it again") from error

    def _ids_by_content(self, config: Mapping[str, Any]) -> None:
        added = [_object(token) for token in _list((self.tokenizer or {}).get("added_tokens"))]
        for kind in self.kinds:
            flag = config.get(f"add_{kind}_token")
            if isinstance(flag, bool):
                # the post-processor, which is what runs, has the last word
                self.found.add.setdefault(kind, flag)
            token = config.get(f"{kind}_token")
            content = _object(token).get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                self._set_id(kind, next((t.get("id") for t in added if t.get("content") == content), None))

    def _ids_in_config(self) -> None:
        config = read_json_if_there(self.folder / "config.json") or {}
        for kind in self.kinds:
            token = config.get(f"{kind}_token_id")
            if token is None:
                token = _object(config.get("text_config")).get(f"{kind}_token_id")
            self._set_id(kind, token)

    def _set_id(self, kind: str, token: Any) -> None:
        if type(token) is not int:  # several ids, or none: GGUF has room for one
            return
        if token < 0:
            raise TokenizerError(self.folder, f"{kind} token has the id {token}", "correct it in config.json")
        if self.n_vocab is None or token < self.n_vocab:
            self.found.ids.setdefault(kind, token)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _special(piece: Mapping[str, Any]) -> str | None:
    token = _object(piece.get("SpecialToken")).get("id")
    return token if isinstance(token, str) else None


def _sequence(piece: Mapping[str, Any]) -> str | None:
    name = _object(piece.get("Sequence")).get("id")
    return name if isinstance(name, str) else None
