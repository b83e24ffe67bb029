"""Importance matrices: llama.cpp's files are read, ours are read by llama.cpp, damaged ones are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.calibration.imatrix import imatrix_for, read_imatrix, write_imatrix
from gguf_splitquant.errors import GGUFError, SplitQuantError
from gguf_splitquant.planning import plan_refined
from gguf_splitquant.recipe import Recipe
from tests.gguf_files import one_tensor
from tests.sample_models import small_model


def legacy(entries: dict[str, tuple[int, np.ndarray]]) -> bytes:
    """The bytes of the legacy format."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += (values * calls).astype("<f4").tobytes()
    return data + struct.pack("<ii", 3, 4) + b"wiki"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), widths=st.lists(st.integers(1, 70), min_size=1, max_size=4))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, widths: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    importance = {f"blk.{i}.ffn_up.weight": rng.lognormal(size=w) for i, w in enumerate(widths)}
    path = tmp_path_factory.mktemp("imatrix") / "own.gguf"
    write_imatrix(path, importance, dict.fromkeys(importance, 4096), "own text")
    read = read_imatrix(path).importance
    assert read.keys() == importance.keys()
    for name, values in importance.items():
        np.testing.assert_allclose(read[name], values, rtol=1e-6)


def test_experts_keep_their_rows(tmp_path: Path) -> None:
    means = np.arange(12.0).reshape(3, 4) + 1
    write_imatrix(
        tmp_path / "m.gguf", {"blk.0.ffn_up_exps.weight": means}, {"blk.0.ffn_up_exps.weight": 64}, "t"
    )
    np.testing.assert_allclose(
        read_imatrix(tmp_path / "m.gguf").importance["blk.0.ffn_up_exps.weight"], means
    )


def test_legacy_format(tmp_path: Path) -> None:
    values = np.array([0.5, 2.0, 8.0])
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"blk.0.attn_q.weight": (7, values), "blk.1.attn_q.weight": (1, values * 2)}))
    read = read_imatrix(path).importance
    np.testing.assert_allclose(read["blk.0.attn_q.weight"], values)
    np.testing.assert_allclose(read["blk.1.attn_q.weight"], values * 2)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 60), noise=st.binary(max_size=40))
def test_damaged_legacy_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("imatrix") / "bad.dat"
    path.write_bytes(legacy({"blk.0.attn_q.weight": (2, np.ones(8))})[:cut] + noise)
    try:
        read = read_imatrix(path).importance
    except SplitQuantError:
        return
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in read.values())


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(legacy({"blk.0.attn_q.weight": (2, np.ones(8))})[:40])
    with pytest.raises(GGUFError, match=r"ends inside the values of blk\.0\.attn_q\.weight"):
        read_imatrix(path)
    path.write_bytes(legacy({"blk.0.attn_q.weight": (1, np.array([1.0, np.nan]))}))
    with pytest.raises(GGUFError, match="NaN"):
        read_imatrix(path)
    with pytest.raises(GGUFError, match="cannot be read"):
        read_imatrix(tmp_path / "none.gguf")


def test_an_imatrix_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    name = "blk.0.attn_q.weight"
    for width in (8, 255, 257):
        write_imatrix(path, {name: np.ones(width)}, {name: 64}, "t")
        with pytest.raises(GGUFError, match=f"has {width} channels for {name}, which has 256; give"):
            imatrix_for(small_model(), path)
    other = "blk.9.attn_q.weight"
    write_imatrix(path, {name: np.ones(256), other: np.ones(8)}, {name: 64, other: 1}, "t")
    recipe = Recipe(layout="split", target_bpw=5.0)
    plan = plan_refined(small_model(), recipe, imatrix_for(small_model(), path))
    assert plan.pieces[name]


def test_a_model_is_not_an_imatrix(tmp_path: Path) -> None:
    one_tensor(tmp_path / "model.gguf", "llama", "blk.0.attn_q.weight")
    with pytest.raises(GGUFError, match="not an imatrix"):
        read_imatrix(tmp_path / "model.gguf")
