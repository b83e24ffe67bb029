"""Calibration on stories15M: what is gathered is what the model computes, once per checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from gguf_splitquant.calibration.calibrate import (
    Calibration,
    calibrate,
    chat_opening,
    gather,
    user_text,
    write_and_gather,
)
from gguf_splitquant.calibration.experts import Routing
from gguf_splitquant.calibration.moment_writer import MomentWriter
from gguf_splitquant.calibration.moments import Moments, TokenWeighting
from gguf_splitquant.calibration.observer import HEAD, ObservedEngine
from gguf_splitquant.calibration.own_text import OwnText, write_own_text, writing_options
from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.calibration.sensitivity import Probing
from gguf_splitquant.errors import EngineError, SplitQuantError
from gguf_splitquant.linear_algebra import blas_threads
from gguf_splitquant.refining.metric import Feedback
from gguf_splitquant.runtime.engine import Engine, EngineOptions
from tests.gguf_files import FLOAT, convert_once

HOW = OwnText(sequences=4, length=40, temperatures=(1.0,))


def own_text(model: Path, how: OwnText) -> NDArray[np.int32]:
    with ObservedEngine(Runnable(model), writing_options(how)) as engine:
        return write_own_text(engine, how, chat_opening(model))


@pytest.fixture(scope="module")
def model(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_once(stories15m, tmp_path_factory.mktemp("model"), FLOAT, "float")


@pytest.fixture(scope="module")
def text(model: Path) -> NDArray[np.int32]:
    return own_text(model, HOW)


@pytest.fixture(scope="module")
def moments(model: Path, text: NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory) -> Moments:
    return gather(Runnable(model), text, tmp_path_factory.mktemp("moments"), TokenWeighting(), {})


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, NDArray[np.float32]]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in GGUFReader(model).tensors}


def test_the_same_seed_writes_the_same_text(model: Path, text: NDArray[np.int32]) -> None:
    assert text.shape == (4, 40) and text.dtype == np.int32
    np.testing.assert_array_equal(own_text(model, HOW), text)
    assert (own_text(model, OwnText(4, 40, seed=1)) != text).mean() > 0.5


def test_some_pairs_of_texts_are_written_at_another_temperature(model: Path, text: NDArray[np.int32]) -> None:
    other = own_text(model, dataclasses.replace(HOW, temperatures=(1.0, 1.5)))
    np.testing.assert_array_equal(other[:2], text[:2])
    assert (other[2:] != text[2:]).mean() > 0.5


def test_texts_begin_as_the_model_expects_and_differ(model: Path, text: NDArray[np.int32]) -> None:
    with Engine(model, EngineOptions(vocabulary_only=True)) as engine:
        assert engine.adds_bos and (text[:, 0] == engine.bos).all()
    assert len(set(text[:, 1].tolist())) == len(text)


def test_the_model_finds_its_own_text_likely(model: Path, text: NDArray[np.int32]) -> None:
    def surprise(row: NDArray[np.int32]) -> float:
        with Engine(model, EngineOptions(n_ctx=256)) as engine:
            logits = np.concatenate([slab.logits for slab in engine.logits(row)])[2:-1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(-logits[np.arange(len(logits)), row[3:]].mean())

    shuffled = text[0].copy()
    np.random.default_rng(0).shuffle(shuffled[2:])
    assert surprise(text[0]) < 4 < surprise(shuffled)


def test_first_layer_reads_the_normed_embedding(
    text: NDArray[np.int32], moments: Moments, weights: dict[str, NDArray[np.float32]]
) -> None:
    x = weights["token_embd.weight"][text.reshape(-1)].astype(np.float64)
    x *= weights["blk.0.attn_norm.weight"] / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(moments.matrix("blk.0.attn_q.weight"), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments.energy("blk.0.attn_k.weight"), (x**2).mean(axis=0), rtol=1e-4)


def test_head_input_explains_the_logits(
    model: Path, text: NDArray[np.int32], moments: Moments, weights: dict[str, NDArray[np.float32]]
) -> None:
    power = 0.0
    with Engine(model, EngineOptions(n_ctx=256)) as engine:
        for row in text:
            power += sum(float((slab.logits.astype(np.float64) ** 2).sum()) for slab in engine.logits(row))
    head = weights["token_embd.weight"].astype(np.float64)  # tied
    predicted = float(((head @ moments.matrix(HEAD)) * head).sum())
    assert predicted == pytest.approx(power / text.size, rel=0.01)  # F16 cache and batch shapes differ


def test_every_linear_layer_is_seen_and_shared_inputs_are_gathered_once(
    moments: Moments, weights: dict[str, NDArray[np.float32]]
) -> None:
    linear = {n for n, w in weights.items() if w.ndim == 2 and n.startswith("blk.")}
    assert linear | {HEAD} == set(moments.sharing)
    assert moments.input_of("blk.3.attn_k.weight") == moments.input_of("blk.3.attn_v.weight")
    assert moments.input_of("blk.3.ffn_up.weight") == moments.input_of("blk.3.ffn_gate.weight")
    assert len(moments.files) == 4 * 6 + 1
    assert set(moments.tokens.values()) == {160}
    with pytest.raises(SplitQuantError, match="did not see"):
        moments.matrix("blk.99.attn_q.weight")


def test_writing_and_gathering_at_once_is_gathering_from_what_was_written(
    model: Path, text: NDArray[np.int32], tmp_path: Path
) -> None:
    how = Calibration(own=HOW)
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    tokens, once = write_and_gather(Runnable(model), tmp_path / "once", how, {})
    np.testing.assert_array_equal(tokens, text)
    twice = gather(
        Runnable(model), np.ascontiguousarray(text[:, :-1]), tmp_path / "twice", TokenWeighting(), {}
    )
    assert once.sharing == twice.sharing and once.tokens == twice.tokens
    for name in twice.files:
        expected = twice.matrix(name)
        np.testing.assert_allclose(once.matrix(name), expected, atol=0.02 * np.diagonal(expected).max())
        np.testing.assert_allclose(np.trace(once.matrix(name)), np.trace(expected), rtol=0.01)


def test_a_calibrated_checkpoint_needs_no_model(model: Path, tmp_path: Path) -> None:
    how = Calibration(own=OwnText(2, 16))
    first = calibrate(model, "digest", how, cache=tmp_path)
    again = calibrate(tmp_path / "gone.gguf", "digest", how, cache=tmp_path)
    assert again == first
    with pytest.raises(EngineError, match="no such file"):
        calibrate(tmp_path / "gone.gguf", "other weights", how, cache=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [first.folder.name]  # no leftovers of the failure


def test_what_plans_would_have_to_factor_is_kept(model: Path, tmp_path: Path) -> None:
    how = Calibration(own=OwnText(2, 16), probing=Probing(texts=2, length=16, layers=2))
    moments = calibrate(model, "digest", how, cache=tmp_path)
    kept = sorted(path.name for path in moments.folder.glob("*-salience.npy"))
    assert kept == sorted(name.replace(".npy", "-salience.npy") for name in moments.files.values())
    assert not list(moments.folder.glob("*partial*"))
    for name in ("blk.2.attn_k.weight", "blk.5.ffn_down.weight", HEAD):
        with blas_threads(1):
            exact = Feedback.of(moments.matrix(name)).salience
        found = moments.salience(name)
        assert found.order.dtype == np.int64
        np.testing.assert_array_equal(found.order, exact.order)
        np.testing.assert_array_equal(found.left, exact.left)
    first, second = (moments.folder / name for name in kept[:2])
    expected = moments.salience(kept_under(moments, first))
    first.unlink()  # of a calibration by an earlier version
    np.testing.assert_allclose(moments.salience(kept_under(moments, first)).left, expected.left, rtol=1e-3)
    for left in (100, 0):
        second.write_bytes(second.read_bytes()[:left])
        with pytest.raises(SplitQuantError, match=r"salience\.npy: cannot be read"):
            moments.salience(kept_under(moments, second))


def kept_under(moments: Moments, path: Path) -> str:
    """The weight whose input's salience is in a file."""
    matrix = path.name.replace("-salience.npy", ".npy")
    return next(name for name, file in moments.files.items() if file == matrix)


def test_a_users_text_is_cut_into_pieces_from_all_over(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"Once upon a time there were {i} cats." for i in range(200)))
    pieces = user_text(model, path, length=64, most_tokens=320)
    assert pieces.shape == (5, 64)
    with Engine(model, EngineOptions(vocabulary_only=True)) as engine:
        assert (pieces[:, 0] == engine.bos).all()
        assert "were 0 cats" in engine.detokenize(pieces[0])
        assert "19" in engine.detokenize(pieces[-1])
    path.write_text("short")
    with pytest.raises(SplitQuantError, match="tokens"):
        user_text(model, path, length=64, most_tokens=320)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SplitQuantError, match="UTF-8"):
        user_text(model, path, length=64, most_tokens=320)


def test_what_a_sink_raises_reaches_the_caller(model: Path, text: NDArray[np.int32]) -> None:
    def broken(name: str, _inputs: NDArray[np.float32], _routing: object) -> None:
        raise ValueError(name)

    options = EngineOptions(n_ctx=256, n_batch=40, n_ubatch=40)
    engine = ObservedEngine(Runnable(model), options, broken)
    with engine, pytest.raises(ValueError, match=r"blk\.0\.attn_"):
        engine.observe(text[0], np.arange(40), 0)


def test_overflowing_inputs_are_named(tmp_path: Path) -> None:
    writer = MomentWriter(tmp_path, TokenWeighting())
    with pytest.raises(EngineError, match=r"blk\.0\.ffn_down\.weight.*overflows"):
        writer("blk.0.ffn_down.weight", np.array([[1, np.inf]], np.float32))


@pytest.mark.parametrize("routed", [False, True])
def test_statistics_do_not_depend_on_where_they_grow(tmp_path: Path, routed: bool) -> None:
    """In memory, of rows in files, or some here and some there; however many rows come at a time."""
    rng = np.random.default_rng(0)
    widths = {"a": 40, "b": 560, "c": 40}
    inputs = {name: rng.standard_normal((700, n)).astype(np.float32) for name, n in widths.items()}
    experts = rng.integers(0, 4, (700, 2)).astype(np.int32)
    found = []
    for memory, step in ((0, 32), (1 << 30, 32), (200_000, 100), (0, 700), (1 << 30, 256)):
        folder = tmp_path / f"{memory}-{step}"
        folder.mkdir()
        writer = MomentWriter(folder, TokenWeighting(), 700, memory)
        for start in range(0, 700, step):
            rows = slice(start, start + step)
            for name, values in inputs.items():
                writer(name, values[rows], Routing(experts[rows], 4) if routed else None)
        waiting = {path.name for path in folder.glob("*.waiting")}
        # the narrow ones are the first to have room
        assert len(waiting) == (0 if memory == 1 << 30 else 3 if memory == 0 or step == 700 else 1)
        found.append(writer.finish({name: name for name in inputs}, {}))
        assert not list(folder.glob("*.waiting"))
    for name, values in inputs.items():
        exact = values.T.astype(np.float64) @ values / 700
        np.testing.assert_allclose(found[0].matrix(name), exact, rtol=0, atol=1e-5)
        for other in found[1:]:
            np.testing.assert_array_equal(other.matrix(name), found[0].matrix(name))
            np.testing.assert_array_equal(other.energy(name), found[0].energy(name))
            if routed:
                np.testing.assert_array_equal(other.matrix(name, 2), found[0].matrix(name, 2))


def test_a_disk_without_room_is_noticed_at_once(tmp_path: Path) -> None:
    rows = np.ones((4, 64), np.float32)
    enough, too_much = (MomentWriter(tmp_path, TokenWeighting(), tokens) for tokens in (1000, 1 << 50))
    for writer in (enough, too_much):
        writer("a", rows)  # after one pass all inputs are known
    enough("a", rows)
    with pytest.raises(OSError, match=r"No space left.*bytes are needed"):
        too_much("a", rows)


def test_weighting_limits_only_the_massive_tokens() -> None:
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    x[0] *= 1000
    limited = TokenWeighting(limit=4).apply(x)
    energy = (limited**2).sum(axis=1)
    assert energy[0] == pytest.approx(4 * np.median((x**2).sum(axis=1)), rel=1e-3)
    assert (limited[1:] == x[1:]).mean() > 0.9
    np.testing.assert_allclose(
        limited[0] / np.linalg.norm(limited[0]), x[0] / np.linalg.norm(x[0]), rtol=1e-4
    )
    assert TokenWeighting().apply(x) is x


@pytest.mark.parametrize("weighting", [TokenWeighting(), TokenWeighting(limit=4), TokenWeighting(floor=1)])
def test_inputs_of_nothing_stay_nothing(weighting: TokenWeighting) -> None:
    x = np.zeros((5, 3), np.float32)
    assert not weighting.apply(x).any()
    x[0] = 2  # most tokens have no energy: there is no typical one to limit this one by
    np.testing.assert_array_equal(weighting.apply(x), x)


def test_weighting_lifts_faint_tokens_to_the_floor() -> None:
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    x[0] *= 1e-3
    x[1] = 0
    lifted = TokenWeighting(floor=1).apply(x)
    energy = (lifted**2).sum(axis=1)
    median = np.median((x**2).sum(axis=1))
    assert energy[0] == pytest.approx(median, rel=1e-3) and energy[1] == 0
    assert (energy[2:] >= median * 0.999).all()
    loud = (x**2).sum(axis=1) > median
    np.testing.assert_allclose(lifted[loud], x[loud], rtol=1e-6)


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (
            "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}",
            "<|im_start|>user\n",
        ),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[0].content }}", None),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", None),
        ("{% broken", None),
    ],
)
def test_opening_of_a_chat(tmp_path: Path, template: str, opening: str | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert chat_opening(tmp_path / "m.gguf") == opening


def test_a_folder_that_is_no_calibration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(SplitQuantError, match="not a calibration"):
        Moments.open(tmp_path)
