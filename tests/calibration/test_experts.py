"""Statistics per expert, of a mixture made of stories15M that computes exactly what stories15M computes.

Every expert is a copy of the FFN: what it reads is known from the dense model and the router's directions.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gguf_splitquant.calibration.calibrate import gather, user_text
from gguf_splitquant.calibration.experts import PRIOR, RowWriter, expert_matrix, expert_use
from gguf_splitquant.calibration.imatrix import ImportanceMatrix, imatrix_for, read_imatrix, write_moments
from gguf_splitquant.calibration.moments import Moments, TokenWeighting
from gguf_splitquant.calibration.observer import ObservedEngine, Routing
from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.calibration.sensitivity import Probing, measure_sensitivity, row_scales
from gguf_splitquant.cli.convert_output import print_summary
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import GGUFError, SplitQuantError
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.gguf_io.sharding import WHOLE
from gguf_splitquant.linear_algebra import blas_threads
from gguf_splitquant.planning.curves import ExpertUse, Salience, weight_curves
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.refining.metric import Feedback
from gguf_splitquant.refining.weights import WeightRefiner
from gguf_splitquant.runtime.builds import BuildSpec, find_build
from gguf_splitquant.runtime.engine import Engine, EngineOptions
from gguf_splitquant.sources import open_model
from scripts.mixture import write_mixture
from tests.calibration.test_imatrix import legacy
from tests.gguf_files import FLOAT, convert_once

EXPERTS, USED = 4, 2
GATE, DOWN = "blk.2.ffn_gate_exps.weight", "blk.2.ffn_down_exps.weight"

pytestmark = pytest.mark.engine

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def checkpoint(stories15m: Path, folder: Path) -> Path:
    write_mixture(stories15m, folder / "mixture", EXPERTS, USED)
    return folder / "mixture"


@pytest.fixture(scope="module")
def dense(stories15m: Path, folder: Path) -> Path:
    return convert_once(stories15m, folder, FLOAT, "dense")


@pytest.fixture(scope="module")
def mixture(checkpoint: Path, folder: Path) -> Path:
    return convert_once(checkpoint, folder, FLOAT, "mixture")


@pytest.fixture(scope="module")
def text(dense: Path, folder: Path) -> NDArray[np.int32]:
    (folder / "text.txt").write_text(read_text(None).content)
    return user_text(dense, folder / "text.txt", length=100, most_tokens=800)


@pytest.fixture(scope="module")
def moments(mixture: Path, text: NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory) -> Moments:
    folder = tmp_path_factory.mktemp("moments")
    return gather(Runnable(mixture), text, folder, TokenWeighting(), {}, n_threads=1)


@pytest.fixture(scope="module")
def inputs(dense: Path, text: NDArray[np.int32]) -> dict[str, F64]:
    """What the dense model's gate and down projections read, (tokens, channels)."""
    rows: dict[str, list[F64]] = {}

    def sink(name: str, x: F32, routing: Routing | None) -> None:
        assert routing is None
        rows.setdefault(name, []).append(x.astype(np.float64))

    options = EngineOptions(n_ctx=256, n_batch=text.shape[1], n_ubatch=text.shape[1], n_threads=1)
    with ObservedEngine(Runnable(dense), options, sink) as engine:
        for row in text:
            engine.clear()
            engine.observe(row, np.arange(len(row)), 0)
        sharing = engine.sharing
    return {stack: np.concatenate(rows[sharing[stack.replace("_exps", "")]]) for stack in (GATE, DOWN)}


@pytest.fixture(scope="module")
def routes(mixture: Path, inputs: dict[str, F64]) -> NDArray[np.bool_]:
    """Which experts each token uses, (tokens, experts), from the router's weights."""
    (router,) = [t for t in GGUFReader(mixture).tensors if t.name == "blk.2.ffn_gate_inp.weight"]
    logits = inputs[GATE] @ router.data.T
    return logits >= np.sort(logits, axis=1)[:, -USED, None]


def test_the_mixture_computes_what_the_dense_model_computes(dense: Path, mixture: Path) -> None:
    found = compare(
        dense,
        mixture,
        read_text(None),
        context=256,
        limit_tokens=512,
        threads=1,
        kv="f32",
        flash_attention=False,
    ).divergence
    assert found.logit_max < 1e-3 and found.top1 == 1


def test_all_experts_together_read_what_the_dense_model_reads(
    moments: Moments, inputs: dict[str, F64], routes: NDArray[np.bool_]
) -> None:
    assert moments.input_of(GATE) == moments.input_of(GATE.replace("gate", "up")) != moments.input_of(DOWN)
    for name, x in inputs.items():
        # F16 cache, batches of other shapes
        size = np.einsum("ij,ij->j", x, x).max() / len(x)
        np.testing.assert_allclose(moments.matrix(name), x.T @ x / len(x), atol=0.01 * size)
        use = moments.experts(name)
        assert use is not None
        np.testing.assert_allclose(use.share, routes.mean(axis=0) / USED, atol=0.01)
    assert moments.experts("blk.2.attn_q.weight") is None


def test_each_expert_has_the_moments_of_the_rows_that_are_sent_to_it(
    moments: Moments, inputs: dict[str, F64], routes: NDArray[np.bool_]
) -> None:
    for name, x in inputs.items():
        pooled, prior = moments.matrix(name), PRIOR * x.shape[1]
        counts = moments.uses[moments.sharing[name]]
        for expert in range(EXPERTS):
            rows = x[routes[:, expert]]
            # a token between two experts may go the other way
            assert abs(counts[expert] - len(rows)) <= 3
            expected = (rows.T @ rows + prior * pooled) / (len(rows) + prior)
            found = moments.matrix(name, expert)
            distance = np.linalg.norm(found - expected)
            assert distance < 0.02 * np.linalg.norm(expected)
            assert distance < 0.3 * np.linalg.norm(found - pooled)
            energy = np.square(rows).mean(axis=0)
            np.testing.assert_allclose(moments.energy(name)[expert], energy, atol=0.05 * energy.max())


@given(seed=st.integers(0, 2**32 - 1), used=st.integers(1, 3), batches=st.integers(1, 3))
def test_rows_on_disk_are_the_experts_matrices(
    tmp_path_factory: pytest.TempPathFactory, seed: int, used: int, batches: int
) -> None:
    rng = np.random.default_rng(seed)
    stem = tmp_path_factory.mktemp("rows") / "00000-experts"
    x = (rng.standard_normal((batches, 20, 6)) * 10 ** rng.uniform(-3, 6, (batches, 20, 1))).astype(
        np.float32
    )
    experts = rng.permuted(np.tile(np.arange(5, dtype=np.int32), (batches, 20, 1)), axis=2)[:, :, :used]
    writer = RowWriter(stem, 6, 6)
    for rows, routes in zip(x, experts, strict=True):
        writer.add(rows, rows, routes)
    writer.finish()
    rows, routes = x.reshape(-1, 6).astype(np.float64), experts.reshape(-1, used)
    pooled = np.cov(rows.T).astype(np.float32)
    for expert in range(6):
        own = rows[(routes == expert).any(axis=1)]
        assert writer.counts[expert] == len(own)
        expected = (own.T @ own + PRIOR * 6 * pooled) / (len(own) + PRIOR * 6)
        size = np.abs(expected).max()
        np.testing.assert_allclose(expert_matrix(stem, expert, pooled), expected, atol=2e-3 * size)
    assert len(own) == 0, "nobody was sent to the last one"


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(SplitQuantError, match=r"cannot be read.*delete"):
        expert_matrix(tmp_path / "00000-experts", 0, np.eye(4, dtype=np.float32))


def test_experts_with_fewer_tokens_than_channels_are_rare() -> None:
    use = expert_use((40, 3, 0, 85), channels=32)
    assert use.rare == (1, 2)
    assert use.share.tolist() == [40 / 128, 3 / 128, 0, 85 / 128]


def test_the_planner_weights_experts_by_their_use(
    checkpoint: Path, moments: Moments, stories15m: Path
) -> None:
    # all experts are the dense weight, so their mean, by any shares, costs what the dense weight costs
    (stack,) = [t for t in open_model(checkpoint).tensors if t.name == DOWN]
    (weight,) = [t for t in open_model(stories15m).tensors if t.name == DOWN.replace("_exps", "")]

    class AsDense(Moments):
        def matrix(self, weight: str, expert: int | None = None) -> F32:
            return moments.matrix(DOWN, expert)

        def salience(self, weight: str) -> Salience:
            return moments.salience(DOWN)

        def input_of(self, weight: str) -> str | None:
            return DOWN

    measured = Moments(**{**vars(moments), "sensitivity": {DOWN: 1.0, weight.name: 1.0}})
    (curve,) = weight_curves([stack], measured)
    (expected,) = weight_curves([weight], AsDense(**vars(measured)))
    np.testing.assert_allclose(curve.loss, expected.loss, rtol=1e-5)


def test_an_expert_is_refined_on_what_it_reads(
    dense: Path, moments: Moments, inputs: dict[str, F64], routes: NDArray[np.bool_]
) -> None:
    (tensor,) = [t for t in GGUFReader(dense).tensors if t.name == GATE.replace("_exps", "")]
    refiner = WeightRefiner(moments, threads=1)
    better = []
    for expert in range(EXPERTS):
        rows = inputs[GATE][routes[:, expert]]

        def loss(which: int | None, rows: F64 = rows) -> float:
            pieces = [(GGMLQuantizationType.IQ4_NL, 288)]
            (packed,) = refiner.refine(GATE, tensor.data[:96], pieces, expert=which).packed
            error = tensor.data[:96] - quants.dequantize(packed, GGMLQuantizationType.IQ4_NL)
            return float(np.square(rows @ error.T).mean())

        better.append(loss(expert) / loss(None))
    assert max(better) < 1 and np.mean(better) < 0.95, better


@dataclass(frozen=True)
class ReadsDown:
    """Every weight reads what the stack of down projections reads."""

    moments: Moments

    @property
    def sensitivity(self) -> Mapping[str, float]:
        return {}

    def input_of(self, weight: str) -> str | None:
        return DOWN

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[np.float32]:
        return self.moments.matrix(DOWN)

    def feedback(self, weight: str) -> Feedback:
        return self.moments.feedback(DOWN)

    def salience(self, weight: str) -> Salience:
        return self.moments.salience(DOWN)

    def experts(self, weight: str) -> ExpertUse | None:
        return self.moments.experts(weight)


def test_errors_of_a_stack_cost_what_they_cost_in_the_dense_layer(
    dense: Path, mixture: Path, text: NDArray[np.int32], moments: Moments
) -> None:
    how = Probing(texts=4, length=64)
    found = {}
    for model, name in ((dense, DOWN.replace("_exps", "")), (mixture, DOWN)):
        scales = row_scales(Runnable(model), [name])
        assert scales[name].shape == ((288,) if model == dense else (EXPERTS, 288))
        found[model] = measure_sensitivity(
            Runnable(model),
            text,
            scales,
            ReadsDown(moments),
            how,
            n_threads=1,
        )[name]
    # two experts' errors are independent, and each counts with its weight from the router, w and 1 - w:
    # w^2 + (1 - w)^2 of the dense model's divergence, between a half and one
    assert 0.35 < found[mixture] / found[dense] < 1.3


def test_an_imatrix_is_what_llama_imatrix_makes_of_the_same_text(mixture: Path, tmp_path: Path) -> None:
    build = find_build(BuildSpec(patched=False, tools=True))
    if build is None:
        pytest.fail("no llama-imatrix: run `gguf-splitquant build-runtime --stock --with-tools`")
    story = tmp_path / "text.txt"
    story.write_text(read_text(None).content)
    command = [build.lib_dir / "llama-imatrix", "-m", mixture, "-f", story, "-o", tmp_path / "theirs.gguf"]
    options = ["-c", "128", "-b", "128", "--chunks", "4", "-fa", "off", "-t", "1"]
    subprocess.run([*map(str, command), *options], check=True, capture_output=True)
    with Engine(mixture, EngineOptions(vocabulary_only=True)) as engine:
        tokens = engine.tokenize(read_text(None).content, add_special=True)[: 4 * 128].reshape(4, 128)
        tokens[:, 0] = engine.bos
    (tmp_path / "moments").mkdir()
    ours = gather(Runnable(mixture), tokens, tmp_path / "moments", TokenWeighting(), {}, n_threads=1)
    write_moments(tmp_path / "ours.gguf", ours)
    theirs, mine = read_imatrix(tmp_path / "theirs.gguf"), read_imatrix(tmp_path / "ours.gguf")
    stacks = {n for n in mine.importance if "_exps" in n}
    assert len(stacks) == 3 * 6 and stacks == set(mine.counts) == set(theirs.counts)
    for name in stacks:
        assert mine.counts[name].sum() == theirs.counts[name].sum() == 4 * 128 * USED
        assert np.abs(mine.counts[name] - theirs.counts[name]).max() <= 5
        energy = theirs.importance[name]
        np.testing.assert_allclose(mine.importance[name], energy, atol=0.05 * energy.max())


def test_an_imatrix_gives_each_expert_its_own_and_unreached_ones_the_mean() -> None:
    values = np.array([[1, 2], [3, 4], [1, 1]], np.float32)
    known = ImportanceMatrix({"e": values, "w": values[0]}, {"e": np.array([30, 10, 0], np.float32)})
    assert known.matrix("e", 1).tolist() == [3, 4]
    assert known.matrix("e").tolist() == known.matrix("e", 2).tolist() == [1.5, 2.5]
    use = known.experts("e")
    assert use is not None and use.share.tolist() == [0.75, 0.25, 0] and use.rare == (2,)
    assert known.experts("w") is None and known.matrix("w").tolist() == [1, 2]


def test_the_mean_of_all_experts_does_not_depend_on_blas_threads() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((128, 14336)).astype(np.float32)
    counts = rng.integers(0, 100, 128).astype(np.float32)
    known = ImportanceMatrix({"e": values}, {"e": counts})
    means = set()
    for threads in (1, 2, 3):
        with blas_threads(threads):
            means.add(known.matrix("e").tobytes())
    assert len(means) == 1


def test_an_older_imatrix_is_shaped_by_the_model(checkpoint: Path, tmp_path: Path) -> None:
    model = open_model(checkpoint)
    flat = np.arange(EXPERTS * 288, dtype=np.float32)
    path = tmp_path / "older.dat"
    path.write_bytes(legacy({GATE: (1, flat)}))
    known = imatrix_for(model, path)
    np.testing.assert_array_equal(known.matrix(GATE, 1), flat[288:576])
    path.write_bytes(legacy({GATE: (1, flat[:-1])}))
    with pytest.raises(GGUFError, match=f"has {flat.size - 1} channels for {GATE}, which has 288"):
        imatrix_for(model, path)


def test_the_report_names_the_rare_experts(
    checkpoint: Path, moments: Moments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(layout="stock", qtype="Q4_0")
    report = convert(open_model(checkpoint), tmp_path / "out.gguf", recipe, statistics=moments)
    counts = np.array(moments.uses[moments.sharing[GATE]])
    assert report.rare_experts.get(GATE, ()) == tuple(np.flatnonzero(counts < PRIOR * 288))
    assert report.rare_experts[DOWN] == tuple(np.flatnonzero(counts < PRIOR * 768))
    print_summary(report, WHOLE, 1.0, "mixture")
    count = sum(map(len, report.rare_experts.values()))
    assert f"{count} of {EXPERTS * 18} expert weights: too few tokens" in capsys.readouterr().out
    # what is not refined used no statistics
    plain = convert(
        open_model(checkpoint), tmp_path / "plain.gguf", Recipe(layout="float"), statistics=moments
    )
    assert not plain.rare_experts
