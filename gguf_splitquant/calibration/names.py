"""Names that calibration and conversion share."""

from __future__ import annotations

HEAD = "output.weight"
"""The name under which the input of the output head is known, tied or not."""
