"""A calibration that is killed while matrices are made of rows goes on at the input where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.calibration.calibrate import Calibration, calibrate
from gguf_splitquant.calibration.experts import Routing
from gguf_splitquant.calibration.gathered import complete_moments, is_gathered
from gguf_splitquant.calibration.moment_writer import MomentWriter
from gguf_splitquant.calibration.moments import Moments, TokenWeighting
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.calibration.sensitivity import Probing
from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.progress import Progress
from tests.gguf_files import FLOAT, convert_once
from tests.killing import kill_when

HOW = Calibration(own=OwnText(4, 32), probing=Probing(texts=2, length=16, layers=2))

SLOWLY = """
import sys, time
from pathlib import Path
from gguf_splitquant.calibration.calibrate import calibrate
from tests.calibration.test_gathered import HOW

class Slow:
    def start(self, what, total, unit): self.what = what
    def advance(self, amount, note=""): time.sleep(0.1 if self.what == "adding up statistics" else 0)
    def finish(self): ...

calibrate(Path(sys.argv[1]), "digest", HOW, memory=0, cache=Path(sys.argv[2]), progress=Slow())
"""


class Noted(Progress):
    """What was done."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.total = 0

    def start(self, what: str, total: int, unit: str) -> None:
        self.phases.append(what)
        if what == "adding up statistics":
            self.total = total

    def advance(self, amount: int, note: str = "") -> None: ...

    def finish(self) -> None: ...


def rows_of_three(folder: Path, routed: bool = False) -> None:
    """Rows of three inputs, none of which has a place in memory."""
    rng = np.random.default_rng(0)
    writer = MomentWriter(folder, TokenWeighting())
    for _ in range(3):
        experts = Routing(rng.integers(0, 4, (500, 2)).astype(np.int32), 4) if routed else None
        for name in ("a", "b", "c"):
            writer(name, rng.standard_normal((500, 24)).astype(np.float32), experts)
    writer.keep({name: name for name in ("a", "b", "c")})


def assert_equal(one: Moments, other: Moments) -> None:
    assert one.tokens == other.tokens and one.uses == other.uses and one.sharing == other.sharing
    for name in one.files:
        np.testing.assert_array_equal(one.matrix(name), other.matrix(name))
        np.testing.assert_array_equal(one.energy(name), other.energy(name))
        for expert in range(len(one.uses.get(name, ()))):
            np.testing.assert_array_equal(one.matrix(name, expert), other.matrix(name, expert))


@pytest.mark.engine
def test_a_killed_calibration_goes_on(stories15m: Path, tmp_path: Path) -> None:
    model = convert_once(stories15m, tmp_path, FLOAT, "float")
    cache = tmp_path / "killed"
    kill_when(lambda: any(cache.glob("unfinished-*/00005.npy")), ["-c", SLOWLY, str(model), str(cache)])
    (work,) = (path for path in cache.glob("unfinished-*") if path.is_dir())
    assert is_gathered(work) and list(work.glob("*.waiting"))
    noted = Noted()
    resumed = calibrate(model, "digest", HOW, cache=cache, progress=noted)
    assert noted.phases[0] == "adding up statistics"  # the text is not written again
    # of 25 inputs the five before the one that was seen; that one may not be noted yet
    assert noted.total <= 20 * 4 * 31
    whole = calibrate(model, "digest", HOW, memory=0, cache=tmp_path / "whole")
    assert_equal(resumed, whole)
    assert resumed.sensitivity == whole.sensitivity
    names = [sorted(path.name for path in moments.folder.iterdir()) for moments in (resumed, whole)]
    assert names[0] == names[1]
    assert not any("waiting" in name or "partial" in name or "gathered" in name for name in names[0])


@pytest.mark.parametrize("routed", [False, True])
def test_an_input_that_was_begun_is_begun_again(tmp_path: Path, routed: bool) -> None:
    class Stop(Noted):
        """Breaks off in the middle of the second input."""

        def advance(self, amount: int, note: str = "") -> None:
            if note == "b":
                raise KeyboardInterrupt

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        rows_of_three(tmp_path / name, routed)
    whole = complete_moments(tmp_path / "whole", TokenWeighting(), {})
    with pytest.raises(KeyboardInterrupt):
        complete_moments(tmp_path / "broken", TokenWeighting(), {}, progress=Stop())
    assert (tmp_path / "broken" / "00000.npy").exists()
    noted = Noted()
    assert_equal(complete_moments(tmp_path / "broken", TokenWeighting(), {}, progress=noted), whole)
    assert noted.total == 2 * 1500


def test_damaged_notes_are_refused(tmp_path: Path) -> None:
    rows_of_three(tmp_path)
    record = tmp_path / "gathered" / "00001.npz"
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(SplitQuantError, match=r"gathered: cannot be read.*delete"):
        complete_moments(tmp_path, TokenWeighting(), {})
    record.unlink()
    (tmp_path / "gathered" / "sharing.json").write_text(json.dumps({})[:1])
    with pytest.raises(SplitQuantError, match="cannot be read"):
        complete_moments(tmp_path, TokenWeighting(), {})
