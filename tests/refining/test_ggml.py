"""ggml's own quantizer through ctypes: the bytes that llama.cpp decodes, and the importance is heard."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize

from gguf_splitquant.convert import convert
from gguf_splitquant.errors import RecipeError
from gguf_splitquant.recipe import GGML_TYPES, Recipe
from gguf_splitquant.refining.ggml import quantize_with_ggml
from tests.sample_models import small_model

Q = GGMLQuantizationType
WEIGHT = np.random.default_rng(0).standard_normal((600, 512)).astype(np.float32)
FLAT = np.ones(512, np.float32)

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", GGML_TYPES)
def test_codebook_types_decode_close_to_the_weights(name: str) -> None:
    decoded = dequantize(quantize_with_ggml(WEIGHT, Q[name], FLAT, threads=2), Q[name])
    assert ((WEIGHT - decoded) ** 2).mean() < 0.5  # 1.6 bits a weight of unit variance


def test_a_type_without_a_choice_is_the_reference() -> None:
    packed = quantize_with_ggml(WEIGHT, Q.Q8_0, FLAT, threads=2)
    np.testing.assert_array_equal(packed, quantize(WEIGHT, Q.Q8_0))


def test_important_columns_are_kept_better() -> None:
    importance = FLAT.copy()
    importance[::2] = 50

    def error(weights: np.ndarray) -> float:
        decoded = dequantize(quantize_with_ggml(WEIGHT, Q.IQ3_S, weights, threads=1), Q.IQ3_S)
        return float(((WEIGHT - decoded)[:, ::2] ** 2).mean())

    assert error(importance) < 0.9 * error(FLAT)


def test_threads_and_slabs_change_nothing() -> None:
    one, four = (quantize_with_ggml(WEIGHT, Q.IQ2_XS, FLAT, threads=n) for n in (1, 4))
    np.testing.assert_array_equal(one, four)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match="rows of 96 values are not whole blocks of 256"):
        quantize_with_ggml(WEIGHT[:, :96], Q.IQ3_S, FLAT[:96], threads=1)


def test_a_file_of_such_a_type(tmp_path: object) -> None:
    report = convert(small_model(), tmp_path / "out.gguf", Recipe(layout="stock", qtype="IQ3_S"))  # type: ignore[operator]
    types = {o.name: o.qtype.name for o in report.plan.outputs}
    assert types["blk.0.attn_q.weight"] == "IQ3_S"
    assert 0 < report.relative_errors["blk.0.attn_q.weight"] < 0.1
