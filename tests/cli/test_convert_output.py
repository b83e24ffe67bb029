"""What ``convert`` writes beside the file, and the names that it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.evaluation.contents import read_contents
from tests.publishing.modelfile_reader import read_modelfile

STOCK = ("--recipe", "stock", "--no-calibration")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["convert", *(str(a) for a in arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_ollama(stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.gguf"
    code, said, notes = run(
        capsys, stories15m, out, "--ollama", "me/stories:4bit", "--no-calibration", "--target-bpw", "4.6"
    )
    assert code == 0, notes
    modelfile = tmp_path / "s.Modelfile"
    assert f"ollama create me/stories:4bit -f {modelfile}" in said
    assert read_modelfile(modelfile.read_text())[0] == ("from", "./s.gguf")
    assert "s.Modelfile: the model has no chat template" in notes
    contents = read_contents(out)
    assert contents.metadata["splitquant.layout"] == "stock"  # without a recipe
    assert not any(name.startswith("IQ") for name in contents.types)
    again = run(capsys, stories15m, tmp_path / "t.gguf", *STOCK, "--target-bpw", "4.6")
    assert again[0] == 0 and any(n.startswith("IQ") for n in read_contents(tmp_path / "t.gguf").types)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "paper"), "--ollama: Ollama does not run files with sub-layers; use --recipe stock"),
        ((*STOCK, "--type", "IQ4_NL"), "--ollama: Ollama does not load IQ4_NL; choose one of Q2_K"),
        ((*STOCK, "--tensor-type", "attn_v=iq4_xs"), "--ollama: Ollama does not load IQ4_XS"),
        (
            (*STOCK, "--type", "Q8_0", "--max-shard-size", "5MB"),
            "--ollama: Ollama takes one file, not shards",
        ),
        ((*STOCK, "--ollama", "no name"), "--ollama: 'no name' is not a model name"),
    ],
)
def test_what_ollama_would_refuse(
    stories15m: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    code, _, error = run(capsys, stories15m, tmp_path / "s.gguf", "--ollama", "s", *options)
    assert code == 2 and words in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_modelfile_is_not_replaced_unasked(
    stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.Modelfile").write_text("mine")
    arguments = (stories15m, tmp_path / "s.gguf", *STOCK, "--type", "Q8_0", "--ollama", "s")
    code, _, error = run(capsys, *arguments)
    assert code == 2 and "s.Modelfile: exists; pass --force" in error
    assert [path.name for path in tmp_path.iterdir()] == ["s.Modelfile"]
    assert run(capsys, *arguments, "--force")[0] == 0


def test_a_folder_gets_a_file_named_by_its_contents(
    stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, error = run(capsys, stories15m, tmp_path, *STOCK, "--type", "Q8_0", "--ollama", "s")
    assert code == 0, error
    (file,) = tmp_path.glob("*-Q8_0.gguf")
    assert f"{file}: " in said and file.stem.lower() == f"{stories15m.name}-q8_0".lower()
    assert file.with_name(f"{file.stem}.Modelfile").is_file()
    code, _, error = run(capsys, stories15m, tmp_path, *STOCK, "--type", "Q8_0")
    assert code == 2 and f"{file}: exists; pass --force" in error


def test_shards(stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (stories15m, tmp_path / "s.gguf", *STOCK, "--type", "Q8_0", "--max-shard-size", "5MB")
    code, dry, _ = run(capsys, *arguments, "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    code, said, error = run(capsys, *arguments)
    assert code == 0, error
    files = sorted(tmp_path.iterdir())
    total = sum(file.stat().st_size for file in files)
    assert f"{files[0]}: {total:,} bytes in {len(files)} files" in said
    assert f"{total:,} bytes in {len(files)} files" in dry
    assert main(["inspect", str(files[0])]) == 0
    assert f"size     {total:,} bytes" in capsys.readouterr().out
    assert main(["inspect", str(files[1])]) == 2
    assert f"give the first, {files[0].name}" in capsys.readouterr().err


def test_model_card(stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, card = tmp_path / "s.gguf", tmp_path / "README.md"
    code, said, error = run(capsys, stories15m, out, *STOCK, "--type", "Q8_0", "--model-card", card)
    assert code == 0, error
    assert f"model card: {card}" in said
    assert "| s.gguf |" in card.read_text() and '"qtype": "Q8_0"' in card.read_text()
    code, _, error = run(capsys, stories15m, tmp_path / "t.gguf", "--model-card", card)
    assert code == 2 and "README.md: exists; pass --force" in error
    code, _, error = run(capsys, stories15m, tmp_path / "t.gguf", "--results", card)
    assert code == 2 and "--results: belongs to a model card" in error
