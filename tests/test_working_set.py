"""Under a memory limit: the same bytes, less memory, and a limit that is too small is refused at once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValue, GGUFValueType

from gguf_splitquant.conversion import Conversion
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import RecipeError
from gguf_splitquant.planning import make_plan
from gguf_splitquant.planning.curves import ExpertUse, Salience
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.refining.feedback import CHUNK_ROWS
from gguf_splitquant.refining.metric import Feedback
from gguf_splitquant.sources.model import FloatType, SourceModel
from gguf_splitquant.working_set import WorkingSet
from tests.sample_models import heavy_tailed, tensor_of

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 64


class Correlated:
    """Statistics of an input whose channels are correlated, the same for every weight."""

    sensitivity: Mapping[str, float] = {}

    def input_of(self, weight: str) -> str | None:
        return "input"

    def experts(self, weight: str) -> ExpertUse | None:
        return None

    def matrix(self, weight: str, expert: int | None = None) -> np.ndarray:
        inputs = np.random.default_rng(7).standard_normal((256, COLUMNS)).astype(np.float32)
        inputs[:, 1:] += inputs[:, :-1]
        return inputs.T @ inputs / np.float32(len(inputs))

    def salience(self, weight: str) -> Salience:
        return Feedback.of(self.matrix(weight)).salience


def long_model(rows: int = 2 * CHUNK_ROWS + 88, dtype: FloatType = FloatType.BF16) -> SourceModel:
    """Weights of several pieces of rows, the last one not whole; a stack of experts among them."""
    tensors = (
        tensor_of("token_embd.weight", heavy_tailed(rows, COLUMNS, seed=1), dtype),
        tensor_of("blk.0.attn_q.weight", heavy_tailed(rows, COLUMNS, seed=2), dtype),
        tensor_of("blk.0.ffn_up_exps.weight", heavy_tailed(2, rows, COLUMNS, seed=3), dtype),
        tensor_of("output.weight", heavy_tailed(rows, COLUMNS, seed=4), dtype),
    )
    metadata = {"general.architecture": GGUFValue("llama", GGUFValueType.STRING)}
    return SourceModel("llama", metadata, tensors, tied_head=False)


class Collected:
    """A sink that keeps what it is given, and how much came at once."""

    def __init__(self) -> None:
        self.pieces: dict[str, dict[int, bytes]] = {}

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        self.pieces.setdefault(tensor, {})[position] = bytes(data)

    def tensors(self) -> dict[str, bytes]:
        return {name: b"".join(p for _, p in sorted(parts.items())) for name, parts in self.pieces.items()}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(layout="stock", qtype="Q4_0", embedding="Q8_0", calibration="imatrix"),
        Recipe(layout="stock", qtype="Q5_0", embedding="Q4_0", calibration="imatrix"),
        Recipe(k=2, granularity="row"),
    ],
    ids=["rounded embedding", "refined embedding", "value split"],
)
def test_the_bytes_do_not_depend_on_the_limit(recipe: Recipe) -> None:
    model, statistics = long_model(), Correlated()
    plan = make_plan(model, recipe)
    results = []
    # a limit of one byte is not refused here: the least that can be done is done
    for limit in (None, 1):
        sink = Collected()
        work = Conversion(plan, sink, statistics, model.tied_head)
        work.run(plan.tensors, 2, limit)
        results.append((sink, work.relative_errors))
    (free, free_errors), (limited, limited_errors) = results
    assert free.tensors() == limited.tensors()
    assert free_errors == limited_errors  # to the last bit: they are in the file
    if recipe.refined:
        assert len(free.pieces["blk.0.attn_q.weight"]) == 1
        assert len(limited.pieces["blk.0.attn_q.weight"]) == 3


@pytest.mark.parametrize("full", [False, True])
def test_less_room_means_fewer_rows_and_tensors(full: bool) -> None:
    recipe = Recipe(layout="stock", qtype="Q4_0", calibration="none")
    plan = make_plan(long_model(), recipe)
    rooms = [1 << 40, 1 << 26, 1 << 23, 1 << 20, 0]
    rows = [WorkingSet(plan, 8, room).rows(plan.tensors[1], full) for room in rooms]
    assert rows[0] == WorkingSet(plan, 8).rows(plan.tensors[1], full)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == CHUNK_ROWS and all(count % CHUNK_ROWS == 0 for count in rows)
    split = make_plan(long_model(), Recipe(k=2, granularity="row"))
    tensors = [WorkingSet(split, 8, room).tensors(split.tensors) for room in rooms]
    assert tensors[0] == 8 and tensors[-1] == 1 and tensors == sorted(tensors, reverse=True)


def test_an_impossible_limit_names_the_least_possible_before_anything_is_written(tmp_path: Path) -> None:
    recipe, model = Recipe(layout="stock", qtype="Q4_0", calibration="imatrix"), long_model()
    with pytest.raises(RecipeError, match=r"memory limit: 1,000,000 bytes .*; allow \d+MB or more") as caught:
        convert(model, tmp_path / "out.gguf", recipe, statistics=Correlated(), memory_limit=1_000_000)
    assert list(tmp_path.iterdir()) == []
    least = re.search(r"allow (\d+)MB", str(caught.value))
    assert least is not None
    limit = int(least[1]) * 1_000_000
    convert(model, tmp_path / "out.gguf", recipe, statistics=Correlated(), memory_limit=limit)
    convert(model, tmp_path / "free.gguf", recipe, statistics=Correlated())
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "free.gguf").read_bytes()


_PEAK = """
import re, sys
from pathlib import Path
from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources.model import FloatType
from tests.test_working_set import large_model
limit = int(sys.argv[1]) or None
recipe = Recipe(k=2, bits=4, granularity="row")
convert(large_model(), Path(sys.argv[2]), recipe, threads=4, memory_limit=limit)
# what getrusage says is also what the parent had when it made this process
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def large_model() -> SourceModel:
    """Four weights of more than a slab each, of few different values: made row by row as they are read."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        pattern = np.resize(heavy_tailed(1024), (stop - start, 1024))
        return (pattern.view(np.uint32) >> 16).astype(np.uint16)

    tensors = tuple(tensor_of(f"blk.{i}.ffn_up.weight", np.zeros((1, 1024), np.float32)) for i in range(4))
    grown = tuple(
        type(t)(t.name, (4096, 1024), t.dtype, read_rows, origin="made as it is read") for t in tensors
    )
    return SourceModel("llama", long_model(32).metadata, grown, tied_head=False)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is not counted in kilobytes")
def test_a_process_stays_below_its_limit(tmp_path: Path) -> None:
    def converted(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _PEAK, str(limit), str(tmp_path / f"{limit}.gguf")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    # how much it takes differs between machines: the refusal says what would do
    least = re.search(r"allow (\d+)MB or more", converted(1_000_000).stderr)
    assert least
    limit = (int(least[1]) + 16) * 1_000_000
    done = converted(limit)
    assert done.returncode == 0, done.stderr
    assert 1024 * int(done.stdout) <= limit
    assert converted(0).returncode == 0
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / f"{limit}.gguf").read_bytes()
