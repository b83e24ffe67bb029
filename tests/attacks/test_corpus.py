"""Every bad file gives its error, and only that: no crash, no hang, no explosion of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.attack import Attack
from tests.attacks.bounded_process import BoundedProcess
from tests.attacks.corpus import CORPUS

MiB = 1 << 20
BUDGET = 1024 * MiB
"""Memory for the worst file of each kind, the file's own bytes included."""

CASES = [(reader, attack) for reader, attacks in CORPUS.items() for attack in attacks]


@pytest.fixture(scope="module")
def process() -> Iterator[BoundedProcess]:
    process = BoundedProcess()
    yield process
    process.close()


@pytest.mark.parametrize(
    ("reader", "attack"), CASES, ids=[f"{reader}: {attack.name}" for reader, attack in CASES]
)
def test_attack(reader: str, attack: Attack, process: BoundedProcess, tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    path = attack.make(place)
    before = sorted(tmp_path.rglob("*"))
    verdict = process.read(reader, path)
    assert verdict.kind == ("refused" if attack.error else ""), verdict.message
    assert re.search(attack.error, verdict.message), verdict.message
    assert verdict.message.isprintable()
    assert verdict.bytes < BUDGET
    # reading writes nothing
    assert sorted(tmp_path.rglob("*")) == before
