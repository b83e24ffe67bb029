"""Weights that are only rounded, and inputs that are factored ahead."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize
from numpy.typing import NDArray

from gguf_splitquant.planning.curves import Salience
from gguf_splitquant.refining.metric import Feedback
from gguf_splitquant.refining.weights import ExpectedWeight, WeightRefiner

Q4_0 = GGMLQuantizationType.Q4_0


@pytest.mark.parametrize("rows", [1, 64, 130])
def test_rounding_to_bytes_is_that_of_ggml(rows: int) -> None:
    rng = np.random.default_rng(rows)
    weight = (rng.standard_normal((rows, 96)) * np.exp(4 * rng.standard_normal((rows, 1)))).astype(np.float32)
    weight[0, :32] = 0
    weight[0, 32:64] = np.arange(-16, 16) / 2  # halves of a step among them
    weight[0, 32] = 63.5
    weight[-1, 64:] *= np.float32(1e-9)  # a step below the normal halves
    with WeightRefiner(None, 2) as refiner:
        rounded = refiner.round(weight)
    expected = quantize(weight, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(rounded.packed[0], expected)
    difference = weight.astype(np.float64) - dequantize(expected, GGMLQuantizationType.Q8_0)
    assert sum(rounded.errors) == pytest.approx((difference**2).sum(), rel=1e-5)
    assert sum(rounded.powers) == pytest.approx((weight.astype(np.float64) ** 2).sum(), rel=1e-6)
    assert len(rounded.errors) == len(rounded.powers) == -(-rows // 64)


class Inputs:
    """Every weight has an input of its own; which second moments were asked for."""

    sensitivity: Mapping[str, float] = {}

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.widths = widths
        self.asked: list[str] = []

    def input_of(self, weight: str) -> str:
        return weight

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[np.float64]:
        self.asked.append(weight)
        inputs = np.random.default_rng(ord(weight)).standard_normal((256, self.widths[weight]))
        return inputs.T @ (inputs + 0.5 * np.roll(inputs, 1, axis=1)) / 256 + np.eye(self.widths[weight])

    def salience(self, weight: str) -> Salience:
        return Feedback.of(self.matrix(weight)).salience

    def experts(self, weight: str) -> None:
        return None


@pytest.mark.parametrize(
    ("widths", "ahead"),
    [
        ((32, 32, 32, 32), "b"),
        ((32, 32, 128, 32), "bcd"),  # a wide one begins early
        ((32, 128, 128, 32), "b"),  # and no two of them
        ((128, 32, 32, 128), "bc"),
    ],
)
def test_inputs_are_factored_ahead_as_far_as_there_is_room(widths: tuple[int, ...], ahead: str) -> None:
    inputs = Inputs(dict(zip("abcd", widths, strict=True)))
    expected = [ExpectedWeight(name, width, [(Q4_0, width)]) for name, width in inputs.widths.items()]
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((8, w)).astype(np.float32) for n, w in inputs.widths.items()}
    with WeightRefiner(inputs, 1) as refiner:
        alone = [refiner.refine(n, w, [(Q4_0, w.shape[1])]).packed[0].tobytes() for n, w in weights.items()]
    inputs.asked.clear()
    found = []
    with WeightRefiner(inputs, 1) as refiner:
        for i, (name, weight) in enumerate(weights.items()):
            refiner.expect(expected[i + 1 :])
            found.append(refiner.refine(name, weight, [(Q4_0, weight.shape[1])]).packed[0].tobytes())
    assert found == alone
    assert sorted(inputs.asked) == list("abcd")
    inputs.asked.clear()
    with WeightRefiner(inputs, 1) as refiner:
        refiner.expect(expected[1:])
        refiner.refine("a", weights["a"], [(Q4_0, widths[0])])
        while len(inputs.asked) < 1 + len(ahead):  # in another thread
            time.sleep(0.01)
        time.sleep(0.1)
        assert "".join(inputs.asked) == "a" + ahead
