"""Downloads from a hub, in processes of their own: huggingface_hub reads its settings when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from gguf import GGUFReader

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.hub import is_repository

from .hub_server import COMMIT, Hub
from .raw_gguf import read_raw

ROOT = Path(__file__).parents[2]
FLOAT = ("--layout", "float", "--outtype", "f16")


@pytest.fixture
def hub(stories15m: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in stories15m.iterdir() if path.is_file()}
    extra = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x", "original/model.safetensors": b"x"}
    hub = Hub({"org/Stories": {**files, **extra}})
    yield hub
    hub.close()


CONVERT = (ROOT / "convert_splitquant.py",)


def run(
    hub: Hub, folder: Path, *arguments: object, command: Sequence[object] = CONVERT, **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, *(str(a) for a in (*command, *arguments))],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), **settings, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_repository_converts_like_its_folder(hub: Hub, stories15m: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    convert(open_model(stories15m), tmp_path / "local.gguf", Recipe(layout="float", outtype="f16"))
    mine, local = read_raw(tmp_path / "out.gguf"), read_raw(tmp_path / "local.gguf")
    assert mine.tensors == local.tensors
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.name"].contents() == "Stories"  # not the commit that the cache names its folder by
    assert fields["general.source.repo_url"].contents() == "https://huggingface.co/org/Stories"
    wanted = {"config.json", "model.safetensors", "tokenizer.model"}
    fetched = hub.downloaded()
    assert wanted <= set(fetched) and len(fetched) == len(set(fetched))
    assert not {"pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors"} & set(fetched)
    assert fetched[-1] == "model.safetensors"  # the large one last

    asked = len(hub.requests)
    again = run(hub, tmp_path, "org/Stories", "again.gguf", *FLOAT)
    assert again.returncode == 0, again.stderr
    assert not [path for method, path, _ in hub.requests[asked:] if method == "GET" and "/resolve/" in path]
    hub.close()
    offline = run(hub, tmp_path, "org/Stories", "offline.gguf", *FLOAT, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "offline.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    verify = ("-m", "gguf_splitquant", "verify")
    source = ("--source", "org/Stories", "--all")
    verified = run(hub, tmp_path, "out.gguf", *source, command=verify, HF_HUB_OFFLINE="1")
    assert verified.returncode == 0 and verified.stdout.startswith("match: "), verified.stderr


def test_a_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    whole = len(hub.files["org/Stories"]["model.safetensors"])
    hub.cut["model.safetensors"] = 12_000_000
    done = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert done.returncode == 0, done.stderr
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={10 << 20}-"]  # huggingface_hub writes pieces of ten MiB
    (blob,) = (p for p in (tmp_path / "hf").rglob("model.safetensors"))
    assert blob.stat().st_size == whole


def test_an_interrupted_run_keeps_complete_files(hub: Hub, tmp_path: Path) -> None:
    good = hub.files["org/Stories"]["tokenizer.model"]
    hub.files["org/Stories"]["model.safetensors.index.json"] = b'{"weight_map": {"a": "model.safetensors"}}'
    del hub.files["org/Stories"]["model.safetensors"]
    done = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert done.returncode == 2 and "model.safetensors: missing, though model" in done.stderr, done.stderr
    asked = len(hub.requests)
    assert run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT).returncode == 2
    assert not [path for method, path, _ in hub.requests[asked:] if method == "GET" and "/resolve/" in path]
    assert good in [path.read_bytes() for path in (tmp_path / "hf").rglob("tokenizer.model")]


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT, "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert any("/revision/v1" in path for _, path, _ in hub.requests)
    assert all(COMMIT in path for _, path, _ in hub.requests if "/resolve/" in path)
    done = run(hub, tmp_path, "org/Stories", "other.gguf", *FLOAT, "--revision", "v2")
    assert (
        done.returncode == 2 and "org/Stories at revision v2: no such revision; give a branch" in done.stderr
    )


def test_a_local_path_always_wins(hub: Hub, stories15m: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "Stories").symlink_to(stories15m)
    done = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    done = run(hub, tmp_path, "org/Stories", "x.gguf", *FLOAT, "--revision", "v1")
    assert done.returncode == 2 and "--revision: org/Stories is a path, not a repository" in done.stderr


def test_the_token_comes_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    hub.gated = ("org/Stories",)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(hub.token)
    stored = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert stored.returncode == 2
    assert "org/Stories: is gated; accept its licence at https" in stored.stderr
    assert "set HF_TOKEN" in stored.stderr
    wrong = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT, HF_TOKEN="hf_bad")
    assert wrong.returncode == 2 and "hf_bad" not in wrong.stderr
    right = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT, HF_TOKEN=hub.token)
    assert right.returncode == 0, right.stderr


def test_what_cannot_be_converted_is_refused_before_its_weights_come(hub: Hub, tmp_path: Path) -> None:
    good = hub.files["org/Stories"]
    config = json.loads(good["config.json"])
    hub.files |= {
        "org/Bert": {**good, "config.json": json.dumps({**config, "architectures": ["BertModel"]}).encode()},
        "org/gguf": {"model-Q8_0.gguf": b"x", "README.md": b""},
        "org/pickle": {k: v for k, v in good.items() if k != "model.safetensors"},
        "org/data": {"README.md": b""},
    }
    for name, words in {
        "org/Bert": "architecture BertModel is not supported",
        "org/gguf": "org/gguf: holds GGUF files, not a checkpoint; download one of its GGUF files, such as",
        "org/pickle": "org/pickle: holds its weights only as pickles",
        "org/data": "org/data: holds no config.json",
        "org/none": "no such path on this disk, and no such repository on the hub, or a private one",
    }.items():
        done = run(hub, tmp_path, name, "out.gguf", *FLOAT)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert "model.safetensors" not in hub.downloaded()


def test_a_hub_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.status = 503
    broken = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert broken.returncode == 2 and "the hub answers with status 503; try again" in broken.stderr
    hub.close()
    gone = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT)
    assert gone.returncode == 2 and gone.stderr.startswith("error: org/Stories"), gone.stderr
    assert gone.stderr.count("\n") == 1
    offline = run(hub, tmp_path, "org/Stories", "out.gguf", *FLOAT, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "not in the hub's cache" in offline.stderr


@pytest.mark.parametrize(
    ("name", "may_be"),
    [
        *(("org/name", True), ("Org-1/name_2.v3", True)),
        *(("name", False), ("./name", False), ("a/b/c", False), ("../up", False), ("/abs/x", False)),
        *(("org/..", False), ("org/na me", False), ("tests/sources", False)),
    ],
)
def test_what_can_be_a_repository(name: str, may_be: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert is_repository(name) is may_be
