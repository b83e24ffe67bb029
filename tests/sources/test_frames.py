"""Every family's checkpoint runs in llama.cpp from where it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.calibration.runnable import runnable
from gguf_splitquant.sources import open_model
from tests.calibration.probing import disturbed_logits
from tests.calibration.test_runnable import ROOM, TEXT, filled, logits

from .family_cases import FAMILY_CASES

pytestmark = [pytest.mark.oracle, pytest.mark.engine]


@ROOM
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_family_computes_the_same(official_files: Path, tmp_path: Path, name: str, room: int) -> None:
    model = open_model(official_files / name, pre_tokenizer=FAMILY_CASES[name].pre)
    with runnable(model, tmp_path, room) as frame:
        assert len(frame.elsewhere) > len(model.tensors) // 4
        expected = logits(filled(frame, tmp_path / "full.gguf"))
        assert expected.std() > 0.1
        np.testing.assert_array_equal(logits(frame), expected)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_layers_that_are_known_are_left_out(official_files: Path, tmp_path: Path, name: str) -> None:
    model = open_model(official_files / name, pre_tokenizer=FAMILY_CASES[name].pre)
    with runnable(model, tmp_path, 1 << 40) as frame:
        (target, *_) = [n for n in frame.elsewhere if n.startswith("blk.1.") and "norm" not in n]
        every, _ = disturbed_logits(frame, TEXT, [target], layers=())
        known, left_out = disturbed_logits(frame, TEXT, [target], layers=(1,))
    assert left_out > 10
    np.testing.assert_array_equal(known, every)
