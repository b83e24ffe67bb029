"""The command as a user runs it: real processes, real checkpoint, exit codes that scripts can trust."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader

from gguf_splitquant.cache import cache_dir
from scripts.empty_cache import empty_cache
from tests.sources.handmade import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def convert(*arguments: object, script: bool = False) -> subprocess.CompletedProcess[str]:
    command = (
        [sys.executable, "convert_splitquant.py"]
        if script
        else [sys.executable, "-m", "gguf_splitquant", "convert"]
    )
    return subprocess.run(
        [*command, *(str(a) for a in arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def unknowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache in which nothing is known."""
    folder = empty_cache(tmp_path / "cache", cache_dir() / "runtime")
    monkeypatch.setenv("GGUF_SPLITQUANT_CACHE", str(folder))
    return folder


def test_script_and_command_write_the_same_file(stories15m: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path, script in zip(files, (True, False), strict=True):
        done = convert(stories15m, path, "--recipe", "paper", script=script)
        assert done.returncode == 0, done.stderr
        assert str(path) in done.stdout
        assert "gguf-splitquant build-runtime" in done.stdout  # a split file says what it needs to run
        assert done.stderr == ""  # no progress bar in a pipe
    assert files[0].read_bytes() == files[1].read_bytes()
    names = {t.name for t in GGUFReader(files[0]).tensors}
    assert {"blk.0.attn_q.weight", "blk.5.ffn_down.split2.weight"} <= names


def test_options_override_the_recipe(stories15m: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    options = ("--recipe", "plain", "-k", "2", "--bits", "8", "--granularity", "row", "--outtype", "f32")
    assert convert(stories15m, out, *options).returncode == 0
    recipe = json.loads(GGUFReader(out).fields["splitquant.recipe"].contents())
    assert (recipe["k"], recipe["bits"], recipe["granularity"], recipe["outtype"]) == (2, 8, "row", "f32")


def test_dry_run_knows_the_exact_size_and_writes_nothing(stories15m: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    dry = convert(stories15m, out, "--recipe", "paper", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert list(tmp_path.iterdir()) == []
    lines = dry.stdout.splitlines()
    (split,) = [line for line in lines if line.startswith("blk.3.attn_k.split2.weight ")]
    assert split.split()[1:] == ["Q4_1", "51,840", "288", "x", "288"]
    assert convert(stories15m, out, "--recipe", "paper").returncode == 0
    assert lines[-1].startswith(f"{out.stat().st_size:,} bytes")


def test_a_plan_can_be_written_edited_and_used(stories15m: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    options = ("--no-calibration", "--recipe", "stock", "--target-bpw", "5", "--tensor-type", "attn_v=Q8_0")
    dry = convert(stories15m, out, *options, "--dry-run", "--plan", plan)
    assert dry.returncode == 0, dry.stderr
    document = json.loads(plan.read_text())
    assert document["weights"]["blk.2.attn_v.weight"] == [["Q8_0", 288]]
    document["weights"]["blk.0.attn_q.weight"] = [["Q5_1", 288]]
    plan.write_text(json.dumps(document))
    made = convert(stories15m, out, "--no-calibration", "--recipe", "stock", "--use-plan", plan)
    assert made.returncode == 0, made.stderr
    assert json.loads(GGUFReader(out).fields["splitquant.recipe"].contents()) == document["recipe"]
    types = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_1" and types["blk.2.attn_v.weight"] == "Q8_0"
    assert types["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "stock", "--target-bpw", "4.5", "--tensor-type", "attn_v=Q8_0"),
        ("--target-size", "14MB", "-k", "2", "--embedding-type", "Q6_K"),
    ],
)
def test_a_plan_gives_the_file_of_its_options(
    stories15m: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    files = [tmp_path / name for name in ("direct.gguf", "planned.gguf", "again.gguf")]
    plan = tmp_path / "plan.json"
    all_options = (*options, "--no-calibration")
    dry = convert(stories15m, files[0], *all_options, "--dry-run", "--plan", plan)
    assert dry.returncode == 0, dry.stderr
    with_plan = ("--use-plan", plan)
    for path, arguments in zip(files, (all_options, with_plan, (*with_plan, *all_options)), strict=True):
        made = convert(stories15m, path, *arguments)
        assert made.returncode == 0, made.stderr
    assert len({path.read_bytes() for path in files}) == 1


def test_options_cannot_contradict_a_plan(stories15m: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    options = ("--no-calibration", "--target-bpw", "4.5", "--tensor-type", "attn_v=Q8_0")
    assert convert(stories15m, out, *options, "--dry-run", "--plan", plan).returncode == 0
    for option, value in (
        ("--target-bpw", "4.6"),
        ("--target-size", "14MB"),
        ("--type", "Q8_0"),
        ("--tensor-type", "attn_v=Q6_K"),
        ("-k", "2"),
    ):
        done = convert(stories15m, out, "--use-plan", plan, option, value)
        assert done.returncode == 2
        assert f"plan.json: was not made with this {option}; leave it out" in done.stderr
    document = json.loads(plan.read_text())
    document["recipe"]["calibration"] = "imatrix"
    plan.write_text(json.dumps(document))
    done = convert(stories15m, out, "--use-plan", plan)
    assert done.returncode == 2
    assert "plan.json: was made with --imatrix; give the same file" in done.stderr
    assert not out.exists()


def test_a_plan_is_not_replaced(stories15m: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    options = ("--recipe", "stock", "--no-calibration", "--plan", plan)
    plan.write_text("a user's own")
    for more in (("--dry-run",), (), ("--resume",)):
        done = convert(stories15m, out, *options, *more)
        assert done.returncode == 2
        assert f"{plan}: exists; pass --force to replace it" in done.stderr
        assert plan.read_text() == "a user's own" and not out.exists()
    assert convert(stories15m, out, *options, "--force").returncode == 0
    assert json.loads(plan.read_text())["format"] == 1
    again = convert(stories15m, out, *options, "--resume")
    assert again.returncode == 0 and "complete already" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "3"), "invalid choice"),
        (("--bits", "4"), "--bits: belongs to the value split"),
        (("--target-bpw", "nan"), "target: nan bits per weight"),
        (("--target-bpw", "5", "--target-size", "1GB"), "exactly one"),
        (("--target-size", "12 parsecs"), "is not a size"),
        (("--target-size", 400 * "9" + "GB"), "is not a size"),
        (("--tensor-type", "attn_v"), "REGEX=TYPE"),
        (("--tensor-type", "(=Q8_0"), "not a regular expression"),
        (("--tensor-type", "attn=Q9"), "'Q9' is not one of"),
        (("--imatrix", "/no/such"), "--imatrix: no such file"),
        (("--use-plan", "/no/such"), "--use-plan: no such file"),
        (("--no-calibration", "--write-imatrix", "x"), "--write-imatrix: needs a calibration"),
        (("--no-calibration", "--target-bpw", "2"), "the smallest types need"),
        (("-k", "9"), "k: 9 clusters; choose 1 to 8"),
        (("--threads", "0"), "--threads: 0 is less than one"),
        (("--recipe", "paper", "--type", "Q4_0"), "--type: belongs to the split and stock layouts"),
        (("--type", "Q4_0"), "the split layout has more than one"),
        (
            ("--recipe", "stock", "--calibration-text", "/no/such"),
            "--calibration-text: no such file: /no/such",
        ),
        (("--pre", "no-such-name", "--recipe", "nothing"), "invalid choice"),
    ],
)
def test_bad_options(stories15m: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = convert(stories15m, tmp_path / "out.gguf", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def break_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def write_nan(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-40:-36] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)


def claim_gptq(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


def other_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))


def lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


BREAKAGES = {
    "missing folder": (shutil.rmtree, "model"),
    "missing config": (lambda model: (model / "config.json").unlink(), "config.json"),
    "truncated": (break_header, "model.safetensors"),
    "NaN": (write_nan, "NaN or Inf"),
    "GPTQ": (claim_gptq, "gptq"),
    "unknown architecture": (other_architecture, "NoSuchForCausalLM"),
    "Git LFS pointer": (lfs_pointer, "git lfs pull"),
    "pickle": (pickle_only, "pytorch_model.bin"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_bad_input_is_one_line_and_exit_code_2(stories15m: Path, tmp_path: Path, breakage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(stories15m, model)
    damage, words = BREAKAGES[breakage]
    damage(model)
    folder = tmp_path / "out"
    folder.mkdir()
    done = convert(model, folder / "out.gguf", "--recipe", "paper")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert list(folder.iterdir()) == []


def test_existing_output_needs_force(stories15m: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    done = convert(stories15m, out, "--recipe", "plain")
    assert (done.returncode, out.read_bytes()) == (2, b"mine")
    assert "--force" in done.stderr
    assert convert(stories15m, out, "--recipe", "plain", "--force").returncode == 0


def test_a_memory_limit_that_is_too_small_is_refused_before_the_calibration(
    stories15m: Path, tmp_path: Path
) -> None:
    refused = convert(stories15m, tmp_path / "none.gguf", "--memory-limit", "20MB")
    assert refused.returncode == 2
    assert "memory limit: 20,000,000 bytes are too few" in refused.stderr
    assert "MB or more" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    done = convert(stories15m, tmp_path / "out.gguf", "--recipe", "paper", "--memory-limit", "2GB")
    assert done.returncode == 0, done.stderr


@pytest.mark.engine
def test_the_memory_limit_that_is_advised_is_enough_after_a_calibration(
    stories15m: Path, tmp_path: Path, unknowing: Path
) -> None:
    text = tmp_path / "text"
    text.write_text(" ".join(f"Once upon a time there were {i} cats and a dog." for i in range(300)))
    calibrated = [stories15m, tmp_path / "out.gguf", "--calibration-text", text, "--memory-limit"]
    refused = convert(*calibrated, "20MB")
    advised = re.search(r"allow (\d+MB) or more", refused.stderr)
    assert advised is not None
    assert not (unknowing / "calibration").exists()
    done = convert(*calibrated, advised[1])
    assert done.returncode == 0, done.stderr
    assert (unknowing / "calibration").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_disk_that_is_too_small_is_found_before_the_calibration(
    stories15m: Path, small_disk: Path, unknowing: Path, resume: list[str]
) -> None:
    done = convert(stories15m, small_disk / "out.gguf", *resume)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {small_disk / 'out.gguf'}: the file will have")
    assert not (unknowing / "calibration").exists()
    assert list(small_disk.iterdir()) == []


def test_the_model_that_is_read_is_not_replaced(stories15m: Path, tmp_path: Path) -> None:
    folder, file, link = tmp_path / "model", tmp_path / "float.gguf", tmp_path / "link.gguf"
    shutil.copytree(stories15m, folder)
    assert convert(folder, file, "--layout", "float").returncode == 0
    for source, target in ((folder, folder / "model.safetensors"), (file, file)):
        before = target.read_bytes()
        done = convert(source, target, "--recipe", "plain", "--force")
        assert done.returncode == 2
        assert done.stderr == f"error: {target}: is the model that is read; choose another name\n"
        assert target.read_bytes() == before
    link.symlink_to(file)
    assert convert(file, link, "--recipe", "plain", "--force").returncode == 0
    assert not link.is_symlink() and file.read_bytes() == before


@pytest.mark.parametrize("shards", [[], ["--shards", "2"], ["--max-shard-size", "20kB"]])
def test_what_is_complete_needs_no_room(tmp_path: Path, small_disk: Path, shards: list[str]) -> None:
    model, out = write_checkpoint(tmp_path / "model"), small_disk / "out.gguf"
    options = ["--recipe", "paper", *shards, "--resume"]
    assert convert(model, out, *options).returncode == 0
    made = sorted(small_disk.iterdir())
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    again = convert(model, out, *options)
    assert again.returncode == 0 and "complete already" in again.stdout, again.stderr
    assert sorted(small_disk.iterdir()) == sorted([*made, small_disk / "filler"])
