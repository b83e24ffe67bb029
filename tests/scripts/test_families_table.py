"""docs/families.md is written from test outcomes, and says what happened."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gguf_splitquant.sources.families import FAMILIES
from scripts import families_table
from scripts.families_table import COLUMNS, TABLE, Outcomes, cases_of


def outcomes(**passed: list[bool]) -> Outcomes:
    """As if pytest had run ``test`` on these cases."""
    made = Outcomes()
    items: list[Any] = [
        SimpleNamespace(
            nodeid=f"test[{name}]", originalname="test", callspec=SimpleNamespace(params={"name": name})
        )
        for name in passed
    ]
    made.pytest_collection_modifyitems([*items, SimpleNamespace(nodeid="other")])
    for name, runs in passed.items():
        for outcome in runs:
            report: Any = SimpleNamespace(nodeid=f"test[{name}]", when="call", passed=outcome)
            made.pytest_runtest_logreport(report)
    return made


def test_cells() -> None:
    made = outcomes(a=[True, True], b=[True, False])
    assert made.cell(["test"], ["a"]) == "yes (2)"
    assert made.cell(["test"], ["a", "b"]) == "**no** (1 of 4)"
    assert made.cell(["test"], ["c"]) == made.cell(["never"], ["a"]) == "-"


def test_what_could_not_be_set_up_is_not_shown() -> None:
    made = outcomes(a=[])
    report: Any = SimpleNamespace(nodeid="test[a]", when="setup", passed=False)
    made.pytest_runtest_logreport(report)
    assert made.cell(["test"], ["a"]) == "**no** (1 of 1)"


def test_every_architecture_has_a_case_and_a_row() -> None:
    text = TABLE.read_text(encoding="utf-8")
    for architecture in FAMILIES:
        assert cases_of(architecture), architecture
        assert f"| `{architecture}` |" in text, f"run {families_table.__name__}"
    assert all(f"| {column} " in text for column in COLUMNS)
