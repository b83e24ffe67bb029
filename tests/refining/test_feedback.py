"""Error feedback against the loss it minimizes, on weights and inputs like a model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.refining import Refined, Refiner, TypedCluster, feedback, refinable
from gguf_splitquant.refining.blocks import BlockType
from gguf_splitquant.refining.chunk import Chunk
from gguf_splitquant.refining.feedback import CHUNK_ROWS
from gguf_splitquant.refining.metric import Metric, typical_salience
from gguf_splitquant.refining.scales import round_f16

Q = GGMLQuantizationType
COLUMNS, ROWS, DAMPING = 512, 70, 0.02


@pytest.fixture(scope="module")
def moments() -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, COLUMNS)) * np.exp(rng.standard_normal(COLUMNS))
    x = x + 0.5 * rng.standard_normal((2000, 8)) @ rng.standard_normal((8, COLUMNS))
    return x.T @ x / len(x)


@pytest.fixture(scope="module")
def weight() -> NDArray[np.float32]:
    return (0.02 * np.random.default_rng(1).standard_t(5, (ROWS, COLUMNS))).astype(np.float32)


def refine(weight: NDArray[np.float32], moments: NDArray[Any], qtype: Q, **options: Any) -> Refined:
    return Refiner(moments, qtype, **options).refine(weight)


def loss(weight: NDArray[np.float32], packed: NDArray[np.uint8], qtype: Q, h: NDArray[np.float64]) -> float:
    error = (weight - dequantize(packed, qtype)).astype(np.float64)
    return float(((error @ (h + DAMPING * typical_salience(np.diag(h)) * np.eye(len(h)))) * error).sum())


@pytest.mark.parametrize("qtype", refinable(), ids=lambda t: t.name)
def test_reported_error_is_the_loss_of_the_bytes(
    qtype: Q, weight: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    refined = refine(weight, moments, qtype, threads=1, damping=DAMPING)
    assert refined.error == pytest.approx(loss(weight, refined.packed[0], qtype, moments), rel=1e-3)


@pytest.mark.parametrize("qtype", [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0])
def test_far_less_loss_of_plain_rounding(
    qtype: Q, weight: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    refined = refine(weight, moments, qtype, threads=1, damping=DAMPING)
    assert refined.error < 0.6 * loss(weight, quantize(weight, qtype), qtype, moments)


@pytest.mark.parametrize("qtype", [Q.IQ4_NL, Q.Q3_K])
def test_revisits_only_improve(qtype: Q, weight: NDArray[np.float32], moments: NDArray[np.float64]) -> None:
    errors = [refine(weight, moments, qtype, threads=1, revisits=n).error for n in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_bits_buy_accuracy(weight: NDArray[np.float32], moments: NDArray[np.float64]) -> None:
    ladder = (Q.Q2_K, Q.Q3_K, Q.IQ4_XS, Q.Q5_K, Q.Q6_K, Q.Q8_0)
    errors = [refine(weight, moments, t, threads=1).error for t in ladder]
    assert errors == sorted(errors, reverse=True)


def test_slabs_and_threads_give_the_same_bytes(
    weight: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    tall = np.concatenate([weight * f for f in range(1, 9)])
    whole = Refiner(moments, Q.Q4_1, threads=2).refine(tall)
    slabs = Refiner(moments, Q.Q4_1, threads=1)
    parts = [slabs.refine(tall[i : i + 64]).packed[0] for i in range(0, len(tall), 64)]
    assert (whole.packed[0] != np.concatenate(parts)).mean() < 1e-3  # BLAS may order sums by shape
    again = Refiner(moments, Q.Q4_1, threads=1).refine(tall)
    np.testing.assert_array_equal(whole.packed[0], again.packed[0])


def test_the_shapes_of_products_do_not_depend_on_threads_and_slabs(
    moments: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them BLAS' last bits change, and now and then a code."""
    seen: list[tuple[float, int]] = []

    class Watched(Chunk):
        def __init__(
            self, types: Sequence[type[BlockType]], metric: Metric, rows: NDArray[np.float32]
        ) -> None:
            seen.append((float(rows[0, 0]), len(rows)))
            super().__init__(types, metric, rows)

    monkeypatch.setattr(feedback, "Chunk", Watched)
    numbers = np.arange(9 * CHUNK_ROWS + 40, dtype=np.float32)
    tall = np.repeat(numbers[:, None], COLUMNS, axis=1)
    found = []
    for threads in (1, 2, 3, 64):
        Refiner(moments, Q.Q4_0, threads=threads).refine(tall)
        found.append(sorted(seen))
        seen.clear()
    slabs = Refiner(moments, Q.Q4_0, threads=1)
    for start in range(0, len(tall), 2 * CHUNK_ROWS):
        slabs.refine(tall[start : start + 2 * CHUNK_ROWS])
    assert all(shapes == sorted(seen) for shapes in found)
    assert len(seen) == 10


def test_importance_alone_weights_the_columns(weight: NDArray[np.float32]) -> None:
    salience = np.ones(COLUMNS)
    salience[::2] = 100.0
    error = weight - dequantize(refine(weight, salience, Q.Q4_0, threads=1).packed[0], Q.Q4_0)
    flat = weight - dequantize(refine(weight, np.ones(COLUMNS), Q.Q4_0, threads=1).packed[0], Q.Q4_0)
    assert (error[:, ::2] ** 2).sum() < 0.95 * (flat[:, ::2] ** 2).sum()


@pytest.mark.parametrize("qtype", refinable(), ids=lambda t: t.name)
def test_zero_rows_and_zero_blocks_stay_zero(qtype: Q, moments: NDArray[np.float64]) -> None:
    weight = np.zeros((3, COLUMNS), np.float32)
    weight[1, 300:310] = 1.0
    values = dequantize(refine(weight, moments, qtype, threads=1).packed[0], qtype)
    assert not values[[0, 2]].any() and np.isfinite(values).all()


@pytest.mark.parametrize("factor", [1e-7, 1e3])
@pytest.mark.parametrize("qtype", [Q.IQ4_NL, Q.Q4_1, Q.Q4_K])
def test_tiny_and_huge_weights_stay_finite(
    qtype: Q, factor: float, weight: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    scaled = (weight * factor).astype(np.float32)
    values = dequantize(refine(scaled, moments, qtype, threads=1).packed[0], qtype)
    assert np.isfinite(values).all()
    assert np.abs(values - scaled).max() <= np.abs(scaled).max() + 1e-6


def test_row_width_that_does_not_fit_is_refused(moments: NDArray[np.float64]) -> None:
    with pytest.raises(RecipeError, match=r"Q4_K.*320.*256"):
        Refiner(moments[:320, :320], Q.Q4_K)
    with pytest.raises(RecipeError, match="512 input channels"):
        Refiner(moments, Q.Q4_0).refine(np.zeros((2, 64), np.float32))


def test_clusters_with_types_of_their_own_share_the_feedback(
    weight: NDArray[np.float32], moments: NDArray[np.float64]
) -> None:
    order = np.argsort(-np.diag(moments), kind="stable")
    clusters = [
        TypedCluster(Q.Q8_0, order[:64]),
        TypedCluster(Q.Q3_K, order[64:320]),
        TypedCluster(Q.Q4_0, order[320:]),
    ]
    together = Refiner(moments, clusters, threads=2, damping=DAMPING).refine(weight)
    decoded = np.empty_like(weight)
    apart = np.empty_like(weight)
    for cluster, packed in zip(clusters, together.packed, strict=True):
        decoded[:, cluster.channels] = dequantize(packed, cluster.qtype)
        own = moments[np.ix_(cluster.channels, cluster.channels)]
        alone = Refiner(own, cluster.qtype, threads=1, damping=DAMPING).refine(weight[:, cluster.channels])
        apart[:, cluster.channels] = dequantize(alone.packed[0], cluster.qtype)
    damped = moments + DAMPING * typical_salience(np.diag(moments)) * np.eye(COLUMNS)

    def output_error(values: NDArray[np.float32]) -> float:
        error = (weight - values).astype(np.float64)
        return float(((error @ damped) * error).sum())

    assert together.error == pytest.approx(output_error(decoded), rel=1e-3)
    assert together.error < 0.9 * output_error(apart)


def test_clusters_must_partition_the_channels(moments: NDArray[np.float64]) -> None:
    for channels in (np.arange(480), np.r_[np.arange(480), np.arange(32)]):
        with pytest.raises(RecipeError, match="512 channels once"):
            Refiner(moments, [TypedCluster(Q.Q4_0, channels)])


def test_f16_rounding_is_numpys() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x477FE000, 20000).astype(np.uint32)  # positive floats up to the largest half
    values = bits.view(np.float32)
    values = np.concatenate([values, -values, np.float32([0, 6.1e-5, 6.2e-5, 1 + 2**-11, 1 + 3 * 2**-11])])
    got = np.array([round_f16(v) for v in values], np.float32)
    np.testing.assert_array_equal(got, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("columns", "revisits"), [(256, 2), (4096, 2), (4608, 1)])
def test_wide_inputs_are_revisited_once(columns: int, revisits: int) -> None:
    assert Refiner(np.ones(columns, np.float32), Q.Q4_0).revisits == revisits
    assert Refiner(np.ones(columns, np.float32), Q.Q4_0, revisits=3).revisits == 3
