"""The benchmarks measure what they say, and their checkpoints are what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gguf_splitquant.sources import open_model
from scripts.bench_memory import watch
from scripts.synthetic import SHAPES, write_checkpoint

_CHILD = """
import mmap, sys, time
held = b"x" * (96 << 20)
with open(sys.argv[1], "w+b") as file:
    file.write(bytes(64 << 20))
    file.flush()
    pages = mmap.mmap(file.fileno(), 0)
    total = sum(pages[i] for i in range(0, len(pages), 4096))
    time.sleep(0.5)
    file.truncate(16 << 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory from mapped")
def test_peaks_of_heap_mapped_files_and_disk_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    peak = watch([sys.executable, "-c", _CHILD, str(folder / "file")], folder)
    assert 96 << 20 <= peak.anonymous < 130 << 20
    assert 64 << 20 <= peak.mapped < 96 << 20
    assert peak.total >= 160 << 20
    assert peak.folder >= 64 << 20
    assert peak.final == 16 << 20


def test_a_sparse_checkpoint_has_the_model_s_shapes_and_takes_little_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "14B", layers=2, filled=0)
    model = open_model(tmp_path / "model")
    shapes = {t.name: t.shape for t in model.tensors}
    config = SHAPES["14B"]
    assert shapes["blk.1.ffn_down.weight"] == (config["hidden_size"], config["intermediate_size"])
    assert shapes["output.weight"] == (config["vocab_size"], config["hidden_size"])
    weights = tmp_path / "model" / "model.safetensors"
    assert weights.stat().st_size > 2 * model.n_params
    assert 512 * weights.stat().st_blocks < 200 << 20
    by_name = {t.name: t for t in model.tensors}
    assert by_name["token_embd.weight"].read_rows(4095, 4096).any()
    assert not by_name["token_embd.weight"].read_rows(4096, 4097).any()
    assert not by_name["blk.0.ffn_up.weight"].read_rows(0, 8).any()
