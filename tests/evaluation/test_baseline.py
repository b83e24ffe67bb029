"""What is lost by keeping a baseline at a tenth of llama-perplexity's size or less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.errors import OutputError
from gguf_splitquant.evaluation.baseline import BaselineCache, BaselineRows, compress, score_against
from gguf_splitquant.evaluation.divergence import score


def language_like(seed: int, rows: int, vocabulary: int, scale: float) -> np.ndarray:
    """Logits with a long tail, as language models have: a few likely tokens and a broad rest."""
    random = np.random.default_rng(seed)
    ranks = random.permuted(np.tile(np.arange(vocabulary), (rows, 1)), axis=1)
    return (-scale * np.log1p(ranks) + random.normal(size=(rows, vocabulary))).astype(np.float32)


@pytest.mark.parametrize("noise", [3.0, 1.0, 0.3, 0.03, 0.001])
def test_the_mean_divergence_survives(noise: float) -> None:
    vocabulary, rows = 32000, 48
    base = language_like(1, rows, vocabulary, 1.6)
    random = np.random.default_rng(2)
    other = (base + noise * random.normal(size=base.shape)).astype(np.float32)
    targets = random.integers(0, vocabulary, rows).astype(np.int32)
    kept = compress(base, targets, seed=3)
    exact, cached = score(base, other, targets), score_against(kept, other, targets)
    assert cached.kld.mean() == pytest.approx(exact.kld.mean(), rel=0.01)
    np.testing.assert_allclose(cached.kld, exact.kld, rtol=0.3)
    np.testing.assert_array_equal(cached.same_top, exact.same_top)
    np.testing.assert_allclose(cached.nll_base, exact.nll_base)
    np.testing.assert_allclose(cached.nll, exact.nll)


def test_size_is_below_a_tenth() -> None:
    for vocabulary in (32000, 49152, 128256, 151936):
        rows = compress(language_like(0, 2, vocabulary, 1.5), np.zeros(2, np.int32), seed=0)
        # llama-perplexity: two bytes per token and eight per position
        assert rows.nbytes <= 2 * (2 * vocabulary + 8) / 10


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 400),
    scale=st.floats(0, 40),
    noise=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
)
def test_any_logits_give_a_divergence(seed: int, vocabulary: int, scale: float, noise: float) -> None:
    base = language_like(seed, 2, vocabulary, scale)
    other = (base + noise * np.random.default_rng(seed).normal(size=base.shape)).astype(np.float32)
    targets = np.zeros(2, np.int32)
    cached = score_against(compress(base, targets, seed), other, targets)
    assert np.isfinite(cached.kld).all() and (cached.kld >= 0).all()
    if noise == 0:
        assert cached.kld.max() < 1e-6


def test_masked_tokens_and_broken_rows() -> None:
    base = language_like(5, 3, 500, 1.5)
    base[0, 100:] = -np.inf
    base[1, 7] = np.nan
    targets = np.zeros(3, np.int32)
    scores = score_against(compress(base, targets, seed=0), base, targets)
    finite, broken = scores.finite()
    assert broken == 1 and len(finite) == 2
    assert finite.kld.max() < 1e-6


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    cache = BaselineCache(tmp_path / "a" / "b", {"text": "t"})
    rows = compress(language_like(0, 3, 1000, 1.5), np.arange(3, dtype=np.int32), seed=0)
    assert 7 not in cache
    cache.store(7, rows)
    assert 7 in cache
    again = cache.load(7)
    for name in BaselineRows.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
    assert sorted(p.name for p in cache.folder.iterdir()) == ["chunk-00007.npz", "head.json"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="file/cache: cannot write"):
        BaselineCache(blocked / "cache", {})
