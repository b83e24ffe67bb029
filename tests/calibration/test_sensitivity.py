"""Sensitivities on stories15M: small errors that matter, and the divergence they predict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.calibration.sensitivity import Probing, measure_sensitivity, row_scales
from gguf_splitquant.linear_algebra import blas_threads
from gguf_splitquant.planning.curves import Salience
from gguf_splitquant.refining.metric import Feedback
from tests.calibration.test_calibrate import own_text
from tests.gguf_files import FLOAT, convert_once

NAMES = ["blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.3.attn_v.weight", "blk.5.attn_v.weight"]
PROBING = Probing(texts=2, length=48, layers=6)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_once(stories15m, tmp_path_factory.mktemp("model"), FLOAT, "float")


@pytest.fixture(scope="module")
def text(model: Path) -> NDArray[np.int32]:
    return own_text(model, OwnText(2, 48))


class Even:
    """Inputs whose channels are independent and of one size."""

    sensitivity: Mapping[str, float] = {}

    def input_of(self, weight: str) -> str:
        return weight

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[np.float32]:
        return np.ones(768 if "ffn_down" in weight else 288, np.float32)

    def feedback(self, weight: str) -> Feedback:
        return Feedback.of(self.matrix(weight))

    def salience(self, weight: str) -> Salience:
        return self.feedback(weight).salience

    def experts(self, weight: str) -> None:
        return None


def measure(
    model: Path, text: NDArray[np.int32], names: list[str], how: Probing = PROBING
) -> dict[str, float]:
    return measure_sensitivity(Runnable(model), text, row_scales(Runnable(model), names), Even(), how)


def test_the_divergence_grows_as_the_square_of_the_errors(model: Path, text: NDArray[np.int32]) -> None:
    # so the quotient is a property of the layer, not of the size of the errors
    small, large = (measure(model, text, NAMES, Probing(2, 48, strength=s, layers=6)) for s in (0.1, 0.2))
    for name in NAMES:
        assert 0.5 < small[name] / large[name] < 2
        assert small[name] > 0


def test_layers_in_between_are_interpolated(model: Path, text: NDArray[np.int32]) -> None:
    names = [n for n in NAMES if "attn_v" in n]
    found = measure(model, text, names, Probing(2, 48, layers=2))
    first, middle, last = (found[n] for n in names)
    assert np.log(middle) == pytest.approx(np.log(first) + 3 / 5 * (np.log(last) - np.log(first)))


def test_no_weight_counts_for_nothing(model: Path, text: NDArray[np.int32]) -> None:
    rows = row_scales(Runnable(model), NAMES)
    faint, loud = "blk.0.ffn_down.weight", "blk.3.attn_v.weight"
    rows[faint] = rows[faint] * np.float32(1e-12)
    rows["blk.0.attn_v.weight"] = np.zeros_like(rows["blk.0.attn_v.weight"])
    found = measure_sensitivity(Runnable(model), text, rows, Even(), PROBING)
    assert all(0 < value < np.inf for value in found.values())

    def divergence(name: str) -> float:
        power = float(np.vdot(rows[name], rows[name])) * len(Even().matrix(name))
        return found[name] * PROBING.strength**2 * power

    others = max(divergence(name) for name in (loud, "blk.5.attn_v.weight"))
    assert divergence(faint) == pytest.approx(1e-6 * others, rel=1e-3)


def test_the_same_seed_gives_the_same_figures(model: Path, text: NDArray[np.int32]) -> None:
    assert measure(model, text, NAMES[:2]) == measure(model, text, NAMES[:2])


def test_the_figures_do_not_depend_on_blas_threads(model: Path, text: NDArray[np.int32]) -> None:
    names = ["blk.0.ffn_gate.weight", "blk.0.ffn_down.weight"]  # on some processors only the first would
    found = []
    for count in (1, 2, 3):
        with blas_threads(count):
            found.append(measure(model, text, names))
    assert found[0] == found[1] == found[2]


def test_row_scales_are_root_mean_squares(model: Path) -> None:
    scales = row_scales(Runnable(model), {"blk.0.ffn_down.weight", "blk.0.attn_norm.weight", "no such"})
    assert list(scales) == ["blk.0.ffn_down.weight"]
    assert scales["blk.0.ffn_down.weight"].shape == (288,)
    assert (scales["blk.0.ffn_down.weight"] > 0).all()


@pytest.mark.parametrize(("size", "texts"), [(50_000_000, 8), (600_000_000, 5), (2_500_000_000, 2)])
def test_small_models_are_probed_with_more_texts(size: int, texts: int) -> None:
    assert Probing().texts_for(size) == texts
    assert Probing(texts=1).texts_for(size) == 1


@pytest.mark.parametrize(
    ("size", "layers"), [(10**6, 10), (270_000_000, 10), (1_500_000_000, 10), (2_470_000_000, 8), (10**11, 8)]
)
def test_large_models_are_probed_in_fewer_layers(size: int, layers: int) -> None:
    assert Probing().layers_for(size) == layers
    assert Probing(layers=3).layers_for(size) == 3
