"""The factorizations behind the sweeps, against the loss written out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.refining.metric import (
    Cluster,
    Feedback,
    Sweep,
    prepare,
    typical_salience,
    visiting_order,
)


def moments(columns: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((3 * columns, columns)) @ (
        np.eye(columns) + 0.2 * rng.standard_normal((columns, columns))
    )
    x = mixed * np.exp(rng.standard_normal(columns))
    return x.T @ x / len(x)


def block_losses(sweep: Sweep, error: NDArray[np.float64], quantized_before_only: bool) -> list[float]:
    """|M_bb (x_b - q_b)|^2 with x_b - q_b = e_b + coupling e, over all blocks."""
    assert sweep.coupling is not None
    losses = []
    start = 0
    for factors in sweep.factors:
        for low, weight in zip(factors.low, factors.weight, strict=True):
            here = slice(start, start + len(low))
            start = here.stop
            known = here.start if quantized_before_only else len(error)
            miss = error[here] + sweep.coupling[here, :known].astype(np.float64) @ error[:known]
            losses.append(float((weight * (low.astype(np.float64) @ miss) ** 2).sum()))
    return losses


def whole(columns: int, sub: int, block: int) -> list[Cluster]:
    return [Cluster(np.arange(columns), sub, block)]


def test_first_sweep_splits_the_whole_loss_into_block_losses() -> None:
    h = moments(96)
    shuffled = np.random.default_rng(3).permutation(96)
    metric = prepare(h, [Cluster(shuffled[:64], 32, 64), Cluster(shuffled[64:], 16, 32)], damping=0.01)
    error = np.random.default_rng(1).standard_normal(96)
    damped = h + 0.01 * typical_salience(np.diag(h)) * np.eye(96)
    loss = error @ damped[np.ix_(metric.order, metric.order)] @ error
    assert sum(block_losses(metric.first, error, True)) == pytest.approx(loss, rel=1e-4)


def test_later_sweep_measures_a_block_around_its_conditional_optimum() -> None:
    h = moments(64)
    metric = prepare(h, whole(64, 16, 32), damping=0.05)
    assert metric.later is not None
    damped = (h + 0.05 * typical_salience(np.diag(h)) * np.eye(64))[np.ix_(metric.order, metric.order)]
    rng = np.random.default_rng(2)
    error = rng.standard_normal(64)
    changed = error.copy()
    changed[16:32] += rng.standard_normal(16)
    before, after = (block_losses(metric.later, e, False)[1] for e in (error, changed))
    assert after - before == pytest.approx(changed @ damped @ changed - error @ damped @ error, rel=1e-3)


def test_order_falls_in_salience_and_keeps_blocks_together() -> None:
    salience = np.random.default_rng(0).lognormal(size=512)
    order = visiting_order(salience, 16, 256)
    assert sorted(order) == list(range(512))
    assert [len(set(order[i : i + 256] // 256)) for i in (0, 256)] == [1, 1]
    for start in range(0, 512, 16):
        columns = order[start : start + 16]
        assert len(set(columns // 16)) == 1
        assert (np.diff(salience[columns]) <= 0).all()
    sums = salience[order].reshape(2, 16, 16).sum(axis=2)
    assert (np.diff(sums, axis=1) <= 0).all() and sums[0].sum() >= sums[1].sum()


def test_rank_deficient_and_dead_channels_are_factored() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64))
    x[:, 10:20] = 0
    metric = prepare(x.T @ x, whole(64, 32, 32), damping=0.01)
    assert np.isfinite(metric.first.factors[0].weight).all() and (metric.first.factors[0].weight > 0).all()


def test_all_zero_input_counts_columns_alike() -> None:
    metric = prepare(np.zeros((64, 64)), whole(64, 32, 32), damping=0.01)
    np.testing.assert_allclose(metric.first.factors[0].weight, 0.01, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_broken_moments_are_refused(bad: float) -> None:
    h = np.eye(64)
    h[3, 3] = bad
    with pytest.raises(SplitQuantError, match="second moments"):
        prepare(h, whole(64, 32, 32), damping=0.01)


def test_the_spread_of_feedback_is_the_first_sweeps_weights() -> None:
    h = moments(96)
    metric = prepare(h, whole(96, 32, 32), damping=0.02)
    expected = np.concatenate([f.weight.reshape(-1) for f in metric.first.factors])
    np.testing.assert_allclose(Feedback.of(h, metric.order, 0.02).spread ** 2, expected, rtol=1e-4)


def test_outputs_of_feedback_have_the_loss_of_its_errors() -> None:
    """Errors e of the columns become e D M^-T; with inputs of moments H they cost sum((e_i D_i)**2)."""
    h = moments(64)
    feedback = Feedback.of(h, damping=0.0)
    inputs = np.linalg.cholesky(h).T.astype(np.float32) * np.sqrt(np.float32(64))  # x^T x / 64 = H
    outputs = feedback.outputs_of(inputs).astype(np.float64)
    np.testing.assert_allclose(outputs.T @ outputs / 64, np.diag(feedback.spread**2), atol=2e-3)
    assert (np.diff(np.diagonal(h)[feedback.order]) <= 0).all()


def test_feedback_on_a_diagonal_leaves_errors_where_they_are() -> None:
    salience = np.array([1.0, 9.0, 4.0])
    feedback = Feedback.of(salience, damping=0.0)
    assert feedback.order.tolist() == [1, 2, 0]
    np.testing.assert_allclose(feedback.spread, [3, 2, 1])
    inputs = np.array([[1, 2, 3]], np.float32)
    np.testing.assert_allclose(feedback.outputs_of(inputs), inputs[:, feedback.order])


def test_few_massive_channels_do_not_move_the_typical_salience() -> None:
    salience = np.ones(1000)
    salience[7] = 1e6
    assert typical_salience(salience) < 1.02
