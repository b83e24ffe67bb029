"""Modelfiles: Ollama's parser and Go's templates make of them what the model's own template writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from gguf import GGUFValue, GGUFValueType

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.publishing.chat_form import NoFormError, find_form
from gguf_splitquant.publishing.ollama import (
    LOADS,
    REFUSED,
    check_name,
    check_plan,
    go_template,
    make_modelfile,
)
from gguf_splitquant.recipe import RECIPES, STOCK_TYPES, Recipe
from gguf_splitquant.runtime.chat_template import ChatTemplate
from tests.sample_models import small_model

from .go_template import execute
from .modelfile_reader import read_modelfile

TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
IN_USER = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ s if loop.first }}{{ m.content }} [/INST]{% else %} {{ m.content }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|system|>\nYou help, {{ '{{' }}always}}.<|end|>\n{% endif %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS + PROMPT
)
TEMPLATES = {
    "turns": ChatTemplate(TURNS + PROMPT),
    "turns after BOS": ChatTemplate("{{ bos_token }}" + TURNS + PROMPT, "<s>", "</s>", adds_bos=True),
    "BOS that the tokenizer leaves out": ChatTemplate("{{ bos_token }}" + TURNS + PROMPT, "<s>", "</s>"),
    "system inside the user's turn": ChatTemplate(IN_USER),
    "instructions in brackets": ChatTemplate(BRACKETS, "<s>", "</s>", adds_bos=True),
    "default system message": ChatTemplate(DEFAULT + TURNS + PROMPT),
    "no system message": ChatTemplate(NO_SYSTEM),
}


def real(folder: Path) -> ChatTemplate:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return ChatTemplate(settings["chat_template"], settings.get("bos_token") or "", settings["eos_token"])


def conversations(with_system: bool) -> list[list[dict[str, str]]]:
    texts = ["Hi!", "two\n\nlines {{ .x }}", '\u4f60\u597d \\ "quoted"', "1 < 2 & 3", "end"]
    found = []
    for rounds in range(3):
        roles = ["system"] * with_system + ["user", "assistant"] * rounds + ["user"]
        found.append([{"role": r, "content": texts[(i + rounds) % len(texts)]} for i, r in enumerate(roles)])
    return found


def for_ollama(messages: list[dict[str, str]]) -> dict[str, object]:
    system = [m["content"] for m in messages if m["role"] == "system"]
    return {
        "System": "".join(system),
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
    }


def assert_faithful(template: ChatTemplate, folder: Path) -> None:
    form = find_form(template)
    written = go_template(form)
    talks = conversations(False) + (conversations(True) if form.system else [])
    expected = [template.render(talk) for talk in talks]
    data = [for_ollama(talk) for talk in talks]
    assert [execute(written, values) for values in data] == expected
    if shutil.which("go"):
        source = folder / "template"
        source.write_text(written)
        program = Path(__file__).with_name("render.go")
        done = subprocess.run(
            ["go", "run", str(program), str(source)], input=json.dumps(data), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_every_form(name: str, tmp_path: Path) -> None:
    assert_faithful(TEMPLATES[name], tmp_path)
    assert (find_form(TEMPLATES[name]).system is None) == (name == "no system message")


def test_a_real_template(smollm2: Path, tmp_path: Path) -> None:
    assert_faithful(real(smollm2), tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ strftime_now('%d %b %Y') }}" + TURNS + PROMPT, "it writes the date"),
        (TURNS.replace("m.content", "m.content | upper") + PROMPT, "leaves out, repeats or moves"),
        (TURNS.replace("m.content", "m.content | replace('\n', ' ')") + PROMPT, "more than fixed texts"),
        ("{% for m in messages %}{{ m.no.such }}{% endfor %}", "refuses an ordinary conversation"),
        ("{% for m in messages %}", "refuses an ordinary conversation"),
        ("{{ messages[-1].content }}", "leaves out, repeats or moves"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}|{% endfor %}", "first message differently"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses an ordinary conversation"),
    ],
)
def test_what_has_no_form(source: str, reason: str) -> None:
    with pytest.raises(NoFormError, match=reason):
        find_form(ChatTemplate(source))


def metadata(**pairs: object) -> dict[str, GGUFValue]:
    kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    found = {}
    for key, value in pairs.items():
        key = key.replace("__", ".")
        if isinstance(value, list):
            found[key] = GGUFValue(value, GGUFValueType.ARRAY, kinds[type(value[0])])
        else:
            found[key] = GGUFValue(value, kinds[type(value)])
    return found


TOKENS = {
    "tokenizer__ggml__tokens": ["<unk>", "<s>", "</s>", "<|end|>", "a"],
    "tokenizer__ggml__token_type": [2, 3, 3, 3, 1],
    "tokenizer__ggml__eos_token_id": 2,
}


def test_modelfile() -> None:
    pairs = metadata(
        **TOKENS,
        tokenizer__chat_template=TURNS + PROMPT,
        general__sampling__temp=0.6000000238418579,
        general__sampling__top_k=20,
        general__sampling__top_p=0.949999988079071,
    )
    modelfile = make_modelfile("my model.gguf", pairs)
    assert modelfile.notes == ()
    assert read_modelfile(modelfile.text) == [
        ("from", "./my model.gguf"),
        ("template", go_template(find_form(ChatTemplate(TURNS + PROMPT)))),
        ("stop", "</s>"),
        ("stop", "<|end|>"),
        ("temperature", "0.6"),
        ("top_k", "20"),
        ("top_p", "0.95"),
    ]


def test_without_a_usable_template() -> None:
    plain = make_modelfile("m.gguf", metadata(**TOKENS))
    assert read_modelfile(plain.text) == [("from", "./m.gguf"), ("stop", "</s>")]
    assert "no chat template" in plain.notes[0]
    dated = metadata(**TOKENS, tokenizer__chat_template="{{ strftime_now('%Y-%m-%d') }}" + TURNS + PROMPT)
    modelfile = make_modelfile("m.gguf", dated)
    assert [name for name, _ in read_modelfile(modelfile.text)] == ["from", "stop"]
    assert "no faithful equivalent (it writes the date)" in modelfile.notes[0]
    lost = metadata(**TOKENS, tokenizer__chat_template=TURNS.replace("<|end|>", "\x01") + PROMPT)
    assert "cannot be written in a Modelfile" in make_modelfile("m.gguf", lost).notes[0]
    refuses = metadata(**TOKENS, tokenizer__chat_template=NO_SYSTEM)
    assert "SYSTEM has no effect" in make_modelfile("m.gguf", refuses).notes[0]


@pytest.mark.parametrize("name", ["m", "my-model:4bit", "me/model.v2", "hub.example:8080/me/model:x"])
def test_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "a b", "-x", "a:b:c", "../m", "a/b/c/d", "m;ls"])
def test_names_that_ollama_refuses(name: str) -> None:
    with pytest.raises(RecipeError, match=r"--ollama: .* is not a model name"):
        check_name(name)


def test_types_that_ollama_loads() -> None:
    assert {"IQ4_XS", "IQ4_NL"} <= set(REFUSED) and all(name.startswith("IQ") for name in REFUSED)
    assert set(STOCK_TYPES) == LOADS & set(STOCK_TYPES) | set(REFUSED)
    model = small_model()
    check_plan(plan_file(model, Recipe(layout="stock", qtype="Q4_K"))[0])
    check_plan(plan_file(model, RECIPES["plain"])[0])
    check_plan(plan_file(model, Recipe(layout="float"))[0])
    with pytest.raises(RecipeError, match=r"does not load IQ4_NL \(blk\.0\.attn_q\.weight\)"):
        check_plan(plan_file(model, Recipe(layout="stock", qtype="IQ4_NL"))[0])
    with pytest.raises(RecipeError, match="does not run files with sub-layers; use --recipe stock"):
        check_plan(plan_file(model, RECIPES["paper"])[0])


@pytest.mark.parametrize("columns", [256, 96])
@pytest.mark.parametrize("bits", [3.0, 4.4, 5.0])
def test_the_planner_avoids_what_ollama_refuses(columns: int, bits: float) -> None:
    if columns == 96 and bits < 4.5:
        bits += 2  # the narrow types that are left begin with Q4_0
    recipe = Recipe(layout="stock", target_bpw=bits, embedding="Q2_K", avoid=REFUSED, calibration="none")
    plan = plan_file(small_model(columns), recipe)[0]
    check_plan(plan)
    free = Recipe(layout="stock", target_bpw=bits, embedding="Q2_K", calibration="none")
    used = {o.qtype.name for o in plan_file(small_model(columns), free)[0].outputs}
    assert used & set(REFUSED) or (columns, bits) == (256, 3.0)
