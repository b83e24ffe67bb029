"""The readers of strangers' files, each as a function of a path that reads all that it can.

Run as a script, it is the process that :class:`.bounded_process.BoundedProcess` asks: a reader that explodes
takes only that process with it.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gguf_splitquant.calibration.imatrix import read_imatrix
from gguf_splitquant.cli import verify as verify_command
from gguf_splitquant.cli.inspect import describe, render
from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.evaluation.contents import read_contents
from gguf_splitquant.gguf_io.header import read_header
from gguf_splitquant.gguf_io.layout import build_layout
from gguf_splitquant.gguf_io.pairs import read_pairs
from gguf_splitquant.planning.refined import read_plan
from gguf_splitquant.publishing.model_card import model_card, read_results
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.runtime.chat_template import ChatTemplate
from gguf_splitquant.runtime.template_process import TEMPLATES
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.safetensors import SafetensorsFile
from gguf_splitquant.verification import read_recipe, verify
from tests.sample_models import small_model

ADDRESS_SPACE = 6 << 30
"""Bytes: libraries alone reserve two gigabytes; what a reader really uses is measured."""

_SPLIT = Recipe(layout="split", target_bpw=5.0, calibration="none")


def read_safetensors(path: Path) -> None:
    """Header, and every tensor that is float."""
    for tensor in SafetensorsFile(path).tensors.values():
        if tensor.dtype in ("F32", "F16", "BF16") and tensor.shape:
            tensor.read_rows(0, tensor.shape[0])


def read_source(path: Path) -> None:
    """A checkpoint or a GGUF file, as ``convert`` opens it, with its weights; and the header of a copy."""
    model = open_model(path, allow_requantize=True)
    for tensor in model.tensors:
        tensor.read()
    build_layout(model.architecture, model.metadata, ())


def inspect(path: Path) -> None:
    """A GGUF file, as ``inspect`` and a model card show it."""
    contents = read_contents(path)
    found = describe(contents)
    json.dumps(found)
    render(found)
    model_card(contents)
    read_pairs(path)


def header_and_pairs(path: Path) -> None:
    """The two ways to read the same header: they must agree on what is sound."""
    problems = []
    for reader in (read_header, read_pairs):
        try:
            reader(path)
        except SplitQuantError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def imatrix(path: Path) -> None:
    """An importance matrix, and every weight's part in it."""
    matrix = read_imatrix(path)
    for weight in matrix.importance:
        assert matrix.matrix(weight).ndim == 1
        matrix.input_of(weight)


def plan(path: Path) -> None:
    """A plan for a small model."""
    read_plan(path, small_model(), _SPLIT, None)


def recipe(path: Path) -> None:
    """A recipe as files store it, and the types that it wants."""
    read = Recipe.from_json(path.read_text(encoding="utf-8", errors="replace"))
    for tensor in small_model().tensors:
        read.fixed_type(tensor.name)
    assert Recipe.from_json(read.to_json()) == read


def verified(path: Path) -> None:
    """A file that says that it was made from a small model."""
    found = verify(read_recipe(path), small_model(), seed=0, threads=1)
    json.dumps(dataclasses.asdict(found))
    verify_command.render(found)


def results(path: Path) -> None:
    """What an evaluation measured, for a model card."""
    read_results(path)


def template(path: Path) -> None:
    """A chat template, rendered."""
    # of processor time that this costs
    TEMPLATES.seconds = 5.0
    ChatTemplate(path.read_text(encoding="utf-8")).render([{"role": "user", "content": "Hello"}])


READERS: dict[str, Callable[[Path], None]] = {
    reader.__name__: reader
    for reader in (
        read_safetensors,
        read_source,
        inspect,
        header_and_pairs,
        imatrix,
        plan,
        recipe,
        verified,
        results,
        template,
    )
}


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def _answer(reader: str, path: Path) -> dict[str, object]:
    # the peak from here on
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.monotonic()
    kind, message = "", ""
    try:
        READERS[reader](path)
    # whatever it is, the test wants to see it
    except BaseException as error:
        expected = isinstance(error, SplitQuantError) or type(error).__name__ == "TemplateError"
        kind, message = "refused" if expected else "crashed", f"{type(error).__name__}: {error}"
    return {
        "kind": kind,
        "message": message[:5000],
        "bytes": _peak() - before,
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    """Answer lines of standard input: a reader's name and a path, in JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for line in sys.stdin:
        reader, path = json.loads(line)
        print(json.dumps(_answer(reader, Path(path))), flush=True)


if __name__ == "__main__":
    main()
