"""Where the model on a command line is: a folder, a file, a repository, or what another converter makes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError

if TYPE_CHECKING:
    from ..sources.model import SourceModel


def add_source_arguments(parser: argparse._ActionsContainer) -> None:
    """Define the options that say how a model is found and read."""
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a model on the hub (default: main)"
    )
    parser.add_argument(
        "--official-converter",
        type=Path,
        metavar="PATH",
        help="llama.cpp checkout whose convert_hf_to_gguf.py reads the checkpoint, for families unknown here",
    )
    parser.add_argument(
        "--allow-requantize", action="store_true", help="take a GGUF file that is quantized already"
    )
    parser.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it is not recognized"
    )


@dataclasses.dataclass(frozen=True)
class ModelPath:
    """What is read.

    Attributes:
        path: a folder or a file, for a while.
        repository: that it came from, or nothing.
        checkpoint: what ``path`` was made from by another converter, if it was.
    """

    path: Path
    repository: str = ""
    checkpoint: Path | None = None


def find_model(name: str, args: argparse.Namespace, work: Path, files: ExitStack) -> ModelPath:
    """The path to read, until ``files`` is closed.

    Args:
        name: a path, or ``ORG/NAME`` on the hub where there is no such path.
        args: with what :func:`add_source_arguments` defines.
        work: takes the float file that another converter makes.
        files: closes what is open meanwhile.
    """
    from ..sources.families import FAMILIES
    from ..sources.hub import hub_checkpoint, is_repository
    from ..sources.official import official_float_file

    path, repository = Path(name), ""
    if is_repository(name):
        repository = name
        families = None if args.official_converter else FAMILIES
        path = files.enter_context(
            hub_checkpoint(repository, args.revision, families=families, show=sys.stderr.isatty())
        )
    elif args.revision:
        raise RecipeError("--revision", f"{path} is a path, not a repository", "leave it out")
    if args.official_converter:
        converted = files.enter_context(official_float_file(args.official_converter, path, work))
        return ModelPath(converted, repository, path)
    return ModelPath(path, repository)


def open_found(found: ModelPath, args: argparse.Namespace) -> SourceModel:
    """Open it, and say what there is to say about it."""
    from ..sources import open_model
    from ..sources.hub import with_source

    model = open_model(found.path, pre_tokenizer=args.pre, allow_requantize=args.allow_requantize)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    if found.repository:
        model = with_source(model, found.repository)
    if found.checkpoint is not None:
        # the file that is read is made anew each time
        files = tuple(sorted(path for path in found.checkpoint.iterdir() if path.is_file()))
        model = dataclasses.replace(model, files=files)
    return model
