"""The report's arithmetic; how it looks is checked in a browser by hand."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.evaluation.base import Column, EvaluationResult, Figure, ModelResult
from gguf_splitquant.evaluation.heat_map import heat_map
from gguf_splitquant.evaluation.plots import Bar, Point, interval_bars, pareto, scatter
from gguf_splitquant.evaluation.report import render_report
from gguf_splitquant.evaluation.results import ModelFacts, Results

points = st.lists(st.tuples(st.floats(0.1, 1e5), st.floats(1e-9, 100)), min_size=1, max_size=12, unique=True)


@given(points)
def test_pareto_points_are_those_that_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    all_points = [Point(x, y, str(i)) for i, (x, y) in enumerate(pairs)]
    front = pareto(all_points)
    for point in all_points:
        beaten = any(
            other.x <= point.x and other.y <= point.y and (other.x, other.y) != (point.x, point.y)
            for other in all_points
        )
        assert (point in front) != beaten


@settings(max_examples=50, deadline=None)
@given(points)
def test_scatter_stays_inside_its_frame(pairs: list[tuple[float, float]]) -> None:
    svg = scatter([Point(x, y, f"file {i}") for i, (x, y) in enumerate(pairs)], x_title="x", y_title="y")
    root = ElementTree.fromstring(svg)
    circles = root.findall("circle")
    assert len(circles) == len(pairs)
    for circle in circles:
        assert 84 <= float(circle.attrib["cx"]) <= 620 and 16 <= float(circle.attrib["cy"]) <= 352


def test_bars() -> None:
    root = ElementTree.fromstring(
        interval_bars([Bar("a", 0.5, 0.4, 0.6), Bar("b", 0.3, 0.2, 0.4)], reference=0.5)
    )
    first, second = root.findall("line[@class='interval']")
    assert float(first.attrib["x1"]) == pytest.approx(float(second.attrib["x2"]))
    reference = root.find("line[@class='reference']")
    assert reference is not None
    assert reference.attrib["x1"] == root.findall("circle")[0].attrib["cx"]


def test_heat_follows_the_logarithm() -> None:
    page = heat_map({("attn_q", 0): 0.001, ("attn_q", 1): 0.01, ("ffn_up", 1): 0.1, ("ffn_up", 0): 0.0})
    assert re.findall(r"--heat:(\d+)%", page) == ["0", "50", "0", "100"]
    assert heat_map({("a", 0): 1.0}).count("<td style") == 1


def facts(file: str, size: int, **more: object) -> ModelFacts:
    known = {
        "file_bpw": 4.5,
        "linear_bpw": None,
        "types": {"F32": 1},
        "layout": None,
        "recipe": None,
        "errors": {},
    }
    return ModelFacts(**({"file": file, "file_bytes": size} | known | more))  # type: ignore[arg-type]


def test_names_are_text_and_best_figures_are_marked() -> None:
    columns = (Column("kld", "mean KLD", ".3f", "lower"), Column("acc", "acc", ".1%", "higher"))
    results = Results(
        [
            facts("/m/base.gguf", 100),
            facts("/m/<b>&.gguf", 50, recipe='{"k": 3}', errors={"blk.0.ffn_up.weight": 0.5}),
            facts("/m/q8.gguf", 70, recipe="not json"),
        ],
        [
            EvaluationResult(
                "kld",
                1,
                {"context": 512},
                columns,
                [
                    ModelResult(Path("/m/base.gguf"), {"kld": Figure(1e-6), "acc": Figure(None)}),
                    ModelResult(Path("/m/<b>&.gguf"), {"kld": Figure(0.5, 0.1), "acc": Figure(0.25)}),
                    ModelResult(
                        Path("/m/q8.gguf"),
                        {"kld": Figure(0.01), "acc": Figure(0.2, low=0.1, high=0.3)},
                        ["odd"],
                    ),
                ],
            )
        ],
    )
    page = render_report(results)
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    assert re.findall(r'class="n best">([^<]*)', page) == ["25.0%", "0.010"]
    assert "0.500 <small>± 0.100</small>" in page and "20.0% <small>10.0% to 30.0%</small>" in page
    assert "k 3" in page and "not json" in page and "q8.gguf: odd" in page
    assert page.count("<circle") == 2
    assert "Noise floor" in page
