"""Checkpoints straight from the Hugging Face hub: only the files that a conversion reads, small ones first.

What cannot be converted is refused by its config.json, before gigabytes are on their way. Downloads go to the
hub's own cache, where other programs find them; a connection that breaks goes on where it stopped, and files
that are complete never come again. The token comes from the environment, never from a file or an option.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from gguf import GGUFValue, GGUFValueType, Keys

from ..errors import CheckpointError, SplitQuantError, UnsupportedModelError
from .checkpoint import INDEX_NAME, check_config, shards_of_index
from .model import SourceModel

_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)

_SMALL = (
    *("config.json", "generation_config.json", "README.md", INDEX_NAME),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
)
_TEMPLATES = "additional_chat_templates/"
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def is_repository(name: str) -> bool:
    """Whether ``name`` can be a repository of the hub, and is nothing on this disk."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and not Path(name).exists()


@contextmanager
def hub_checkpoint(
    name: str, revision: str | None = None, *, families: Iterable[str] | None = None, show: bool = False
) -> Iterator[Path]:
    """A repository's checkpoint as a folder with the model's name, as long as the context lasts.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None: the main branch.
        families: architectures that can be converted; None: any, another converter reads it.
        show: let huggingface_hub draw progress bars.

    Raises:
        SplitQuantError: huggingface_hub is not installed, the repository cannot be read, or the disk is full.
        CheckpointError, UnsupportedModelError: what is there is not a checkpoint that can be converted.
    """
    snapshot = _Repository(name, revision, show).download(families)
    with tempfile.TemporaryDirectory(prefix="gguf-splitquant-") as folder:
        # the cache calls the folder by its commit; converters take a model's name from the folder
        link = Path(folder) / name.partition("/")[2]
        link.symlink_to(snapshot, target_is_directory=True)
        yield link


def with_source(model: SourceModel, name: str) -> SourceModel:
    """The model with the repository that it came from in its metadata."""
    url = GGUFValue(f"https://huggingface.co/{name}", GGUFValueType.STRING)
    return replace(model, metadata={**model.metadata, Keys.General.SOURCE_REPO_URL: url})


class _Repository:
    def __init__(self, name: str, revision: str | None, show: bool) -> None:
        try:
            self._hub = import_module("huggingface_hub")
            self._constants = import_module("huggingface_hub.constants")
            self._known = import_module("huggingface_hub.errors")
            utils = import_module("huggingface_hub.utils")
        except ImportError as error:
            raise SplitQuantError(
                name,
                "no such path, and huggingface_hub is not installed",
                "pip install 'gguf-splitquant[hub]'",
            ) from error
        self._name = name
        self._revision = revision
        # False keeps huggingface_hub from looking for a stored one
        self._token: str | bool = next((os.environ[v] for v in _TOKENS if os.environ.get(v)), False)
        if not show:
            utils.disable_progress_bars()

    def download(self, families: Iterable[str] | None) -> Path:
        """The folder in the hub's cache."""
        if self._constants.HF_HUB_OFFLINE:
            return self._fetched()
        files = self._list()
        small = [f for f in files if f in _SMALL or (f.startswith(_TEMPLATES) and f.count("/") == 1)]
        if "config.json" not in files:
            raise self._no_checkpoint(files)
        folder = self._fetch(small)
        if families is not None:
            check_config(folder, families)
        weights = self._weights(folder, files)
        return self._fetch([*small, *weights])

    def _list(self) -> list[str]:
        with self._errors():
            info = self._hub.HfApi(token=self._token).model_info(self._name, revision=self._revision)
        return [sibling.rfilename for sibling in info.siblings or ()]

    def _weights(self, folder: Path, files: list[str]) -> list[str]:
        if INDEX_NAME in files:
            return sorted(set(shards_of_index(folder / INDEX_NAME).values()))
        weights = [f for f in files if f.startswith("model") and f.endswith(".safetensors") and "/" not in f]
        if len(weights) == 1:
            return weights
        raise self._no_checkpoint(files)

    def _no_checkpoint(self, files: list[str]) -> SplitQuantError:
        gguf = [f for f in files if f.endswith(".gguf")]
        if gguf:
            fix = f"download one of its GGUF files, such as {gguf[0]}, and give its path"
            return UnsupportedModelError(self._name, "holds GGUF files, not a checkpoint", fix)
        if any(f.endswith((".bin", ".pth", ".pt")) for f in files):
            fix = "look for a revision with model.safetensors (often refs/pr/1)"
            return UnsupportedModelError(self._name, "holds its weights only as pickles", fix)
        return CheckpointError(
            self._name, "holds no config.json with model*.safetensors", "give a model's repository"
        )

    def _fetch(self, files: list[str]) -> Path:
        with self._errors():
            return Path(
                self._hub.snapshot_download(
                    self._name, revision=self._revision, allow_patterns=files, token=self._token
                )
            )

    def _fetched(self) -> Path:
        """The folder of an earlier run."""
        with self._errors():
            config = self._hub.hf_hub_download(
                self._name, "config.json", revision=self._revision, local_files_only=True
            )
        return Path(config).parent

    @contextmanager
    def _errors(self) -> Iterator[None]:
        errors = self._known
        at = f"{self._name} at revision {self._revision}" if self._revision else self._name
        token = f"set {_TOKENS[0]} to a token" if not self._token else f"check {_TOKENS[0]}"
        try:
            yield
        except errors.GatedRepoError as error:
            fix = f"accept its licence at https://huggingface.co/{self._name} and {token} of that account"
            raise SplitQuantError(self._name, "is gated", fix) from error
        except errors.RevisionNotFoundError as error:
            raise SplitQuantError(at, "no such revision", "give a branch, a tag or a commit") from error
        except errors.RepositoryNotFoundError as error:
            cause = "no such path on this disk, and no such repository on the hub, or a private one"
            raise SplitQuantError(self._name, cause, f"check the name; for a private one {token}") from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise SplitQuantError(
                at,
                "is not in the hub's cache, and the hub cannot be reached",
                "check the network, then run again",
            ) from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "no")
            raise SplitQuantError(at, f"the hub answers with status {status}", "try again later") from error
        except Exception as error:
            # connections break with errors of whatever HTTP library huggingface_hub uses
            if not isinstance(error, OSError) and _package_of(error) not in _HTTP_LIBRARIES:
                raise
            raise SplitQuantError(
                at,
                f"the download failed: {str(error)[:200] or type(error).__name__}",
                "check the network and the disk, then run again: complete files are kept",
            ) from error


def _package_of(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
