"""The report's two plots, as SVG: a scatter with the Pareto line, and bars with confidence intervals."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 16, 48
_LABEL = 15
"""Least vertical distance of two labels."""
_CHARACTER = 9.0
"""Width of a character of a label, roughly, in the larger letters that a phone gets."""
_LONGEST = 28
"""Characters of a label; the whole name is in the point's tooltip."""


class Point(NamedTuple):
    """One file in the scatter; ``y`` is positive."""

    x: float
    y: float
    label: str


class Bar(NamedTuple):
    """One file's share with its interval, all within 0 and 1."""

    label: str
    value: float
    low: float
    high: float


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both coordinates (smaller is better), by rising x."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def scatter(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Points by name, x linear, y logarithmic, and the Pareto line through them."""
    xs = [p.x for p in points]
    spread = max(xs) - min(xs) or max(xs) or 1.0
    x_low, x_high = max(0.0, min(xs) - 0.08 * spread), max(xs) + 0.08 * spread
    y_low = math.floor(math.log10(min(p.y for p in points)) - 0.1)
    y_high = math.ceil(math.log10(max(p.y for p in points)) + 0.1)

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return (
            _LEFT + right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_open(_WIDTH, _HEIGHT, f"{y_title} against {x_title}")]
    for exponent in range(y_low, y_high + 1):
        _, y = place(x_low, 10.0**exponent)
        parts.append(_line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_write(_LEFT - 8, y + 4, f"{10.0**exponent:g}", anchor="end", kind="tick"))
    for tick in _ticks(x_low, x_high):
        x, _ = place(tick, 10.0**y_low)
        parts.append(_line("grid", x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_write(x, _HEIGHT - _BOTTOM + 18, f"{tick:g}", anchor="middle", kind="tick"))
    parts.append(_write((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_title, anchor="middle", kind="axis"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turn = f' transform="rotate(-90 14 {middle:.1f})"'
    parts.append(_write(14, middle, y_title, anchor="middle", kind="axis", more=turn))
    front = pareto(points)
    path = " ".join("{:.1f},{:.1f}".format(*place(p.x, p.y)) for p in front)
    parts.append(f'<polyline class="front" points="{path}"/>')
    placed: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: -p.y):
        x, y = place(point.x, point.y)
        kind = "point on" if point in front else "point"
        name = html.escape(f"{point.label}: {point.x:.1f} MB, {point.y:.4g}")
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{name}</title></circle>')
        label = _short(point.label)
        width = _CHARACTER * len(label)
        to_left = x + 10 + width > _WIDTH
        start = x - 10 - width if to_left else x + 10
        level = y + 4
        while any(
            abs(level - other) < _LABEL and start < end and begin < start + width
            for begin, end, other in placed
        ):
            level += _LABEL
        placed.append((start, start + width, level))
        parts.append(
            _write(x - 10 if to_left else x + 10, level, label, anchor="end" if to_left else "start")
        )
    return "".join([*parts, "</svg>"])


def interval_bars(bars: Sequence[Bar], *, reference: float) -> str:
    """A horizontal interval with its estimate per file, and a line at ``reference``."""
    label_width = _CHARACTER * max(len(_short(bar.label)) for bar in bars) + 16
    low = max(0.0, math.floor(10 * (min(bar.low for bar in bars) - 0.02)) / 10)
    high = min(1.0, math.ceil(10 * (max(bar.high for bar in bars) + 0.02)) / 10)
    row, head = 30, 10
    height = head + row * len(bars) + 30

    def place(value: float) -> float:
        return label_width + (value - low) / (high - low) * (_WIDTH - label_width - 70)

    parts = [_open(_WIDTH, height, "shares with confidence intervals")]
    for step in range(round(low * 10), round(high * 10) + 1):
        x = place(step / 10)
        parts.append(_line("grid", x, head, x, height - 26))
        parts.append(_write(x, height - 8, f"{10 * step} %", anchor="middle", kind="tick"))
    parts.append(_line("reference", place(reference), head, place(reference), height - 26))
    for number, bar in enumerate(bars):
        y = head + row * (number + 0.5)
        parts.append(_write(label_width - 10, y + 4, _short(bar.label), anchor="end"))
        parts.append(_line("interval", place(bar.low), y, place(bar.high), y))
        name = html.escape(f"{bar.label}: {bar.value:.1%} ({bar.low:.1%} to {bar.high:.1%})")
        x = place(bar.value)
        parts.append(f'<circle class="point on" cx="{x:.1f}" cy="{y}" r="5"><title>{name}</title></circle>')
        parts.append(_write(_WIDTH - 4, y + 4, f"{bar.value:.1%}", anchor="end"))
    return "".join([*parts, "</svg>"])


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "\u2026"


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round numbers between two."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step) + 1)]


def _open(width: float, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(title)}">'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _write(x: float, y: float, text: str, *, anchor: str, kind: str = "label", more: str = "") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}{more}>{html.escape(text)}</text>'
