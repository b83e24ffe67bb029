"""Errors of all tensors at a glance: a table of coloured cells, kinds by layers."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping


def heat_map(cells: Mapping[tuple[str, int], float]) -> str:
    """An HTML table.

    Args:
        cells: positive value by kind of tensor and layer. The colour follows the logarithm.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    logs = [math.log10(value) for value in cells.values() if value > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    head = "".join(f"<th>{layer}</th>" for layer in layers)
    rows = []
    for kind in kinds:
        row = []
        for layer in layers:
            value = cells.get((kind, layer))
            if value is None:
                row.append("<td></td>")
                continue
            share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
            name = html.escape(f"layer {layer}, {kind}: {value:.3g}")
            row.append(f'<td style="--heat:{100 * share:.0f}%" title="{name}"></td>')
        rows.append(f"<tr><th>{html.escape(kind)}</th>{''.join(row)}</tr>")
    scale = f'<p class="scale"><span>{10**low:.2g}</span><i></i><span>{10**high:.2g}</span></p>'
    table = (
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return f'<div class="wide">{table}</div>{scale}'
